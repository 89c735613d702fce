"""Pictures that somebody's map-style `Dataset` gives, one by one and seeded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ...experiment.plugins import PluginError, resolve
from ..errors import DataError
from .base import Images, Item
from .decoding import DECODE_ERRORS
from .rgb import to_rgb

SEED = 1
CONSTRUCTION = 0
INSTANCES = 16
SEEDING = RLock()


@dataclass(frozen=True)
class OwnDataset:
    """A Dataset by what makes it, so that every process can make an instance of its own, once.

    Attributes:
        name: the source, for messages.
        factory: `module:Class`, or `module:function` that returns one.
        arguments: its keyword arguments, a JSON object.
    """

    name: str
    factory: str
    arguments: str

    def instance(self) -> Any:
        """This process's own. Raises DataError where it cannot be made, or is not map-style."""
        return _instance(self)

    def sample(self, index: int) -> Any:
        """What `__getitem__` gives: the same each time and in every process. Raises DataError where it raises."""
        made = self.instance()
        try:
            with seeded(index + 1):
                return made[index]
        except Exception as error:
            raise DataError(f"{self.name}: item {index} raises {type(error).__name__}: {error}") from error


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seeds torch's generator of the CPU, NumPy's and Python's by (`SEED`, number); afterwards they are as before.

    One thread at a time, as all threads draw from the same three.
    """
    words = np.random.SeedSequence([SEED, number]).generate_state(3).tolist()
    with SEEDING:
        of_python, of_numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(words[0])
            np.random.seed(words[1])
            random.seed(words[2])
            try:
                yield
            finally:
                random.setstate(of_python)
                np.random.set_state(of_numpy)


@lru_cache(maxsize=INSTANCES)
def _instance(dataset: OwnDataset) -> Any:
    try:
        found = resolve(dataset.factory)
    except PluginError as error:
        raise DataError(f"the data source {error}") from error
    arguments = json.loads(dataset.arguments)
    made: Any = found
    if not _is_map_style(found) and callable(found):
        try:
            with seeded(CONSTRUCTION):
                made = found(**arguments)
        except Exception as error:
            raise DataError(f"{dataset.name}: making it raises {type(error).__name__}: {error}") from error
    elif arguments:
        raise DataError(f"{dataset.name}: it is no class or function, and takes no arguments")
    if not _is_map_style(made):
        raise DataError(
            f"{dataset.name} gives a {type(made).__name__}: it must be a Dataset with __len__ and __getitem__"
            + (
                ", not one that is iterated"
                if isinstance(made, IterableDataset)
                else ", or have pretext() and downstream()"
            )
        )
    if len(made) == 0:
        raise DataError(f"{dataset.name} has no items")
    return made


def _is_map_style(made: Any) -> bool:
    kind = type(made)
    # torch gives every Dataset, also one that is iterated, a __getitem__.
    return (
        not isinstance(made, type | IterableDataset)
        and callable(getattr(kind, "__len__", None))
        and callable(getattr(kind, "__getitem__", None))
    )


def to_picture(value: Any, where: str) -> Tensor:
    """A picture as Datasets give them: uint8 [1 or 3, H, W].

    `value`: a PIL image of at most 8 bits a channel; a tensor [C, H, W] or [H, W], or an array [H, W, C] or [H, W],
    C 1 or 3, of uint8, or of floats from 0 to 1, which are rounded to the next of 255 steps (so that what torchvision's
    `ToTensor` made is as it was). Raises DataError, saying what came, on anything else.
    """
    if isinstance(value, Image.Image):
        if value.mode.startswith(("I", "F")):
            raise DataError(f"{where} has more than 8 bits a channel (mode {value.mode}): convert it to 8 bits")
        try:
            return torch.from_numpy(np.array(to_rgb(value))).permute(2, 0, 1)
        except DECODE_ERRORS as error:
            raise DataError(f"{where} cannot be decoded ({error}): it is damaged; replace it") from error
    if not isinstance(value, Tensor | np.ndarray):
        raise DataError(f"{where} must be a PIL image, a tensor or an array, not a {type(value).__name__}")
    came = f"{'a tensor' if isinstance(value, Tensor) else 'an array'} of {value.dtype} {list(value.shape)}"
    if isinstance(value, Tensor):
        pixels = value.detach().as_subclass(Tensor).cpu()
    else:
        if value.dtype != np.uint8 and value.dtype.kind != "f":
            raise DataError(f"{where} must be of uint8, or of floats from 0 to 1, not {came}")
        pixels = torch.from_numpy(np.ascontiguousarray(value))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise DataError(
            f"{where} must be a tensor [C, H, W] or [H, W], or an array [H, W, C] or [H, W], with 1 or "
            f"3 channels, not {came}"
        )
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point() or not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise DataError(
            f"{where} must be of uint8, or of floats from 0 to 1, not {came}"
            + (f" from {float(pixels.min()):g} to {float(pixels.max()):g}" if pixels.is_floating_point() else "")
            + ": leave out its normalisation, which the recipe does"
        )
    return (pixels.float() * 255).round_().to(torch.uint8)


@dataclass(frozen=True)
class OwnItem(Item):
    """One item of a Dataset."""

    dataset: OwnDataset
    index: int

    def picture(self) -> Tensor:
        sample = self.dataset.sample(self.index)
        image = sample[0] if isinstance(sample, tuple | list) and sample else sample
        return to_picture(image, f"{self.dataset.name}: the image of item {self.index}")


@dataclass(frozen=True, eq=False)
class OwnImages(Images):
    """Items of a Dataset: `indices` int64 [N]."""

    dataset: OwnDataset
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def items(self, positions: Sequence[int]) -> list[OwnItem]:
        return [OwnItem(self.dataset, int(self.indices[position])) for position in positions]

    def subset(self, positions: Tensor) -> OwnImages:
        return OwnImages(self.dataset, self.indices[positions])
