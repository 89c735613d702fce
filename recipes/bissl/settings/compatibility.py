"""Where the authors' published code deviates from the paper: switches that follow the code, none of them on by default.

The code is what the authors published last, `REPOSITORY` at `REVISION`; every switch names the file there that shows
it. What the paper leaves open and the presets therefore take from the code (layer-wise CG, one forward pass a view, the
joint norm limit, the evaluation resize, bilinear labelled crops, softmax cross-entropy for several labels) needs no
switch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...experiment.errors import ConfigError
from ...vision.views.view_policy import IMAGENET_MEAN, IMAGENET_STD, ViewPolicy
from ..tasks.base import Task
from .config import Config, build_config

REPOSITORY = "NIPS25-16372/NIPS25_16372_BiSSL"
"""The authors' last published code, on GitHub."""

REVISION = "5400253ac68baf678a6b999687499bf4d7ca37cf"
"""Its commit, of November 2025."""

OFFICIAL = "official"
"""The name that stands for all switches."""


@dataclass(frozen=True)
class Switch:
    """One deviation.

    Attributes:
        meaning: what the code does, as a sentence of the report.
        shown_in: files of `REPOSITORY` that show it.
        paper: what the paper says, and where.
        changes: config -> nested fields to override; making them twice changes nothing more.
    """

    meaning: str
    shown_in: tuple[str, ...]
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
    offered = [
        f"{name}: {switch.meaning} ({', '.join(switch.shown_in)}). The paper: {switch.paper}."
        for name, switch in SWITCHES.items()
    ]
    refused = [f"{what}: {why}." for what, why in NOT_OFFERED.items()]
    official = f"{OFFICIAL}: all of the following, as in {REPOSITORY} at {REVISION[:7]}"
    return "\n".join([official, *offered, "", "not offered:", *refused])


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


def _cifar10_split(config: Config) -> dict[str, Any]:
    return {"data": {"labels_per_class": 3200, "val_per_class": 800}} if config.data.downstream == "cifar10" else {}


