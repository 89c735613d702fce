"""Curvature that is lost without a word: what an objective's operations cut off from its second derivatives.

A custom autograd Function whose backward pass is no differentiable function of what it saved, and a ``detach`` in the
objective, leave first derivatives as they are meant and give wrong products. Two checks find them: a walk over the
gradient's graph names operations that may, and products are compared with differences of gradients.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node

from bilevel import tree
from bilevel.distributed import mean_over_ranks
from bilevel.products.graph import graph_nodes
from bilevel.products.hvp import FiniteDifference, HVPProvider, Objective
from bilevel.tree import Params

LOST = 1e-3
"""Products further than this from differences of gradients have lost something; healthy ones are within 1e-5."""

_STEP, _SHORTER = 1e-8, 1e-9
_JITTER = 1e-3
_CLEAR = 0.1
"""Differences with the two steps must be this much closer to each other than to the product."""
_RESOLVED = 1e-4
"""Products below this share of the gradient are not told from rounding."""

_SUSPICIOUS = {
    "Error": "a Function marked once_differentiable",
    "WeightNormInterfaceBackward0": "torch._weight_norm",
}

_NUMBERS = (int, float, str, torch.Size, torch.dtype, torch.device, type(None))


def suspicious_operations(outputs: Iterable[Tensor]) -> dict[str, bool]:
    """Operations in the graph of an objective and its gradient that may lose curvature: by name, whether a surrogate.

    They are custom autograd Functions but for this package's own, what ``once_differentiable`` leaves behind, and
    operations of torch whose double backward is known to be wrong. A ``detach`` leaves nothing behind, and is not seen.
    A Function that keeps nothing but numbers from its forward pass has nothing to lose in its backward pass: where its
    products are wrong, that pass is a surrogate for the derivative (straight-through rounding, gradient reversal).

    Args:
        outputs: the objective, and its gradient with the graph.
    """
    found = (_suspicion(node) for node in graph_nodes(outputs))
    # Of two with a name, what may lose something counts.
    return dict(sorted({suspicion for suspicion in found if suspicion}, key=lambda pair: (pair[0], not pair[1])))


def _suspicion(node: Node) -> tuple[str, bool] | None:
    if not isinstance(node, FunctionCtx):
        name = _SUSPICIOUS.get(type(node).__name__)
        return None if name is None else (name, False)
    function = getattr(node, "_forward_cls", type(node))
    if function.__module__.partition(".")[0] == "bilevel":
        return None
    # As they are saved: to unpack them may make a checkpoint's forward pass again.
    saved = getattr(node, "_raw_saved_tensors", ())
    numbers = all(isinstance(value, _NUMBERS) for value in vars(node).values())
    return function.__name__, numbers and not saved


@final
@dataclass(frozen=True)
class CurvatureErrors:
    """How far second derivatives are from differences of gradients, relative to the longer of both.

    Attributes:
        hessian: of ``(d2L/dydy) u``, in the provider's own sense of it.
        cross: of ``<u, (d2L/dydx) p>``.
        doubt: why the numbers decide nothing, empty where they do.
    """

    hessian: float
    cross: float
    doubt: str = ""


@torch.enable_grad()
def curvature_errors(provider: HVPProvider, objective: Objective, upper: Params, lower: Params) -> CurvatureErrors:
    """One product and one cross term of a provider against one-sided differences of gradients.

    The point is moved by a thousandth, off the kinks at which variables may start, and each entry of a direction is as
    long as the variable's, or 0 where the gradient is. Where a step of 1e-8 shows an error above `LOST`, one of 1e-9 is
    taken too, since a step may cross a kink: the smaller error counts, and only where both differences agree. With
    several ranks everything is the mean over them, as in a system.

    Args:
        upper, lower: in float64; in float32 such differences say nothing at kinks.
    """
    generator = torch.Generator().manual_seed(0)
    x_scale, y_scale = _scales(upper), _scales(lower)
    x = tree.axpy(_JITTER, _random(x_scale, generator), tree.detach(upper))
    y = tree.axpy(_JITTER, _random(y_scale, generator), tree.detach(lower))
    p, gradient = _random(x_scale, generator), mean_over_ranks(provider.linearize(objective, x, y).gradient())
    # Entries without a gradient may move outputs and be no variables all the same: the padding row of an embedding.
    u = {n: torch.where(gradient[n] != 0.0, leaf, 0.0) for n, leaf in _random(y_scale, generator).items()}
    if not any(bool(leaf.any()) for leaf in u.values()):
        return CurvatureErrors(0.0, 0.0, "its gradient is zero")
    if not provider.exact:
        # Its steps would be too long at kinks.
        provider = FiniteDifference(step=_STEP * float(tree.norm(u)), central=False)
    here = provider.linearize(objective, x, y)

    def flat(vector: Params) -> Tensor:
        return torch.cat([(vector[name].detach() * scale).reshape(-1) for name, scale in y_scale.items()])

    product, crossed = flat(mean_over_ranks(here.hessian(u))), mean_over_ranks(here.cross(u, x))
    base = mean_over_ranks(here.gradient_near(y))
    floor = _RESOLVED * float(flat(gradient).norm())

    def along_lower(step: float) -> tuple[Tensor, float]:
        near = mean_over_ranks(here.gradient_near(tree.axpy(step, u, y)))
        return flat(tree.sub(near, base)) / step, floor

    def along_upper(step: float) -> tuple[Tensor, float]:
        near = mean_over_ranks(here.gradient_at(tree.axpy(step, p, x)))
        difference = tree.scale(1.0 / step, tree.sub(near, gradient))
        # The share along a random direction may vanish by accident; it varies around the length.
        return tree.dot(difference, u).reshape(1), max(floor, float(flat(difference).norm()))

    hessian, hessian_doubt = _error(product, along_lower)
    cross, cross_doubt = _error(tree.dot(crossed, p).reshape(1), along_upper)
    doubt = (hessian_doubt or cross_doubt) and max(hessian, cross) <= LOST
    return CurvatureErrors(hessian, cross, "differences of its gradients do not converge" if doubt else "")


def _error(product: Tensor, difference: Callable[[float], tuple[Tensor, float]]) -> tuple[float, bool]:
    """The distance of a product from differences, relative to the longest and at least to what comes with these; and
    whether they leave it open, where the distance is 0."""

    def distance(found: Tensor, least: float) -> float:
        size = max(float(found.norm()), float(product.norm()), least)
        return float((found - product).norm()) / size if size > 0.0 else 0.0

    first, least = difference(_STEP)
    error, doubt = distance(first, least), False
    if not error <= LOST:
        second, least = difference(_SHORTER)
        error = min(error, distance(second, least))
        apart = float((first - second).norm()) / max(float((first - product).norm()), 1e-300)
        doubt = error > LOST and not apart <= _CLEAR
    return (0.0, True) if doubt or not math.isfinite(error) else (error, False)


def _scales(point: Params) -> Params:
    """The size of every entry; of entries that are 0 that of their tensor, or 1."""
    scales = {}
    for name, leaf in point.items():
        size = leaf.detach().abs()
        typical = size.square().mean().sqrt()
        scales[name] = torch.where(size > 0.0, size, torch.where(typical > 0.0, typical, 1.0))
    return scales


def _random(scales: Params, generator: torch.Generator) -> Params:
    return {name: scale * torch.randn(scale.shape, generator=generator).to(scale) for name, scale in scales.items()}
