"""What a search tries: pairs from the paper's ranges or on a grid, any fields, and what a pair stands for."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.search.presentation import options
from recipes.bissl.outcome.search.space import check_space, decided, grid_around, pair_space
from recipes.bissl.outcome.search.variant_search import Search
from recipes.bissl.settings.config import build_config
from recipes.experiment.errors import ConfigError
from recipes.experiment.search.plan import StudyPlan
from recipes.experiment.search.space import Trial, draw, parse_space
from tests.support.recipes.small_runs import SMALL_OPTIONS, small_config

pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")


def random_pairs(count: int) -> list[Trial]:
    return draw(pair_space(), count, 0)


def test_pairs_fill_the_paper_s_ranges() -> None:
    trials = random_pairs(3000)
    rates, decays = ([trial.values[name] for trial in trials] for name in ("lr", "weight_decay"))
    assert stats.kstest(rates, stats.loguniform(1e-4, 1.0).cdf).pvalue > 0.01
    assert stats.kstest(decays, stats.loguniform(1e-5, 1e-2).cdf).pvalue > 0.01
    assert trials[:200] == random_pairs(200)


def test_the_paper_s_trials_stay_what_they_are() -> None:
    """A search goes on with the trials that it began with, also under a later version."""
    found = random_pairs(200)
    assert [trial.number for trial in found] == list(range(200))
    kept = {
        0: (0.00017640032163585175, 0.005738121063219924),
        1: (0.325529871780159, 0.008211036446025898),
        199: (0.37862220989451, 1.2098627531008655e-05),
    }
    for number, pair in kept.items():
        assert tuple(found[number].values.values()) == pytest.approx(pair, rel=1e-12)


def test_the_grid_is_even_on_a_logarithmic_scale() -> None:
    _, trials = grid_around((0.03, 0.001), side=5, factor=2.0)
    rates, decays = np.geomspace(0.03 / 4, 0.03 * 4, 5), np.geomspace(0.001 / 4, 0.001 * 4, 5)
    found = np.array([(trial.values["lr"], trial.values["weight_decay"]) for trial in trials])
    np.testing.assert_allclose(found, [(rate, decay) for rate in rates for decay in decays], rtol=1e-12)
    assert [trial.number for trial in trials] == list(range(25))


@pytest.mark.parametrize(
    ("arm", "stage", "fields"),
    [
        ("bissl", "finetune", {"finetune": {"lr": 0.5, "weight_decay": 1e-05}}),
        ("baseline", "finetune", {"finetune": {"baseline_lr": 0.5, "baseline_weight_decay": 1e-05}}),
        ("scratch", "finetune", {"finetune": {"scratch_lr": 0.5, "scratch_weight_decay": 1e-05}}),
        (
            "bissl",
            "head",
            {
                "head": {"lr": 0.5, "weight_decay": 1e-05},
                "bissl": {"upper_lr": 0.5, "upper_weight_decay": 1e-05},
            },
        ),
    ],
)
def test_a_pair_reaches_the_fields_of_its_arm(tmp_path: Path, arm: Any, stage: Any, fields: dict[str, Any]) -> None:
    named = decided(stage, arm, {"lr": 0.5, "weight_decay": 1e-5})
    assert named == fields
    config = build_config(small_config(), named)
    if stage == "finetune":
        assert config.finetune.rates(arm) == (0.5, 1e-5)
        assert arm == "bissl" or config.finetune.rates("bissl") == small_config().finetune.rates("bissl")
    (tmp_path / "chosen.json").write_text(json.dumps(named))
    assert parse([*SMALL_OPTIONS, "--config", str(tmp_path / "chosen.json")]).config == config
    assert parse([*SMALL_OPTIONS, *shlex.split(options(named))]).config == config


def test_the_image_cache_is_found_by_what_decides_the_images(tmp_path: Path) -> None:
    def cache(*options: str, images: str = "digest") -> Path:
        plan = StudyPlan(tmp_path / "search", {}, (), 0, 3.0)
        return Search(small_config(*options), tmp_path, "finetune", "bissl", plan).image_cache(images)

    folder = cache()
    assert cache("--data.pretext-limit=50", "--finetune.lr=0.5", "--data.root=other") == folder
    assert cache(images="another") != folder
    for option in ("--data.labels-per-class=2", "--data.split-seed=5", "--data.image-size=16"):
        assert cache(option) != folder


def test_fields_become_tables_options_and_back() -> None:
    values = {
        "bissl.upper_lr": 0.03,
        "pretext.options.temperature": 0.25,
        "bissl.solver": "minres",
        "bissl.solver_rtol": None,
        "nonfinite_skips": 2,
        "bissl.aggregate": False,
    }
    config = build_config(small_config(), decided("finetune", "bissl", values))
    assert (config.bissl.upper_lr, config.pretext.options["temperature"], config.bissl.solver) == (0.03, 0.25, "minres")
    assert parse([*SMALL_OPTIONS, *shlex.split(options(decided("finetune", "bissl", values)))]).config == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "bissl.uper_lr=log:1e-4:1",
            r"--space: bissl\.uper_lr: unknown field; there is bissl\.upper_lr.*; `.* --help` lists",
        ),
        ("finetune.batch-size=int:1:9", "unknown field; there is downstream.batch_size and pretext.batch_size; `"),
        ("nothing=log:1e-4:1", "--space: nothing: unknown field"),
        ("nonfinite_skips.x=int:0:1", r"--space: nonfinite_skips\.x: unknown field; there is nonfinite_skips; `"),
        ("bissl.upper_lr=uniform:-1:1", r"--space: bissl\.upper_lr: Input should be greater than 0, got -1\.0"),
        ("finetune.epochs=uniform:1:5", r"--space: finetune\.epochs: Input should be a valid integer"),
        ("bissl.solver=choice:cg,jacobi", r"--space: bissl\.solver: .*, got 'jacobi'"),
        ("pretext.options.temperatur=log:0.1:1", r"temperatur: unknown field; there is pretext\.options\.temperature"),
        ("data.image_size=choice:8,16", "data.image_size is not searched: trials are compared on the same images"),
        ("seeds=int:1:3", "seeds is not searched: a trial is one repeat"),
        ("seed=int:1:3", "seed is not searched: the best of several seeds is chance"),
        ("threads=int:1:2", "threads is not searched: it does not decide what is trained"),
    ],
)
def test_a_space_is_checked_by_the_fields_themselves(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(parse_space([option]), small_config(), "finetune", "bissl", given=False)


@pytest.mark.parametrize(
    ("field", "stage", "variant", "given", "reason"),
    [
        ("bissl.upper_lr", "finetune", "baseline", False, "the arm 'baseline' has no such stage"),
        ("head.lr", "finetune", "restart", False, "the arm 'restart' has no such stage"),
        ("pretext.lr", "finetune", "scratch", False, "starts from random weights"),
        ("pretext.lr", "finetune", "bissl", True, "what --from names is made already"),
        ("bissl.upper_lr", "finetune", "bissl", True, "what --from names is made already"),
        ("finetune.lr", "head", "bissl", False, "with --stage head a trial ends before"),
    ],
)
def test_a_field_that_changes_no_trial_is_refused(
    field: str, stage: Any, variant: str, given: bool, reason: str
) -> None:
    space = parse_space([f"{field}=log:0.01:0.1"])
    with pytest.raises(ConfigError, match=f"--space: {field} changes no trial: .*{reason}"):
        check_space(space, small_config(), stage, variant, given=given)
    check_space(space, small_config(), "head" if field == "head.lr" else "finetune", "bissl", given=False)
