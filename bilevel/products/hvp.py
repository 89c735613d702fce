"""Hessian-vector product providers: different ways to the same second derivatives of an objective L(x, y).

A provider linearizes L at a point; the `Linearization` then answers products ``(d2L/dydy) w`` and ``(d2L/dxdy) w``.
Costs are in units of one plain gradient of L.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_number
from bilevel.nn import CheapDoubleBackward
from bilevel.products.forward_mode import forward_mode
from bilevel.products.graph import reached
from bilevel.products.graph_memory import GraphAccount, graph_bytes
from bilevel.tree import Params

Objective = Callable[[Params, Params], Tensor]
"""L(x, y) on one fixed batch with fixed randomness; 0-d."""

_SMALL = 100_000
"""Up to so many entries the products of all batches are made together, which holds them all at a time, and graphs are
kept without being asked for."""


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

    def cross_here(self, vector: Params) -> Params:
        """`cross` at the point, from what products have made on their way where that serves."""
        return self.cross(vector, self.upper)

    def gradient(self) -> Params:
        """dL/dy at the point; computed once, and for nothing where a product has met it on its way."""
        if self._gradient is None:
            self._gradient = self.gradient_at(self.upper)
        return self._gradient

    def gradient_at(self, upper: Params) -> Params:
        """dL/dy at other upper values."""
        return _gradient(self.objective, upper, self.lower)

    def gradient_near(self, lower: Params) -> Params:
        """At other lower values, the field whose derivative at the point `hessian` is: dL/dy."""
        near = copy.copy(self)
        near.lower = lower
        return near.gradient_at(self.upper)

    @torch.enable_grad()
    def reached_upper(self) -> set[str]:
        """Names of the upper variables that L reaches, decided on the graph of one forward pass."""
        x = tree.as_variables(self.upper)
        return reached([self.objective(x, tree.as_variables(self.lower))], x)

    def depends_on_upper(self) -> bool | None:
        """Whether dL/dy may change with any upper variable, as far as a product has met it on its way; None where none
        has."""
        return None

    def kept_graph(self) -> tuple[Params, Params] | None:
        """The lower variables and the gradient of the graph that is kept between products; None where none is kept."""
        return None

    def kept_bytes(self) -> int | None:
        """Bytes of the graph that is kept between products, measured now; None where none is kept."""
        return None


@final
class Hessians:
    """The products of several linearizations with one vector after the other: one by one, or of small kept graphs by
    one pass through all. The products are the same."""

    def __init__(self, linearizations: Sequence[Linearization]) -> None:
        self.linearizations = tuple(linearizations)
        self._joined: tuple[list[Params], Params] | None = None

    def __call__(self, vector: Params) -> Iterable[Params]:
        joined = self._join(vector)
        if joined is None:
            return (one.hessian(vector) for one in self.linearizations)
        variables, gradients = joined
        along = {name: vector[name].expand_as(leaf) for name, leaf in gradients.items()}
        return tree.pullback(gradients, along, variables, retain_graph=True)

    @torch.enable_grad()
    def _join(self, vector: Params) -> tuple[list[Params], Params] | None:
        """The lower variables of all graphs, and their gradients stacked leaf by leaf; None while not all are kept."""
        if self._joined is None and len(self.linearizations) > 1 and tree.size(vector) <= _SMALL:
            kept = [graph for one in self.linearizations if (graph := one.kept_graph()) is not None]
            if len(kept) == len(self.linearizations):
                stacked = {name: torch.stack([gradient[name] for _, gradient in kept]) for name in vector}
                self._joined = [variables for variables, _ in kept], stacked
        return self._joined


class HVPProvider(ABC):
    """Makes linearizations.

    Attributes:
        exact: whether products are derivatives to rounding (False: finite differences).
        needs_outputs: whether `linearize` takes a `ComposedObjective` only (the Problem's `lower_outputs` and
            `lower_output_loss`), not any function.
    """

    exact: bool = True
    needs_outputs: bool = False

    @abstractmethod
    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        """Prepare products of `objective`'s second derivatives at (upper, lower)."""

    def linearize_all(
        self, objectives: Sequence[Objective], upper: Params, lower: Params, *, resident: Iterable[Tensor] = ()
    ) -> list[Linearization]:
        """`linearize` for every batch of one system, under one memory budget where the provider has one.

        Args:
            resident: tensors that live as long as the system anyway, such as its batches: not charged to the budget.
        """
        return [self.linearize(objective, upper, lower) for objective in objectives]


