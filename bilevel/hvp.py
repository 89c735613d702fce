"""Hessian-vector product providers: different ways to the same second derivatives of an objective L(x, y).

A provider linearizes L at a point; the `Linearization` then answers products ``(d2L/dydy) w`` and ``(d2L/dxdy) w``.
Costs are in units of one plain gradient of L.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import Params

Objective = Callable[[Params, Params], Tensor]
"""L(x, y) on one fixed batch with fixed randomness; 0-d."""


class Linearization(ABC):
    """Second derivatives of one objective at one point (x, y)."""

    def __init__(self, objective: Objective, upper: Params, lower: Params) -> None:
        self.objective, self.upper, self.lower = objective, upper, lower
        self._gradient: Params | None = None

    @abstractmethod
    def hessian(self, vector: Params) -> Params:
        """``(d2L/dydy) w`` for `vector` over the lower variables."""

    @abstractmethod
    def cross(self, vector: Params, upper: Params) -> Params:
        """``(d2L/dxdy) w = d/dx <dL/dy, w>``, over the upper variables, at the upper values given."""

    def gradient(self) -> Params:
        """dL/dy at the point; computed once, and for nothing where a product has met it on its way."""
        if self._gradient is None:
            self._gradient = self.gradient_at(self.upper)
        return self._gradient

    def gradient_at(self, upper: Params) -> Params:
        """dL/dy at other upper values."""
        return _gradient(self.objective, upper, self.lower)

    def uses_upper(self) -> bool:
        """Whether L reaches any upper variable at all (decided on the graph of one forward pass)."""
        with torch.enable_grad():
            x = tree.as_variables(self.upper)
            loss = self.objective(x, tree.detach(self.lower))
            if not x or not loss.requires_grad:
                return False
            return any(g is not None for g in torch.autograd.grad(loss, list(x.values()), allow_unused=True))


class HVPProvider(ABC):
    """Makes linearizations.

    Attributes:
        exact: whether products are derivatives to rounding (False: finite differences).
    """

    exact: bool = True

    @abstractmethod
    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        """Prepare products of `objective`'s second derivatives at (upper, lower)."""


@final
@dataclass(frozen=True)
class ReverseOverReverse(HVPProvider):
    """Double backward: ``H w = d/dy <dL/dy, w>`` (Pearlmutter 1994, in reverse mode twice).

    Args:
        keep_graph: keep the graph of the first backward pass for as long as the linearization lives. Every product
            after the first saves the forward and the first backward pass, for the memory of one graph per batch.
    """

    keep_graph: bool = False

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        return _Reverse(objective, upper, lower, keep_graph=self.keep_graph)


@final
@dataclass(frozen=True)
class ForwardOverReverse(HVPProvider):
    """``H w = jvp of grad`` by torch.func: about one third less memory traffic than a double backward, no kept graph.

    The order matters: jvp of jacrev gives wrong products through BatchNorm in train mode, jvp of grad is exact.
    Every operation of the objective needs a forward-mode rule.
    """

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        return _Forward(objective, upper, lower)


@final
@dataclass(frozen=True)
class FiniteDifference(HVPProvider):
    r"""Differences of gradients, :math:`H w \approx [g(y + \epsilon w) - g(y - \epsilon w)] / 2 \epsilon`.

    Works through anything that has a first derivative. Exact on quadratics only, and far off at the kinks of ReLU
    networks: check it before trusting it.

    Args:
        step: length ``epsilon ||w||`` of the step in y, absolute. None takes ``eps^(1/3) (1 + ||y||)`` for central and
            ``eps^(1/2) (1 + ||y||)`` for one-sided differences, eps being the dtype's rounding unit.
        central: two gradients a product; False reuses the gradient at y, one gradient a product, first-order accurate.

    Raises:
        ValueError: a step that is not positive.
    """

    step: float | None = None
    central: bool = True
    exact = False

    def __post_init__(self) -> None:
        if self.step is not None and not self.step > 0:
            raise ValueError(
                f"FiniteDifference: step must be positive, got {self.step}; leave it out for an automatic one"
            )

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        return _Difference(objective, upper, lower, step=self.step, central=self.central)


