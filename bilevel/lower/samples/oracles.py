"""What stochastic methods ask of a problem: all derivatives of one sample at one point, from one pass."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, final

from torch import Tensor

from bilevel import distributed, tree
from bilevel.lower.derivatives import lower_graph, upper_graph
from bilevel.lower.repeatable import repeatable
from bilevel.lower.samples import compiled
from bilevel.lower.samples.draws import Draw
from bilevel.nn import curvature_pass
from bilevel.problem import Problem
from bilevel.tree import Params


class LowerParts(NamedTuple):
    """G = L + lambda r on a sample, times its weight; 0-d, over y, over y and over x: G, dG/dy, d2G/dydy v and
    d2G/dxdy v."""

    value: Tensor
    gradient: Params
    product: Params
    cross: Params


class FirstDerivatives(NamedTuple):
    """An objective on a sample, times its weight, and its derivatives in x and in y."""

    value: Tensor
    upper: Params
    lower: Params


@final
class Oracles:
    """Derivatives of both objectives on samples, averaged over the ranks; equal samples have equal random masks. Asked
    where gradients are recorded and within a `curvature_pass`, as in all of a method's `estimate`.

    Args:
        problem: the objectives.
        names: the lower variables that respond to the upper ones; v, products and dF/dy are over these.
        write_buffers: the first pass of the lower objective writes buffers such as running statistics, as a lower step
            does. All others leave them.
        watch: called before each pass.
        backend: of torch.compile, which the passes then go through; they write no buffers and examine nothing. None
            computes them by autograd.
    """

    def __init__(
        self,
        problem: Problem,
        names: Sequence[str],
        *,
        write_buffers: bool = False,
        watch: Callable[[], None] = lambda: None,
        backend: str | None = None,
    ) -> None:
        self.problem, self.names, self._watch = problem, tuple(names), watch
        self._writes, self._backend = write_buffers, backend

    def lower(self, upper: Params, lower: Params, v: Params, draw: Draw) -> LowerParts:
        """The lower level's parts at (x, y, v): one forward pass, a backward pass and one through that."""
        if self._backend is not None:
            return LowerParts(*self._compiled(compiled.lower, draw, upper, lower, v))
        x, y, value = self._lower_value(upper, lower, draw)
        gradient = tree.gradients(value, y, create_graph=True)
        implicit = {name: y[name] for name in self.names}
        product, cross = tree.pullback({name: gradient[name] for name in self.names}, v, (implicit, x))
        return LowerParts(*_mean(draw.weight, value, tree.detach(gradient), product, cross))

    def hessian(self, upper: Params, lower: Params, v: Params, draw: Draw) -> Params:
        """d2G/dydy v alone."""
        if self._backend is not None:
            return self._compiled(compiled.hessian, draw, upper, lower, v)[1]
        _, y, value = self._lower_value(tree.detach(upper), lower, draw, upper_too=False)
        implicit = {name: y[name] for name in self.names}
        gradient = tree.gradients(value, implicit, create_graph=True)
        (product,) = tree.pullback(gradient, v, (implicit,))
        return _mean(draw.weight, value, product)[1]

    def lower_gradients(self, upper: Params, lower: Params, draw: Draw) -> FirstDerivatives:
        """G, dG/dx and dG/dy over all lower variables."""
        if self._backend is not None:
            return FirstDerivatives(*self._compiled(compiled.lower_gradients, draw, upper, lower))
        x, y, value = self._lower_value(upper, lower, draw)
        return self._first(value, x, y, draw.weight)

    def upper(self, upper: Params, lower: Params, draw: Draw) -> FirstDerivatives:
        """F, dF/dx and dF/dy over the responding lower variables."""
        responding = {name: lower[name] for name in self.names}
        if self._backend is not None:
            return FirstDerivatives(*self._compiled(compiled.upper, draw, upper, responding, lower))
        x, y = tree.as_variables(upper), tree.as_variables(responding)
        value = self._pass("upper", draw, lambda: upper_graph(self.problem, x, y, lower, draw.batch))
        return self._first(value, x, y, draw.weight)

    def _lower_value(
        self, upper: Params, lower: Params, draw: Draw, *, upper_too: bool = True
    ) -> tuple[Params, Params, Tensor]:
        """x, y and G with its graph."""
        x, y = tree.as_variables(upper) if upper_too else upper, tree.as_variables(lower)
        writes, self._writes = self._writes, False
        return x, y, self._pass("lower", draw, lambda: lower_graph(self.problem, x, y, draw.batch), writes=writes)

    def _compiled(self, function: Callable[..., Any], draw: Draw, *points: Params) -> tuple[Any, ...]:
        assert self._backend is not None
        self._watch()
        arguments = (*map(tree.detach, points), draw.batch)
        return _mean(draw.weight, *compiled.compiled(function, self._backend, self.problem, *arguments))

    def _pass(
        self, level: Literal["upper", "lower"], draw: Draw, objective: Callable[[], Tensor], *, writes: bool = False
    ) -> Tensor:
        self._watch()

        def evaluated(again: bool) -> Tensor:
            # Buffers are written once, also where a pass is made again.
            if not writes or again:
                return objective()
            with curvature_pass(write_buffers=True):
                return objective()

        return repeatable(self.problem, level, draw.seed, evaluated)

    @staticmethod
    def _first(value: Tensor, x: Params, y: Params, weight: float) -> FirstDerivatives:
        return FirstDerivatives(*_mean(weight, value, *tree.joint_gradients(value, (x, y))))


def _mean(weight: float, value: Tensor, *parts: Params) -> tuple[Any, ...]:
    """Value and parts times the weight, averaged over the ranks in one exchange."""
    value = value.detach()
    if weight != 1.0:
        value, parts = weight * value, tuple(tree.scale(weight, part) for part in parts)
    return distributed.mean_with_gradients(value, *parts)