SWITCHES: dict[str, Switch] = {
    "one-hessian-batch": Switch(
        "Hessian products use one lower batch",
        ("source/bissl/bissl_trainer.py",),
        "K = 5 (section 4.2.2, appendix B.3)",
        lambda config: {"bissl": {"hessian_batches": 1}},
    ),
    "fresh-hessian-batches": Switch(
        "Hessian batches are drawn after the lower steps (there: new views of the first images of the present shuffle; "
        "here: the images that come next)",
        ("source/bissl/bissl_trainer.py",),
        "the first batches of the lower steps are stored (section 4.2.2)",
        lambda config: {"bissl": {"fresh_hessian_batches": True}},
    ),
    "classic-weight-1": Switch(
        "the downstream gradient of theta_D itself enters the upper step with weight 1",
        ("source/bissl/bissl_trainer.py",),
        "gamma = 0.01 (section 4.2.2)",
        lambda config: {"bissl": {"gamma": 1.0}},
    ),
    "crop-as-aspect": Switch(
        "the minimal crop of 0.5 is the lower end of the aspect (0.5, 1), the area is (0.08, 1), in all training views",
        ("source/augmentations/pretext.py", "source/augmentations/downstream.py"),
        "reads as an area of (0.5, 1) (section 4.2.1)",
        _crop_as_aspect,
    ),
    "lars-on-all": Switch(
        "LARS scales and decays every parameter, biases and norms too",
        ("source/optimizers.py",),
        "silent; the optimizer's usual form leaves one-dimensional parameters out",
        lambda config: {"pretext": {"options": {"lars_excludes_1d": False}}},
    ),
    "cosine-floor": Switch(
        "every cosine (pretext stage, both levels, fine-tuning) ends at 0.001 of the peak",
        ("source/schedulers.py",),
        "a cosine decay towards 0 (section 4.2.1)",
        lambda config: {
            "pretext": {"lr_floor": 0.001},
            "bissl": {"upper_lr_floor": 0.001},
            "finetune": {"lr_floor": 0.001},
        },
    ),
    "warmup-at-4.8": Switch(
        "the pretext warm-up runs at a peak of 4.8, the lower level at 1.0",
        ("runs/pretext/config.py", "runs/bissl/classification/simclr/config.py"),
        "1.0 for the warm-up in version 2, 4.8 in version 1; the lower level follows the pretext stage (section 4.2)",
        lambda config: {"pretext": {"lr": 4.8}, "bissl": {"lower_lr": 1.0}},
    ),
    "short-lower-warmup": Switch(
        "the lower level's learning rate rises over 10 alternations, 200 steps",
        ("runs/bissl/optimizer.py",),
        "follows the pretext stage, where it rises over 10 epochs, 980 steps of STL-10 (section 4.2)",
        lambda config: {"bissl": {"lower_warmup_steps": 10 * config.bissl.lower_steps}},
    ),
    "train-mode-head": Switch(
        "BatchNorm of the frozen backbone runs on batch statistics while the head warms up, and keeps them",
        ("source/trainers.py", "runs/bissl/linear_warmup.py"),
        "silent (section 4.2.2)",
        lambda config: {"head": {"batch_norm": "train"}},
    ),
    "no-adaptation": Switch(
        "theta_D is never moved towards theta_P",
        ("source/bissl/bissl_trainer.py",),
        "every 100 alternations by alpha = 0.1 (Algorithm 1)",
        lambda config: {"bissl": {"adaptation_every": None}},
    ),
    "zero-init-residual": Switch(
        "the backbone is timm's, in which the last norm of each residual block starts at 0",
        ("source/models/misc.py",),
        "silent; a ResNet-18 (He et al. 2016; section 4.2.1), where it starts at 1",
        lambda config: {"model": {"zero_init_residual": True}},
    ),
    "no-last-bias": Switch(
        "the projector's last layer has no bias",
        ("source/models/misc.py",),
        "a single linear layer (section 4.2.1)",
        lambda config: {"pretext": {"options": {"projector_last_bias": False}}},
    ),
    "unscaled-pretext": Switch(
        "pretext images stay in 0..255 when ImageNet's mean and deviation, meant for [0, 1], are applied",
        ("source/augmentations/pretext.py",),
        "silent; downstream images are scaled",
        _unscaled_pretext,
    ),
    "cifar10-split": Switch(
        "CIFAR-10 is split into 32,000 images to train on and 8,000 to validate, the other 10,000 being unused",
        ("data/tv_splits/cifar10_train_split.txt", "data/tv_splits/cifar10_val_split.txt"),
        "a fifth of the training images is for validation (appendix B.1)",
        _cifar10_split,
    ),
}
"""Name -> deviation, in the order in which they are made."""

NOT_OFFERED: dict[str, str] = {
    "Hessian products and upper passes that update theta_P's running statistics": "the exported weights would depend "
    "on the solver",
    "a gather that drops the Gauss-Newton cross terms": "the product would be of no Hessian",
    "a first update at the full learning rate": "an error of the schedule that can end training at its first step",
    "the smaller last batch of a small set in upper steps": "the paper reshuffles before it (appendix B.4)",
    "a sampler that drops the last images": "with one process it drops none, with several fewer an epoch than there "
    "are; the smaller last batch of an epoch is kept there too",
    "test scores measured on the validation split": "they would be no test scores",
    "NaN of a solve taken as 0": "a failed solve is reported, never hidden",
    "no resume, CUDA and torchrun only, a tracking service required": "changes no number",
    "of earlier revisions alone": "1 or 2 upper steps an alternation for small sets, an adaptation that stops the "
    "program, upper gradients that stay per process, step lengths summed over tensors in CG that is not layer-wise, "
    "shuffling that never advances with the epoch, bicubic labelled crops; the last one has none of them",
}
"""Deviations without a switch -> why."""