@final
@dataclass(frozen=True)
class ReverseOverReverse(HVPProvider):
    """Double backward: ``H w = d/dy <dL/dy, w>`` (Pearlmutter 1994, in reverse mode twice).

    On a CPU, 2-d convolutions and batch normalisations take cheaper kernels for the second pass
    (`bilevel.nn.double_backward`); products are the same to rounding.

    Args:
        keep_graph: keep the graph of the first backward pass for as long as the linearization lives. Every product
            after the first, and the cross term, saves the forward and the first backward pass, for the memory of one
            graph per batch in the variables of both levels. None keeps it within a call that makes a system and uses it
            at once (`hypergradient`, a trainer's upper step) where variables and batches have no more than 100,000
            entries together: there a pass costs mostly the calls it is made of.
        memory_budget: bytes that the kept graphs of one system may hold together; None is no limit. Each graph is
            measured (`bilevel.products.graph_bytes`) when the batch's first product has built it, and kept
            if it still fits beside those kept before; the other batches are recomputed for every product, and the
            products are the same. As without kept graphs, one more graph exists while such a product is made.

    Raises:
        ValueError: a budget without `keep_graph`, or one that is not a number of bytes >= 0.
    """

    keep_graph: bool | None = None
    memory_budget: float | None = None

    def __post_init__(self) -> None:
        if self.memory_budget is None:
            return
        check_number("ReverseOverReverse: memory_budget (bytes)", self.memory_budget)
        if not self.keep_graph:
            raise ValueError(
                f"ReverseOverReverse: memory_budget={self.memory_budget!r} limits kept graphs, and none are kept; pass "
                "keep_graph=True with it"
            )

    def for_use_at_once(self, tensors: Iterable[Tensor]) -> "ReverseOverReverse":
        """With `keep_graph` decided for a system of these variables and batches that none of them outlives."""
        if self.keep_graph is not None:
            return self
        return ReverseOverReverse(keep_graph=sum(tensor.numel() for tensor in tensors) <= _SMALL)

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        return self.linearize_all([objective], upper, lower)[0]

    def linearize_all(
        self, objectives: Sequence[Objective], upper: Params, lower: Params, *, resident: Iterable[Tensor] = ()
    ) -> list[Linearization]:
        living = (*upper.values(), *lower.values(), *resident)
        limit = inf if self.memory_budget is None else self.memory_budget
        account = GraphAccount(limit, living) if self.keep_graph else None
        return [_Reverse(objective, upper, lower, account) for objective in objectives]


