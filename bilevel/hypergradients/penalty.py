"""The hypergradient of the penalised problem: first derivatives and a second copy of the lower variables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, final

import torch

from bilevel import tree
from bilevel.checks import check_count, check_kind, check_number, same_structure
from bilevel.hypergradients.method import Method, MethodState, Proposal, Setup, UpperStep
from bilevel.hypergradients.result import Hypergradient
from bilevel.hypergradients.updates.update import Update
from bilevel.lower import Selection, check_selection, lower_derivatives, selected, upper_derivatives
from bilevel.tree import Params


@final
@dataclass(frozen=True, eq=False)
class Penalty(Method):
    r"""The penalty formulation (F2SA; Kwon, Kwon, Wright & Nowak 2023):

    .. math:: z \approx \arg\min_z \; G(x, z) + F(x, z) / \sigma, \qquad
       \frac{dF}{dx} \approx \frac{\partial F}{\partial x}(x, z)
       + \sigma \Big[\frac{\partial G}{\partial x}(x, z) - \frac{\partial G}{\partial x}(x, y)\Big].

    z is trained here, one step of `update` for each lower batch, and in a trainer carried on from step to step. With
    exact minimizers y and z the error is of order 1 / sigma (none if F is linear and G quadratic in y); what is missing
    to the minimum, and rounding, comes in multiplied by sigma. The result's `solution` is None, its `lower` z, its
    `stationarity` the norm of dG/dy at y.

    Args:
        update: the optimizer of z, with a fresh state in every upper step.
        penalty: sigma > 0.
        penalized: where z starts first, for example a former result's `lower`; default y.
        implicit: as for `linearize`; the other variables stay the same in y and z.
        lower_batches: how many lower batches, and steps of z, an upper step takes in a trainer; both dG/dx are means
            over all of them, with the same random masks.

    Raises:
        TypeError: an `update` that is not one; `penalized` that is not Params.
        ValueError: a number out of its range; `penalized` with other names or shapes than the lower variables.
    """

    update: Update
    penalty: float
    penalized: Params | None = None
    implicit: Selection | None = field(default=None, kw_only=True)
    lower_batches: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_kind("Penalty: update", self.update, Update, "an Update such as SGDUpdate(lr=0.1)")
        check_number("Penalty: penalty", self.penalty, positive=True)
        object.__setattr__(self, "implicit", check_selection("Penalty", self.implicit))
        check_count("Penalty: lower_batches", self.lower_batches, least=1)
        if self.penalized is not None:
            tree.check_params("Penalty: penalized", self.penalized)

    @property
    def stored_batches(self) -> int:
        return self.lower_batches

    def check(self, setup: Setup) -> None:
        selected(setup.problem, setup.lower, self.implicit)
        self._start(setup.lower, {})

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        names = selected(step.problem, step.lower, self.implicit)
        upper, lower = tree.detach(step.upper), tree.detach(step.lower)
        start = self._start(lower, state)
        batches = [(batch, int(torch.randint(2**31 - 1, ()))) for batch in step.lower_batches]
        end = {**lower, **self._descend(step, upper, {**lower, **{n: start[n] for n in names}}, names, batches)}

        loss, direct, _ = upper_derivatives(step.problem, upper, end, names, step.upper_batch)
        step.watch()
        at_z = [lower_derivatives(step.problem, upper, end, names, *drawn)[0] for drawn in batches]
        at_y = [lower_derivatives(step.problem, upper, lower, names, *drawn) for drawn in batches]
        response = tree.scale(self.penalty, tree.sub(_mean(at_z), _mean([x for x, _ in at_y])))
        grad = tree.add(direct, response)
        stationarity, sound = tree.read(tree.norm(_mean([y for _, y in at_y])), tree.finite(grad))
        failure = None if sound else _NOT_FINITE
        result = Hypergradient(grad, direct, response, loss, None, stationarity, end, failure=failure)
        return Proposal(grad, loss, {"z": {name: end[name] for name in names}}, result)

    def _start(self, lower: Params, state: MethodState) -> Params:
        if "z" in state:
            return {**lower, **{name: leaf.to(lower[name].device) for name, leaf in state["z"].items()}}
        if self.penalized is None:
            return lower
        if not same_structure(self.penalized, lower):
            raise ValueError(
                f"Penalty: penalized must have the names and shapes of lower, {list(lower)}, got "
                f"{list(self.penalized)}; pass a former result's `lower`"
            )
        return tree.detach(self.penalized)

    def _descend(
        self, step: UpperStep, upper: Params, lower: Params, names: Sequence[str], batches: Sequence[tuple[Any, int]]
    ) -> Params:
        """z after one step on ``G + F / sigma`` for each batch and its seed."""
        z = {name: lower[name] for name in names}
        state = self.update.init(z)
        for batch, seed in batches:
            step.watch()
            _, _, of_upper = upper_derivatives(step.problem, upper, {**lower, **z}, names, step.upper_batch)
            _, of_lower = lower_derivatives(step.problem, upper, {**lower, **z}, names, batch, seed)
            with torch.no_grad():
                z, state = self.update.step(z, tree.axpy(1.0 / self.penalty, of_upper, of_lower), state)
        return z


_NOT_FINITE = (
    "non-finite: the hypergradient of the penalised problem is not finite; lower the learning rate of the update or "
    "the penalty, or check the data"
)


def _mean(trees: Sequence[Params]) -> Params:
    return tree.scale(1.0 / len(trees), reduce(tree.add, trees))
