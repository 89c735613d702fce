"""The sets of image files whose lists torchvision reads: Flowers, Cars, Aircraft, DTD, Food-101."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import file_source, reading


class _Listed(Protocol):
    """What torchvision's classes offer, with a loader that leaves the images on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> tuple[str | Path, int]: ...


def _path(file: str | Path) -> Path:
    """A loader that does not load, so that an image is decoded only when it is needed."""
    return Path(file)


def _part(listed: _Listed) -> tuple[list[Path], Tensor]:
    """The files and labels of one of torchvision's sets."""
    items = [listed[position] for position in range(len(listed))]
    return [Path(file) for file, _ in items], torch.tensor([int(label) for _, label in items], dtype=torch.int64)


def _same_classes(classes: Sequence[str], expected: Sequence[str], file: Path) -> None:
    """Raise DataError unless a part has the classes of the train part: its labels would mean others."""
    if list(classes) != list(expected):
        different = sorted(set(classes) ^ set(expected))
        raise DataError(f"{file} has other classes than the train part: {', '.join(different[:5])}")


def open_flowers(request: Request) -> Source:
    """Oxford 102 Flowers with its own train, val and test lists; torchvision checks the MD5 of both lists."""
    from scipy.io.matlab import MatReadError
    from torchvision.datasets import Flowers102

    folder = request.root / "flowers-102"
    files = [folder / "setid.mat", folder / "imagelabels.mat"]
    if not (folder / "jpg").is_dir():
        raise DataError(f"the folder {folder / 'jpg'} is missing")
    with reading(*files, errors=(MatReadError,)):
        parts = {part: _part(Flowers102(request.root, part, loader=_path)) for part in ("train", "val", "test")}
    return file_source("flowers", Flowers102.classes, parts, request, lists=dict.fromkeys(parts, files[0]))


def open_cars(request: Request) -> Source:
    """Stanford Cars: train and test."""
    from scipy.io.matlab import MatReadError
    from torchvision.datasets import StanfordCars

    folder = request.root / "stanford_cars"
    meta = folder / "devkit" / "cars_meta.mat"
    lists = {
        "train": folder / "devkit" / "cars_train_annos.mat",
        "test": folder / "cars_test_annos_withlabels.mat",
    }
    classes: list[str] = []
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        if not (folder / f"cars_{part}").is_dir():
            raise DataError(f"the folder {folder / f'cars_{part}'} is missing")
        with reading(file, meta, errors=(MatReadError,)):
            listed = StanfordCars(request.root, part, loader=_path)
            classes, parts[part] = [str(name) for name in listed.classes], _part(listed)
    return file_source("cars", classes, parts, request, lists=lists)


def open_aircraft(request: Request) -> Source:
    """FGVC-Aircraft at the level of variants, with its own train, val and test lists."""
    from torchvision.datasets import FGVCAircraft

    folder = request.root / "fgvc-aircraft-2013b" / "data"
    lists = {part: folder / f"images_variant_{part}.txt" for part in ("train", "val", "test")}
    classes: list[str] = []
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        with reading(file, folder / "variants.txt"):
            listed = FGVCAircraft(request.root, part, "variant", loader=_path)
            classes, parts[part] = listed.classes, _part(listed)
    return file_source("aircraft", classes, parts, request, lists=lists)


def open_dtd(request: Request) -> Source:
    """The Describable Textures Dataset: train, val and test of its first partition."""
    from torchvision.datasets import DTD

    folder = request.root / "dtd" / "dtd" / "labels"
    lists = {part: folder / f"{part}1.txt" for part in ("train", "val", "test")}
    classes: list[str] = []
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        with reading(file):
            listed = DTD(request.root, part, partition=1, loader=_path)
            classes = classes or listed.classes
            _same_classes(listed.classes, classes, file)
            parts[part] = _part(listed)
    return file_source("dtd", classes, parts, request, lists=lists)


def open_food101(request: Request) -> Source:
    """Food-101: train and test."""
    from torchvision.datasets import Food101

    folder = request.root / "food-101"
    if not (folder / "images").is_dir():
        raise DataError(f"the folder {folder / 'images'} is missing")
    lists = {part: folder / "meta" / f"{part}.json" for part in ("train", "test")}
    classes: list[str] = []
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        with reading(file):
            listed = Food101(request.root, part, loader=_path)
            classes = classes or listed.classes
            _same_classes(listed.classes, classes, file)
            parts[part] = _part(listed)
    return file_source("food101", classes, parts, request, lists=lists)
