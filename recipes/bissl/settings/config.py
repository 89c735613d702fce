"""The configuration of a run: typed, validated, saved with the run and reloadable."""

import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, field_validator, model_validator

from ...experiment.configuration import Section, explain, merge, validated
from ...experiment.plugins import PluginError, resolve
from ...vision.networks.backbones import check_backbone, check_view
from ...vision.pipeline.reduction import View
from ..tasks.base import DownstreamTask, PretextTask, Task
from ..tasks.byol import BYOL
from ..tasks.classification import Classification
from ..tasks.multilabel import MultiLabel
from ..tasks.regression import Regression
from ..tasks.simclr import SimCLR
from ..tasks.vicreg import VICReg
from .arms import ARMS, METHOD, REQUIRED, WARMUP_LR, arm_of
from .bilevel_section import BilevelConfig
from .paper import PaperVersion
from .sections import (
    ComputeConfig,
    DataConfig,
    DownstreamConfig,
    FinetuneConfig,
    HeadConfig,
    ModelConfig,
    PretextConfig,
)

PRETEXT_TASKS: dict[str, type[PretextTask]] = {"simclr": SimCLR, "byol": BYOL, "vicreg": VICReg}
DOWNSTREAM_TASKS: dict[str, type[DownstreamTask]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
}


MOST_JOBS = 512

T = TypeVar("T", bound=Task)


def _jobs(value: object) -> object:
    """In one sentence what a union of types says in one for each."""
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if number != "auto" and not (type(number) is int and 1 <= number <= MOST_JOBS):
        raise ValueError(f"must be a whole number from 1 to {MOST_JOBS}, or auto, got {value!r}")
    return number


