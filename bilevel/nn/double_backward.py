"""Convolutions and batch normalisations whose double backward is cheap on a CPU.

torch differentiates the backward pass of batch normalisation as a chain of some twenty elementwise operations, and that
of a convolution by a weight gradient written as a convolution with an image for a kernel. Here both use the backward
kernels that torch has for first derivatives. The results are the same to rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Pair = Sequence[int]


@final
class CheapDoubleBackward(TorchFunctionMode):
    """Inside, 2-d convolutions and batch normalisations with batch statistics differentiate twice at a low price.

    So do derivatives of a higher order, though not cheaply. Those that torch itself gives a batch normalisation end at
    the second order: its versions from 2.12 on refuse the third, and 2.11 returns a wrong one.
    Everything that is not a plain float32 or float64 computation on a CPU is left to torch: other devices (not
    measured), autocast, tensors within torch.func transforms and forward mode, running statistics, padding by name.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        result = None if replacement is None else replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | _Pair = 1,
    padding: int | _Pair | str = 0,
    dilation: int | _Pair = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or input.dim() != 4 or not _plain(input, weight):
        return None
    # Broadcasting and promotion would take biases that torch refuses.
    if bias is not None and (bias.dtype != input.dtype or bias.shape != weight.shape[:1]):
        return None
    output = _Convolution.apply(input, weight, (_pair(stride), _pair(padding), _pair(dilation), groups))
    return output if bias is None else output + bias.view(-1, 1, 1)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    # A single value a channel is an error that torch words.
    if not training or running_mean is not None or weight is None or bias is None or input.numel() <= weight.numel():
        return None
    return _BatchNorm.apply(input, weight, bias, eps)[0] if _plain(input, weight, bias) else None


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.conv2d: _convolution,
    functional.batch_norm: _batch_norm,
}


def _plain(*tensors: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or len({t.dtype for t in tensors}) > 1:
        return False
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.float64)
        and torch.func.debug_unwrap(t) is t
        and forward_ad.unpack_dual(t).tangent is None
        for t in tensors
    )


def _pair(value: int | _Pair) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


_Geometry = tuple[list[int], list[int], list[int], int]


def _forward(x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    return functional.conv2d(x, weight, None, *geometry)


def _backward(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, *, x_too: bool, weight_too: bool) -> Any:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [x_too, weight_too, False]
    )[:2]


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        return _forward(x, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        return (*_ConvolutionBackward.apply(g, *ctx.saved_tensors, ctx.geometry, wanted[0], wanted[1]), None)


class _ConvolutionBackward(torch.autograd.Function):
    """``(g, x, w) -> (dx, dw)``: bilinear in each pair, so that every derivative is one of the three kernels again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, x_too: bool, weight_too: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return _backward(g, x, weight, geometry, x_too=x_too, weight_too=weight_too)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, weight, ctx.geometry, *_ = inputs
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        g_too, x_too, weight_too, *_ = ctx.needs_input_grad
        along_g = along_x = along_weight = None
        if g_too:
            parts = [_forward(x, dw, ctx.geometry)] if dw is not None else []
            parts += [_forward(dx, weight, ctx.geometry)] if dx is not None else []
            along_g = parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)
        if x_too and dw is not None:
            along_x = _backward(g, x, dw, ctx.geometry, x_too=True, weight_too=False)[0]
        if weight_too and dx is not None:
            along_weight = _backward(g, dx, weight, ctx.geometry, x_too=False, weight_too=True)[1]
        return along_g, along_x, along_weight, None, None, None


class _BatchNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*_BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None)


def _norm_backward(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Any:
    """``w s P g``, ``sum g x^`` and ``sum g``, in the notation of `_BatchNormBackward`."""
    return torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )


class _BatchNormBackward(torch.autograd.Function):
    r"""``(g, x, w) -> (w s P g, sum g x^, sum g)`` a channel, with s = 1 / deviation, x^ = (x - mean) s, n values, and
    the projection ``P g = g - mean(g) - x^ mean(g x^)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _norm_backward(g, x, weight, mean, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *saved, ctx.eps = inputs
        _, dw, db = output
        ctx.save_for_backward(*saved, dw, db)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of ``<a, w s P g> + <b, sum g x^> + <c, sum g>``; s and x^ depend on x."""
        if torch.is_grad_enabled():
            return (*_by_elements(ctx.saved_tensors[:3], (a, b, c), ctx.eps), None, None, None)
        g, x, w, mean, s, g_moment, g_sum = ctx.saved_tensors
        n = x.numel() // w.numel()
        per_channel = (1, -1, *(1,) * (x.dim() - 2))

        def spread(values: Tensor) -> Tensor:
            return values.view(per_channel)

        along_g, a_moment, a_sum = _norm_backward(a, x, w, mean, s, ctx.eps)
        inner = torch.einsum("nc...,nc...->c", a, g)
        projected = inner - (a_sum * g_sum + a_moment * g_moment) / n  # <a, P g>
        along_g.addcmul_(x, spread(b * s)).add_(spread(c - b * s * mean))
        # Through x^, and then through s, of which ds = -s^2 x^ . dx / n.
        through = (g * spread(b - w * s * a_moment / n)).addcmul_(a, spread(-w * s * g_moment / n))
        along_x = _norm_backward(through, x, torch.ones_like(w), mean, s, ctx.eps)[0]
        factor = -w * projected * s**3 / n
        along_x.addcmul_(x, spread(factor)).sub_(spread(factor * mean))
        return along_g, along_x, s * projected, None, None, None


def _by_elements(point: Sequence[Tensor], cotangents: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """The same with a graph of its own, for derivatives of a higher order: from elementary operations alone."""
    # Aliases, so that what g owes to x stays outside.
    g, x, weight = (leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in point)
    bias = torch.zeros_like(weight).requires_grad_()
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0, keepdim=True)
    per_channel = mean.shape
    output = (x - mean) * (variance + eps).rsqrt() * weight.view(per_channel) + bias.view(per_channel)
    first = torch.autograd.grad(output, (x, weight, bias), g, create_graph=True)
    return torch.autograd.grad(first, (g, x, weight), cotangents, create_graph=True, materialize_grads=True)
