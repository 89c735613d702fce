"""The hypergradient by the implicit function theorem."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from bilevel import tree
from bilevel.checks import check_count, check_kind, check_number
from bilevel.hypergradients.linearize import make_system
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.result import Hypergradient
from bilevel.hypergradients.system import System, through_system
from bilevel.linear import CG, Solution, Solver, Status
from bilevel.lower import (
    ResidualProblem,
    Selection,
    Tikhonov,
    check_selection,
    check_tikhonov,
    check_tikhonov_names,
    selected,
    upper_derivatives,
)
from bilevel.problem import Problem
from bilevel.products import HVP, Automatic, HVPProvider, ReverseOverReverse, as_provider
from bilevel.tree import Params

_SOUND = (Status.CONVERGED, Status.AT_THE_NOISE, Status.LOST_IN_THE_NOISE, Status.BUDGET, Status.NOT_CONVERGED)
"""After these the iterate is one that a next solve may start from."""


@final
@dataclass(frozen=True, eq=False)
class Implicit(Method):
    r"""Implicit differentiation at a lower solution y:

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x}
       - \frac{\partial^2 G}{\partial x \partial y} A^{-1} \frac{\partial F}{\partial y}

    with A and the cross term as `linearize` defines them (BiSSL eq. 6-7; Lorraine et al. 2020). In a trainer all upper
    steps of an alternation use the system of the same `hessian_batches` lower batches, which is built once where the
    Problem says that its curvature does not depend on the upper variables. Lower levels that are no smooth minimum
    (`bilevel.lower.ResidualProblem`) have a system that is not symmetric: give a solver such as `GMRES`.

    Args:
        solver: of A x = dF/dy.
        hvp: Hessian-vector products, a provider or "auto" (`linearize`).
        damping, tikhonov, implicit: as for `linearize`.
        hessian_batches: K, how many lower batches make the system's mean in a trainer: the alternation's first ones.
        fresh_batches: draw these K after the lower steps instead, so that the lower variables have not been fitted to
            them just before. They are taken from the lower level's data, whose stages are then K batches longer.
        aggregate: solve once an alternation, for the sum of its upper steps' right-hand sides (each by its learning
            rate), instead of once a step: all but the last step go along dF/dx alone, and the last one takes the whole
            implicit part. Needs ``curvature_depends_on_upper = False``. The summed update is that of separate solves
            where dF/dx does not depend on the upper variables that the implicit part moves, the optimizer is SGD and
            no norm limit binds; otherwise the implicit part is seen up to upper_steps - 1 steps later: a bias of the
            order of gamma in BiSSL, and with momentum a displacement that comes later (the same in total at a constant
            rate). The norm limit of the last step is wider by the sum of the rates over its own.
        warm_start: start each solve from the last one's solution x0 where one product shows that it helps,
            ``||b - A x0|| < ||b||``; the product is not lost, since a solve from x0 begins with it. What a breakdown
            (negative curvature, divergence) left is not kept, an unfinished solve's iterate is, and
            `Problem.reset_lower` forgets it. With independent upper batches the last solution is often worse than zero:
            then the product is all that it costs.

    A solver that remembers directions (`CG(memory=...)`) hands them from one system of a training to the next;
    `Problem.reset_lower` forgets them.

    Raises:
        TypeError: a solver or provider that is not one.
        ValueError: a number out of its range.
    """

    serves_residuals = True

    solver: Solver = field(default_factory=CG)
    hvp: HVP = field(default_factory=ReverseOverReverse, kw_only=True)
    damping: float = field(default=0.0, kw_only=True)
    tikhonov: Tikhonov = field(default=0.0, kw_only=True)
    implicit: Selection | None = field(default=None, kw_only=True)
    hessian_batches: int = field(default=1, kw_only=True)
    fresh_batches: bool = field(default=False, kw_only=True)
    aggregate: bool = field(default=False, kw_only=True)
    warm_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_kind("Implicit: solver", self.solver, Solver, "a solver such as CG() or Neumann(10)")
        as_provider(self.hvp)
        object.__setattr__(self, "implicit", check_selection("Implicit", self.implicit))
        check_number("Implicit: damping", self.damping)
        check_tikhonov(self.tikhonov)
        check_count("Implicit: hessian_batches", self.hessian_batches, least=1)
        for name in ("fresh_batches", "aggregate", "warm_start"):
            check_kind(f"Implicit: {name}", getattr(self, name), bool, "True or False")
        if self.warm_start and not self.solver.uses_start:
            raise ValueError(
                f"Implicit: warm_start=True, but {type(self.solver).__name__} has no use for a start; take a solver "
                "that iterates, or leave it out"
            )

    @property
    def stored_batches(self) -> int:
        return self.hessian_batches

    def check(self, setup: Setup) -> None:
        if isinstance(setup.problem, ResidualProblem):
            self.solver.check_symmetry(setup.problem.symmetric)
        check_tikhonov_names(self.tikhonov, selected(setup.problem, setup.lower, self.implicit))
        if not self.aggregate:
            return
        if setup.problem.curvature_depends_on_upper:
            raise ValueError(
                "aggregate=True: one solve serves several upper steps only where the curvature does not depend on the "
                "upper variables; set curvature_depends_on_upper = False in the Problem if that is so, or leave "
                "aggregate out"
            )
        if len({group["lr"] for group in setup.upper_optimizer.param_groups}) > 1:
            raise ValueError(
                "aggregate=True: the upper optimizer's parameter groups have different learning rates, but the steps "
                "of an alternation are summed by one; give all groups one rate, or leave aggregate out"
            )

    def starts_anew(self, setup: Setup) -> bool:
        several = setup.upper_steps > 1 and not (self.aggregate or setup.problem.curvature_depends_on_upper)
        return several and self.solver.learns

    def prepare(self, step: UpperStep, state: MethodState) -> System:
        # "auto" measures anew for every training; a training that has chosen keeps its choice.
        provider = as_provider(self.hvp)
        if isinstance(provider, Automatic) and "hvp" in state:
            provider.load_state_dict({"chosen": state["hvp"]})
        at_once = step.count == 1 or step.problem.curvature_depends_on_upper
        system = self.system(step.problem, step.upper, step.lower, step.lower_batches, provider, at_once=at_once)
        self.solver.remember(system.state, state.get("memory", {}))
        return system

    def system(
        self,
        problem: Problem,
        upper: Params,
        lower: Params,
        lower_batches: Sequence[Any],
        provider: HVPProvider | None = None,
        *,
        at_once: bool = False,
    ) -> System:
        """The linear system at (upper, lower), whose `provider` stands for `hvp`; `at_once` as for `make_system`."""
        return make_system(
            problem,
            upper,
            lower,
            lower_batches,
            solver=self.solver,
            hvp=self.hvp if provider is None else provider,
            damping=self.damping,
            tikhonov=self.tikhonov,
            implicit=self.implicit,
            at_once=at_once,
        )

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        system: System = prepared
        pending = _Pending.of(step, state)
        if self.aggregate and step.position + 1 < step.count:
            loss, direct, v = upper_derivatives(step.problem, step.upper, step.lower, system.implicit, step.upper_batch)
            return Proposal(direct, loss, self._next(state, system, pending.and_of(v, step.upper_rate or 0.0)))
        rate = step.upper_rate or 0.0
        if rate == 0.0 and pending.rates > 0.0:
            raise ValueError(
                f"upper scheduler: the learning rate is 0 in upper step {step.number}, which takes the implicit part "
                "of its whole alternation; end above 0, or leave aggregate out"
            )
        scale, start = pending.scale(rate), state.get("start")

        def solve(v: Params) -> Solution:
            return _solve(step, system, pending.whole(v, rate), start and tree.scale(scale, start))

        result = through_system(
            system, step.upper, step.lower, step.upper_batch, solve=solve, on_failure=step.on_failure
        )
        following = self._next(state, system, _Pending())
        if self.warm_start and result.solution is not None:
            following.pop("start", None)
            if result.solution.status in _SOUND:
                following["start"] = tree.scale(1.0 / scale, result.solution.value)
        result, following = _with_active_changes(result, state, following)
        return Proposal(result.grad, result.loss, following, result, scale)

    def _next(self, state: MethodState, system: System, pending: "_Pending") -> MethodState:
        chosen = system.hvp.state_dict()["chosen"] if isinstance(system.hvp, Automatic) else None
        start = state.get("start") if self.warm_start else None
        kept = {"start": start, "hvp": chosen, "right": pending.right, "rates": pending.right and pending.rates}
        kept["memory"] = self.solver.memory_of(system.state) or None
        return {name: value for name, value in kept.items() if value is not None}

    def restarted(self, state: MethodState) -> MethodState:
        return {name: value for name, value in state.items() if name == "hvp"}


def _with_active_changes(
    result: Hypergradient, state: MethodState, following: MethodState
) -> tuple[Hypergradient, MethodState]:
    """How many entries of a proximal problem's active set are others than in the step before; the set is kept."""
    now, before = result.active_set, state.get("active")
    if now is None:
        return result, following
    changes = int((now != before).sum()) if before is not None and before.shape == now.shape else None
    return replace(result, active_changes=changes), {**following, "active": now}


