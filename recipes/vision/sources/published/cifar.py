"""CIFAR-10 and CIFAR-100 from their Python batches, unpickled without running anything."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import array_source, reading

SIDE = 32


@dataclass(frozen=True)
class Batches:
    """The files of a set below its `folder`, and the keys of what they hold: `labels`, and in `meta` class `names`."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names: str
    labels: str


CIFAR10 = Batches(
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    names="label_names",
    labels="labels",
)
CIFAR100 = Batches("cifar-100-python", ("train",), ("test",), "meta", "fine_label_names", "fine_labels")


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into pickles that Python 2 could read."""
    assert encoding == "latin1"
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    """The names that a pickled dictionary of lists, strings and number arrays refers to."""
    # The function that rebuilds an array has no public name; NumPy moved it, and an array's own reduction gives it.
    rebuild = np.empty(0).__reduce__()[0]
    return {
        ("numpy.core.multiarray", "_reconstruct"): rebuild,
        ("numpy._core.multiarray", "_reconstruct"): rebuild,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays of numbers, lists, dictionaries and strings alone: a pickle of anything else is refused unrun.

    A pickle can call whatever it can name, so this one can name nothing but NumPy's array and its type. Files are
    therefore safe to read whether or not they are the published ones.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = _allowed().get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which these batches have no use for")
        return found


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary in `file`. Raises DataError if it is missing, damaged or holds anything else."""
    with reading(file):
        try:
            with file.open("rb") as stored:
                content = _Unpickler(stored, encoding="latin1").load()
        except pickle.UnpicklingError as error:
            raise DataError(f"{file} is no batch of CIFAR: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is no batch of CIFAR: it holds a {type(content).__name__}")
    return content


def _batch(file: Path, key: str) -> tuple[Tensor, Tensor]:
    """The images uint8 [n, 3, 32, 32] and labels of one batch: a row is the red, green and blue plane by rows."""
    content = _unpickled(file)
    with reading(file):
        data, labels = np.asarray(content["data"]), torch.tensor(content[key], dtype=torch.int64)
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * SIDE**2) or labels.ndim != 1:
        raise DataError(
            f"{file} is damaged: data is {data.dtype} of shape {data.shape} for {len(labels)} labels, "
            f"not uint8 of {3 * SIDE**2} a label"
        )
    return torch.from_numpy(data).view(-1, 3, SIDE, SIDE), labels


def _open(name: str, published: Batches, request: Request) -> Source:
    """Train and test."""
    folder = request.root / published.folder
    classes = _unpickled(folder / published.meta).get(published.names)
    if not isinstance(classes, list) or not all(isinstance(entry, str) for entry in classes):
        raise DataError(f"{folder / published.meta} is damaged: it has no list {published.names!r}")
    parts = {}
    for part, files in (("train", published.train), ("test", published.test)):
        batches = [_batch(folder / file, published.labels) for file in files]
        parts[part] = torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])
    return array_source(name, classes, parts)


def open_cifar10(request: Request) -> Source:
    """CIFAR-10: train (five batches) and test."""
    return _open("cifar10", CIFAR10, request)


def open_cifar100(request: Request) -> Source:
    """CIFAR-100: train and test, with the 100 fine classes."""
    return _open("cifar100", CIFAR100, request)
