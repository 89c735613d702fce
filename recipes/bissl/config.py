"""The configuration of a run: typed, validated, saved with the run and reloadable."""

import inspect
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bilevel import (
    CG,
    MINRES,
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    Identity,
    Neumann,
    ReverseOverReverse,
    Solver,
)
from recipes.bissl.models import BACKBONES
from recipes.bissl.plugins import PluginError, resolve
from recipes.bissl.tasks.base import DownstreamTask, PretextTask, Task
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR

PRETEXT_TASKS: dict[str, type[PretextTask]] = {"simclr": SimCLR}
DOWNSTREAM_TASKS: dict[str, type[DownstreamTask]] = {"classification": Classification}


T = TypeVar("T", bound=Task)
V = TypeVar("V")


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field, what came and what to do."""


def _json_values(options: dict[str, Any]) -> dict[str, Any]:
    """The options as JSON gives them back (tuples become lists), so that a saved config equals the one that ran."""
    try:
        return json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold JSON values: {error}") from error


Options = Annotated[dict[str, Any], AfterValidator(_json_values)]


class Section(BaseModel):
    """A part of the configuration; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where images come from and how they are split."""

    pretext: str = Field(description='source of pretext images: "digits", "stl10", "folder:PATH" or "module:Class"')
    downstream: str = Field(description="source of labelled images, as for pretext")
    root: str = Field(default="data", description="folder of downloaded sets")
    download: bool = Field(default=True, description="fetch a set that is not below root, where the network allows it")
    image_size: int = Field(ge=4, description="side to which images are resized when they are read (px)")
    pretext_limit: int | None = Field(default=None, ge=1, description="use at most this many pretext images; null: all")
    labels_per_class: int | None = Field(default=None, ge=1, description="training images a class; null: all")
    val_per_class: int | None = Field(
        default=None, ge=1, description="validation images a class; null: all of the split"
    )
    val_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="validation share where the set has no split of its own"
    )
    test_fraction: float = Field(
        default=0.25, gt=0, lt=1, description="test share where the set has no split of its own"
    )
    split_seed: int = Field(default=0, ge=0, description="seed of the splits")


class ModelConfig(Section):
    """The network."""

    backbone: str = Field(description="backbone: " + ", ".join(sorted(BACKBONES)))

    @field_validator("backbone")
    @classmethod
    def _known(cls, backbone: str) -> str:
        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}; there are {', '.join(sorted(BACKBONES))}")
        return backbone


class PretextConfig(Section):
    """Stage 1: self-supervised training on unlabelled images."""

    task: str = Field(default="simclr", description='"simclr" or module:Class of a PretextTask')
    options: Options = Field(default_factory=dict, description="the task's own fields, as JSON or key=value")
    epochs: int = Field(ge=1, description="length of the BiSSL arm's warm-up (epochs)")
    batch_size: int = Field(ge=2, description="images a step")
    lr: float = Field(gt=0, description="peak learning rate of the BiSSL arm's warm-up")
    weight_decay: float = Field(default=1e-6, ge=0, description="weight decay, also in the lower level")
    warmup_epochs: float = Field(default=10.0, ge=0, description="linear warm-up of the learning rate (epochs)")
    baseline_epochs: int | None = Field(
        default=None, ge=1, description="length of the baseline (epochs); null: exactly the BiSSL arm's pretext steps"
    )
    baseline_lr: float | None = Field(default=None, gt=0, description="peak learning rate of the baseline; null: as lr")
    monitor_every: int = Field(default=10, ge=1, description="epochs between two k-NN and embedding-spread checks")
    checkpoint_every: int = Field(default=10, ge=1, description="epochs between two checkpoints")


class DownstreamConfig(Section):
    """The downstream task, shared by stages 2 to 4."""

    task: str = Field(default="classification", description='"classification" or module:Class of a DownstreamTask')
    options: Options = Field(default_factory=dict, description="the task's own fields, as JSON or key=value")
    batch_size: int = Field(ge=2, description="labelled images a step; at most the labelled set")
    eval_batch_size: int = Field(default=512, ge=1, description="images a pass in evaluation")


class HeadConfig(Section):
    """Stage 2: the downstream head on the frozen backbone."""

    epochs: int = Field(default=20, ge=1, description="length (epochs of the labelled set)")
    lr: float = Field(gt=0, description="constant learning rate")
    weight_decay: float = Field(ge=0, description="weight decay")
    batch_norm: Literal["eval", "train"] = Field(default="eval", description="mode of the frozen backbone's BatchNorm")


class BilevelConfig(Section):
    """Stage 3: Algorithm 1."""

    alternations: int = Field(ge=1, description="T, number of alternations")
    lower_steps: int = Field(default=20, ge=1, description="N_L, pretext steps an alternation")
    upper_steps: int = Field(default=8, ge=1, description="N_U, hypergradient steps an alternation")
    adaptation_every: int | None = Field(
        default=100, ge=1, description="N_a, alternations between adaptations; null: never"
    )
    adaptation_strength: float = Field(
        default=0.1, ge=0, le=1, description="alpha of theta_D <- (1-alpha) theta_D + alpha theta_P"
    )
    regularization_weight: float = Field(default=0.001, ge=0, description="lambda of lambda/2 ||theta_P - theta_D||^2")
    damping: float = Field(default=10.0, ge=0, description="added to lambda in the linear system (appendix B.3)")
    gamma: float = Field(default=0.01, ge=0, description="weight of the downstream loss of theta_D itself")
    hessian_batches: int = Field(default=5, ge=1, description="K, lower batches in the Hessian's mean")
    solver: Literal["cg", "minres", "neumann", "identity"] = Field(
        default="cg", description="solver of the linear system"
    )
    solver_iterations: int = Field(default=5, ge=1, description="N_c, most iterations of the solver")
    solver_rtol: float | None = Field(
        default=None, ge=0, lt=1, description="relative residual to stop at; null: all iterations"
    )
    implicit_head: bool = Field(
        default=False,
        description="let phi_P respond to the upper level too (the paper holds it fixed)",
    )
    head_shift: float = Field(
        default=1.0,
        ge=0,
        description="with implicit_head: shift of phi_P's block (multiples of lambda + damping)",
    )
    layerwise: bool = Field(
        default=False, description="CG with step lengths per tensor, the paper's variant (not exact)"
    )
    hvp: Literal["reverse", "reverse-kept", "forward", "finite-difference"] = Field(
        default="reverse", description="Hessian-vector products; reverse-kept keeps K graphs in memory"
    )
    max_grad_norm: float | None = Field(
        default=10.0, gt=0, description="norm limit of each level's gradient; null: none"
    )
    lower_lr: float = Field(default=1.0, gt=0, description="peak learning rate of the lower level")
    lower_warmup_epochs: float = Field(
        default=10.0, ge=0, description="linear warm-up of the lower level (pretext epochs)"
    )
    upper_lr: float = Field(gt=0, description="initial learning rate of the upper level (SGD, momentum 0.9, cosine)")
    upper_weight_decay: float = Field(ge=0, description="weight decay of the upper level")
    checkpoint_every: int = Field(default=5, ge=1, description="alternations between two checkpoints")

    @model_validator(mode="after")
    def _consistent(self) -> "BilevelConfig":
        if self.layerwise and self.solver != "cg":
            raise ValueError(f"layerwise is a variant of cg, but solver is {self.solver!r}; set solver to cg")
        if self.hessian_batches > self.lower_steps:
            raise ValueError(
                f"hessian_batches={self.hessian_batches} exceeds lower_steps={self.lower_steps}, whose first batches "
                "are used; reduce hessian_batches"
            )
        if self.regularization_weight + self.damping == 0.0:
            raise ValueError("regularization_weight + damping must be positive; the system divides by their sum")
        return self

    def make_solver(self) -> Solver:
        """The solver that the fields describe."""
        if self.solver == "identity":
            return Identity()
        if self.solver == "minres":
            return MINRES(self.solver_iterations, self.solver_rtol)
        if self.solver == "neumann":
            return Neumann(self.solver_iterations, self.solver_rtol)
        return CG(self.solver_iterations, self.solver_rtol, self.layerwise)

    def make_hvp(self) -> HVPProvider:
        """The provider that the fields describe."""
        return {
            "reverse": ReverseOverReverse(),
            "reverse-kept": ReverseOverReverse(keep_graph=True),
            "forward": ForwardOverReverse(),
            "finite-difference": FiniteDifference(),
        }[self.hvp]


class FinetuneConfig(Section):
    """Stage 4: fine-tuning of backbone and a fresh head, the best validation epoch being tested."""

    epochs: int = Field(ge=1, description="length (epochs of the labelled set)")
    lr: float = Field(gt=0, description="initial learning rate after BiSSL (SGD, momentum 0.9, cosine to 0)")
    weight_decay: float = Field(ge=0, description="weight decay after BiSSL")
    baseline_lr: float | None = Field(default=None, gt=0, description="as lr, after plain pre-training; null: as lr")
    baseline_weight_decay: float | None = Field(
        default=None, ge=0, description="as weight_decay, after plain pre-training"
    )
    scratch_lr: float | None = Field(
        default=None, gt=0, description="as lr, from random weights; null: as the baseline's"
    )
    scratch_weight_decay: float | None = Field(default=None, ge=0, description="as weight_decay, from random weights")
    validate_every: int = Field(default=1, ge=1, description="epochs between two validations; the last one always is")
    checkpoint_every: int = Field(default=50, ge=1, description="epochs between two checkpoints")

    def rates(self, arm: str) -> tuple[float, float]:
        """(learning rate, weight decay) of an arm."""
        baseline = _first(self.baseline_lr, self.lr), _first(self.baseline_weight_decay, self.weight_decay)
        if arm == "scratch":
            return _first(self.scratch_lr, baseline[0]), _first(self.scratch_weight_decay, baseline[1])
        return baseline if arm == "baseline" else (self.lr, self.weight_decay)


class Config(Section):
    """Everything that decides what a run computes."""

    preset: str = Field(description="name of the preset it was made from")
    seed: int = Field(default=0, ge=0, description="first seed")
    seeds: int = Field(default=3, ge=1, description="repeats of the fine-tuning, seeds seed, seed+1, ...")
    pipeline_seeds: int | None = Field(
        default=None, ge=1, description="repeat the whole pipeline this often, one fine-tuning each; overrides seeds"
    )
    arms: tuple[Literal["bissl", "baseline", "scratch"], ...] = Field(
        default=("bissl", "baseline"), description="arms to run; bissl and baseline always are"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; auto: cuda where there is one"
    )
    threads: int | None = Field(default=None, ge=1, description="torch's CPU threads; null: torch's choice")
    data: DataConfig
    model: ModelConfig
    pretext: PretextConfig
    downstream: DownstreamConfig
    head: HeadConfig
    bissl: BilevelConfig
    finetune: FinetuneConfig

    @model_validator(mode="after")
    def _arms(self) -> "Config":
        if not {"bissl", "baseline"} <= set(self.arms) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms must hold bissl and baseline, and each arm once; got {list(self.arms)}")
        # Made here so that a bad option is found before anything runs.
        self.pretext_task()
        self.downstream_task(("a", "b"))
        return self

    def pretext_task(self) -> PretextTask:
        """The pretext task with its options."""
        given = {"image_size": self.data.image_size}
        return _make_task("pretext", self.pretext, PRETEXT_TASKS, PretextTask, given)

    def downstream_task(self, classes: tuple[str, ...]) -> DownstreamTask:
        """The downstream task with its options, for these classes."""
        given = {"image_size": self.data.image_size, "classes": classes}
        return _make_task("downstream", self.downstream, DOWNSTREAM_TASKS, DownstreamTask, given)


def _make_task(
    section: str,
    config: PretextConfig | DownstreamConfig,
    known: Mapping[str, type[T]],
    base: type[T],
    given: Mapping[str, Any],
) -> T:
    task: Any = known.get(config.task)
    if task is None and ":" not in config.task:
        raise ValueError(f"{section}.task: unknown task {config.task!r}; there are {', '.join(known)} and module:Class")
    try:
        task = resolve(config.task) if task is None else task
    except PluginError as error:
        raise ValueError(f"{section}.task: {error}") from error
    if not (isinstance(task, type) and issubclass(task, base)):
        raise ValueError(f"{section}.task: {config.task!r} is not a subclass of {base.__name__}")
    if inspect.isabstract(task):
        missing = ", ".join(sorted(task.__abstractmethods__))
        raise ValueError(f"{section}.task: {config.task!r} does not define {missing}, which {base.__name__} asks for")
    try:
        return task(**{**given, **config.options})
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, f"{section}.options."))) from error


def build_config(preset: Config, *overrides: Mapping[str, Any]) -> Config:
    """The preset with nested `overrides` applied in order; options are merged unless the task changes with them.

    Raises:
        ConfigError: naming every field that is unknown or has a bad value.
    """
    values = preset.model_dump()
    for override in overrides:
        values = _merge(_without_foreign_options(values, override), override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error


def read_config_file(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON config file.

    Raises:
        ConfigError: the file is missing, unreadable, or not a table of fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"config file {path}: not valid {path.suffix.lstrip('.') or 'JSON'} ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: must hold a table of fields, got {type(values).__name__}")
    return values


def explain(error: ValidationError, prefix: str = "") -> list[str]:
    """One line for each problem that pydantic found: field, what is wrong, what came."""
    lines = []
    for item in error.errors():
        field = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown field; --help lists all fields")
        elif item["type"] == "value_error":
            lines.append(f"{field}: {message}" if field else message)
        else:
            lines.append(f"{field}: {message}, got {item['input']!r}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``field: old -> new`` for every field in which two dumped configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _without_foreign_options(values: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the options of a task that `override` replaces by another one taken out."""
    kept = dict(values)
    for section in ("pretext", "downstream"):
        old, new = kept.get(section), override.get(section)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and new.get("task", old["task"]) != old["task"]:
            kept[section] = {**old, "options": {}}
    return kept


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _first(value: V | None, fallback: V) -> V:
    return fallback if value is None else value
