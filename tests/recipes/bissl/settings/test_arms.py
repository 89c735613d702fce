"""The controls beside the two arms: what each is made of, and that they differ in nothing else."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.outcome.results import summarise
from recipes.bissl.settings.plan import batches_per_epoch, make_plan
from recipes.experiment.artifacts import Artifact
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import build_backbone
from tests.support.recipes.small_runs import SMALL_OPTIONS, batches_of, events, refused, small_config, small_pipeline

Made = tuple[dict[str, Artifact], dict[str, Any], list[dict[str, Any]]]

ALL = "bissl,baseline,scratch,identity,restart,baseline-warmup-lr,baseline-labels,baseline-time,gentle"
GENTLE = '{"gentle": {"damping": 30.0}}'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One artifact an arm, results.json, and the events of a run of every arm."""
    folder = tmp_path_factory.mktemp("arms")
    config = small_config("--arms", ALL, "--variants", GENTLE, "--seeds=1", "--pretext.baseline-lr=2.0")
    pipeline = small_pipeline(folder, config)
    tested = pipeline.run()
    assert list(tested) == ALL.split(",")
    results = summarise(tested, config, pipeline.data, pipeline.computing.device)
    return {arm: artifacts[0] for arm, artifacts in tested.items()}, results, events(folder)


def test_steps_of_the_controls(made: Made) -> None:
    info = {arm: artifact.info for arm, artifact in made[0].items()}
    # 48 images in batches of 24: 2 epochs of 2 steps and 2 alternations of 2 lower steps.
    for arm in ("bissl", "identity", "restart", "gentle", "baseline", "baseline-warmup-lr", "baseline-labels"):
        assert info[arm]["pretext_steps"] == 8, arm
    assert info["scratch"]["pretext_steps"] == 0
    # 30 labelled images in batches of 16: 2 steps an epoch; 2 epochs of the head, 4 upper steps, 4 epochs at the end.
    assert info["bissl"]["label_steps"] == info["identity"]["label_steps"] == 4 + 4 + 8
    assert info["restart"]["label_steps"] == info["baseline"]["label_steps"] == 8
    assert info["baseline-labels"]["label_steps"] == info["bissl"]["label_steps"]
    assert info["baseline-time"]["pretext_steps"] > 8


def test_the_identity_arm_makes_no_product_and_the_others_do(made: Made) -> None:
    products = {
        arm: sum(
            e["num_hvps"]
            for e in made[2]
            if e["variant"] == arm and e["event"] == "upper" and e["num_hvps"] is not None
        )
        for arm in ("bissl", "identity", "gentle")
    }
    assert products["identity"] == 0
    assert products["bissl"] > 0
    assert products["gentle"] > 0


def test_arms_end_at_different_weights(made: Made) -> None:
    weights = {arm: torch.cat([t.double().flatten() for t in a.tensors().values()]) for arm, a in made[0].items()}
    names = list(weights)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(weights[a], weights[b]), (a, b)


def test_the_report_says_what_each_control_is(made: Made) -> None:
    results = made[1]
    assert set(results["variants"]) == set(ALL.split(","))
    notes = "\n".join(results["notes"])
    assert "arm gentle: bissl with damping = 30.0" in notes
    assert "arm restart: as many pretext steps" in notes
    assert {(c["a"], c["b"]) for c in results["comparisons"]} >= {("bissl", arm) for arm in ALL.split(",")[1:]}


def test_the_restart_sees_the_lower_level_s_batches_at_its_rates(tmp_path: Path) -> None:
    """Without pull and without upper steps that matter, the lower level is the restart."""
    free = [
        "--bissl.regularization-weight=0",
        "--bissl.adaptation-every=null",
        "--bissl.max-grad-norm=null",
        "--bissl.damping=100",
    ]
    config = small_config(*free, "--arms", "bissl,baseline,restart", "--seeds=1")
    pipeline = small_pipeline(tmp_path, config)
    method = pipeline.at("bissl", 0)
    warm = pipeline.pretext(method)
    lower = pipeline.bissl(method, pipeline.head(method, warm)).tensors()
    again = pipeline.restart(pipeline.at("restart", 0), warm).tensors()
    for name, value in again.items():
        if name.startswith("backbone."):
            torch.testing.assert_close(value, lower[name], rtol=1e-4, atol=1e-5)


def test_arms_without_head_share_their_warm_up(tmp_path: Path) -> None:
    config = small_config("--arms", "bissl,baseline,restart", "--seeds=1")
    pipeline = small_pipeline(tmp_path, config)
    keys = {arm: pipeline.pretext(pipeline.at(arm, 0)).key for arm in config.arms}
    assert keys["bissl"] == keys["restart"]
    assert keys["baseline"] != keys["bissl"]