@final
@dataclass(frozen=True)
class ForwardOverReverse(HVPProvider):
    """``H w = jvp of grad`` by torch.func: about one third less memory traffic than a double backward, no kept graph.

    The order matters: jvp of jacrev gives wrong products through BatchNorm in train mode, jvp of grad is exact.
    Every operation of the objective needs a forward-mode rule; where one has none, a RuntimeError names it, and the
    layer where that is known.

    Gradients and products of one system see the same random masks, but not always those of the other providers with
    the same seed: torch fills a dropout mask in the order in which the activations lie in memory, and its transforms
    in the order of their indices. Where the two differ (attention layers), so do the draws, not their distribution.
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
    """`account` decides whether the graph is kept, in the variables of both levels; None keeps none."""

    def __init__(self, objective: Objective, upper: Params, lower: Params, account: GraphAccount | None) -> None:
        super().__init__(objective, upper, lower)
        self._account = account
        self._graph: tuple[Params, Params, Params] | None = None
        self._depends: bool | None = None

    def _differentiable_gradient(self) -> tuple[Params, Params, Params]:
        """(x, y, dL/dy with its graph); also records the gradient's value."""
        if self._graph is not None:
            return self._graph
        look = self._account is None and self._depends is None
        x = tree.as_variables(self.upper) if look or self._account is not None else tree.detach(self.upper)
        y = tree.as_variables(self.lower)
        with CheapDoubleBackward():
            loss = self.objective(x, y)
        g = tree.gradients(loss, y, create_graph=True)
        self._gradient = tree.detach(g)
        self._depends = bool(reached(g.values(), x)) if look else self._depends
        if self._account is not None and self._account.admits(g.values()):
            self._graph = x, y, g
        # Offered once: what is kept only grows, so that a graph that does not fit now never will.
        self._account = self._account if self._graph is not None else None
        return x, y, g

    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        _, y, g = self._differentiable_gradient()
        return tree.pullback(g, vector, [y], retain_graph=self._graph is not None)[0]

    def depends_on_upper(self) -> bool | None:
        if self._depends is None and self._graph is not None:
            x, _, g = self._graph
            self._depends = bool(reached(g.values(), x))
        return self._depends

    def kept_graph(self) -> tuple[Params, Params] | None:
        return None if self._graph is None else self._graph[1:]

    def kept_bytes(self) -> int | None:
        if self._graph is None or self._account is None:
            return None
        return graph_bytes(self._graph[2].values(), self._account.resident)

    @torch.enable_grad()
    def cross(self, vector: Params, upper: Params) -> Params:
        x, y = tree.as_variables(upper), tree.as_variables(self.lower)
        g = tree.gradients(self.objective(x, y), y, create_graph=True)
        return tree.pullback(g, vector, [x])[0]

    @torch.enable_grad()
    def cross_here(self, vector: Params) -> Params:
        if self._account is not None:
            x, _, g = self._differentiable_gradient()
            return tree.pullback(g, vector, [x], retain_graph=self._graph is not None)[0]
        x, y = tree.as_variables(self.upper), tree.as_variables(self.lower)
        g = tree.gradients(self.objective(x, y), y, create_graph=True)
        self._gradient = tree.detach(g) if self._gradient is None else self._gradient
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

    @torch.enable_grad()
    def gradient_at(self, upper: Params) -> Params:
        # By the same transform as the products: random masks are drawn in another order without it.
        point = tree.detach(upper)
        with self._explained():
            return tree.detach(torch.func.grad(lambda y: self.objective(point, y))(tree.detach(self.lower)))

    def _derivative(self, gradient: Callable[[Params], Params], vector: Params) -> tuple[Params, Params]:
        """A gradient as a function of y, and its directional derivative, at the point."""
        y = tree.detach(self.lower)
        with self._explained():
            value, product, *_ = torch.func.jvp(gradient, (y,), ({name: vector[name] for name in y},))
        return value, product

    def _explained(self) -> AbstractContextManager[None]:
        reverse = ReverseOverReverse().linearize(self.objective, self.upper, self.lower)
        return forward_mode("ForwardOverReverse", lambda: reverse.hessian(self.lower))


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
        y, vector = tree.detach(self.lower), tree.detach(vector)
        # Over a power of two, so that the squares of a very short or long vector do not leave the dtype's range.
        magnitude = _power_of_two(vector)
        divisor = torch.where(magnitude == 0.0, 1.0, magnitude)
        direction = {name: (leaf / divisor).to(leaf.dtype) for name, leaf in vector.items()}
        # Along zero there is no length to divide by, and no difference.
        length = torch.where(magnitude == 0.0, 1.0, tree.wide(tree.norm(direction)))
        rounding = max(torch.finfo(leaf.dtype).eps for leaf in y.values())
        automatic = rounding ** (1 / 3 if self.central else 1 / 2) * (1.0 + tree.wide(tree.norm(y)))
        epsilon = (self.step or automatic) / length
        ahead = function(tree.axpy(epsilon, direction, y))
        behind = function(tree.axpy(-epsilon, direction, y)) if base is None else base
        share = (0.5 if base is None else 1.0) / epsilon
        return tree.scale(magnitude, tree.scale(share, tree.sub(ahead, behind)))


def _power_of_two(x: Params) -> Tensor:
    """The power of two at or next below the largest entry in modulus, in the device's widest dtype; 0 where x = 0, NaN
    where an entry is not finite. Nothing is read from the device."""
    norms = [tree.wide(torch.linalg.vector_norm(leaf, inf)) for leaf in x.values() if leaf.numel()]
    largest = torch.stack(norms).max() if norms else torch.zeros((), dtype=torch.float64)
    return torch.where(largest == 0.0, 0.0, largest / (2.0 * torch.frexp(largest).mantissa))


@torch.enable_grad()
def _gradient(objective: Objective, upper: Params, lower: Params) -> Params:
    y = tree.as_variables(lower)
    return tree.gradients(objective(tree.detach(upper), y), y)
