"""Sets that lower variables are projected onto."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind
from bilevel.lower.kinds.maps import Parameter, ProximalMap, check_parameter, of_name
from bilevel.tree import Params


@final
class Box(ProximalMap):
    r"""The projection onto :math:`\{y : l \le y \le u\}`, entry by entry; its derivative is 1 inside and 0 outside,
    where that of an active bound takes its place.

    Args:
        low, high: l and u; a number, a tensor that broadcasts against each variable, or these by name. None, or a name
            that is left out, is no bound.

    Raises:
        TypeError: bounds of another kind.
        ValueError: no bound at all; l > u somewhere, of tensors when the map is applied.
    """

    def __init__(self, low: Parameter | None = None, high: Parameter | None = None) -> None:
        if low is None and high is None:
            raise ValueError("Box: low and high are both None; give at least one of the bounds")
        for name, bound in (("low", low), ("high", high)):
            if bound is not None:
                check_parameter(f"Box: {name}", bound, negative=True)
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
            raise ValueError(f"Box: low={low:g} is above high={high:g}, with nothing between them; exchange them")
        self.low, self.high = low, high

    def __call__(self, point: Params, step: float) -> Params:
        moved = {}
        for name, z in point.items():
            low, high = self._bounds(name, z)
            y = z if low is None else torch.where(z > low, z, low)
            moved[name] = y if high is None else torch.where(y < high, y, high)
        return moved

    def distances(self, point: Params, step: float) -> Params:
        bounded = {name: [z - b for b in self._bounds(name, z) if b is not None] for name, z in point.items()}
        return {name: torch.stack(parts) for name, parts in bounded.items() if parts}

    def _bounds(self, name: str, leaf: Tensor) -> tuple[Tensor | None, Tensor | None]:
        low, high = (None if b is None else of_name(b, name, leaf) for b in (self.low, self.high))
        if low is not None and high is not None and bool((low > high).any()):
            raise ValueError(
                f"Box: {int((low > high).sum())} entries of low are above those of high for {name!r}, with nothing "
                "between them; parametrise the bounds so that they cannot cross, such as high = low + width.exp()"
            )
        return low, high


@final
class NonNegative(ProximalMap):
    r"""The projection onto :math:`\{y : y \ge 0\}`, entry by entry."""

    def __call__(self, point: Params, step: float) -> Params:
        return {name: torch.where(z > 0.0, z, torch.zeros_like(z)) for name, z in point.items()}

    def distances(self, point: Params, step: float) -> Params:
        return point


@final
class Simplex(ProximalMap):
    r"""The projection onto :math:`\{y : y \ge 0, \sum_i y_i = r\}`, the sum being over the last dimension: a vector is
    one simplex, a matrix has one in each row (Held, Wolfe and Crowder 1974; Duchi et al. 2008).

    With the support s (1 where the projection is positive, 0 elsewhere) the derivative is
    :math:`\operatorname{diag}(s) - s s^\top / (s^\top s)`, and that in r is s / (s's).

    Args:
        radius: r > 0; a number, a tensor that broadcasts against each variable without its last dimension, or these by
            name. A name that is left out is not projected.

    Raises:
        TypeError: a radius of another kind.
        ValueError: a number that is not positive; at a call, a variable without dimensions.
    """

    def __init__(self, radius: Parameter = 1.0) -> None:
        check_parameter("Simplex: radius", radius)
        if isinstance(radius, (int, float)) and radius == 0.0:
            raise ValueError("Simplex: radius must be positive, got 0; a simplex of radius 0 is the point 0")
        self.radius = radius

    def __call__(self, point: Params, step: float) -> Params:
        moved = dict(point)
        for name, z in point.items():
            threshold = self._threshold(name, z)
            if threshold is not None:
                moved[name] = torch.where(z > threshold, z - threshold, torch.zeros_like(z))
        return moved

    def distances(self, point: Params, step: float) -> Params:
        thresholds = {name: self._threshold(name, z) for name, z in point.items()}
        return {name: point[name] - value for name, value in thresholds.items() if value is not None}

    def _threshold(self, name: str, z: Tensor) -> Tensor | None:
        """tau with ``sum max(z - tau, 0) = r``, as a function of the entries of the support and of r."""
        radius = of_name(self.radius, name, z)
        if radius is None:
            return None
        if z.dim() == 0:
            raise ValueError(f"Simplex: variable {name!r} has no dimension to sum over; make it a vector")
        radius = radius.unsqueeze(-1)
        with torch.no_grad():
            ordered = z.sort(dim=-1, descending=True).values
            counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
            kept = ordered * counts > ordered.cumsum(-1) - radius
            # The largest entry always is of the support, whatever rounding says.
            last = kept.sum(-1, keepdim=True).clamp(min=1)
            smallest = ordered.gather(-1, last - 1)
            support = (z >= smallest).to(z)
        return ((support * z).sum(-1, keepdim=True) - radius) / support.sum(-1, keepdim=True)


@final
class LinearEqualities(ProximalMap):
    r"""The projection onto :math:`\{y : A y = b\}`, :math:`z - A^+ (A z - b)`, with a fixed A.

    The derivative in z is the projector :math:`I - A^+ A` onto the null space, that in b is :math:`A^+`; there are no
    kinks. The pseudo-inverse is taken when the map is made: keep the map where b does not depend on x.

    Args:
        matrix: A, [m, n], over all the variables in their order, each flattened; n is the number of their entries.
        values: b, [m] or a number; it may depend on the upper variables.

    Raises:
        TypeError: a matrix or values that are no tensors.
        ValueError: a matrix without two dimensions, or that needs gradients; equations that contradict each other
            (where `values` needs no gradient); at a call, variables of another number of entries.
    """

    separable = False

    def __init__(self, matrix: Tensor, values: float | Tensor) -> None:
        check_kind("LinearEqualities: matrix", matrix, Tensor, "a tensor [equations, entries of the variables]")
        check_parameter("LinearEqualities: values", values, negative=True)
        if isinstance(values, Mapping):
            raise TypeError("LinearEqualities: values must be a tensor [equations] or a number, got a mapping")
        if matrix.dim() != 2:
            raise ValueError(f"LinearEqualities: matrix must have two dimensions, got shape {tuple(matrix.shape)}")
        if matrix.requires_grad:
            raise ValueError(
                "LinearEqualities: matrix needs gradients, and it is held fixed here; pass matrix.detach() if that is "
                "meant, or state the condition as a RootProblem (its KKT system)"
            )
        self.matrix, self.values = matrix, values
        self._inverse = torch.linalg.pinv(matrix)
        if not isinstance(values, Tensor) or not values.requires_grad:
            self._check_consistent()

    def __call__(self, point: Params, step: float) -> Params:
        z = tree.flatten(point)
        if z.numel() != self.matrix.shape[1]:
            raise ValueError(
                f"LinearEqualities: the matrix has {self.matrix.shape[1]} columns, and the variables {list(point)} "
                f"have {z.numel()} entries; give each entry a column, or one variable its own map by ByName"
            )
        matrix, inverse = self.matrix.to(z), self._inverse.to(z)
        return tree.unflatten(z - inverse @ (matrix @ z - self._right(z)), point)

    def _right(self, like: Tensor) -> Tensor:
        values = self.values.to(like) if isinstance(self.values, Tensor) else like.new_tensor(self.values)
        return values.expand(self.matrix.shape[0])

    def _check_consistent(self) -> None:
        right = self._right(self.matrix)
        left_over = torch.linalg.vector_norm(self.matrix @ (self._inverse @ right) - right)
        if bool(left_over > torch.finfo(self.matrix.dtype).eps ** 0.5 * (1.0 + torch.linalg.vector_norm(right))):
            raise ValueError(
                "LinearEqualities: the equations contradict each other, and no y satisfies them all; leave out those "
                "that follow from others with another value"
            )
