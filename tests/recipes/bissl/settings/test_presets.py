"""The presets: the paper's numbers in each, one pretext stage for all, and what a dry run writes of them."""

import csv
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.bissl.commands.main import main
from recipes.bissl.settings.config import Config
from recipes.bissl.settings.paper import TITLES, PaperVersion, paper_entry
from recipes.bissl.settings.plan import make_plan
from recipes.bissl.settings.presets import PRESETS, describe_preset, list_presets
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.image_batches import Batches
from recipes.bissl.training.repeat import Repeat
from recipes.bissl.training.stages import pretext
from recipes.experiment.artifacts import ArtifactStore
from recipes.experiment.configuration import differences
from recipes.experiment.workspace import Workspace
from recipes.vision.imagesets import ImageSet

VERSIONS: tuple[PaperVersion, ...] = ("v2", "v1")

# Tables 2 to 4, copied apart from the package: Table 2, then 3 and 4 of version 2, then 3 and 4 of version 1.
RATES = """\
set,lr2,wd2,lr3,wd3,lr4,wd4,lr3v1,wd3v1,lr4v1,wd4v1
stl10,0.0136,0.001,0.015,0.01,0.0005,0.00043,0.015,0.01,0.0008,0.00641
flowers,0.113,0.00226,0.05,0.01,0.0009,0.00005,0.05,0.01,0.0007,0.00078
cars,0.035,0.00658,0.035,0.007,0.0293,0.00851,0.035,0.007,0.028,0.00453
aircraft,0.0167,0.00996,0.015,0.01,0.011,0.00612,0.015,0.01,0.0126,0.00459
dtd,0.0262,0.00332,0.015,0.0075,0.0008,0.00764,0.015,0.0075,0.005,0.00003
pets,0.0235,0.00472,0.03,0.005,0.0002,0.00543,0.03,0.005,0.0011,0.00852
fashion-mnist,0.0009,0.00829,0.05,0.004,0.0022,0.00876,0.05,0.005,0.0031,0.00983
cifar10,0.0067,0.00128,0.03,0.006,0.0003,0.00991,0.03,0.006,0.0007,0.00611
cifar100,0.005,0.00127,0.03,0.001,0.0012,0.00422,0.03,0.001,0.0013,0.00322
caltech101,0.0096,0.00902,0.03,0.007,0.0008,0.00011,0.03,0.007,0.0004,0.00013
food101,0.015,0.00699,0.015,0.01,0.006,0.0095,0.006,0.01,0.0202,0.00697
sun397,0.0097,0.00121,0.03,0.002,0.0011,0.00028,0.03,0.002,0.0015,0.00298
cub200,0.0722,0.00568,0.05,0.005,0.035,0.00868,0.05,0.005,0.0003,0.00495
voc2007,0.0108,0.00894,0.03,0.006,0.0002,0.00015,0.03,0.006,0.0004,0.00003
"""

# Table 1: BiSSL, fine-tuning only, then the same of top-5; BiSSL and its top-5 in version 1.
SCORES = """\
set,metric,b,bs,f,fs,b5,bs5,f5,fs5,b1,bs1,b51,bs51
stl10,top1,90.2,0.1,90.3,0.1,99.7,0.0,99.6,0.0,90.6,0.1,99.7,0.0
flowers,top1,74.8,0.2,73.4,0.4,89.8,0.3,90.0,0.4,74.8,0.4,90.0,0.3
cars,top1,73.0,0.4,72.7,0.5,91.5,0.3,91.4,0.4,72.4,0.3,91.2,0.2
aircraft,top1,46.9,0.5,46.1,0.9,78.9,0.4,79.3,0.6,46.8,0.8,78.5,0.6
dtd,top1,51.8,0.5,49.3,0.5,79.9,0.3,79.1,0.4,52.1,0.5,79.5,0.3
pets,top1,67.8,0.2,65.0,0.5,92.3,0.3,90.7,0.3,67.6,0.4,91.9,0.4
fashion-mnist,top1,94.3,0.2,94.1,0.1,100.0,0.0,100.0,0.0,94.3,0.1,100.0,0.0
cifar10,top1,93.9,0.1,93.8,0.1,99.9,0.0,99.8,0.0,93.8,0.2,99.9,0.0
cifar100,top1,73.0,0.1,73.2,0.2,93.7,0.1,92.8,0.1,73.0,0.2,93.7,0.1
caltech101,top1,80.6,0.7,78.1,0.5,95.5,0.2,94.7,0.2,80.7,0.5,95.3,0.1
food101,top1,72.0,0.2,71.7,0.2,90.4,0.1,90.4,0.1,71.8,0.2,90.5,0.1
sun397,top1,41.1,0.2,40.0,0.3,71.0,0.2,69.9,0.4,41.0,0.3,71.0,0.4
cub200,top1,47.1,0.4,45.7,0.4,72.1,0.3,70.7,0.6,45.6,0.3,75.2,0.2
voc2007,map11,60.4,0.1,58.6,0.3,,,,,60.4,0.2,,
"""

