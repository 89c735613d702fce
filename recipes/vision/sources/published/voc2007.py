"""PASCAL VOC 2007 as a multi-label set: which of 20 classes an image shows, by all its annotated objects."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import check_files, file_source, reading

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PARTS = ("train", "val", "test")


def _objects(file: Path) -> list[str]:
    """The class names of the objects in one annotation, those marked as difficult included."""
    with reading(file):
        found = ElementTree.parse(file).iterfind("object/name")
        return [(name.text or "").strip() for name in found]


def _multi_hot(files: list[Path]) -> Tensor:
    """The annotations as bool [N, 20]. Raises DataError on a class that VOC does not have."""
    labels = torch.zeros(len(files), len(VOC_CLASSES), dtype=torch.bool)
    for row, file in zip(labels, files, strict=True):
        for name in _objects(file):
            if name not in VOC_CLASSES:
                raise DataError(f"{file} names an object {name!r}, which is none of VOC's {len(VOC_CLASSES)} classes")
            row[VOC_CLASSES.index(name)] = True
    return labels


def open_voc2007(request: Request) -> Source:
    """VOC 2007 with its own train, val and test lists; labels bool [N, 20] over all annotated objects.

    Objects marked as difficult count; the challenge's own evaluation leaves an image out for a class of which it
    shows difficult objects alone.
    """
    from torchvision.datasets import VOCDetection

    folder = request.root / "VOCdevkit" / "VOC2007"
    lists = {part: folder / "ImageSets" / "Main" / f"{part}.txt" for part in PARTS}
    parts: dict[str, tuple[list[Path], Tensor]] = {}
    for part, file in lists.items():
        with reading(file):
            listed = VOCDetection(request.root, year="2007", image_set=part)
        images, annotations = [Path(name) for name in listed.images], [Path(name) for name in listed.annotations]
        check_files(images, file)
        parts[part] = images, _multi_hot(annotations)
    return file_source("voc2007", VOC_CLASSES, parts, request, lists=lists)
