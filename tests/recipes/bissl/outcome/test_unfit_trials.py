"""Values that do not fit the data, or what a training needs: refused, or the end of their trial alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.training.stages import finetune
from recipes.experiment.errors import ConfigError
from recipes.experiment.search.space import draw, parse_space
from recipes.vision.errors import DataError
from tests.support.recipes.searches import records, search, selection

pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")

UNFIT = ("--space", "downstream.batch_size=choice:16,32", "--space", "finetune.baseline_lr=log:1e-3:1")
"""There are 30 labelled images."""


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["search", "dry-run"])
def test_known_trials_whose_values_do_not_fit_the_data_are_refused(tmp_path: Path, dry: tuple[str, ...]) -> None:
    said = (
        r"--space: the values of trial \d do not fit .*: downstream.batch_size: 32 is larger than the data, 30 labelled"
    )
    with pytest.raises(ConfigError, match=said):
        search("--arm", "baseline", "--trials", 6, *UNFIT, *dry, "--output-dir", tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_trials_whose_values_do_not_fit_the_data_end_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--arm", "baseline", "--trials", 6, *UNFIT, "--output-dir", tmp_path, "--sampler", "random")
    assert search(*options, "--workers", 2) == 0
    found = list(records(tmp_path).values())
    unfit = [record for record in found if record["downstream.batch_size"] == 32]
    assert 1 <= len(unfit) < len(found) == 6
    for record in unfit:
        assert record["status"] == "invalid"
        assert record["message"].startswith("downstream.batch_size: 32 is larger than the data, 30 labelled images")
    fit = [record for record in found if record["downstream.batch_size"] == 16]
    assert all(record["status"] is None for record in fit)
    assert len(selection(tmp_path)["ranking"]) == len(fit)
    printed = capsys.readouterr().out
    assert f"; {len(unfit)} invalid" in printed.replace("0 diverged, ", "")
    # Fields are called as in --space, and no header is cut.
    assert "batch size" not in printed
    assert "downstream.batch_size 16" in printed
    assert "finetune.baseline_lr " in printed
    assert "…" not in printed


def test_unfit_trials_that_join_a_search_end_and_the_others_go_on(tmp_path: Path) -> None:
    space = parse_space(["downstream.batch_size=choice:16,32"])
    sizes = {seed: [trial.values["downstream.batch_size"] for trial in draw(space, 4, seed)] for seed in range(50)}
    seed = next(seed for seed, drawn in sizes.items() if drawn == [16, 32, 32, 16])
    options = ("--arm", "scratch", "--search-seed", seed, "--space", "downstream.batch_size=choice:16,32")
    for count in (1, 4):
        assert search(*options, "--trials", count, "--output-dir", tmp_path) == 0
    assert [record["status"] for record in records(tmp_path).values()] == [None, "invalid", "invalid", None]


def test_values_that_a_training_refuses_end_the_trial_and_other_faults_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finetune.fit

    def fit(repeat: Any, *given: Any) -> Any:
        if repeat.settings.downstream.batch_size == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return real(repeat, *given)

    monkeypatch.setattr(finetune, "fit", fit)
    options = ("--arm", "scratch", "--trials", 4, "--space", "downstream.batch_size=choice:15,16")
    assert search(*options, "--output-dir", tmp_path / "a") == 0
    ended = {record["downstream.batch_size"]: record for record in records(tmp_path / "a").values()}
    assert (ended[15]["status"], ended[16]["status"]) == (None, "invalid")
    assert "too little memory" in ended[16]["message"]

    def missing(*given: Any) -> Any:
        raise DataError("data.downstream: there is no folder; name another one")

    monkeypatch.setattr(finetune, "fit", missing)
    with pytest.raises(DataError, match="there is no folder"):
        search(*options, "--output-dir", tmp_path / "b")
    assert records(tmp_path / "b") == {}


def test_images_that_go_missing_are_no_fault_of_a_trial_s_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*given: Any, **options: Any) -> Any:
        raise DataError("data.downstream: there is no folder; name another one")

    options = ("--arm", "scratch", "--trials", 2, "--space", "downstream.batch_size=choice:15,16")
    assert search(*options, "--trial", 0, "--output-dir", tmp_path) == 0
    assert list(records(tmp_path)) == ["000"]
    monkeypatch.setattr("recipes.bissl.outcome.search.variant_search.check_labelled", gone)
    with pytest.raises(DataError, match="there is no folder"):
        search(*options, "--trial", 1, "--output-dir", tmp_path)
    assert list(records(tmp_path)) == ["000"]


def test_a_search_without_a_usable_trial_says_how_the_first_ended(tmp_path: Path) -> None:
    unfit = ("--sampler", "random", "--space", "downstream.batch_size=int:31:40", "--output-dir", tmp_path)
    for again in ((), ("--summary",)):
        with pytest.raises(ConfigError, match=r"none of 2 trials finished.*\. Trial 000: .* is larger than the data"):
            search("--arm", "scratch", "--trials", 2, *unfit, *again)
