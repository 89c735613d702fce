"""What rounding may change: limits by Monte Carlo arithmetic, and TF32 imitated on a CPU.

A result computed in a format differs from the exact one by its rounding errors, amplified by the condition of the
computation. Both are measured together in float64 on the CPU: `RandomRounding` disturbs what every operation gives by a
random relative error of the format's size, and the largest of the changes over a few seeds is the format's error
(Parker, Monte Carlo Arithmetic, 1997). A computed result has to lie within `MARGIN` of that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bilevel import Params
from tests.support.cases import joined

MARGIN = 10.0
"""For kernels that sum in another order, and use other formulas (Winograd's, fast Fourier transforms)."""
SEEDS = (0x5DEECE66D, 0x9E3779B97F4A7C1)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward"}
"""Operations whose operands tensor cores round."""


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes:
        dtype: of the tensors.
        unit: largest relative error of a rounded operation.
        operand: largest relative error of an operand of a product that is rounded first; 0 where none is.
    """

    name: str
    dtype: torch.dtype
    unit: float
    operand: float = 0.0

    def __str__(self) -> str:
        return self.name


FLOAT64 = Format("float64", torch.float64, 2.0**-53)
FLOAT32 = Format("float32", torch.float32, 2.0**-24)
TF32 = Format("TF32", torch.float32, 2.0**-24, 2.0**-11)
BFLOAT16 = Format("bfloat16", torch.float32, 2.0**-9, 2.0**-9)
FORMATS = (FLOAT64, FLOAT32, TF32)


class RandomRounding(TorchDispatchMode):
    """Disturbs every operation of float64 tensors as rounding to a format would.

    The disturbance of a number is a function of its bits and of the seed, so that the same operation on the same
    numbers gives the same again, as rounding does. A sum of n terms makes an error that grows like the root of n.
    """

    def __init__(self, unit: float, operand: float, seed: int) -> None:
        super().__init__()
        self.unit, self.operand, self.seed = unit, operand, seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.operand and name in PRODUCTS:
            args = tree_map(lambda leaf: self._disturbed(leaf, self.operand), args)
        out = func(*args, **kwargs)
        if any(value.alias_info is not None for value in func._schema.returns):
            # A view, or written in place.
            return out
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
        return tree_map(lambda leaf: self._disturbed(leaf, self.unit * _growth(name, sizes, leaf)), out)

    def _disturbed(self, leaf: Any, size: float) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float64:
            return leaf
        hashed = ((leaf.contiguous().view(torch.int64) ^ self.seed) * -7046029254386353131) >> 32
        return torch.addcmul(leaf, leaf, hashed.double(), value=size / 2.0**31)


def _growth(name: str, sizes: Sequence[int], out: Any) -> float:
    """Root of about as many terms as are summed for an entry of `out`."""
    if not isinstance(out, Tensor) or not sizes or not out.numel():
        return 1.0
    terms = sqrt(prod(sizes[:2]) / out.numel()) if name in PRODUCTS else max(sizes) / out.numel()
    return sqrt(max(1.0, terms))


class _RoundedOperands(TorchDispatchMode):
    """Products of float32 tensors whose operands are rounded to TF32's 10 bits first, as tensor cores do it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            args = tree_map(_to_tf32, args)
        return func(*args, **(kwargs or {}))


def _to_tf32(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dtype != torch.float32:
        return leaf
    bits = leaf.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(leaf)


@contextmanager
def arithmetic(device: torch.device, form: Format) -> Iterator[None]:
    """Float32 products in this format: on CUDA by torch's switches, on the CPU imitated where it is TF32."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if form is TF32 else "ieee"
    try:
        if form is TF32 and device.type == "cpu":
            with _RoundedOperands():
                yield
        else:
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def distance(found: Params, expected: Params) -> float:
    """||found - expected|| / ||expected|| on the CPU, in float64."""
    reference = joined({name: leaf.detach().double().cpu() for name, leaf in expected.items()})
    there = joined({name: found[name].detach().double().cpu() for name in expected})
    return float((there - reference).norm() / reference.norm())


def rounding_limit(compute: Callable[[], Params], form: Format) -> float:
    """How far a result in this format may lie from what `compute` gives in float64 on the CPU, relative to it.

    For float64 use `float64_limit`: its errors are not seen beside those of its own.
    """
    exact, largest = compute(), 0.0
    for seed in SEEDS:
        with RandomRounding(form.unit, form.operand, seed):
            disturbed = compute()
        largest = max(largest, distance(disturbed, exact))
    return MARGIN * largest


def float64_limit(of_float32: float) -> float:
    """The limit of float64 from that of float32: errors are proportional to the unit."""
    return of_float32 * FLOAT64.unit / FLOAT32.unit
