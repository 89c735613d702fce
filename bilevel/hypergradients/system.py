"""The linear system behind one hypergradient, built once and solved for many right-hand sides."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.checks import same_structure
from bilevel.hypergradients.result import (
    AdjointSolve,
    Hypergradient,
    OnFailure,
    check_on_failure,
    finite_failure,
    joined,
    noise_warning,
    report_failure,
    solve_failure,
)
from bilevel.linear import (
    FunctionOperator,
    LinearOperator,
    MeanOperator,
    SampledOnce,
    ScaledOperator,
    Solution,
    Solver,
    Status,
    SumOperator,
    TikhonovOperator,
    WatchedOperator,
    mean_and_error,
)
from bilevel.lower import (
    BufferWatch,
    Examination,
    Inputs,
    LowerObjectives,
    PerProblem,
    Tikhonov,
    check_batch,
    cross_examined,
    differentiates,
    examine_cross,
    examine_curvature,
    examine_response,
    halves,
    upper_derivatives,
)
from bilevel.nn import curvature_surroundings
from bilevel.problem import Problem
from bilevel.products import Hessians, HVPProvider, Linearization, MicroBatched, ReverseOverReverse, reached
from bilevel.sharded import check_variable
from bilevel.tree import Params

_coupled = PerProblem[set[tuple[str, ...]]](set)
"""Names of upper variables on some of which a lower objective's gradient was found to depend."""