def _solve(step: UpperStep, system: System, b: Params, start: Params | None) -> Solution:
    """A^-1 b, from `start` where it is of these variables and one product shows that it helps."""
    if start is None or start.keys() != b.keys():
        return system.solve(b, watch=step.watch)
    step.watch()
    x0 = {name: start[name].to(b[name].device) for name in b}
    return system.solve(b, x0=x0, only_if_closer=True, watch=step.watch)


@dataclass(frozen=True)
class _Pending:
    """Right-hand sides of earlier steps that wait for the solve, each by its learning rate, and the sum of these."""

    right: Params | None = None
    rates: float = 0.0

    @staticmethod
    def of(step: UpperStep, state: MethodState) -> "_Pending":
        right = state.get("right")
        if right is None or step.position == 0:
            return _Pending()
        return _Pending({n: leaf.to(step.lower[n].device) for n, leaf in right.items()}, state["rates"])

    def and_of(self, v: Params, rate: float) -> "_Pending":
        """With the right-hand side of one more step."""
        return _Pending(
            tree.scale(rate, v) if self.right is None else tree.axpy(rate, v, self.right), self.rates + rate
        )

    def whole(self, v: Params, rate: float) -> Params:
        """The right-hand side v of a step at this learning rate with the pending ones added, in its units."""
        return v if self.right is None or rate == 0.0 else tree.axpy(1.0 / rate, self.right, v)

    def scale(self, rate: float) -> float:
        """The sum of all rates in units of the last one."""
        return 1.0 + (self.rates / rate if rate > 0.0 else 0.0)