TRAIN = {
    **{"stl10": 4000, "flowers": 1020, "cars": 6598, "aircraft": 3334, "dtd": 1880, "pets": 2946, "cifar10": 40000},
    **{"fashion-mnist": 48000, "cifar100": 40000, "caltech101": 2424, "food101": 60600, "sun397": 15880},
    **{"cub200": 4800, "voc2007": 2501},
}


def rows(text: str) -> dict[str, dict[str, str]]:
    return {row["set"]: row for row in csv.DictReader(io.StringIO(text))}


def numbers(row: dict[str, str], *names: str) -> tuple[float, ...]:
    return tuple(float(row[name]) for name in names)


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.estimate._seconds_per_image", lambda config, device: 0.01)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", list(TRAIN))
def test_dry_run_of_a_paper_preset_writes_the_papers_rates_and_the_steps(
    name: str, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = ["--preset", f"paper-{name}", "--paper-version", version, "--dry-run", "--output-dir", str(folder)]
    assert main([*arguments, "--data.root", str(tmp_path / "no-data")]) == 0
    written = json.loads((folder / "config.json").read_text())
    row, old = rows(RATES)[name], "v1" if version == "v1" else ""
    finetune = written["finetune"]
    assert (finetune["baseline_lr"], finetune["baseline_weight_decay"]) == numbers(row, "lr2", "wd2")
    upper = numbers(row, f"lr3{old}", f"wd3{old}")
    assert (written["head"]["lr"], written["head"]["weight_decay"]) == upper
    assert (written["bissl"]["upper_lr"], written["bissl"]["upper_weight_decay"]) == upper
    assert (finetune["lr"], finetune["weight_decay"]) == numbers(row, f"lr4{old}", f"wd4{old}")
    text = capsys.readouterr().out
    assert json.loads(text[: text.index("\n}\n") + 2]) == written
    # 256 labelled images a batch, the last one smaller.
    epoch = -(-TRAIN[name] // 256)
    assert (
        f"pretext images 100000, batches an epoch 98; labelled images {TRAIN[name]}, batches an epoch {epoch}" in text
    )
    assert "pretext 49000 + lower 10000 = 59000 pretext steps" in text
    steps = f"head {20 * epoch} + upper 4000 + fine-tuning {400 * epoch} = {420 * epoch + 4000} labelled steps"
    assert f"{steps}; 120000 Hessian-vector products on single batches" in text
    assert "pretext 58800 + lower 0 = 58800 pretext steps (lr 4.8)" in text
    # By hand, at 10 ms an image and gradient: two views, 4 gradients a product, and ten fine-tunings of either arm.
    images = min(256, TRAIN[name])
    gradients = 2 * 1024 * (59_000 + 58_800 + 4 * 120_000) + images * (20 * epoch + 8_000 + 20 * 400 * epoch)
    assert f"about {0.01 * gradients / 86400:.1f} days of computing" in text
    assert not (tmp_path / "no-data").exists()


def test_forty_two_pairs_are_in_the_table() -> None:
    assert len(rows(RATES)) * 3 == 42
    assert list(rows(RATES)) == list(TITLES) == list(rows(SCORES))


@pytest.mark.parametrize("name", list(TRAIN))
def test_the_papers_scores(name: str) -> None:
    row = rows(SCORES)[name]
    metric = row["metric"]
    new, old = paper_entry(name, "v2"), paper_entry(name.replace("-", "_"), "v1")
    assert new is not None
    assert old is not None
    baseline = numbers(row, "f", "fs")
    assert list(new.scores) == ([metric] if metric == "map11" else ["top1", "top5"])
    assert new.scores[metric] == (numbers(row, "b", "bs"), baseline)
    assert old.scores[metric] == (numbers(row, "b1", "bs1"), baseline)
    if metric == "top1":
        five = numbers(row, "f5", "fs5")
        assert new.scores["top5"] == (numbers(row, "b5", "bs5"), five)
        assert old.scores["top5"] == (numbers(row, "b51", "bs51"), five)
    assert row["b"] in describe_preset(f"paper-{name}")
    assert row["fs"] in describe_preset(f"paper-{name}")


def test_there_are_no_numbers_for_other_sets() -> None:
    assert paper_entry("digits") is None
    assert paper_entry("folder:stl10") is None


def pretext_key(config: Config, arm: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Any]:
    """What the key of the arm's pretext artifact is made from, taken where the stage makes it."""

    class Made(Exception):
        pass

    parts: list[Any] = []

    def make_key(*given: Any) -> str:
        parts.extend(given)
        raise Made

    monkeypatch.setattr(pretext, "make_key", make_key)
    monkeypatch.setattr(Batches, "pretext", lambda *given: range(98))
    images = ImageSet(torch.zeros(1, 1, 4, 4, dtype=torch.uint8).expand(100_000, -1, -1, -1), None, (), "images")
    data: Any = SimpleNamespace(pretext=images, identity=SimpleNamespace(pretext="digest of the images"))
    computing = Computing(config.compute, torch.device("cpu"))
    with pytest.raises(Made):
        pretext.run(Repeat(config, arm, 0), data, computing, Workspace(folder, ArtifactStore(folder)))
    return parts


@pytest.mark.parametrize("kind", ["paper", "small"])
@pytest.mark.parametrize("arm", ["bissl", "baseline"])
def test_one_pretext_run_serves_all_downstream_sets(
    kind: str, arm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = [pretext_key(PRESETS[f"{kind}-{name}"]("v2"), arm, monkeypatch, tmp_path) for name in TRAIN]
    assert all(first == second for first, second in pairwise(keys))
    other = pretext_key(PRESETS[f"{kind}-stl10"]("v2"), {"bissl": "baseline"}.get(arm, "bissl"), monkeypatch, tmp_path)
    # In the small presets both arms are trained at one rate, for different lengths.
    assert other != keys[0]
    if kind == "paper":
        assert (pretext_key(PRESETS["paper-dtd"]("v1"), arm, monkeypatch, tmp_path) == keys[0]) == (arm == "baseline")


def test_paper_presets_differ_in_the_set_and_its_rates_alone() -> None:
    first = PRESETS["paper-stl10"]("v2").model_dump()
    allowed = r"(preset|data\.downstream|(head|finetune|bissl)\.\w*(lr|weight_decay)|downstream\.(task|options\..*)): "
    for name in TRAIN:
        changed = differences(first, PRESETS[f"paper-{name}"]("v2").model_dump())
        assert all(re.match(allowed, line) for line in changed), changed
        assert ("downstream.task: 'classification' -> 'multilabel'" in changed) == (name == "voc2007")
    voc = PRESETS["paper-voc2007"]("v2")
    assert voc.downstream.options["loss_function"] == "softmax"
    assert next(iter(voc.downstream_task(("a", "b")).metrics())) == "map11"


@pytest.mark.parametrize("name", list(TRAIN))
def test_small_presets_are_fair_and_cheaper(name: str) -> None:
    config, paper = PRESETS[f"small-{name}"]("v2"), PRESETS[f"paper-{name}"]("v2")
    assert Config.model_validate(config.model_dump()) == config
    bissl, baseline = (make_plan(config, arm, 100_000, TRAIN[name]) for arm in ("bissl", "baseline"))
    assert bissl.pretext_steps == baseline.pretext_steps == 391 * 20 + 100 * 20
    assert bissl.pretext_lr == baseline.pretext_lr
    assert (config.bissl.solver_rtol, config.bissl.aggregate, config.bissl.layerwise) == ("noise", True, False)
    assert (config.bissl.through_negative_curvature, paper.bissl.through_negative_curvature) == (False, True)
    assert config.bissl.hvp == "reverse-kept"
    assert (config.compute.precision, config.compute.crops) == ("bf16", "auto")
    assert 10 <= config.finetune.epochs <= 100
    # A tuning sees 600,000 images, where neither bound on the epochs says otherwise.
    if 10 < config.finetune.epochs < 100:
        assert config.finetune.epochs * TRAIN[name] == pytest.approx(600_000, rel=0.05)
    assert config.finetune.rates("bissl") == paper.finetune.rates("bissl")
    assert config.finetune.rates("baseline") == paper.finetune.rates("baseline")
    assert config.pretext.options == paper.pretext.options


def test_every_preset_has_a_line_and_a_description() -> None:
    lines = list_presets().splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert len(lines) == 4 + 2 * 14
    for name, line in zip(PRESETS, lines, strict=True):
        assert len(line) <= 140
        assert line.endswith(".") or line.endswith(";")
        text = describe_preset(name)
        assert text.startswith(line.split(maxsplit=1)[1])
        assert f"--preset {name}" in text or name == "digits"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("paper-")])
def test_the_lower_level_goes_on_at_the_warmups_rate(name: str, version: PaperVersion) -> None:
    config = PRESETS[name](version)
    assert config.pretext.baseline_lr == 4.8
    assert config.pretext.lr == (4.8 if version == "v1" else 1.0)
    assert config.bissl.lower_lr == (4.8 if name == "paper-literal" else config.pretext.lr)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("small-")])