class _Reverse(Linearization):
    def __init__(self, objective: Objective, upper: Params, lower: Params, *, keep_graph: bool) -> None:
        super().__init__(objective, upper, lower)
        self.keep_graph = keep_graph
        self._graph: tuple[Params, Params] | None = None

    def _differentiable_gradient(self) -> tuple[Params, Params]:
        """(y, dL/dy with its graph); also records the gradient's value."""
        if self._graph is not None:
            return self._graph
        y = tree.as_variables(self.lower)
        g = tree.gradients(self.objective(tree.detach(self.upper), y), y, create_graph=True)
        self._gradient = tree.detach(g)
        if self.keep_graph:
            self._graph = y, g
        return y, g

    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        y, g = self._differentiable_gradient()
        return tree.pullback(g, vector, [y], retain_graph=self.keep_graph)[0]

    @torch.enable_grad()
    def cross(self, vector: Params, upper: Params) -> Params:
        x, y = tree.as_variables(upper), tree.as_variables(self.lower)
        g = tree.gradients(self.objective(x, y), y, create_graph=True)
        return tree.pullback(g, vector, [x])[0]


class _Forward(Linearization):
    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        upper = tree.detach(self.upper)
        self._gradient, product = self._derivative(torch.func.grad(lambda y: self.objective(upper, y)), vector)
        return product

    @torch.enable_grad()
    def cross(self, vector: Params, upper: Params) -> Params:
        x = tree.detach(upper)
        return self._derivative(lambda y: torch.func.grad(lambda z: self.objective(z, y))(x), vector)[1]

    def _derivative(self, gradient: Callable[[Params], Params], vector: Params) -> tuple[Params, Params]:
        """A gradient as a function of y, and its directional derivative, at the point."""
        y = tree.detach(self.lower)
        value, product, *_ = torch.func.jvp(gradient, (y,), ({name: vector[name] for name in y},))
        return value, product


class _Difference(Linearization):
    def __init__(
        self, objective: Objective, upper: Params, lower: Params, *, step: float | None, central: bool
    ) -> None:
        super().__init__(objective, upper, lower)
        self.step, self.central = step, central

    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        base = None if self.central else self.gradient()
        return self._difference(lambda y: _gradient(self.objective, self.upper, y), vector, base)

    @torch.enable_grad()
    def cross(self, vector: Params, upper: Params) -> Params:
        def upper_gradient(y: Params) -> Params:
            x = tree.as_variables(upper)
            return tree.gradients(self.objective(x, tree.detach(y)), x)

        base = None if self.central else upper_gradient(self.lower)
        return self._difference(upper_gradient, vector, base)

    def _difference(self, function: Callable[[Params], Params], vector: Params, base: Params | None) -> Params:
        y = tree.detach(self.lower)
        # Through a power of two, so that the squares of a very short or long vector do not leave the dtype's range.
        magnitude = tree.power_of_two(vector)
        if magnitude == 0.0:
            return tree.zeros_like(function(y))
        direction = tree.scale(1.0 / magnitude, vector)
        length = float(tree.norm(direction))
        rounding = max(torch.finfo(leaf.dtype).eps for leaf in y.values())
        automatic = rounding ** (1 / 3 if self.central else 1 / 2) * (1.0 + float(tree.norm(y)))
        epsilon = (self.step or automatic) / length
        ahead = function(tree.axpy(epsilon, direction, y))
        if base is not None:
            return tree.scale(magnitude / epsilon, tree.sub(ahead, base))
        behind = function(tree.axpy(-epsilon, direction, y))
        return tree.scale(0.5 * magnitude / epsilon, tree.sub(ahead, behind))


@torch.enable_grad()
def _gradient(objective: Objective, upper: Params, lower: Params) -> Params:
    y = tree.as_variables(lower)
    return tree.gradients(objective(tree.detach(upper), y), y)
