"""The hypergradient by the sensitivity of the lower optimizer (SAMA)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, final

import torch

from bilevel import tree
from bilevel.checks import check_count, check_kind
from bilevel.hypergradients.approximation import by_approximation, unsolved_system
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.updates.torch_updates import from_optimizer
from bilevel.hypergradients.updates.update import State, Update, starting_state
from bilevel.lower import Selection, check_selection, selected
from bilevel.products import HVP, ReverseOverReverse, as_provider
from bilevel.tree import Params


@final
@dataclass(frozen=True, eq=False)
class SAMA(Method):
    r"""The inverse replaced by the lower optimizer's own sensitivity (SAMA; Choe et al. 2023, section 3):

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x} - \frac{\partial^2 G}{\partial x \partial y}\, D\,
       \frac{\partial F}{\partial y}, \qquad D = - \frac{\partial U}{\partial g}(y, g, s),

    where U(y, g, s) is where the lower optimizer would go next from y with the gradient g = dG/dy. D is the learning
    rate for plain descent, and a diagonal for Adam,

    .. math:: D = \frac{\alpha}{1 - \beta_1^t} \Big[\frac{1 - \beta_1}{r + \epsilon}
       - \frac{(1 - \beta_2)\, m\, g}{(1 - \beta_2^t)\, r\, (r + \epsilon)^2}\Big], \qquad
       r = \sqrt{s / (1 - \beta_2^t)},

    with the moments m, s after that step. It is taken by automatic differentiation, for any `Update`. y should have
    nearly converged under the optimizer. The paper's adjustment of the lower variables along D dF/dy is not made:
    nothing is written. A trainer's norm limit is no part of D. The result's `solution` holds D dF/dy (times lambda
    where there is a regularizer, by the system's scale) and no residual.

    Args:
        update: the lower optimizer; None takes the live one, which only a trainer has.
        state: of `update` before its next step, as `from_optimizer` gives it; None for a fresh one.
        hvp: gives the cross term; default ``ReverseOverReverse()``. ``FiniteDifference()`` computes gradients only, as
            for `OneStep`. The regularizer's cross term is exact in any case.
        implicit: as for `linearize`.
        lower_batches: how many lower batches G is the mean of in a trainer.

    Raises:
        TypeError: an `update` or provider that is not one.
        ValueError: a state that does not cover the variables; no update where there is no optimizer; in a trainer, a
            lower optimizer that `from_optimizer` refuses.
    """

    update: Update | None = None
    state: State | None = None
    hvp: HVP = field(default_factory=ReverseOverReverse, kw_only=True)
    implicit: Selection | None = field(default=None, kw_only=True)
    lower_batches: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.update is not None:
            check_kind("SAMA: update", self.update, Update, "an Update such as AdamUpdate(lr=1e-3), or None")
        elif self.state is not None:
            raise ValueError("SAMA: a state belongs to an update; pass the update too, or leave the state out")
        check_kind("SAMA: state", self.state, (Mapping, NoneType), "the state that from_optimizer gave, or None")
        object.__setattr__(self, "hvp", as_provider(self.hvp))
        object.__setattr__(self, "implicit", check_selection("SAMA", self.implicit))
        check_count("SAMA: lower_batches", self.lower_batches, least=1)

    @property
    def stored_batches(self) -> int:
        return self.lower_batches

    def check(self, setup: Setup) -> None:
        selected(setup.problem, setup.lower, self.implicit)
        if self.update is None:
            from_optimizer(setup.lower_optimizer, setup.lower)
        else:
            starting_state(self.update, setup.lower, self.state)

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        update, slots = self.update, self.state
        if update is None:
            if step.lower_update is None:
                raise ValueError("SAMA: update is missing; there is no lower optimizer here that it could be read from")
            update, slots = step.lower_update()
        system = unsolved_system(step, self.hvp, self.implicit)
        slots = starting_state(update, step.lower, slots)
        sensitivity = _sensitivity(update, tree.detach(step.lower), system.gradient(), slots)
        return by_approximation(step, state, system, step.lower, sensitivity)


def _sensitivity(update: Update, lower: Params, gradient: Params, state: State) -> Callable[[Params], Params]:
    """b -> -(dU/dg)' b over the names of `gradient`; the other variables get no gradient."""

    @torch.enable_grad()
    def product(b: Params) -> Params:
        g = tree.as_variables(gradient)
        moved, _ = update.step(lower, {**tree.zeros_like(lower), **g}, state)
        return tree.scale(-1.0, tree.pullback({name: moved[name] for name in g}, b, [g])[0])

    return product
