"""The switches that follow the authors' code: each does what it says, and nothing else; none is on by default."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import Trainer
from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.compatibility import (
    NOT_OFFERED,
    REPOSITORY,
    REVISION,
    SWITCHES,
    apply,
    describe,
    explain,
)
from recipes.bissl.settings.config import Config, build_config
from recipes.bissl.settings.plan import make_plan
from recipes.bissl.settings.presets import PRESETS
from recipes.bissl.training.stages import bissl, finetune, pretext
from recipes.experiment.artifacts import Artifact
from recipes.experiment.configuration import differences
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import ResidualBlock, build_backbone
from recipes.vision.pipeline.stream import PrefetchedStack
from tests.support.paths import ROOT
from tests.support.recipes.random_view import RandomView
from tests.support.recipes.small_runs import batches_of, part, run_all, run_stage, small_config, small_pipeline

NAMES = list(SWITCHES)


def paper(name: str = "flowers") -> Config:
    return PRESETS[f"paper-{name}"]("v2")


def changed(before: Config, after: Config) -> dict[str, str]:
    lines = differences(json.loads(before.model_dump_json()), json.loads(after.model_dump_json()))
    pairs = (line.split(": ", 1) for line in lines)
    return {field: values for field, values in pairs if field != "compat"}


EXPECTED: dict[str, dict[str, str]] = {
    "one-hessian-batch": {"bissl.hessian_batches": "5 -> 1"},
    "fresh-hessian-batches": {"bissl.fresh_hessian_batches": "False -> True"},
    "classic-weight-1": {"bissl.gamma": "0.01 -> 1.0"},
    "cosine-floor": {
        "pretext.lr_floor": "0.0 -> 0.001",
        "bissl.upper_lr_floor": "0.0 -> 0.001",
        "finetune.lr_floor": "0.0 -> 0.001",
    },
    "warmup-at-4.8": {"pretext.lr": "1.0 -> 4.8"},
    "short-lower-warmup": {"bissl.lower_warmup_steps": "None -> 200"},
    "train-mode-head": {"head.batch_norm": "'eval' -> 'train'"},
    "no-adaptation": {"bissl.adaptation_every": "100 -> None"},
    "zero-init-residual": {"model.zero_init_residual": "False -> True"},
    "no-last-bias": {"pretext.options.projector_last_bias": "None -> False"},
    "lars-on-all": {"pretext.options.lars_excludes_1d": "None -> False"},
    "cifar10-split": {},
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_switch_changes_its_fields_alone(name: str) -> None:
    config = apply(paper(), [name])
    assert changed(paper(), config) == EXPECTED[name]
    assert config.compat == (name,)


def test_every_switch_is_tested_here() -> None:
    assert set(NAMES) - set(EXPECTED) == {"crop-as-aspect", "unscaled-pretext"}


def test_nothing_is_on_by_default() -> None:
    for function in PRESETS.values():
        config = function("v2")
        assert config.compat == ()
        assert apply(config) == config
        assert describe(config) == []


def test_small_sets_get_all_their_upper_steps() -> None:
    # 7, 4 and 9 whole batches of 256.
    for name in ("dtd", "flowers", "voc2007"):
        assert apply(paper(name), ["official"]).bissl.upper_steps == 8


def test_the_split_is_of_one_set_alone() -> None:
    data = apply(paper("cifar10"), ["cifar10-split"]).data
    assert (10 * (data.labels_per_class or 0), 10 * (data.val_per_class or 0)) == (32_000, 8_000)


def test_crop_as_aspect_is_in_all_training_views() -> None:
    before, config = paper(), apply(paper(), ["crop-as-aspect"])
    old, new = before.pretext_task().model_dump(), config.pretext_task().model_dump()
    views = [(old["view1"], new["view1"]), (old["view2"], new["view2"])]
    views.append(tuple(c.downstream_task(("a", "b")).model_dump()["view"] for c in (before, config)))
    for first, second in views:
        assert second == {**first, "crop_scale": (0.08, 1.0), "crop_ratio": (0.5, 1.0)}
        assert first["crop_scale"] == (0.5, 1.0)
    assert config.downstream.options["eval_resize"] == 109


def test_unscaled_pretext_images_are_those_of_0_to_255() -> None:
    still = {"flip_probability": 0.0, "jitter_probability": 0.0, "grey_probability": 0.0, "crop_scale": (1.0, 1.0)}
    views = {"view1": {**still, "crop_ratio": (1.0, 1.0)}, "view2": {**still, "crop_ratio": (1.0, 1.0)}}
    plain = build_config(PRESETS["images"]("v2"), {"pretext": {"options": views}})
    config = apply(plain, ["unscaled-pretext"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = RandomView(config.pretext_task().random_views()[0])(images, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(first, (images.float() - mean) / std, rtol=1e-4, atol=0.5)
    assert changed(plain, config).keys() > {"pretext.options.view1.mean", "pretext.options.view1.std"}
    assert not any(field.startswith("downstream") for field in changed(plain, config))


def test_official_is_all_of_them_and_twice_is_once() -> None:
    config = apply(paper("cifar10"), ["official"])
    assert config.compat == tuple(NAMES)
    one_by_one = paper("cifar10")
    for name in NAMES:
        one_by_one = apply(one_by_one, [name])
    assert one_by_one == config
    assert apply(config) == apply(config, ["official"]) == config
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    sentences = describe(config)
    assert len(sentences) == len(NAMES)
    assert all(name in sentence for name, sentence in zip(NAMES, sentences, strict=True))


@pytest.mark.parametrize("kind", ["paper-voc2007", "paper-stl10", "paper-literal"])
def test_official_fits_presets_of_the_paper(kind: str) -> None:
    for version in ("v2", "v1"):
        config = apply(PRESETS[kind](version), ["official"])
        assert (config.pretext.lr, config.pretext.baseline_lr, config.bissl.lower_lr) == (4.8, 4.8, 1.0)
        assert (config.bissl.hessian_batches, config.bissl.fresh_hessian_batches, config.bissl.gamma) == (1, True, 1.0)


def test_wrong_names_and_misfits_are_refused() -> None:
    with pytest.raises(ConfigError, match="compat: unknown name 'nothing'; there are official, one-hessian-batch, "):
        apply(paper(), ["nothing"])
    with pytest.raises(ConfigError, match=r"compat: one-hessian-batch does not fit .*solver_rtol=noise"):
        apply(PRESETS["images"]("v2"), ["one-hessian-batch"])
    chain = build_config(paper(), {"model": {"backbone": "mobilenet_v3_small"}})
    with pytest.raises(ConfigError, match=r"zero-init-residual does not fit .*'mobilenet_v3_small' is none of them"):
        apply(chain, ["official"])


def test_the_list_says_what_is_offered_and_what_is_not() -> None:
    text = explain()
    for name, switch in SWITCHES.items():
        assert f"{name}: {switch.meaning} ({', '.join(switch.shown_in)}). The paper: {switch.paper}." in text
    offered, _, refused = text.partition("not offered:")
    assert offered
    for what, why in NOT_OFFERED.items():
        assert f"{what}: {why}." in refused


def test_the_page_has_every_switch_with_the_files_that_show_it() -> None:
    page = (ROOT / "docs" / "bissl.md").read_text()
    section = page[page.index("### Where the authors' code deviates") : page.index("## The BiSSL stage")]
    assert REPOSITORY in section
    assert REVISION[:7] in section
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    assert list(rows) == NAMES
    for name, row in rows.items():
        assert SWITCHES[name].shown_in
        assert all(f"`{file}`" in row for file in SWITCHES[name].shown_in), name


def test_the_field_is_read_from_the_command_line() -> None:
    config = apply(parse(["--preset", "paper-flowers", "--compat", "train-mode-head,no-adaptation"]).config)
    assert config.compat == ("train-mode-head", "no-adaptation")
    assert config.bissl.adaptation_every is None


def lars_by_hand(p: Tensor, g: Tensor, lr: float, weight_decay: float) -> Tensor:
    """One first LARS step that scales and decays whatever the shape."""
    d = g + weight_decay * p
    return p - lr * 0.001 * p.norm() / d.norm() * d


@pytest.mark.parametrize("switched", [False, True])
def test_lars_on_all_scales_biases(switched: bool) -> None:
    config = apply(small_config(), ["lars-on-all"] if switched else [])
    bias = nn.Parameter(torch.tensor([1.0, -2.0]))
    gradient = torch.tensor([0.3, 0.1])
    start = bias.detach().clone()
    bias.grad = gradient.clone()
    config.pretext_task().optimizer([bias], 0.5, 0.01).step()
    expected = lars_by_hand(start, gradient, 0.5, 0.01) if switched else start - 0.5 * gradient
    torch.testing.assert_close(bias.detach(), expected)


class Made(Exception):
    pass


def untrained_trainer(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """That of the bilevel stage, on random weights."""
    monkeypatch.setattr(Artifact, "load_into", lambda self, modules: None)
    pipeline, head = small_pipeline(folder, config), Artifact("head", "key", folder, {})
    problem = bissl.make_problem(config, pipeline.data.downstream.train.classes, head, pipeline.computing)
    return bissl.make_trainer(config, problem, batches_of(pipeline))


def schedules_of(stage: str, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the schedules that a stage makes, of the bilevel stage the lower level's first."""
    seen: list[dict[str, Any]] = []

    def schedule(optimizer: Any, **options: Any) -> Any:
        seen.append(options)
        if len(seen) == (2 if stage == "bissl" else 1):
            raise Made

    module = {"pretext": pretext, "bissl": bissl, "finetune": finetune}[stage]
    monkeypatch.setattr(module, "schedule", schedule)
    if stage == "bissl":
        with pytest.raises(Made):
            untrained_trainer(config, folder, monkeypatch)
    else:
        with pytest.raises(Made):
            run_stage(small_pipeline(folder, config), stage)
    return seen