class System:
    r"""A and the cross term at one point, as `linearize` documents them, with the solver's reusable state.

    Attributes:
        operator: A, over the implicit lower variables.
        implicit: names of the implicit lower variables.
        solver, hvp, damping, tikhonov, lower_batches: what shaped the system.
        weight: c = regularization_weight + damping, by which A and the cross term are divided; 1 without regularizer.
        curvature: what is known of second derivatives that the lower objective loses (`Problem.check_curvature`).
        has_regularizer: whether there is one, whatever its weight, so that damping is something to raise.
        at_once: whether it is used within the call that makes it, where version counters are asked for changes, and no
            checksums are made.
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
        tikhonov: Tikhonov,
        implicit: tuple[str, ...],
        at_once: bool = False,
    ) -> None:
        self.problem, self.upper, self.lower = problem, dict(upper), dict(lower)
        self._upper_versions = [leaf._version for leaf in self.upper.values()]
        self.lower_batches = tuple(lower_batches)
        self.solver, self.hvp, self.damping, self.tikhonov, self.implicit = solver, hvp, damping, tikhonov, implicit
        seed = int(torch.randint(2**31 - 1, ()))
        self._buffers = BufferWatch()
        self._objectives = LowerObjectives(problem, lower, seed, self._buffers)
        point = self.variables(lower)
        self.has_regularizer = self._objectives.has_regularizer(upper, point)
        if not self.has_regularizer and damping != 0.0:
            raise ValueError(
                f"damping={damping}: damping adds to the weight of the regularizer, and this problem has none; use "
                "tikhonov for Tikhonov damping of A alone"
            )
        total = problem.regularization_weight + damping
        self.regularized = self.has_regularizer and total > 0.0
        self.weight = total if self.regularized else 1.0
        # Not of a whole batch that is too large for the memory.
        if hvp.needs_outputs and not isinstance(hvp, MicroBatched):
            self._objectives.check_composition(self.lower_batches[0], upper, point)
        living = [*lower.values(), *tree.tensors_in(self.lower_batches)]
        if at_once and isinstance(hvp, ReverseOverReverse):
            self.hvp = hvp.for_use_at_once([*upper.values(), *living])
        self._losses = self._linearizations(self.lower_batches, living)
        self.curvature = self._examined()
        self.operator = self._build_operator(point)
        self.state = solver.prepare(self.operator)
        self._inputs = Inputs(problem, self.upper, self.lower, self.lower_batches, self._buffers, sums=not at_once)

    def variables(self, lower: Params) -> Params:
        """The implicit part of `lower`, detached."""
        return {name: lower[name].detach() for name in self.implicit}

    @differentiates
    def hypergradient(
        self, upper_batch: Any, *, x0: Params | None = None, on_failure: OnFailure = "warn"
    ) -> Hypergradient:
        """The hypergradient of F on one batch, at the system's variables as they are now, as `Implicit` defines it.

        Upper variables that the curvature does not depend on may have changed since `linearize`.

        Args:
            x0: first iterate of the solve, for example a former ``solution.value``.
            on_failure: as for `bilevel.hypergradient`.

        Raises:
            StaleSystemError: something else that the system was built from has changed.
            RuntimeError: under torch.inference_mode.
            SolverError: with ``on_failure="raise"``.
        """
        check_on_failure(on_failure)
        check_batch("upper_batch", [upper_batch])
        self.check_fresh()
        result = through_system(
            self, self.upper, self.lower, upper_batch, solve=lambda v: self.solve(v, x0=x0), on_failure=on_failure
        )
        report_failure(result, on_failure)
        return result

    @differentiates
    def solve(
        self,
        b: Params,
        *,
        x0: Params | None = None,
        only_if_closer: bool = False,
        watch: Callable[[], None] | None = None,
    ) -> Solution:
        """Solve A x = b with the system's solver and state; b is over the implicit variables.

        Args:
            x0: first iterate.
            only_if_closer: start from x0 only where ``||b - A x0|| < ||b||``, and from nothing otherwise.
            watch: called before each product; what it raises ends the solve.

        Raises:
            StaleSystemError: something the system was built from has changed.
            ValueError: a b with other names or shapes than the implicit variables.
            TypeError: a b of DTensors.
        """
        self.check_fresh()
        if not same_structure(b, {name: self.lower[name] for name in self.implicit}):
            raise ValueError(
                f"b must have the names and shapes of the implicit variables {list(self.implicit)}, got {list(b)}"
            )
        b = {name: b[name] for name in self.implicit}
        for name, leaf in b.items():
            check_variable(f"b[{name!r}]", leaf)
        operator = self.operator if watch is None else WatchedOperator(self.operator, watch)
        # Over several processes it would take an exchange a batch.
        if len(self.lower_batches) == 1 or distributed.world_size() > 1:
            return self._solve(operator, b, x0, only_if_closer)
        sampled = SampledOnce(operator)
        found = self._solve(sampled, b, x0, only_if_closer)
        if sampled.noise is None or found.noise is not None or found.status is Status.NON_FINITE:
            return found
        return replace(found, noise=float(sampled.noise * tree.norm(found.value) / tree.norm(b)))

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, only_if_closer: bool) -> Solution:
        if x0 is None or not (only_if_closer and self.solver.uses_start):
            return self.solver.solve(operator, b, x0=x0, state=self.state)
        product = operator(x0)
        if bool(tree.norm(tree.sub(b, product)) < tree.norm(b)):
            return self.solver.solve(operator, b, x0=x0, x0_product=product, state=self.state)
        found = self.solver.solve(operator, b, state=self.state)
        return replace(found, num_hvps=found.num_hvps + 1)

    def standard_errors(self, x: Params) -> tuple[float, float] | None:
        """Standard errors of A x and of `gradient` that come from the choice of the batches, or for a single batch of
        its halves; one product. None where that is not to be split, or the objective does not take a half."""
        first, *others = self.lower_batches
        if others:
            error, noise = self.operator.sampled(x)[1], self.gradient_noise()
            return None if error is None or noise is None else (float(error), noise)
        parts = halves(self.problem, first)
        if parts is None:
            return None
        try:
            losses = self._linearizations(parts)
            products, gradients = [loss.hessian(x) for loss in losses], [loss.gradient() for loss in losses]
        except (RuntimeError, ValueError, TypeError, IndexError):
            # Nobody has promised that the objective takes a batch of another size.
            return None
        error, noise = mean_and_error(products)[1], mean_and_error(gradients)[1]
        return None if error is None or noise is None else (float(error) / self.weight, float(noise))

    @differentiates
    def cross(self, x: Params, upper: Params | None = None) -> Params:
        """``(d2G/dxdy) x / c`` over the upper variables, at `upper` (default: the system's own, as they are now)."""
        point = tree.detach(self.upper if upper is None else upper)
        if self._is_coupled:
            loss_part = MeanOperator([FunctionOperator(self._cross_of(loss, upper)) for loss in self._losses])
            total = loss_part(x) if self.weight == 1.0 else tree.scale(1.0 / self.weight, loss_part(x))
        else:
            total = tree.zeros_like(point)
        if self.regularized:
            # Written out by hand, most often quadratic: exact in reverse mode whatever the provider does to L.
            exact = ReverseOverReverse().linearize(self._objectives.penalty, point, self.variables(self.lower))
            total = tree.add(exact.cross(x, point), total)
        if not cross_examined(self.problem, point):
            examine_cross(self.problem, self._reached_upper | self._reached_by_penalty(point), point)
        return total

    def _cross_of(self, loss: Linearization, upper: Params | None) -> Callable[[Params], Params]:
        """A batch's cross term at `upper`: from what its products have made, where these are the system's own upper
        variables, which make it stale once they move, and they have not moved."""
        own = upper is None or all(leaf is self.upper.get(name) for name, leaf in upper.items())
        still = [leaf._version for leaf in self.upper.values()] == self._upper_versions
        if own and still and self.problem.curvature_depends_on_upper:
            return loss.cross_here
        point = tree.detach(self.upper if upper is None else upper)
        return lambda v: loss.cross(v, point)

    def check_response(self, upper: Params) -> None:
        """Raise ValueError where neither L nor r reaches any upper variable, so that y does not respond to them; for a
        problem and names that have once been reached, no more."""
        examine_response(self.problem, upper, lambda: self._is_coupled or bool(self._reached_by_penalty(upper)))

    def stationarity(self, upper: Params | None = None) -> float:
        """Norm of `gradient`."""
        return float(tree.norm(self.gradient(upper)))

    def gradient(self, upper: Params | None = None) -> Params:
        """dG/dy over the implicit variables, with the undamped regularization weight; `upper` as in `cross`."""
        return self.gradient_and_noise(upper)[0]

    def gradient_noise(self, upper: Params | None = None) -> float | None:
        r"""Standard error of `gradient` that comes from the choice of batches, :math:`(\sum_k \|g_k - \bar g\|^2
        / (K (K - 1)))^{1/2}`; None for a single batch. A `stationarity` of a few times this is as stationary as the
        batches can tell."""
        noise = self.gradient_and_noise(upper)[1]
        return None if noise is None else float(noise)

    @differentiates
    def gradient_and_noise(self, upper: Params | None = None) -> tuple[Params, Tensor | None]:
        """`gradient` and `gradient_noise`, 0-d, from one pass over the batches."""
        upper = tree.detach(self.upper if upper is None else upper)
        gradient, noise = self._loss_gradient(upper)
        weight = self.problem.regularization_weight
        if self.regularized and weight > 0.0:
            y = tree.as_variables(self.variables(self.lower))
            with torch.enable_grad():
                value = self._objectives.penalty(upper, y)
            gradient = tree.axpy(weight, tree.gradients(value, y), gradient)
        return gradient, noise

    def batch_sums(self) -> tuple[str, ...]:
        """Checksums of the tensors of the lower batches."""
        return self._inputs.batch_sums()

    def invalidate(self) -> None:
        """Declare the system stale by hand, for changes that it cannot see (data in objects of one's own)."""
        self._inputs.invalidate()

    def check_fresh(self) -> None:
        """Raise StaleSystemError if variables or batches are other objects, other versions or have other sums."""
        self._inputs.check()

    @cached_property
    def _reached_upper(self) -> set[str]:
        """Upper variables that the first batch's loss to reach any reaches."""
        return next((found for loss in self._losses if (found := loss.reached_upper())), set())

    @cached_property
    def _is_coupled(self) -> bool:
        """Whether dL/dy changes with upper variables for any batch on any rank, so that all ranks take part in the mean
        of the cross term. Where it once did for a problem and names, that is taken for granted."""
        known, names = _coupled.of(self.problem), tuple(self.upper)
        if names not in known:
            met = [loss.depends_on_upper() for loss in self._losses]
            # What no product has met takes a pass, which `_reached_upper` makes once.
            depends = bool(self._reached_upper) if None in met and True not in met else any(met)
            if self.operator.agree(depends):
                known.add(names)
        return names in known

    def _reached_by_penalty(self, upper: Params) -> set[str]:
        x = tree.as_variables(upper)
        value = self._objectives.regularizer(x, self.variables(self.lower))
        return set() if value is None else reached([value], x)

    def _linearizations(self, batches: Sequence[Any], resident: Iterable[Tensor] = ()) -> list[Linearization]:
        """Of the batches' losses at the system's point."""
        make = self._objectives.composed if self.hvp.needs_outputs else self._objectives.whole
        objectives = [make(batch, self._objectives.seed + k) for k, batch in enumerate(batches)]
        return self.hvp.linearize_all(objectives, self.upper, self.variables(self.lower), resident=resident)

    def _examined(self) -> Examination:
        """What is known of second derivatives that the lower objective loses."""
        return examine_curvature(self.problem, self.upper, self.lower, self.lower_batches[0], self.implicit, self.hvp)

    def flaw(self) -> str | None:
        """In words, what makes the theorem's assumptions doubtful at this point, None where nothing is known to."""
        return None

    def active_set(self) -> Tensor | None:
        """Which pieces of a proximal map y lies on (`Hypergradient.active_set`); None for other kinds."""
        return None

    def _build_operator(self, point: Params) -> LinearOperator:
        operator = self._without_tikhonov(point)
        if isinstance(self.tikhonov, Mapping) or self.tikhonov != 0.0:
            operator = TikhonovOperator(operator, self.tikhonov)
        return operator

    def _without_tikhonov(self, point: Params) -> LinearOperator:
        losses = [FunctionOperator(loss.hessian, exact=self.hvp.exact) for loss in self._losses]
        operator: LinearOperator = MeanOperator(losses, Hessians(self._losses))
        if self.regularized:
            exact = ReverseOverReverse().linearize(self._objectives.penalty, self.upper, point)
            operator = SumOperator(ScaledOperator(1.0 / self.weight, operator), FunctionOperator(exact.hessian))
        return operator

    def _loss_gradient(self, upper: Params) -> tuple[Params, Tensor | None]:
        """The mean of the batches' gradients, and its standard error."""
        if not self.problem.curvature_depends_on_upper and self._is_coupled:
            return mean_and_error([loss.gradient_at(upper) for loss in self._losses])
        return self._loss_gradient_here

    @cached_property
    def _loss_gradient_here(self) -> tuple[Params, Tensor | None]:
        return mean_and_error([loss.gradient() for loss in self._losses])


def through_system(
    system: System,
    upper: Params,
    lower: Params,
    upper_batch: Any,
    *,
    solve: Callable[[Params], Solution],
    on_failure: OnFailure = "ignore",
) -> Hypergradient:
    """Hypergradient with F taken at `lower` and the cross term at the system's point; `solve` gives x for dF/dy.

    Unless `on_failure` is "ignore", products are spent on what would help a solve that broke down.
    """
    with curvature_surroundings():
        loss, direct, v = upper_derivatives(system.problem, upper, lower, system.implicit, upper_batch)
        implicit_part, whole, made = adjoint(system, v, upper, direct, solve=solve, on_failure=on_failure)
    return Hypergradient(whole, direct, implicit_part, loss, **vars(made))


def adjoint(
    system: System,
    v: Params,
    upper: Params,
    direct: Params | None = None,
    *,
    solve: Callable[[Params], Solution],
    on_failure: OnFailure,
) -> tuple[Params, Params, AdjointSolve]:
    """-(cross term) x, where `solve` gives x for v, its sum with `direct`, and what is known about it."""
    with curvature_surroundings():
        solution = solve(v)
        implicit_part = tree.scale(-1.0, system.cross(solution.value, upper))
        gradient, noise = system.gradient_and_noise(upper)
        failed = solve_failure(system, solution, v, on_failure)
    whole = implicit_part if direct is None else tree.add(direct, implicit_part)
    lost = system.curvature.lost(hessian=solution.num_hvps > 0)
    stationarity, size, *known = tree.read(tree.norm(gradient), tree.norm(whole), *([] if noise is None else [noise]))
    sound = math.isfinite(size) or tree.all_finite(whole)
    not_finite = None if sound else finite_failure(direct or {}, implicit_part)
    failure = joined(lost, failed or not_finite, system.flaw())
    warning = noise_warning(system, solution, v, stationarity)
    noise = known[0] if known else None
    return implicit_part, whole, AdjointSolve(solution, stationarity, noise, failure, warning, system.active_set())
