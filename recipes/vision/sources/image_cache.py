"""Decoded training and validation images in files that all processes of a machine map into memory, and share."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..imagesets import DownstreamSets, ImageSet
from ..pictures.memory import PackedImages, packed

FORMAT = 3
SETS = ("train", "val")
FACTS = "sets.json"


@dataclass(frozen=True, eq=False)
class TrainAndVal:
    """Labelled sets to train on and to choose by. There is no test set here, so that nothing can be scored on it."""

    train: ImageSet
    val: ImageSet


def cache_folder(store: Path, deciding: Mapping[str, Any]) -> Path:
    """Where in `store` the images lie that the JSON values `deciding` decide."""
    content = json.dumps([FORMAT, deciding], sort_keys=True)
    return store / f"images-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def write_cache(folder: Path, sets: DownstreamSets) -> None:
    """Write training and validation sets in memory to `folder`, which appears whole or not at all; no test set."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        facts: dict[str, Any] = {"format": FORMAT}
        for part, images in (("train", sets.train), ("val", sets.val)):
            assert images.labels is not None, "checked by DownstreamSets"
            pictures = images.images
            held = pictures if isinstance(pictures, PackedImages) else packed(map(pictures.at, range(len(pictures))))
            arrays = {"pixels": held.pixels.numpy(), "starts": held.starts, "shapes": held.shapes}
            for name, array in {**arrays, "labels": images.labels.numpy()}.items():
                np.save(temporary / f"{part}-{name}.npy", array, allow_pickle=False)
            facts[part] = {"name": images.name, "classes": images.classes, "count": len(images)}
        (temporary / FACTS).write_text(json.dumps(facts))
        temporary.chmod(0o755)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_cache(folder: Path) -> TrainAndVal:
    """The sets in a folder, mapped rather than read: processes beside the first cost no memory for images.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        train, val = (_image_set(folder, part, facts[part]) for part in SETS)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"the image cache {folder} cannot be read ({error}); delete the folder to remake it") from error
    return TrainAndVal(train, val)


def _image_set(folder: Path, part: str, facts: dict[str, Any]) -> ImageSet:
    pixels, labels = (torch.from_numpy(_mapped(folder / f"{part}-{name}.npy")) for name in ("pixels", "labels"))
    starts, shapes = (_mapped(folder / f"{part}-{name}.npy") for name in ("starts", "shapes"))
    if not len(starts) == len(shapes) == facts["count"]:
        raise ValueError(f"{part}-starts.npy holds {len(starts)} images instead of {facts['count']}")
    return ImageSet(PackedImages(pixels, starts, shapes), labels, tuple(facts["classes"]), facts["name"])


def _mapped(path: Path) -> np.ndarray:
    # Copy-on-write: torch takes no read-only arrays, and nothing writes, so that pages stay shared.
    return np.load(path, mmap_mode="c", allow_pickle=False)
