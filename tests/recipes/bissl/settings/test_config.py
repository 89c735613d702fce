"""Presets, config files and the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bilevel import CG, Identity, Neumann
from bilevel.products import FiniteDifference, ForwardOverReverse, ReverseOverReverse
from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.config import Config, FinetuneConfig, Section, build_config
from recipes.bissl.settings.presets import PRESETS, PaperVersion, describe_preset, list_presets
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.experiment.configuration import differences, read_config_file
from recipes.experiment.errors import ConfigError
from recipes.vision.views.view_policy import ViewPolicy
from tests.support.recipes.small_runs import refused

VERSIONS: tuple[PaperVersion, ...] = ("v2", "v1")
ALL_PRESETS = [pytest.param(PRESETS[name](version), id=f"{name}-{version}") for name in PRESETS for version in VERSIONS]


def leaf_fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field below a model, by its dotted name."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= leaf_fields(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def value_of(config: BaseModel, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


FIELDS = leaf_fields(Config)


def test_every_field_is_described() -> None:
    assert len(FIELDS) > 60
    for model in (Config, SimCLR, Classification, ViewPolicy):
        for name, info in leaf_fields(model).items():
            assert info.description, f"{model.__name__}.{name}"
            assert len(info.description) > 5


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_presets_are_valid_and_survive_json(preset: Config) -> None:
    assert Config.model_validate(preset.model_dump()) == preset
    saved = json.loads(preset.model_dump_json())
    assert Config.model_validate(saved) == preset
    assert build_config(preset, saved) == preset
    assert not differences(saved, json.loads(build_config(preset, saved).model_dump_json()))
    assert PRESETS[preset.preset]


PAPER: dict[str, Any] = {
    "seeds": 10,
    "data.pretext": "stl10",
    "data.downstream": "stl10",
    "data.image_size": 96,
    "data.val_fraction": 0.2,
    "model.backbone": "resnet18",
    "pretext.epochs": 500,
    "pretext.batch_size": 1024,
    "pretext.lr": {"v2": 1.0, "v1": 4.8},
    "pretext.weight_decay": 1e-6,
    "pretext.warmup_epochs": 10,
    "pretext.baseline_epochs": 600,
    "pretext.baseline_lr": 4.8,
    "downstream.batch_size": 256,
    "head.epochs": 20,
    "head.lr": 0.015,
    "head.weight_decay": 0.01,
    "head.batch_norm": "eval",
    "bissl.alternations": 500,
    "bissl.lower_steps": 20,
    "bissl.upper_steps": 8,
    "bissl.adaptation_every": 100,
    "bissl.adaptation_strength": 0.1,
    "bissl.regularization_weight": 0.001,
    "bissl.damping": 10.0,
    "bissl.gamma": 0.01,
    "bissl.hessian_batches": 5,
    "bissl.solver": "cg",
    "bissl.solver_iterations": 5,
    "bissl.solver_rtol": None,
    "bissl.layerwise": True,
    "bissl.through_negative_curvature": True,
    "bissl.max_grad_norm": 10.0,
    "bissl.lower_lr": {"v2": 1.0, "v1": 4.8},
    "bissl.lower_warmup_epochs": 10,
    "bissl.upper_lr": 0.015,
    "bissl.upper_weight_decay": 0.01,
    "finetune.epochs": 400,
    "finetune.ties": "first",
    "finetune.lr": {"v2": 0.0005, "v1": 0.0008},
    "finetune.weight_decay": {"v2": 0.00043, "v1": 0.00641},
    "finetune.baseline_lr": 0.0136,
    "finetune.baseline_weight_decay": 0.001,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_paper_preset_is_the_papers(version: PaperVersion) -> None:
    config = PRESETS["paper-stl10"](version)
    for name, expected in PAPER.items():
        assert value_of(config, name) == (expected[version] if isinstance(expected, dict) else expected), name
    literal = PRESETS["paper-literal"](version)
    changed = differences(config.model_dump(), literal.model_dump())
    # The first version's lower level has the text's 4.8 already.
    rates = ["bissl.lower_lr: 1.0 -> 4.8"] if version == "v2" else []
    assert changed == [*rates, "preset: 'paper-stl10' -> 'paper-literal'"]


def test_paper_views_are_the_papers() -> None:
    config = PRESETS["paper-stl10"]("v2")
    pretext, downstream = config.pretext_task(), config.downstream_task(("a", "b"))
    assert isinstance(pretext, SimCLR)
    assert isinstance(downstream, Classification)
    assert (pretext.temperature, pretext.projector_widths, pretext.joint_pass) == (0.5, (256, 256, 256), False)
    for view, blur, solarize in ((pretext.view1, 1.0, 0.0), (pretext.view2, 0.1, 0.2)):
        assert (view.size, view.crop_scale, view.interpolation, view.flip_probability) == (96, (0.5, 1), "bicubic", 0.5)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.jitter_probability, view.grey_probability, view.blur_sigma) == (0.8, 0.2, (0.1, 2.0))
        assert (view.blur_probability, view.solarize_probability) == (blur, solarize)
        assert view.kernel_size == 9
        assert view.mean == (0.485, 0.456, 0.406)
        assert view.std == (0.229, 0.224, 0.225)
    view = downstream.view
    assert view.interpolation == "bilinear"
    assert (view.size, view.crop_scale, view.flip_probability, downstream.eval_resize) == (96, (0.5, 1), 0.5, 109)
    assert (view.jitter_probability, view.grey_probability, view.blur_probability) == (0, 0, 0)


BAD = [
    ({"nothing": 1}, r"nothing: unknown field"),
    ({"pretext": {"nothing": 1}}, r"pretext.nothing: unknown field"),
    ({"pretext": {"lr": 0}}, r"pretext.lr: .*greater than 0, got 0"),
    ({"pretext": {"lr": float("nan")}}, r"pretext.lr: .*finite"),
    ({"pretext": {"batch_size": 1}}, r"pretext.batch_size: .*2"),
    ({"pretext": {"task": "nothing"}}, r"pretext.task: unknown task 'nothing'; there are simclr, byol, vicreg"),
    ({"pretext": {"options": {"temperature": -1}}}, r"pretext.options.temperature: .*got -1"),
    ({"pretext": {"options": {"nothing": 1}}}, r"pretext.options.nothing: unknown field"),
    ({"pretext": {"options": {"view1": {"hue": 2}}}}, r"pretext.options.view1.hue: .*got 2"),
    ({"pretext": {"options": {"view1": {"blur_sigma": [2, 1]}}}}, r"pretext.options.view1: blur_sigma must be"),
    ({"pretext": {"options": {"temperature": object()}}}, r"pretext.options: must hold JSON values"),
    ({"downstream": {"options": {"eval_resize": 2}}}, r"eval_resize=2 px is smaller"),
    ({"model": {"backbone": "vgg"}}, r"model.backbone: torchvision has no classification network 'vgg'.*resnet18"),
    (
        {"model": {"backbone": "vit_b_16", "zero_init_residual": True}},
        r"model: .*'vit_b_16' is none of them: set it to",
    ),
    ({"bissl": {"lower_warmup_steps": -1}}, r"bissl.lower_warmup_steps: .*got -1"),
    ({"finetune": {"ties": "last"}}, r"finetune.ties: .*'first' or 'lower-loss', got 'last'"),
    ({"finetune": {"lr_floor": 2}}, r"finetune.lr_floor: .*got 2"),
    ({"bissl": {"regularization_weight": -1}}, r"bissl.regularization_weight: .*got -1"),
    ({"bissl": {"regularization_weight": 0, "damping": 0}}, r"regularization_weight \+ damping must be positive"),
    ({"bissl": {"solver": "gmres"}}, r"bissl.solver: .*'cg'.*got 'gmres'"),
    ({"bissl": {"solver": "identity", "layerwise": True}}, r"layerwise is a variant of cg, but solver is 'identity'"),
    ({"bissl": {"lower_steps": 2, "hessian_batches": 3}}, r"hessian_batches=3 exceeds lower_steps=2"),
    ({"arms": ["bissl"]}, r"arms must hold bissl and baseline"),
    ({"arms": ["bissl", "baseline", "other"]}, r"arms: unknown arm other"),
    ({"seed": -1, "seeds": 0}, r"(?s)seed: .*got -1.*seeds: .*got 0"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_wrong_configs_name_the_field(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(PRESETS["digits"]("v2"), override)


def test_overrides_merge_and_later_ones_win() -> None:
    preset = PRESETS["digits"]("v2")
    first = {"pretext": {"lr": 0.3, "options": {"temperature": 0.1, "view1": {"rotation": 3.0}}}}
    config = build_config(preset, first, {"pretext": {"lr": 0.4}})
    assert config.pretext.lr == 0.4
    assert config.pretext.options["temperature"] == 0.1
    assert config.pretext.options["view1"] == {**preset.pretext.options["view1"], "rotation": 3.0}
    rest = {"lr", "options"}
    assert config.pretext.model_dump(exclude=rest) == preset.pretext.model_dump(exclude=rest)
    assert config.model_dump(exclude={"pretext"}) == preset.model_dump(exclude={"pretext"})
    # The preset itself is as it was.
    assert preset == PRESETS["digits"]("v2")


def test_solvers_and_providers() -> None:
    bissl = PRESETS["paper-stl10"]("v2").bissl
    assert bissl.make_solver() == CG(5, None, layerwise=True, through_negative_curvature=True)
    assert bissl.model_copy(update={"through_negative_curvature": False}).make_solver() == CG(5, None, layerwise=True)
    off = {"layerwise": False, "through_negative_curvature": False}
    assert bissl.model_copy(update={**off, "solver_rtol": 0.1}).make_solver() == CG(5, 0.1)
    assert bissl.model_copy(update={"solver": "identity"}).make_solver() == Identity()
    assert bissl.model_copy(update={"solver": "neumann", "solver_iterations": 7}).make_solver() == Neumann(7, None)
    providers = ("reverse", ReverseOverReverse()), ("reverse-kept", ReverseOverReverse(keep_graph=True))
    for name, provider in (*providers, ("forward", ForwardOverReverse()), ("finite-difference", FiniteDifference())):
        assert bissl.model_copy(update={"hvp": name}).make_hvp() == provider


def test_fine_tuning_rates_of_each_arm() -> None:
    base = FinetuneConfig(epochs=1, lr=0.1, weight_decay=0.2)
    assert [base.rates(arm) for arm in ("bissl", "baseline", "scratch")] == [(0.1, 0.2)] * 3
    own = base.model_copy(update={"baseline_lr": 0.3, "baseline_weight_decay": 0.0})
    assert [own.rates(arm) for arm in ("bissl", "baseline", "scratch")] == [(0.1, 0.2), (0.3, 0.0), (0.3, 0.0)]
    scratch = own.model_copy(update={"scratch_lr": 0.5, "scratch_weight_decay": 0.6})
    assert scratch.rates("scratch") == (0.5, 0.6)


def test_config_files(tmp_path: Path) -> None:
    toml, other = tmp_path / "a.toml", tmp_path / "b.json"
    toml.write_text(
        'seeds = 4\n[pretext]\nlr = 0.3\n[pretext.options.view1]\nrotation = 3.0\n[bissl]\nsolver = "neumann"\n'
        "solver_rtol = 0.1\n"
    )
    other.write_text(
        '{"seeds": 4, "pretext": {"lr": 0.3, "options": {"view1": {"rotation": 3.0}}}, "bissl": '
        '{"solver": "neumann", "solver_rtol": 0.1}}'
    )
    first, second = (parse(["--config", str(file)]).config for file in (toml, other))
    assert first == second
    assert (first.seeds, first.pretext.lr, first.bissl.solver) == (4, 0.3, "neumann")
    # Options on the command line come after the file.
    assert parse(["--config", str(toml), "--pretext.lr", "0.5"]).config.pretext.lr == 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, r"missing.toml: cannot be read"),
        ("bad.toml", b"a = [", r"bad.toml: not valid toml"),
        ("bad.json", b"{", r"bad.json: not valid json"),
        ("bytes.json", b"\xff\xfe", r"bytes.json: cannot be read"),
        ("list.json", b"[1]", r"list.json: must hold a table of fields, got list"),
    ],
)
def test_bad_config_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config_file(tmp_path / name)


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_saved_config_is_the_same_config_again(preset: Config, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(preset.model_dump_json())
    assert parse(["--config", str(tmp_path / "config.json")]).config == preset


def test_saved_config_and_another_preset_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(PRESETS["images"]("v2").model_dump_json())
    assert "'digits' was asked for" in refused(capsys, "--preset", "digits", "--config", str(file))
    file.write_text('{"preset": ["digits"]}')
    assert "unknown preset ['digits']" in refused(capsys, "--config", str(file))


def test_both_spellings_and_json_values() -> None:
    hyphens = parse(["--pretext.batch-size", "12", "--data.labels-per-class=null"]).config
    assert hyphens == parse(["--pretext.batch_size=12", "--data.labels_per_class", "null"]).config
    assert (hyphens.pretext.batch_size, hyphens.data.labels_per_class) == (12, None)
    assert parse(["--pretext", '{"lr": 0.25}']).config.pretext.lr == 0.25
    assert parse(["--pretext.options", "temperature=0.2"]).config.pretext_task().temperature == 0.2  # type: ignore[attr-defined]
    options = parse(["--pretext.options", '{"view1": {"hue": 0.3}}']).config.pretext.options
    assert options["view1"]["hue"] == 0.3
    assert parse(["--arms", "baseline,bissl,scratch"]).config.arms == ("baseline", "bissl", "scratch")
    assert parse(["--paper-version", "v1", "--preset", "paper-stl10"]).config == PRESETS["paper-stl10"]("v1")


def test_environment_variables_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "seed", "SEEDS", "DEVICE", "DATA", "PRETEXT__LR"):
        monkeypatch.setenv(name, "7")
    assert parse([]).config == PRESETS["digits"]("v2")


WRONG = [
    (["--preset", "nothing"], "--preset: unknown preset 'nothing'; there are digits, images"),
    (["--paper-version", "v3"], "--paper-version: invalid choice: 'v3'"),
    (["--nothing", "1"], "unrecognized arguments: --nothing"),
    (["--pretext.nothing", "1"], "unrecognized arguments: --pretext.nothing"),
    (["--pretext", '{"nothing": 1}'], "pretext.nothing: unknown field"),
    (["--pretext.lr"], "--pretext.lr: expected one argument"),
    (["--pretext.lr", "fast"], "pretext.lr: Input should be a valid number"),
    (["--pretext.lr", "-1"], "pretext.lr: Input should be greater than 0, got '-1'"),
    (["--bissl.regularization-weight", "-0.1"], "bissl.regularization_weight: "),
    (["--pretext.options", "{"], "--pretext.options: "),
    (["--pretext.options", "temperature"], "--pretext.options: "),
    (["--pretext.task", "no_such_module:Task"], "pretext.task: 'no_such_module:Task': there is no module"),
    (["--pretext.task", "collections:Counter"], "pretext.task: 'collections:Counter' is not a subclass of PretextTask"),
    (["--downstream.task", "recipes.bissl.tasks.simclr:SimCLR"], "is not a subclass of DownstreamTask"),
    (["--downstream.task", "recipes.bissl.tasks.base:DownstreamTask"], "does not define build, loss, metrics"),
    (["--config", "nowhere.toml"], "config file nowhere.toml: cannot be read"),
    (["everything"], "command: unknown command 'everything'; there are all, pretext, restart, head, bissl"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["head"], "head: needs --from ARTIFACT"),
    (["finetune"], "finetune: needs --from ARTIFACT, the folder of an earlier stage's artifact (or --arm scratch"),
    (["--from", "x"], "--from: the command 'all' starts from nothing"),
    (["pretext", "--from", "x"], "--from: the command 'pretext' starts from nothing"),
    (["pretext", "--arm", "scratch"], "--arm: the command 'pretext' knows bissl, baseline, identity, restart"),
    (["head", "--arm", "baseline", "--from", "x"], "--arm: the command 'head' knows bissl, identity, not 'baseline'"),
    (["finetune", "--arm", "scratch", "--from", "x"], "--from: the arm 'scratch' starts from random weights"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_command_lines(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def shown(value: Any) -> str:
    return "null" if value is None else str(value)


@pytest.mark.parametrize("preset", ["digits", "paper-stl10"])
def test_help_lists_every_field_with_its_default(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        parse(["--preset", preset, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    config = PRESETS[preset]("v2")
    for name, info in FIELDS.items():
        if name == "preset":
            continue
        option = re.escape("--" + name.replace("_", "-"))
        default = re.escape(" ".join(shown(value_of(config, name)).split()))
        description = re.escape(" ".join(info.description.split()))
        assert re.search(rf"{option} \S.{{0,80}}?{description} \(default: {default}\)", text), name
    for name in (
        "--preset",
        "--output-dir",
        "--resume",
        "--overwrite",
        "--dry-run",
        "--from",
        "--arm",
        "--list-presets",
    ):
        assert f" {name} " in text
    assert "None" not in text


def test_presets_are_listed_with_command_and_cost() -> None:
    lines = list_presets().splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for name, line in zip(PRESETS, lines, strict=True):
        text = describe_preset(name)
        assert "Command: ``python recipes/bissl/run.py" in text
        assert line.endswith(text.splitlines()[0])
