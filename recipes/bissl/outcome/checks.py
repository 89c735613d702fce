"""What a run refuses before its folder is touched; a dry run checks the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...experiment.artifacts import Artifact
from ...experiment.folder.paths import user_path
from ...vision.errors import DataError
from ...vision.imagesets import LabelKind
from ...vision.networks.backbones import build_backbone
from ...vision.sources import places as places_of_images
from ...vision.sources.published.catalog import DATASETS
from ...vision.sources.published.dataset import Dataset
from ...vision.torch_metrics import as_metrics
from ..settings.arms import METHOD
from ..settings.config import Config
from ..settings.sections import DataConfig
from ..training.compute import Computing
from ..training.datasets import Datasets
from ..training.given_weights import check_initial_weights
from ..training.image_batches import Batches, check_batch_size, labelled_words
from ..training.repeat import Repeat

KNOWN_VAL_FRACTION = 0.2
"""The validation share that the known sizes are for, where a set has no validation part of its own."""


@dataclass(frozen=True)
class Checked:
    """What a run will read.

    Attributes:
        pretext, labelled: numbers of images to train with.
        classes: of the labelled ones; numbers in place of the names of a set that is not there.
        notes: of sizes that are published ones, for want of the set.
        whole: whether all sets are there, so that none of the sizes is.
    """

    pretext: int
    labelled: int
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    whole: bool = True


def check_data(config: Config, data: Datasets, computing: Computing, *, published: bool = False) -> Checked:
    """Read the weights to start from and both data sets, and make the first batches.

    Args:
        published: take the known sizes of a published set that is not on the disk, and fetch nothing.

    Raises:
        DataError, ConfigError, ArtifactError, PluginError: naming what is wrong.
    """
    check_initial_weights(config.model, config.data.image_size)
    return check_batches(config, data, computing, published=published)


def check_batches(config: Config, data: Datasets, computing: Computing, *, published: bool = False) -> Checked:
    """Read both data sets, and make stacks of batches of them, as `check_data` does.

    Raises:
        DataError, ConfigError, PluginError: naming what is wrong.
    """
    source, notes = config.data.pretext, []
    absent = _absent(config.data, source, lambda: data.pretext, notes) if published else None
    if absent is None:
        count = len(data.pretext)
        batches = Batches(Repeat(config, METHOD, config.seed), data, computing)
        for fraction in _fractions(config):
            batches.pretext(config.pretext_task(), "check", 0, fraction)
    else:
        count = min(absent.pretext, config.data.pretext_limit or absent.pretext)
        for fraction in _fractions(config):
            size = config.pretext.batch_size
            check_batch_size("pretext.batch_size", size, round(fraction * count), "pretext images")
    labelled = check_labelled(config, data, computing, published=published)
    told = dict.fromkeys((*notes, *labelled.notes, *data.planned))
    whole = absent is None and labelled.whole
    return Checked(count, labelled.labelled, labelled.classes, tuple(told), whole)


def check_labelled(config: Config, data: Datasets, computing: Computing, *, published: bool = False) -> Checked:
    """Read the labelled sets alone, and make a stack of batches of them, as `check_data` does; check the metrics.

    Raises:
        DataError, ConfigError, PluginError: naming what is wrong.
    """
    notes: list[str] = []
    absent = _absent(config.data, config.data.downstream, lambda: data.downstream, notes) if published else None
    if absent is not None:
        classes = tuple(map(str, range(absent.classes)))
        _check_task(config, classes, absent.labels)
        count = _published_size(config.data, absent)
        check_batch_size("downstream.batch_size", config.downstream.batch_size, count, labelled_words(config.data))
        return Checked(0, count, classes, tuple(notes), whole=False)
    train = data.downstream.train
    _check_task(config, train.classes, train.kind)
    task = config.downstream_task(train.classes)
    Batches(Repeat(config, METHOD, config.seed), data, computing).labelled(task, "check", 0)
    return Checked(0, len(train), train.classes)


def check_parent(parent: Artifact, command: str, config: Config, classes: tuple[str, ...]) -> None:
    """Load the artifact that a single stage starts from, as the stage will.

    Raises:
        ArtifactError: weights that are missing, damaged, not finite or of another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        pretext, size = config.pretext_task(), config.data.image_size
        backbone, upper = (build_backbone(config.model.backbone, image_size=size) for _ in range(2))
        parts: dict[str, nn.Module] = {"backbone": backbone}
        if command != "finetune":
            parts["heads"] = pretext.build(backbone)
        if command == "bissl":
            parts |= {"upper_backbone": upper, "head": config.downstream_task(classes).build(upper)}
        parent.load_into(parts)


def check_places(config: DataConfig, places: Mapping[str, Path]) -> None:
    """Refuse to write where images are read from, the cache of pictures included.

    Args:
        places: folders that will be written to, by their options.

    Raises:
        ConfigError: as `vision.sources.places.check_places`.
    """
    cache = {} if config.cache is None else {"data.cache": user_path(config.cache)}
    sources = {"data.pretext": config.pretext, "data.downstream": config.downstream}
    places_of_images.check_places({**places, **cache}, sources)


def _fractions(config: Config) -> list[float]:
    """Shares of the pretext images that stages draw batches from: all of them, and the bilevel stage's in each arm."""
    return [1.0, *(config.for_arm(arm).bissl.pretext_fraction for arm in config.arms)]


def _check_task(config: Config, classes: tuple[str, ...], kind: LabelKind | None) -> None:
    task = config.downstream_task(classes)
    if task.labels not in (None, kind):
        raise DataError(
            f"data.downstream: {config.data.downstream!r} has {kind} labels, but downstream.task "
            f"{config.downstream.task!r} takes {task.labels} ones; choose another task or source"
        )
    as_metrics(task.metrics())


def _absent(config: DataConfig, source: str, read: Callable[[], object], notes: list[str]) -> Dataset | None:
    """The published set of this name if it is not there, with a note; None where it, or another source, was read."""
    known, root = DATASETS.get(source), user_path(config.root)
    fetched = config.download and known is not None and known.downloadable
    problem = f"is not on the disk (below {root})"
    if known is None or not known.missing(root):
        try:
            read()
            return None
        except DataError:
            if known is None or not fetched:
                raise
            problem = f"is not whole on the disk (below {root})"
    then = "the run will fetch it" if fetched else f"the run will be refused: `data verify {source}` says what to do"
    notes.append(f"note: {source} {problem}; the sizes here are its published ones, and {then}")
    return known


def _published_size(config: DataConfig, dataset: Dataset) -> int:
    """Labelled images to train with: about as many, where the split is not the published one."""
    if config.labels_per_class is not None:
        return config.labels_per_class * dataset.classes
    train, val, _ = dataset.split
    if config.val_fraction == KNOWN_VAL_FRACTION or "val" in dataset.counts:
        return train
    return round((train + val) * (1 - config.val_fraction))


def dry_data(config: Config) -> Datasets:
    """The images of a dry run, which fetches and writes nothing."""
    section = config.data.model_copy(update={"download": False})
    return Datasets(config.model_copy(update={"data": section}), dry=True)
