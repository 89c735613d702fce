"""The switches that follow the authors' code: each does what it says, and nothing else; none is on by default."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.compatibility import NOT_OFFERED, SWITCHES, apply, describe, explain
from recipes.bissl.settings.config import Config, build_config
from recipes.bissl.settings.presets import PRESETS
from recipes.bissl.training.stages import bissl, pretext
from recipes.experiment.artifacts import Artifact
from recipes.experiment.configuration import differences
from recipes.experiment.errors import ConfigError
from tests.support.recipes.small_runs import batches_of, run_stage, small_config, small_pipeline

NAMES = list(SWITCHES)


def paper(name: str = "flowers") -> Config:
    return PRESETS[f"paper-{name}"]("v2")


def changed(before: Config, after: Config) -> dict[str, str]:
    lines = differences(json.loads(before.model_dump_json()), json.loads(after.model_dump_json()))
    pairs = (line.split(": ", 1) for line in lines)
    return {field: values for field, values in pairs if field != "compat"}


EXPECTED: dict[str, dict[str, str]] = {
    "one-hessian-batch": {"bissl.hessian_batches": "5 -> 1"},
    "cosine-floor": {"pretext.lr_floor": "0.0 -> 0.001"},
    "warmup-at-4.8": {"pretext.lr": "1.0 -> 4.8"},
    "train-mode-head": {"head.batch_norm": "'eval' -> 'train'"},
    "no-adaptation": {"bissl.adaptation_every": "100 -> None"},
    "few-upper-steps": {"bissl.upper_steps": "8 -> 2"},
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


def test_conditional_switches() -> None:
    steps = {
        name: apply(paper(name), ["few-upper-steps"]).bissl.upper_steps for name in ("dtd", "caltech101", "voc2007")
    }
    # 7, 9 and 9 whole batches of 256.
    assert steps == {"dtd": 2, "caltech101": 8, "voc2007": 8}
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
    first, _ = config.pretext_task().transform()(images, torch.Generator().manual_seed(0))
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
    assert apply(PRESETS[kind]("v1"), ["official"]).bissl.hessian_batches == 1


def test_wrong_names_and_misfits_are_refused() -> None:
    with pytest.raises(ConfigError, match="compat: unknown name 'nothing'; there are official, one-hessian-batch, "):
        apply(paper(), ["nothing"])
    with pytest.raises(ConfigError, match=r"compat: one-hessian-batch does not fit .*solver_rtol=noise"):
        apply(PRESETS["digits"]("v2"), ["one-hessian-batch"])


def test_the_list_says_what_is_offered_and_what_is_not() -> None:
    text = explain()
    for name, switch in SWITCHES.items():
        assert f"{name}: {switch.meaning}. The paper: {switch.paper}." in text
    offered, _, refused = text.partition("not offered:")
    assert offered
    for what, why in NOT_OFFERED.items():
        assert f"{what}: {why}." in refused


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


def test_cosine_floor_reaches_the_pretext_stage_and_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config = apply(small_config("--pretext.epochs", "3"), ["cosine-floor"])
    seen: list[dict[str, Any]] = []

    class Made(Exception):
        pass

    def schedule(optimizer: Any, **options: Any) -> Any:
        seen.append(options)
        raise Made

    keys = [c.pretext.step_settings() for c in (small_config(), config)]
    assert {**keys[0], "lr_floor": 0.001} == keys[1]
    assert "lr_floor" not in keys[0]
    monkeypatch.setattr(pretext, "schedule", schedule)
    with pytest.raises(Made):
        run_stage(small_pipeline(tmp_path, config), "pretext")
    assert seen[0]["floor"] == 0.001
    monkeypatch.setattr(bissl, "schedule", schedule)
    pipeline, untrained = small_pipeline(tmp_path, config), Artifact("head", "key", tmp_path, {})
    classes = pipeline.data.downstream.train.classes
    monkeypatch.setattr(Artifact, "load_into", lambda self, modules: None)
    with pytest.raises(Made):
        bissl.make_trainer(
            config, bissl.make_problem(config, classes, untrained, pipeline.computing), batches_of(pipeline)
        )
    assert seen[1]["floor"] == 0.001