def test_small_presets_keep_their_own_rates_in_both_versions(name: str, version: PaperVersion) -> None:
    config = PRESETS[name](version)
    assert (config.pretext.lr, config.pretext.baseline_lr, config.bissl.lower_lr) == (1.0, None, 1.0)


def test_epochs_that_tie_are_the_papers_except_where_the_validation_set_is_tiny() -> None:
    ties = {name: function("v2").finetune.ties for name, function in PRESETS.items()}
    assert {name for name, rule in ties.items() if rule == "lower-loss"} == {"digits", "images"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", list(PRESETS))
def test_labelled_crops_are_bilinear_and_pretext_crops_bicubic(name: str, version: PaperVersion) -> None:
    config = PRESETS[name](version)
    pretext, downstream = config.pretext_task().model_dump(), config.downstream_task(("a", "b")).model_dump()
    assert downstream["view"]["interpolation"] == "bilinear"
    # Digits are moved, not cropped, and say so themselves.
    expected = "bilinear" if name == "digits" else "bicubic"
    assert {pretext[view]["interpolation"] for view in ("view1", "view2")} == {expected}


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "bilinear"),
        ({"view": {"crop_scale": (0.5, 1.0)}}, "bilinear"),
        ({"view": {"interpolation": "bicubic"}}, "bicubic"),
        ({"view": {"interpolation": "bilinear"}, "eval_resize": 109}, "bilinear"),
    ],
)
def test_the_resampling_of_labelled_crops_is_an_option(task: str, options: dict[str, Any], expected: str) -> None:
    config = PRESETS["stl10"]("v2")
    section = config.downstream.model_copy(update={"task": task, "options": options})
    made = config.model_copy(update={"downstream": section}).downstream_task(("a", "b"))
    assert made.model_dump()["view"]["interpolation"] == expected
