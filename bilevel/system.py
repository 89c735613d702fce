"""The linear system behind one hypergradient, built once and solved for many right-hand sides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.hvp import HVPProvider, Linearization, Objective, ReverseOverReverse
from bilevel.modules import curvature_pass
from bilevel.operators import FunctionOperator, LinearOperator, MeanOperator, ScaledOperator, ShiftedOperator, SumOperator
from bilevel.problem import Problem
from bilevel.solution import Solution
from bilevel.solvers import CG, Solver
from bilevel.tree import Params

Shift = float | Mapping[str, float]
Implicit = Callable[[str], bool] | Iterable[str]

_SAMPLES = 4096


class StaleSystemError(RuntimeError):
    """A `System` was used after something that it was built from changed."""


class System:
    r"""A and the cross term at one point, as `linearize` documents them, with the solver's reusable state.

    Attributes:
        operator: A, over the implicit lower variables.
        implicit: names of the implicit lower variables.
        solver, hvp, damping, shift, lower_batches: what shaped the system.
        weight: c = regularization_weight + damping, by which A and the cross term are divided; 1 without regularizer.
    """

    def __init__(
        self,
        problem: Problem,
        upper: Params,
        lower: Params,
        lower_batches: Sequence[Any],
        *,
        solver: Solver,
        hvp: HVPProvider,
        damping: float,
        shift: Shift,
        implicit: tuple[str, ...],
    ) -> None:
        self.problem, self.upper, self.lower = problem, dict(upper), dict(lower)
        self.lower_batches = tuple(lower_batches)
        self.solver, self.hvp, self.damping, self.shift, self.implicit = solver, hvp, damping, shift, implicit
        self.regularized = problem.regularizer(upper, lower) is not None
        if not self.regularized and damping != 0.0:
            raise ValueError(
                f"damping={damping}: damping adds to the weight of the regularizer, and this problem has none; use "
                "shift for Tikhonov damping of A alone"
            )
        total = problem.regularization_weight + damping
        self.regularized = self.regularized and total > 0.0
        self.weight = total if self.regularized else 1.0
        self._fixed = {n: t.detach() for n, t in lower.items() if n not in implicit}
        seed = int(torch.randint(2**31 - 1, ()))
        point = self.variables(lower)
        self._losses = [
            hvp.linearize(self._objective(batch, seed + k), self.upper, point)
            for k, batch in enumerate(self.lower_batches)
        ]
        self.operator = self._build_operator(point)
        self.state = solver.prepare(self.operator)
        self._invalidated = False
        self._marks = self._fingerprint()

    def variables(self, lower: Params) -> Params:
        """The implicit part of `lower`, detached."""
        return {name: lower[name].detach() for name in self.implicit}

    def solve(self, b: Params, *, x0: Params | None = None) -> Solution:
        """Solve A x = b with the system's solver and state.

        Raises:
            StaleSystemError: something the system was built from has changed.
        """
        self.check_fresh()
        return self.solver.solve(self.operator, b, x0=x0, state=self.state)

    def cross(self, x: Params) -> Params:
        """``(d2G/dxdy) x / c`` over the upper variables, at their current values."""
        upper = tree.detach(self.upper)
        if self._losses[0].uses_upper:
            loss_part = MeanOperator([FunctionOperator(lambda v, loss=loss: loss.cross(v, upper)) for loss in self._losses])
            total = tree.scale(1.0 / self.weight, loss_part(x))
        else:
            total = tree.zeros_like(upper)
        if self.regularized:
            point = self.variables(self.lower)
            # Written out by hand, most often quadratic: exact in reverse mode whatever the provider does to L.
            exact = ReverseOverReverse().linearize(self._regularizer, upper, point)
            total = tree.add(exact.cross(x, upper), total)
        return total

    def stationarity(self) -> float:
        """Norm of the lower gradient dG/dy over the implicit variables, with the undamped regularization weight."""
        gradient = self._loss_gradient()
        weight = self.problem.regularization_weight
        if self.regularized and weight > 0.0:
            y = tree.as_variables(self.variables(self.lower))
            with torch.enable_grad():
                value = self._regularizer(tree.detach(self.upper), y)
            gradient = tree.axpy(weight, tree.gradients(value, y), gradient)
        return float(tree.norm(gradient))

    def invalidate(self) -> None:
        """Declare the system stale by hand, for changes that it cannot see (buffers, data behind a pointer)."""
        self._invalidated = True

    def check_fresh(self, upper: Params | None = None, lower: Params | None = None) -> None:
        """Raise StaleSystemError if variables or batches are other objects, other versions or have other sums.

        Args:
            upper, lower: variables about to be used with the system; they must be the ones it was built from.
        """
        if self._invalidated:
            raise StaleSystemError("the system was invalidated; call linearize again")
        for argument, given, own in (("upper", upper, self.upper), ("lower", lower, self.lower)):
            if given is not None and (given.keys() != own.keys() or any(given[n] is not own[n] for n in own)):
                raise StaleSystemError(
                    f"{argument}: not the tensors that the system was built from; call linearize again for these"
                )
        for old, new in zip(self._marks, self._fingerprint(), strict=True):
            if old != new:
                raise StaleSystemError(
                    f"{new.name} changed after linearize (version {old.version} -> {new.version}, checksum "
                    f"{old.checksum} -> {new.checksum}); call linearize again"
                )

    def _objective(self, batch: Any, seed: int) -> Objective:
        def objective(upper: Params, variables: Params) -> Tensor:
            with curvature_pass(seed):
                loss = self.problem.lower_objective(upper, {**self._fixed, **variables}, batch)
            return check_scalar("lower_objective", loss)

        return objective

    def _regularizer(self, upper: Params, variables: Params) -> Tensor:
        value = self.problem.regularizer(upper, {**self._fixed, **variables})
        return check_scalar("regularizer", value)

    def _build_operator(self, point: Params) -> LinearOperator:
        losses = [FunctionOperator(loss.hessian, exact=self.hvp.exact) for loss in self._losses]
        operator: LinearOperator = MeanOperator(losses)
        if self.regularized:
            exact = ReverseOverReverse().linearize(self._regularizer, self.upper, point)
            operator = SumOperator(ScaledOperator(1.0 / self.weight, operator), FunctionOperator(exact.hessian))
        if isinstance(self.shift, Mapping) or self.shift != 0.0:
            operator = ShiftedOperator(operator, self.shift)
        return operator

    def _loss_gradient(self) -> Params:
        total: Params = self._losses[0].gradient
        for loss in self._losses[1:]:
            total = tree.add(total, loss.gradient)
        return distributed.mean_over_ranks(tree.scale(1.0 / len(self._losses), total))

    def _fingerprint(self) -> list["_Mark"]:
        marks = [_Mark.of(f"lower[{n!r}]", t) for n, t in self.lower.items()]
        if self.problem.curvature_depends_on_upper:
            marks += [_Mark.of(f"upper[{n!r}]", t) for n, t in self.upper.items()]
        for k, batch in enumerate(self.lower_batches):
            marks += [_Mark.of(f"lower_batches[{k}], tensor {i}", t) for i, t in enumerate(tree.tensors_in(batch))]
        return marks


@dataclass(frozen=True)
class _Mark:
    """What a tensor looked like: version counters miss writes through `.data` and collectives, a sum catches most."""

    name: str
    identity: int
    version: int
    checksum: str

    @staticmethod
    def of(name: str, tensor: Tensor) -> "_Mark":
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)]
        # As text, so that a NaN equals itself.
        return _Mark(name, id(tensor), tensor._version, float.hex(float(sample.to(torch.float64).sum())))


def linearize(
    problem: Problem,
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    *,
    solver: Solver | None = None,
    hvp: HVPProvider | None = None,
    damping: float = 0.0,
    shift: Shift = 0.0,
    implicit: Implicit | None = None,
) -> System:
    r"""Build the linear system of the implicit function theorem at (upper, lower).

    With a regularizer r and :math:`c = \lambda + \text{damping} > 0`:

    .. math:: A = \frac{1}{c} \frac{\partial^2 L}{\partial y^2} + \frac{\partial^2 r}{\partial y^2} + \text{shift},
       \qquad \text{cross} = \frac{1}{c} \frac{\partial^2 L}{\partial x \partial y}
       + \frac{\partial^2 r}{\partial x \partial y},

    so that BiSSL's A is I + H/c (its Algorithm 2 and appendix B.3). Without one, A = d2L/dydy + shift and
    cross = d2L/dxdy. L is the mean over `lower_batches` (and over ranks). Random masks are drawn once per batch and
    stay the same for every product.

    Args:
        upper, lower: variables; the system keeps them and is stale once they change.
        lower_batches: a sequence of batches, whatever the Problem's lower_objective takes.
        solver: default ``CG()``.
        hvp: default ``ReverseOverReverse()``.
        damping: added to the regularization weight in the whole system; needs a regularizer.
        shift: Tikhonov's, added to A alone: one number, or one per lower name (0 where left out).
        implicit: names, or a predicate on names, of the lower variables that respond to the upper ones; default the
            Problem's `implicit`.

    Raises:
        TypeError: variables that are not Params; an `implicit` that is a bare string; batches that are not a sequence.
        ValueError: no batches; an unknown or empty `implicit`; a negative regularization weight or damping; damping
            without a regularizer; an unknown name in `shift`.
    """
    tree.check_params("upper", upper)
    tree.check_params("lower", lower)
    if isinstance(lower_batches, (str, bytes, Mapping, Tensor)) or not isinstance(lower_batches, Sequence):
        raise TypeError(
            f"lower_batches must be a sequence of batches, got {type(lower_batches).__name__}; for one batch pass [batch]"
        )
    if not lower_batches:
        raise ValueError("lower_batches is empty; the lower objective is the mean over at least one batch")
    _check_number("damping", damping)
    if problem.regularization_weight < 0.0:
        raise ValueError(f"regularization_weight must be >= 0, got {problem.regularization_weight}")
    names = _implicit_names(problem, lower, implicit)
    if isinstance(shift, Mapping):
        unknown = sorted(set(shift) - set(names))
        if unknown:
            raise ValueError(f"shift names {unknown}, which are not implicit lower variables; there are {list(names)}")
        for name, value in shift.items():
            _check_number(f"shift[{name!r}]", value)
    else:
        _check_number("shift", shift)
    return System(
        problem,
        upper,
        lower,
        lower_batches,
        solver=CG() if solver is None else solver,
        hvp=ReverseOverReverse() if hvp is None else hvp,
        damping=damping,
        shift=shift,
        implicit=names,
    )


def check_scalar(name: str, value: Tensor | None) -> Tensor:
    """Raise unless an objective returned a 0-d tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a 0-d tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(f"{name} must return a 0-d tensor, got shape {tuple(value.shape)}; take the mean over the batch")
    return value


def implicit_matches(implicit: Implicit, lower: Params) -> tuple[str, ...]:
    """Names of `lower` that `implicit` selects, in the order of `lower`."""
    if isinstance(implicit, str):
        raise TypeError(f"implicit must be a sequence of names or a predicate, got the string {implicit!r}; pass [{implicit!r}]")
    if callable(implicit):
        return tuple(name for name in lower if implicit(name))
    wanted = list(implicit)
    unknown = [name for name in wanted if name not in lower]
    if unknown:
        raise ValueError(f"implicit names {unknown}, which are not lower variables; there are {list(lower)}")
    return tuple(name for name in lower if name in wanted)


def _implicit_names(problem: Problem, lower: Params, implicit: Implicit | None) -> tuple[str, ...]:
    names = implicit_matches(problem.implicit if implicit is None else implicit, lower)
    if not names:
        raise ValueError(f"implicit selects no lower variable; it must match at least one of {list(lower)}")
    return names


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