class Config(Section):
    """Everything that decides what a run computes."""

    preset: str = Field(description="name of the preset it was made from")
    paper_version: PaperVersion = Field(default="v2", description="whose values the paper presets take")
    seed: int = Field(default=0, ge=0, description="first seed")
    seeds: int = Field(default=3, ge=1, description="repeats of the fine-tuning, seeds seed, seed+1, ...")
    pipeline_seeds: int | None = Field(
        default=None, ge=1, description="repeat the whole pipeline this often, one fine-tuning each; overrides seeds"
    )
    arms: tuple[str, ...] = Field(
        default=REQUIRED,
        description=f"arms to run; {' and '.join(REQUIRED)} always are. Of {', '.join(ARMS)} and the names in variants",
    )
    variants: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="further arms, as bissl with other fields of the bissl section: JSON name -> field -> value",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; auto: cuda where there is one"
    )
    threads: int | None = Field(default=None, ge=1, description="torch's CPU threads; null: torch's choice")
    jobs: Annotated[int | Literal["auto"], BeforeValidator(_jobs)] = Field(
        default=1,
        description="processes of this machine that make arms and seeds side by side, each with `threads` threads and "
        "its own images; the result is the same to the bit. auto: as many as cores allow on a CPU where threads is "
        "given, else 1",
    )
    nonfinite_skips: int = Field(
        default=0,
        ge=0,
        description="steps that may be left out in each stage because their loss or gradient is not finite; 0: stop at "
        "the first",
    )
    rank_timeout: float = Field(
        default=600.0,
        gt=0,
        le=1e6,
        description="over several processes: how long one waits for the others before it takes them for lost (s)",
    )
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="viewers that metrics go to beside metrics.jsonl: tensorboard, wandb (docs/tracking.md)"
    )
    compat: tuple[str, ...] = Field(
        default=(),
        description="deviations of the authors' code to follow, made after all other fields: names, or official",
    )
    data: DataConfig
    model: ModelConfig
    pretext: PretextConfig
    downstream: DownstreamConfig
    head: HeadConfig
    bissl: BilevelConfig
    finetune: FinetuneConfig
    compute: ComputeConfig = ComputeConfig()

    @field_validator("tracking", "compat", mode="before")
    @classmethod
    def _no_names(cls, names: Any) -> Any:
        # The command line makes one empty name of an empty list.
        return () if names in ("", [""], ("",)) else names

    @model_validator(mode="after")
    def _arms(self) -> "Config":
        if not set(REQUIRED) <= set(self.arms) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms must hold {' and '.join(REQUIRED)}, and each arm once; got {list(self.arms)}")
        for name in self.variants:
            if name in ARMS or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
                raise ValueError(
                    f"variants: {name!r} must be no bundled arm's name, and of lower-case letters, digits, - and ."
                )
        unknown = set(self.arms) - ARMS.keys() - self.variants.keys()
        if unknown:
            raise ValueError(
                f"arms: unknown arm {', '.join(sorted(unknown))}; there are {', '.join((*ARMS, *self.variants))}"
            )
        for name in {*self.arms, *self.variants}:
            self.for_arm(name)
        if self.jobs not in ("auto", 1) and self.threads is None:
            raise ValueError(
                f"jobs: {self.jobs} processes share the cores, and last digits depend on how many threads each has; "
                "give threads too, such as 1, or set jobs to 1"
            )
        check_backbone(self.model.backbone, self.data.image_size)
        if self.pretext.epochs == 0 and self.model.init_backbone is None:
            raise ValueError("pretext.epochs: 0 is for weights that are trained already; give model.init_backbone")
        # Made here so that a bad option is found before anything runs.
        pretext = self.pretext_task()
        self.downstream_task(("a", "b"))
        if self.compute.micro_batch is not None and type(pretext).outputs is PretextTask.outputs:
            raise ValueError(
                f"compute.micro_batch: the task {self.pretext.task!r} does not define outputs and output_loss, which "
                "micro-batching asks for; set it to null"
            )
        if self.compute.micro_batch is not None and self.bissl.hvp != "reverse":
            raise ValueError(
                f"compute.micro_batch: products in chunks have a method of their own, but bissl.hvp is "
                f"{self.bissl.hvp!r}; set bissl.hvp to reverse, or compute.micro_batch to null"
            )
        return self

    @model_validator(mode="after")
    def _views(self) -> "Config":
        for section, task in (("pretext", self.pretext_task()), ("downstream", self.downstream_task(("a", "b")))):
            for size in sorted(task.view_sizes()):
                try:
                    check_view(self.model.backbone, self.data.image_size, size)
                except ValueError as error:
                    raise ValueError(f"{section}.options: {error}") from error
        return self

    @model_validator(mode="after")
    def _differing_arms(self) -> "Config":
        # A twin teaches nothing, and Holm's correction would count it.
        for name in self.variants.keys() & set(self.arms):
            if self.for_arm(name).bissl == self.bissl:
                raise ValueError(
                    f"variants: {name!r} is the arm {METHOD} itself, whose section has these values already; "
                    "change one, or leave the arm out"
                )
        if WARMUP_LR in self.arms and self.pretext.baseline_lr in (None, self.pretext.lr):
            raise ValueError(
                f"arms: {WARMUP_LR} is the baseline itself where pretext.baseline_lr is null or equals "
                "pretext.lr; leave it out"
            )
        return self

    def for_arm(self, name: str) -> "Config":
        """This config with the bilevel stage as the arm has it.

        Raises:
            ValueError: a variant's fields are unknown, or do not fit the others.
        """
        changes = self.variants.get(name) or arm_of(name).bissl
        if not changes:
            return self
        try:
            section = BilevelConfig.model_validate({**self.bissl.model_dump(), **changes})
        except ValidationError as error:
            raise ValueError("; ".join(explain(error, f"arm {name!r}: bissl."))) from error
        return self.model_copy(update={"bissl": section})

    def with_crops(self, crops: str) -> "Config":
        """This config with that way of cropping where it leaves the choice open (compute.crops auto)."""
        if self.compute.crops != "auto":
            return self
        return self.model_copy(update={"compute": self.compute.model_copy(update={"crops": crops})})

    def pretext_views(self) -> tuple[View, ...]:
        """What is made of a pretext image."""
        return self.pretext_task().random_views() or (self.data.image_size,)

    def labelled_views(self, classes: tuple[str, ...]) -> tuple[View, ...]:
        """What is made of a labelled image, in training and in evaluation."""
        task = self.downstream_task(classes)
        return task.train_view() or self.data.image_size, task.evaluation_view() or self.data.image_size

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
        values = merge(_without_foreign_options(values, override), override)
    return validated(Config, values)


def _without_foreign_options(values: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the options of a task that `override` replaces by another one taken out."""
    kept = dict(values)
    for section in ("pretext", "downstream"):
        old, new = kept.get(section), override.get(section)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and new.get("task", old["task"]) != old["task"]:
            kept[section] = {**old, "options": {}}
    return kept
