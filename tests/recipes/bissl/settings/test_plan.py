"""Steps of each arm, and the estimate that is printed without training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.outcome import estimate
from recipes.bissl.outcome.checks import check_data, dry_data
from recipes.bissl.outcome.side_by_side import workers
from recipes.bissl.settings.config import Config, build_config
from recipes.bissl.settings.plan import batches_per_epoch, make_plan
from recipes.bissl.settings.presets import PRESETS
from recipes.bissl.training import datasets
from recipes.bissl.training.compute import Computing
from recipes.experiment.errors import ConfigError
from recipes.vision.errors import DataError
from tests.support.recipes.small_runs import batches_of, small_config, small_pipeline


def preset(name: str, **overrides: Any) -> Config:
    return build_config(PRESETS[name]("v2"), overrides)


def test_the_papers_steps() -> None:
    config = preset("paper-stl10")
    bissl, baseline = (make_plan(config, arm, 100_000, 4_000) for arm in ("bissl", "baseline"))
    assert batches_per_epoch(100_000, 1024) == 98
    assert (bissl.pretext, bissl.lower, bissl.pretext_steps) == (49_000, 10_000, 59_000)
    assert (baseline.pretext, baseline.lower, baseline.pretext_steps) == (58_800, 0, 58_800)
    # 4,000 images are 16 batches of 256, the last one smaller.
    assert (bissl.head, bissl.upper, bissl.finetune) == (20 * 16, 4_000, 400 * 16)
    assert (bissl.label_steps, baseline.label_steps) == (10_720, 6_400)
    assert (bissl.warmup, baseline.warmup) == (980, 980)
    assert (bissl.lower_warmup, baseline.lower_warmup) == (980, 0)
    assert (bissl.pretext_lr, baseline.pretext_lr) == (1.0, 4.8)
    assert make_plan(config, "scratch", 100_000, 4_000).label_steps == 6_400


@pytest.mark.parametrize("name", ["digits", "images", "stl10"])
@pytest.mark.parametrize("images", [1347, 3000, 100_000])
def test_own_presets_give_both_arms_the_same_pretext_steps(name: str, images: int) -> None:
    config = preset(name)
    bissl, baseline = (make_plan(config, arm, images, 100) for arm in ("bissl", "baseline"))
    assert bissl.pretext_steps == baseline.pretext_steps > bissl.pretext
    assert bissl.lower == config.bissl.alternations * config.bissl.lower_steps
    assert bissl.pretext_lr == baseline.pretext_lr == config.pretext.lr
    assert bissl.finetune == baseline.finetune
    assert make_plan(config, "scratch", images, 100).pretext_steps == 0


def test_an_epoch_keeps_its_last_batch_unless_it_is_a_single_image() -> None:
    assert [batches_per_epoch(n, 4) for n in (4, 5, 6, 7, 8, 9)] == [1, 1, 2, 2, 2, 2]


def test_the_stacks_have_as_many_batches_as_planned(tmp_path: Path) -> None:
    for limit, size in ((48, 24), (49, 24), (50, 24), (50, 50)):
        config = small_config("--data.pretext-limit", str(limit), "--pretext.batch-size", str(size))
        batches = batches_of(small_pipeline(tmp_path, config))
        assert len(batches.pretext(config.pretext_task(), "x", 1)) == batches_per_epoch(limit, size)
        labelled = batches.labelled(config.downstream_task(batches.data.downstream.train.classes), "x", 1)
        assert len(labelled) == batches_per_epoch(30, 16)


def test_warm_up_is_shorter_than_training() -> None:
    long = preset("digits", pretext={"epochs": 1, "warmup_epochs": 50.0, "batch_size": 100})
    plan = make_plan(long, "bissl", 1000, 30)
    assert (plan.pretext, plan.warmup) == (10, 9)
    baseline = make_plan(long, "baseline", 1000, 30)
    assert baseline.warmup == baseline.pretext - 1
    half = preset("digits", pretext={"epochs": 2, "warmup_epochs": 0.5, "batch_size": 100})
    assert make_plan(half, "bissl", 1000, 30).warmup == 5
    single = preset("digits", pretext={"epochs": 1, "batch_size": 100})
    assert make_plan(single, "bissl", 100, 30).warmup == 0


def test_baseline_may_have_its_own_length_and_rate() -> None:
    config = preset("digits", pretext={"batch_size": 100, "baseline_epochs": 7, "baseline_lr": 0.25})
    plan = make_plan(config, "baseline", 1000, 30)
    assert (plan.pretext, plan.pretext_lr) == (70, 0.25)
    assert make_plan(config, "bissl", 1000, 30).pretext_lr == config.pretext.lr


def describe(config: Config) -> str:
    """What a dry run says."""
    computing, data = Computing(config.compute, torch.device("cpu")), dry_data(config)
    return estimate.describe(config, check_data(config, data, computing, published=True), data)


def test_estimate_prints_the_plan() -> None:
    config = small_config()
    text = describe(config)
    plan = make_plan(config, "bissl", 48, 30)
    assert f"pretext {plan.pretext} + lower {plan.lower} = {plan.pretext_steps} pretext steps" in text
    assert f"head {plan.head} + upper {plan.upper} + fine-tuning {plan.finetune} = {plan.label_steps} label" in text
    assert "pretext images 48, batches an epoch 2; labelled images 30, batches an epoch 2" in text
    baseline = next(line for line in text.splitlines() if line.startswith("baseline: "))
    assert f"pretext {plan.pretext_steps} + lower 0 = {plan.pretext_steps} pretext steps" in baseline
    assert "scratch" not in text


def test_estimate_of_a_known_set_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("paper-stl10", data={"root": str(tmp_path)})

    def never(*given: Any, **options: Any) -> Any:
        raise AssertionError("the data were read")

    monkeypatch.setattr(datasets, "load_pretext", never)
    monkeypatch.setattr(datasets, "load_downstream", never)
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 0.01)
    text = describe(config)
    assert "49000 + lower 10000 = 59000 pretext steps" in text
    assert "58800 + lower 0 = 58800 pretext steps" in text
    assert "labelled images 4000" in text
    assert text.count("note: stl10 is not on the disk") == 1
    assert text.endswith("the sizes here are its published ones, and the run will fetch it")
    assert not list(tmp_path.iterdir())
    # 7 of each of 10 classes; half of the 100,000.
    fewer = build_config(
        config, {"data": {"labels_per_class": 7, "pretext_limit": 50_000}, "downstream": {"batch_size": 70}}
    )
    assert "pretext images 50000, batches an epoch 49; labelled images 70, batches an epoch 1" in describe(fewer)


def test_published_sizes_of_other_splits_and_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 0.01)
    data = {"root": str(tmp_path), "val_fraction": 0.3, "download": False}
    text = describe(preset("paper-stl10", data=data))
    assert "labelled images 3500" in text
    assert "and the run will be refused: `data verify stl10` says what to do" in text
    # Flowers have a validation part of their own.
    assert "labelled images 1020" in describe(preset("paper-flowers", data=data))
    with pytest.raises(DataError, match=r"has multi-label labels, but downstream.task 'classification' takes single"):
        describe(preset("paper-stl10", data={**data, "downstream": "voc2007"}))


def test_a_published_set_that_is_there_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 0.01)
    (tmp_path / "flowers-102" / "jpg").mkdir(parents=True)
    for name in ("imagelabels.mat", "setid.mat"):
        (tmp_path / "flowers-102" / name).write_bytes(b"damaged")
    config = preset("paper-flowers", data={"root": str(tmp_path), "download": False})
    with pytest.raises(DataError, match=r"Oxford 102 Flowers cannot be read: .*\.mat"):
        describe(config)
    fetched = build_config(config, {"data": {"download": True}})
    assert "note: flowers is not whole on the disk" in describe(fetched)


def test_estimate_bounds_the_products_of_each_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 0.01)

    def products(**fields: Any) -> str:
        plain = {"alternations": 10, "layerwise": False, "through_negative_curvature": False}
        text = describe(preset("paper-stl10", bissl={**plain, **fields}))
        line = next(line for line in text.splitlines() if line.startswith("bissl: "))
        return line.partition("labelled steps")[2]

    said = " Hessian-vector products on single batches"
    # 10 alternations of 8 solves, each of 5 iterations on 5 batches; layer-wise CG measures its residual by one more.
    assert products() == f"; 2000{said}"
    assert products(layerwise=True) == f"; 2400{said}"
    assert products(layerwise=True, through_negative_curvature=True) == f"; 2400{said}"
    assert products(solver_rtol="noise") == f"; at most 2000{said}"
    assert products(solver_rtol=0.01, aggregate=True, hessian_batches=2) == f"; at most 100{said}"
    assert products(solver="nystrom", nystrom_rank=7) == f"; {2000 + 10 * 7 * 5}{said}"
    assert products(solver="identity") == ""


def test_estimate_refuses_what_the_run_would(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        describe(build_config(small_config(), {"data": {"pretext": f"folder:{tmp_path}/nowhere"}}))
    with pytest.raises(ConfigError, match=r"pretext.batch_size: 49 is larger than the data, 48 pretext images"):
        describe(small_config("--pretext.batch-size", "49"))
    with pytest.raises(ConfigError, match=r"downstream.batch_size: 31 is larger than the data, 30 labelled images"):
        describe(small_config("--downstream.batch-size", "31"))


def test_estimate_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 3600.0)

    def hours(*arguments: str) -> float:
        found = re.search(r"about ([\d.]+) days", describe(small_config(*arguments)))
        assert found is not None
        return 24 * float(found[1])

    # By hand: an image costs an hour; BiSSL makes 4 + 4 steps on 2 x 24 views and 4 upper steps, each with 2 batches x
    # 2 iterations of products at 4 gradients; the labelled batch is 16 images, the set is fine-tuned twice.
    bissl = 48 * (4 + 4 + 4 * 2 * 2 * 4) + 16 * (4 + 2 * 4 + 2 * 8)
    baseline = 48 * 8 + 16 * 2 * 8
    assert hours() == pytest.approx(bissl + baseline, rel=0.01)
    assert hours("--bissl.solver", "identity") == pytest.approx(bissl - 48 * 4 * 2 * 2 * 4 + baseline, rel=0.01)
    assert hours("--pipeline-seeds", "3") == pytest.approx(3 * (bissl + baseline - 2 * 16 * 8), rel=0.01)


@pytest.mark.parametrize(
    ("jobs", "threads", "cores", "at_once"),
    [("1", 1, 8, 1), ("2", 1, 8, 2), ("4", 1, 2, 2), ("4", 4, 2, 1), ("auto", 2, 8, 4), ("8", 1, 8, 8)],
)
def test_estimate_counts_stages_that_are_made_side_by_side(
    jobs: str, threads: int, cores: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_seconds_per_image", lambda config, device: 3600.0)
    for module in (estimate, workers):
        monkeypatch.setattr(module, "available_cores", lambda: cores)
    text = describe(small_config(f"--jobs={jobs}", f"--threads={threads}"))
    found = re.search(r"about ([\d.]+) days on this machine(?:, (\d) processes side by side)?[:,]", text)
    assert found is not None, text
    # As above; the longest way is through one fine-tuning of BiSSL's, of 8 steps.
    bissl, baseline, tuning = 48 * (4 + 4 + 4 * 2 * 2 * 4) + 16 * (4 + 2 * 4 + 2 * 8), 48 * 8 + 16 * 2 * 8, 16 * 8
    assert 24 * float(found[1]) == pytest.approx(max((bissl + baseline) / at_once, bissl - tuning), rel=0.01)
    assert found[2] == (None if at_once == 1 else str(at_once))
