"""What a run reads: classes, numbers, bytes, what was passed over, copies, and where pictures lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..imagesets import ImageSet
from ..pictures.space import decoded_bytes
from .listing import LABELLED, SETS


def reading(sets: Mapping[str, ImageSet], copies: Mapping[str, int], compared: bool = True) -> dict[str, Any]:
    """Facts as JSON values.

    Each of the sets "pretext", "train", "val" and "test" by its name: "source", "images", "bytes" where they lie (None:
    unknown), "storage" ("memory" or "stream"), "decoded_bytes" in memory (None: not there, or unknown) and
    "passed_over", in words. "classes": name -> number of labelled images of all sets, where images have classes, else
    None. "copies", and "compared", whether copies of test images were looked for among the pretext images: as given.
    """
    return {
        **{part: _of_one(sets[part]) for part in SETS},
        "classes": _classes([sets[part] for part in LABELLED]),
        "copies": dict(copies),
        "compared": compared,
    }


def _of_one(images: ImageSet) -> dict[str, Any]:
    pictures = images.images
    return {
        "source": images.name,
        "images": len(images),
        "bytes": pictures.origin.nbytes,
        "storage": "memory" if pictures.in_memory else "stream",
        "decoded_bytes": decoded_bytes(pictures) if pictures.in_memory else None,
        "passed_over": images.passed_over,
    }


def _classes(sets: list[ImageSet]) -> dict[str, int] | None:
    names, found = sets[0].classes, torch.zeros(len(sets[0].classes), dtype=torch.int64)
    for images in sets:
        assert images.labels is not None, "labelled sets have labels"
        if images.kind == "single-label":
            found += torch.bincount(images.labels, minlength=len(names))
        elif images.kind == "multi-label":
            found += images.labels.sum(dim=0)
        else:
            return None
    return dict(zip(names, found.tolist(), strict=True))
