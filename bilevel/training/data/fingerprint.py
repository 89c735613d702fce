"""A few numbers by which a batch that is drawn a second time is known."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.lower import strided

SAMPLED = 2**14
"""Elements that are looked at of each tensor."""


def fingerprint(batch: Any) -> str:
    """A digest of a batch: of at most `SAMPLED` elements of each tensor and array, evenly spaced, and of the numbers
    and strings in nested mappings, lists, tuples and attributes. Anything else counts by its type alone."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, batch, set())
    return digest.hexdigest()


def _feed(digest: Any, item: Any, above: set[int]) -> None:
    digest.update(type(item).__qualname__.encode())
    if isinstance(item, Tensor):
        digest.update(f"{item.dtype}{_shape(item)}".encode())
        flat = strided(item.detach()).resolve_conj().resolve_neg().reshape(-1)
        elements = _spaced(flat).contiguous().cpu()
        digest.update(elements.view(torch.uint8).numpy())
    elif isinstance(item, np.ndarray):
        digest.update(f"{item.dtype}{item.shape}".encode())
        spaced = _spaced(item.reshape(-1))
        digest.update(repr(spaced.tolist()).encode() if item.dtype.hasobject else spaced.tobytes())
    elif isinstance(item, (int, float, complex, str, bytes, np.generic)):
        digest.update(repr(item).encode())
    elif id(item) not in above:
        for part in _parts(item):
            _feed(digest, part, above | {id(item)})


def _parts(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return [part for pair in item.items() for part in pair]
    if isinstance(item, (list, tuple)):
        return _spaced(list(item))
    return list(vars(item).values()) if hasattr(item, "__dict__") and not isinstance(item, type) else []


def _shape(tensor: Tensor) -> list[int]:
    return [] if tensor.is_nested else list(tensor.shape)


def _spaced(elements: Any) -> Any:
    # An odd distance, so that it is not that of an image's rows.
    return elements[:: len(elements) // SAMPLED | 1]
