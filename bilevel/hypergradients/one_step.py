"""The hypergradient through one virtual step of gradient descent (DARTS)."""

from dataclasses import dataclass, field
from typing import Any, final

from bilevel import tree
from bilevel.checks import check_count, check_number
from bilevel.hypergradients.approximation import by_approximation, unsolved_system
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.lower import Selection, check_selection, selected
from bilevel.products import HVP, ReverseOverReverse, as_provider


@final
@dataclass(frozen=True, eq=False)
class OneStep(Method):
    r"""One virtual step of gradient descent (DARTS; Liu, Simonyan & Yang 2019, eq. 7-8):

    .. math:: y' = y - \xi \frac{\partial G}{\partial y}(x, y), \qquad
       \frac{dF}{dx} = \frac{\partial F}{\partial x}(x, y')
       - \xi \frac{\partial^2 G}{\partial x \partial y}(x, y)\, \frac{\partial F}{\partial y}(x, y').

    With an exact provider it equals one unrolled step of ``SGDUpdate(step_size)``. y need not have converged, and is
    not moved. The result's `stationarity` is that of y, its `solution` holds xi dF/dy' (times lambda where there is a
    regularizer, by the system's scale) and no residual.

    Args:
        step_size: xi > 0; None takes the lower optimizer's learning rate, which only a trainer has.
        hvp: gives the cross term; default ``ReverseOverReverse()``. With ``FiniteDifference()`` only gradients are
            computed, at the price of their error at kinks and of what they see through a ``detach`` in the objective
            (a weighting network that looks at ``loss.detach()`` needs exact products). The paper's own formula, with a
            step of 0.01 / ||dF/dy'||, is ``FiniteDifference(step=0.01)``. The regularizer's cross term is exact in any
            case.
        implicit: as for `linearize`; only these variables make the virtual step.
        lower_batches: how many lower batches G is the mean of in a trainer.

    Raises:
        ValueError: a number out of its range; no step size where there is no optimizer.
        TypeError: a provider that is not one.
    """

    step_size: float | None = None
    hvp: HVP = field(default_factory=ReverseOverReverse, kw_only=True)
    implicit: Selection | None = field(default=None, kw_only=True)
    lower_batches: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.step_size is not None:
            check_number("OneStep: step_size", self.step_size, positive=True)
        object.__setattr__(self, "hvp", as_provider(self.hvp))
        object.__setattr__(self, "implicit", check_selection("OneStep", self.implicit))
        check_count("OneStep: lower_batches", self.lower_batches, least=1)

    @property
    def stored_batches(self) -> int:
        return self.lower_batches

    def check(self, setup: Setup) -> None:
        selected(setup.problem, setup.lower, self.implicit)
        rates = sorted({float(group["lr"]) for group in setup.lower_optimizer.param_groups})
        if self.step_size is None and len(rates) > 1:
            raise ValueError(
                f"OneStep: step_size=None takes the lower optimizer's learning rate, and its parameter groups have "
                f"several, {rates}; pass step_size, or give all groups one rate"
            )

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        size = step.lower_rate if self.step_size is None else self.step_size
        if size is None:
            raise ValueError("OneStep: step_size is missing; there is no lower optimizer here whose rate it could be")
        system = unsolved_system(step, self.hvp, self.implicit)
        virtual = {**step.lower, **tree.axpy(-size, system.gradient(), system.variables(step.lower))}
        return by_approximation(step, state, system, virtual, lambda b: tree.scale(size, b))