@pytest.mark.parametrize("stage", ["pretext", "bissl", "finetune"])
def test_cosine_floor_reaches_every_cosine(stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, names, floor in (("paper", [], 0.0), ("code", ["cosine-floor"], 0.001)):
        config = apply(small_config("--pretext.epochs", "3"), names)
        found = schedules_of(stage, config, tmp_path / folder, monkeypatch)
        assert [options["floor"] for options in found] == [floor] * (2 if stage == "bissl" else 1)


def test_the_pretext_floor_is_in_the_stages_key() -> None:
    keys = [c.pretext.step_settings() for c in (small_config(), apply(small_config(), ["cosine-floor"]))]
    assert {**keys[0], "lr_floor": 0.001} == keys[1]
    assert "lr_floor" not in keys[0]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # Two batches an epoch, four lower steps in all, of which the last one is left to the cosine.
        ([], 2),
        (["--bissl.lower-warmup-epochs", "0"], 0),
        (["--bissl.lower-warmup-epochs", "10"], 3),
        (["--bissl.lower-warmup-steps", "1"], 1),
        (["--bissl.lower-warmup-steps", "0"], 0),
        (["--bissl.lower-warmup-steps", "200"], 3),
    ],
)
def test_the_lower_warmup_is_the_planned_one(
    options: list[str], steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(*options)
    assert make_plan(config, "bissl", 48, 30).lower_warmup == steps
    lower, upper = schedules_of("bissl", config, tmp_path, monkeypatch)
    assert (lower["warmup_steps"], lower["total_steps"]) == (steps, 4)
    assert "warmup_steps" not in upper


def test_the_code_warms_the_lower_level_up_for_200_steps_and_the_paper_for_980() -> None:
    for names, steps in (([], 980), (["short-lower-warmup"], 200)):
        for name in ("stl10", "flowers"):
            assert make_plan(apply(paper(name), names), "bissl", 100_000, 4_000).lower_warmup == steps


def test_fresh_batches_reach_the_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, names, drawn in (("paper", [], 4), ("code", ["fresh-hessian-batches"], 8)):
        trainer = untrained_trainer(apply(small_config(), names), tmp_path / folder, monkeypatch)
        assert (trainer.method.fresh_batches, trainer.method.stored_batches) == (bool(names), 2)
        # Two alternations of two steps, and two batches for the Hessian besides.
        data = trainer.lower.data
        assert isinstance(data, PrefetchedStack)
        assert data.total == drawn
        trainer.run()
        assert data.state_dict()["drawn"] == drawn


def test_official_runs_through_all_stages(tmp_path: Path) -> None:
    config = apply(small_config("--device", "cpu"), ["official"])
    made = run_all(small_pipeline(tmp_path, config))
    assert made["finetune"].info["label_steps"] > 0
    projector = part(made["bissl"], "heads")
    assert "projector.3.weight" in projector
    assert "projector.3.bias" not in projector


@pytest.mark.parametrize("stage", ["pretext", "finetune"])
def test_random_weights_start_as_the_switch_says(stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = {"pretext": pretext, "finetune": finetune}[stage]
    built: list[nn.Module] = []

    def build(*given: Any, **options: Any) -> nn.Module:
        built.append(build_backbone(*given, **options))
        raise Made

    monkeypatch.setattr(module, "build_backbone", build)
    for names in ([], ["zero-init-residual"]):
        with pytest.raises(Made):
            run_stage(small_pipeline(tmp_path, apply(small_config(), names)), stage)
    blocks = [[block for block in made.modules() if isinstance(block, ResidualBlock)] for made in built]
    ones, zeros = ([block.get_parameter("bn2.weight") for block in found] for found in blocks)
    assert len(ones) == len(zeros) == 3
    assert all(bool((weight == 1.0).all()) for weight in ones)
    assert all(bool((weight == 0.0).all()) for weight in zeros)


@pytest.mark.parametrize("task", ["simclr", "byol", "vicreg"])
def test_no_last_bias_is_of_every_projector(task: str) -> None:
    names = {}
    for last_bias in (True, False):
        options = {"projector_last_bias": last_bias, "projector_widths": (8, 6, 4)}
        config = build_config(PRESETS["stl10"]("v2"), {"pretext": {"task": task}})
        config = build_config(config, {"pretext": {"options": options}})
        heads = config.pretext_task().build(build_backbone("resnet-tiny"))
        names[last_bias] = set(heads.state_dict())
    # BYOL's predictor has the projector's shape, and its target is a copy.
    last = {"projector.6.bias"} | ({"predictor.6.bias", "target.1.6.bias"} if task == "byol" else set())
    assert names[True] - names[False] == last
    assert names[False] < names[True]
