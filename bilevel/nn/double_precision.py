"""Objectives of float32 modules and data, evaluated in float64."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import tree

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


@final
class DoublePrecision(TorchFunctionMode):
    """Inside, what an objective computes from float64 variables, it computes in float64, whatever the modules, buffers
    and data are that it holds.

    Torch's functions take their real tensors in float64 and their complex ones in complex128, and make no others, also
    where another precision is asked for (``.float()``). Attributes of tensors are as they are.

    Raises:
        TypeError: something is written into a tensor of a lower precision, which would be lost.
    """

    def __enter__(self) -> "DoublePrecision":
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(self._before)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ == "__get__":
            return func(*args, **(kwargs or {}))
        if _writes(func) and args and isinstance(args[0], Tensor) and as_double(args[0]) is not args[0]:
            raise TypeError(f"{func.__name__} writes into a {args[0].dtype} tensor")
        args, keywords = tree.map_tensors(as_double, (tuple(args), kwargs or {}))
        if func in _CASTS:
            return args[0]
        return func(*map(_wide, args), **{name: _wide(value) for name, value in keywords.items()})


def as_double(tensor: Tensor) -> Tensor:
    """The tensor in float64 or complex128; as it is where it holds no such numbers."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def _wide(value: Any) -> Any:
    """Where the argument names a real dtype, float64."""
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _writes(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
