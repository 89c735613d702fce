"""Where the authors' published code deviates from the paper: switches that follow the code, none of them on by default.

What the paper leaves open and the presets therefore take from the code (layer-wise CG, one forward pass a view, the
joint norm limit, the evaluation resize, softmax cross-entropy for several labels) needs no switch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...experiment.errors import ConfigError
from ...vision.sources.published.catalog import DATASETS
from ...vision.views.view_policy import IMAGENET_MEAN, IMAGENET_STD, ViewPolicy
from ..tasks.base import Task
from .config import Config, build_config

OFFICIAL = "official"
"""The name that stands for all switches."""


@dataclass(frozen=True)
class Switch:
    """One relative_change.

    Attributes:
        meaning: what the code does, as a sentence of the report.
        paper: what the paper says, and where.
        changes: config -> nested fields to override; making them twice changes nothing more.
    """

    meaning: str
    paper: str
    changes: Callable[[Config], dict[str, Any]]


def apply(config: Config, names: Iterable[str] | None = None) -> Config:
    """`config` with the switches of its field `compat`, and those of `names`, made; the field lists them one by one.

    Raises:
        ConfigError: an unknown name, or a switch that does not fit the other fields.
    """
    asked = dict.fromkeys([*config.compat, *(names or ())])
    unknown = [name for name in asked if name not in SWITCHES and name != OFFICIAL]
    if unknown:
        raise ConfigError(f"compat: unknown name {unknown[0]!r}; there are {OFFICIAL}, {', '.join(SWITCHES)}")
    chosen = list(SWITCHES) if OFFICIAL in asked else [name for name in SWITCHES if name in asked]
    for name in chosen:
        try:
            config = build_config(config, SWITCHES[name].changes(config))
        except ConfigError as error:
            raise ConfigError(f"compat: {name} does not fit the other fields: {error}") from error
    return config.model_copy(update={"compat": tuple(chosen)})


def describe(config: Config) -> list[str]:
    """A sentence for the report on every switch that `config` was made with."""
    return [f"follows the authors' code, not the paper ({name}): {SWITCHES[name].meaning}" for name in config.compat]


def explain() -> str:
    """All switches with what they do and what the paper says, and what is not offered with the reason."""
    offered = [f"{name}: {switch.meaning}. The paper: {switch.paper}." for name, switch in SWITCHES.items()]
    refused = [f"{what}: {why}." for what, why in NOT_OFFERED.items()]
    return "\n".join([f"{OFFICIAL}: all of the following", *offered, "", "not offered:", *refused])


def _view_changes(task: Task, changes: dict[str, Any]) -> dict[str, Any]:
    """The same changes to every random view among the task's options."""
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    return {
        name: {**view.model_dump(mode="json", exclude={"size"}), **changes}
        for name, view in fields.items()
        if isinstance(view, ViewPolicy)
    }


def _crop_as_aspect(config: Config) -> dict[str, Any]:
    crop = {"crop_scale": (0.08, 1.0), "crop_ratio": (0.5, 1.0)}
    return {
        "pretext": {"options": _view_changes(config.pretext_task(), crop)},
        "downstream": {"options": _view_changes(config.downstream_task(("a", "b")), crop)},
    }


def _unscaled_pretext(config: Config) -> dict[str, Any]:
    # (255 x - mean) / std, for views whose x is in [0, 1].
    normalisation = {"mean": [m / 255 for m in IMAGENET_MEAN], "std": [s / 255 for s in IMAGENET_STD]}
    return {"pretext": {"options": _view_changes(config.pretext_task(), normalisation)}}


def _few_upper_steps(config: Config) -> dict[str, Any]:
    known = DATASETS.get(config.data.downstream)
    small = known is not None and known.split[0] < 8 * config.downstream.batch_size
    return {"bissl": {"upper_steps": min(2, config.bissl.upper_steps)}} if small else {}


def _cifar10_split(config: Config) -> dict[str, Any]:
    return {"data": {"labels_per_class": 3200, "val_per_class": 800}} if config.data.downstream == "cifar10" else {}


SWITCHES: dict[str, Switch] = {
    "one-hessian-batch": Switch(
        "Hessian products use one stored lower batch",
        "K = 5 (section 4.2.2, appendix B.3)",
        lambda config: {"bissl": {"hessian_batches": 1}},
    ),
    "crop-as-aspect": Switch(
        "the minimal crop of 0.5 is the lower end of the aspect (0.5, 1), the area is (0.08, 1), in all training views",
        "reads as an area of (0.5, 1) (section 4.2.1)",
        _crop_as_aspect,
    ),
    "lars-on-all": Switch(
        "LARS scales and decays every parameter, biases and norms too",
        "silent; the optimizer's usual form leaves one-dimensional parameters out",
        lambda config: {"pretext": {"options": {"lars_excludes_1d": False}}},
    ),
    "cosine-floor": Switch(
        "the cosine of the pretext stage and the lower level ends at 0.001 of the peak",
        "a cosine decay (section 4.2.1)",
        lambda config: {"pretext": {"lr_floor": 0.001}},
    ),
    "warmup-at-4.8": Switch(
        "the pretext warm-up runs at a peak of 4.8, the lower level at 1.0",
        "1.0 for the warm-up in version 2, 4.8 in version 1; the lower level follows the pretext stage (section 4.2)",
        lambda config: {"pretext": {"lr": 4.8}, "bissl": {"lower_lr": 1.0}},
    ),
    "train-mode-head": Switch(
        "BatchNorm of the frozen backbone runs on batch statistics while the head warms up, and keeps them",
        "silent (section 4.2.2)",
        lambda config: {"head": {"batch_norm": "train"}},
    ),
    "no-adaptation": Switch(
        "theta_D is never moved towards theta_P",
        "every 100 alternations by alpha = 0.1 (Algorithm 1)",
        lambda config: {"bissl": {"adaptation_every": None}},
    ),
    "few-upper-steps": Switch(
        "a downstream set of fewer than 8 batches gets 2 upper steps an alternation; of the paper's sets, whose sizes "
        "are known, only",
        "8 for every set (section 4.2.2)",
        _few_upper_steps,
    ),
    "unscaled-pretext": Switch(
        "pretext images stay in 0..255 when ImageNet's mean and deviation, meant for [0, 1], are applied",
        "silent; downstream images are scaled",
        _unscaled_pretext,
    ),
    "cifar10-split": Switch(
        "CIFAR-10 is split into 32,000 images to train on and 8,000 to validate, the other 10,000 being unused",
        "a fifth of the training images is for validation (appendix B.1)",
        _cifar10_split,
    ),
}
"""Name -> relative_change, in the order in which they are made."""

NOT_OFFERED: dict[str, str] = {
    "adaptation that stops the program": "a crash; no-adaptation is what remains of it",
    "Hessian products that update BatchNorm's running statistics": "the exported weights would depend on the solver",
    "upper gradients that stay per process": "theta_D diverges between processes; nothing of it exists in one process",
    "a gather that drops the Gauss-Newton cross terms": "the product would be of no Hessian",
    "step lengths summed over tensors in CG that is not layer-wise": "an error without a meaning; layerwise is there",
    "shuffling that never advances with the epoch": "an error of the loader, not a choice",
    "a first update at the full learning rate": "an error of the schedule that can end training at its first step",
    "test scores measured on the validation split": "they would be no test scores",
    "NaN of a solve taken as 0": "a failed solve is reported, never hidden",
    "no resume, CUDA and torchrun only, a tracking service required": "changes no number",
}
"""Deviations without a switch -> why."""