@pytest.mark.parametrize("labelled", [30, 33, 64])
def test_equal_labels_are_rounded_up_to_whole_epochs(labelled: int) -> None:
    config = small_config()
    method, control = (make_plan(config, arm, 48, labelled) for arm in ("bissl", "baseline-labels"))
    epoch = batches_per_epoch(labelled, 16)
    assert control.finetune % epoch == 0
    assert 0 <= control.label_steps - method.label_steps < epoch
    assert control.finetune == math.ceil(method.label_steps / epoch) * epoch


def test_the_warm_up_s_rate_is_a_control() -> None:
    config = small_config("--pretext.lr=1.0", "--pretext.baseline-lr=2.0")
    assert make_plan(config, "baseline", 48, 30).pretext_lr == 2.0
    assert make_plan(config, "baseline-warmup-lr", 48, 30).pretext_lr == 1.0


def test_fine_tuning_takes_the_rates_of_the_arm() -> None:
    config = small_config("--finetune.lr=0.1", "--finetune.baseline-lr=0.2", "--finetune.scratch-lr=0.3")
    rates = {arm: config.finetune.rates(arm)[0] for arm in (*ALL.split(","), "a-variant")}
    assert {arm for arm, rate in rates.items() if rate == 0.1} == {
        "bissl",
        "identity",
        "restart",
        "gentle",
        "a-variant",
    }
    assert rates["scratch"] == 0.3
    assert rates["baseline"] == rates["baseline-labels"] == rates["baseline-time"] == 0.2


def test_a_fraction_of_the_pretext_images_feeds_the_lower_level(tmp_path: Path) -> None:
    batches = batches_of(small_pipeline(tmp_path, small_config("--bissl.pretext-fraction=0.5")))
    task = batches.settings.pretext_task()
    whole, half = batches.pretext(task, "test", 3), batches.pretext(task, "test", 3, 0.5)
    assert (len(whole), len(half)) == (2, 1)
    assert all(half.next()[0].shape[0] == 24 for _ in range(3))


def test_a_fraction_too_small_for_a_batch_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fraction in (
        ["--bissl.pretext-fraction=0.4"],
        ["--variants", '{"few": {"pretext_fraction": 0.4}}', "--arms", "bissl,baseline,few"],
    ):
        for dry in ([], ["--dry-run"]):
            message = refused(capsys, *fraction, *dry, f"--output-dir={tmp_path / 'run'}")
            assert "pretext.batch_size: 24 is larger than the data, 19 pretext images" in message
            assert not (tmp_path / "run").exists()


def test_equal_time_counts_the_steps_that_fit_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 of 14 steps fit heads: twice the baseline's seconds are 28 steps, 22 of them of the whole network."""
    torch.save(build_backbone("resnet-tiny").state_dict(), tmp_path / "weights.pt")
    config = small_config(f"--model.init-backbone={tmp_path / 'weights.pt'}", "--model.projector-epochs=3")
    pipeline, asked = small_pipeline(tmp_path, config), []
    monkeypatch.setattr(Pipeline, "pretext", lambda self, repeat, steps: asked.append(steps))
    counts = {"pretext_steps": 14, "label_steps": 0}
    infos = {"bissl": {**counts, "seconds": 20.0}, "baseline": {**counts, "seconds": 10.0}}
    made: dict[str, Artifact | None] = {arm: Artifact("pretext", arm, tmp_path, info) for arm, info in infos.items()}
    pipeline.pretrain(pipeline.at("baseline-time", 0), made)
    assert asked == [22]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", '{"identity": {"damping": 1}}'], "variants: 'identity' must be no bundled arm's name"),
        (["--variants", '{"A b": {"damping": 1}}'], "variants: 'A b' must be"),
        (["--variants", '{"mine": {"dampign": 1}}'], "arm 'mine': bissl.dampign: unknown field"),
        (["--variants", '{"mine": {"damping": -1}}'], "arm 'mine': bissl.damping"),
        (["--arms", "bissl,baseline,mine"], "arms: unknown arm mine"),
        (
            ["--variants", '{"mine": {"upper_steps": 2}}', "--arms", "bissl,baseline,mine"],
            "variants: 'mine' is the arm bissl itself",
        ),
        (["--arms", "bissl,baseline,baseline-warmup-lr"], "arms: baseline-warmup-lr is the baseline itself"),
        (["pretext", "--arm", "baseline-time"], "--arm: the command 'pretext' knows"),
        (["restart"], "restart: needs --from ARTIFACT"),
        (["finetune", "--arm", "nobody", "--from", "x"], "--arm: the command 'finetune' knows"),
    ],
)
def test_wrong_arms_and_variants_are_named(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse([*SMALL_OPTIONS, *options])
    assert message in str(refused.value)
