"""Fashion-MNIST: grey images of 28 x 28 px in IDX files."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import DataError
from ..sources import Request, Source
from .reading import array_source, reading

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def open_fashion_mnist(request: Request) -> Source:
    """Fashion-MNIST: train and test, one channel."""
    from torchvision.datasets import FashionMNIST

    folder = request.root / "FashionMNIST" / "raw"
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part, names in FILES.items():
        files = [folder / name for name in names]
        with reading(*files):
            stored = FashionMNIST(request.root, train=part == "train")
        images, labels = stored.data, stored.targets
        if len(images) != len(labels) or images.ndim != 3 or images.shape[1] != images.shape[2]:
            raise DataError(
                f"{files[0]} holds images of shape {tuple(images.shape)}, but {files[1]} holds {len(labels)} labels"
            )
        parts[part] = images.unsqueeze(1), labels.to(torch.int64)
    return array_source("fashion-mnist", FashionMNIST.classes, parts)
