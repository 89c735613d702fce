"""Whether two objects compute alike, as far as their makings tell."""

from collections.abc import Hashable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_PARTS = 20_000


def likeness(*values: Any) -> Hashable | None:
    """Equal for objects of the same code and settings, whatever is in their tensors; None where that is not known.

    Tensors are taken by shape and precision, modules by class and attributes, functions by their code and what they
    close over. Everything else, as large collections, is not known.
    """
    try:
        return _Likeness().of(values)
    except (_UnknownError, RecursionError):
        return None


class _UnknownError(Exception):
    pass


class _Likeness:
    def __init__(self) -> None:
        self.parts = 0

    def of(self, value: Any) -> Hashable:
        self.parts += 1
        if self.parts > _PARTS:
            raise _UnknownError
        if isinstance(value, Tensor) and value.is_nested:
            raise _UnknownError  # It has no shape.
        if isinstance(value, Tensor):
            return type(value), value.shape, value.dtype, value.device
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, nn.Module):
            return type(value), self.of(vars(value))
        if isinstance(value, FunctionType):
            closed = tuple(cell.cell_contents for cell in value.__closure__ or ())
            return value.__code__, self.of((closed, value.__defaults__, value.__kwdefaults__))
        if type(value) in (list, tuple):
            return type(value), tuple(map(self.of, value))
        if type(value) is set:
            return type(value), frozenset(map(self.of, value))
        if isinstance(value, Mapping):
            return type(value), tuple((self.of(key), self.of(item)) for key, item in value.items())
        raise _UnknownError
