"""Vector-Jacobian products of a vector field S(x, y), in the place of second derivatives of an objective."""

import copy
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.products.graph import reached
from bilevel.products.graph_memory import GraphAccount, graph_bytes
from bilevel.products.hvp import Linearization, ReverseOverReverse
from bilevel.tree import Params

VectorField = Callable[[Params, Params], Params]
"""S(x, y) on one fixed batch with fixed randomness, over the names of y."""


def linearize_fields(
    fields: Sequence[VectorField],
    upper: Params,
    lower: Params,
    provider: ReverseOverReverse,
    *,
    resident: Iterable[Tensor] = (),
) -> list[Linearization]:
    """Of each field at (upper, lower): `hessian(w)` is ``(dS/dy)' w``, `cross(w, x)` is ``(dS/dx)' w`` and `gradient()`
    is S. Graphs are kept as the provider says; `resident` as for `HVPProvider.linearize_all`."""
    living = (*upper.values(), *lower.values(), *resident)
    limit = inf if provider.memory_budget is None else provider.memory_budget
    account = GraphAccount(limit, living) if provider.keep_graph else None
    return [_FieldLinearization(field, upper, lower, account) for field in fields]


@final
class _FieldLinearization(Linearization):
    """`account` decides whether the graph of S is kept; None keeps none."""

    def __init__(self, field: VectorField, upper: Params, lower: Params, account: GraphAccount | None) -> None:
        self.field, self.upper, self.lower = field, upper, lower
        self._gradient: Params | None = None
        self._account, self._offered = account, False
        self._graph: tuple[Params, Params] | None = None

    @torch.enable_grad()
    def hessian(self, vector: Params) -> Params:
        y, value = self._differentiable()
        return tree.pullback(value, vector, [y], retain_graph=self._graph is not None)[0]

    @torch.enable_grad()
    def cross(self, vector: Params, upper: Params) -> Params:
        # With y as variables too: a field may take derivatives of its own in it.
        x = tree.as_variables(upper)
        return tree.pullback(self.field(x, tree.as_variables(self.lower)), vector, [x])[0]

    @torch.enable_grad()
    def gradient_at(self, upper: Params) -> Params:
        return tree.detach(self.field(tree.detach(upper), tree.as_variables(self.lower)))

    def gradient_near(self, lower: Params) -> Params:
        near = copy.copy(self)
        near.lower = lower
        return near.gradient_at(self.upper)

    @torch.enable_grad()
    def reached_upper(self) -> set[str]:
        x = tree.as_variables(self.upper)
        return reached(self.field(x, tree.as_variables(self.lower)).values(), x)

    def kept_bytes(self) -> int | None:
        if self._graph is None or self._account is None:
            return None
        return graph_bytes(self._graph[1].values(), self._account.resident)

    def _differentiable(self) -> tuple[Params, Params]:
        """(y, S with its graph); also records the value of S."""
        if self._graph is not None:
            return self._graph
        y = tree.as_variables(self.lower)
        value = self.field(tree.detach(self.upper), y)
        self._gradient = tree.detach(value)
        if self._account is not None and not self._offered and self._account.admits(value.values()):
            self._graph = y, value
        self._offered = True
        return y, value
