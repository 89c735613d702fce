"""The abstract solver: everything that all methods share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from bilevel import tree
from bilevel.checks import check_count, check_number, same_structure
from bilevel.linear.operators import KnownProduct, LinearOperator, as_operator
from bilevel.linear.solution import Solution, Status
from bilevel.tree import Params


class Solver(ABC):
    """Solves A x = b. A solver is a frozen set of options and holds no state of its own.

    Subclasses are final and implement `_solve`, where b is finite, not zero and of norm between 1 and 2 (up to the
    extremes that `tree.power_of_two` names), and A symmetric unless the subclass says otherwise.
    """

    needs_symmetric: ClassVar[bool] = True
    """Whether the method rests on a symmetric A. Where it does, operators that are not symmetric are refused."""

    @property
    def learns(self) -> bool:
        """Whether a right-hand side may leave something in the state that changes what comes of later ones; where it
        may, a trainer resumes before the first solve of a system, not between two."""
        return type(self).prepare is not Solver.prepare

    @property
    def uses_start(self) -> bool:
        """Whether a first iterate makes any difference."""
        return True

    @property
    def tolerance(self) -> float | None:
        """The relative residual that a solve goes to; None where no number was asked for."""
        return None

    def prepare(self, operator: LinearOperator | Callable[[Params], Params]) -> Any:
        """State that serves every right-hand side of one operator (a factorisation, a scale); None if there is none."""
        return None

    def memory_of(self, state: Any) -> dict[str, Any]:
        """What a state holds for the systems that come after its operator's, in nested dictionaries of tensors; {} for
        solvers that carry nothing on."""
        return {}

    def remember(self, state: Any, memory: Mapping[str, Any]) -> None:
        """Give a fresh state the `memory_of` an earlier operator's."""
        return None

    def solve(
        self,
        operator: LinearOperator | Callable[[Params], Params],
        b: Params,
        *,
        x0: Params | None = None,
        x0_product: Params | None = None,
        state: Any = None,
    ) -> Solution:
        """An approximate solution of A x = b.

        Args:
            operator: A, or a function that computes products with it.
            b: right-hand side.
            x0: first iterate, with the names and shapes of b; zero if None. `Dense` and `Identity` have no use for it.
            x0_product: A x0 where it is known already, so that the solver need not make it again.
            state: what `prepare` returned for this operator; None makes a fresh one.

        Returns:
            A `Solution`. b = 0 gives 0 and CONVERGED; a b that is not finite, or whose solution is beyond the dtype's
            range, is given back with NON_FINITE. After a breakdown the best iterate is kept; at the first step that
            is x0 or, without one, b itself, never 0.

        Raises:
            TypeError: an operator that cannot be called, or a b or x0 that is not Params.
            ValueError: x0 with other names or shapes than b; an operator that is not symmetric, where that is needed.
        """
        operator = as_operator(operator)
        self.check_symmetry(operator.symmetric)
        tree.check_params("b", b, may_be_sharded=True)
        if x0 is not None:
            _check_start(x0, b)
        b = tree.detach(b)
        scale = tree.power_of_two(b)
        if operator.agree(math.isnan(scale)):
            return Solution(b, Status.NON_FINITE, (math.nan, math.nan), 0, 0, None, math.nan, math.nan)
        if scale == 0.0:
            return Solution(tree.zeros_like(b), Status.CONVERGED, (0.0, 0.0), 0, 0)
        unit = tree.scale(1.0 / scale, b)
        # From zero a breakdown at the first step keeps b, which a zero given as x0 would silence.
        given = x0 is not None and not bool(tree.norm(x0) == 0.0)
        start = _in_units(x0, b, scale) if given and x0 is not None else None
        state = self.prepare(operator) if state is None else state
        if start is not None and x0_product is not None:
            operator = KnownProduct(operator, start, tree.scale(1.0 / scale, {name: x0_product[name] for name in b}))
        with torch.no_grad():
            solution = self._solve(operator, unit, start, state)
            if solution.value is unit:
                # Bit for bit, also where entries far below the largest do not survive the scaling.
                return replace(solution, value=b)
            value, (size, relative_change, cosine) = tree.scale(scale, solution.value), _compare(solution.value, unit)
            within = size * scale < min(torch.finfo(leaf.dtype).max for leaf in b.values()) / 2
            if not within and not tree.all_finite(value):
                return replace(solution, value=b, status=Status.NON_FINITE, residual_norms=_unmeasured(solution))
        return replace(solution, value=value, relative_change=relative_change, cosine=cosine)

    def check_symmetry(self, symmetric: bool) -> None:
        """Raise ValueError where the operator is not symmetric and the method rests on it."""
        if self.needs_symmetric and not symmetric:
            raise ValueError(
                f"{type(self).__name__} needs a symmetric operator, and this one is not: that of a lower level which "
                "is a fixed point, a proximal problem or a root is not symmetric. Take GMRES(), AdjointIteration() "
                "where the map contracts, or Dense() where the variables are few"
            )

    @abstractmethod
    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        """The method itself."""


def residual(operator: LinearOperator, b: Params, x: Params) -> Params:
    """``b - A x``; one product."""
    return tree.sub(b, operator(x))


def reads_are_free(x: Params) -> bool:
    """Whether numbers may be read whenever they are asked for: on a CPU, where nobody has to wait for them."""
    return all(leaf.device.type == "cpu" for leaf in x.values())


def rounding_unit(x: Params) -> float:
    """The largest machine epsilon among the leaves' dtypes."""
    return max(torch.finfo(leaf.dtype).eps for leaf in x.values())


def product_error(operator: LinearOperator, x: Params) -> float:
    """Relative error to expect in a product: eps, or ``eps^(2/3)`` for central differences."""
    return rounding_unit(x) if operator.exact else rounding_unit(x) ** (2 / 3)


def check_iterations(solver: str, max_iterations: int, rtol: object) -> None:
    """Raise ValueError unless the budget is a positive whole number and rtol a non-negative number or None."""
    check_count(f"{solver}: max_iterations", max_iterations, least=1)
    check_rtol(solver, rtol)


def check_rtol(solver: str, rtol: object, *, otherwise: str = "None for a fixed budget") -> None:
    """Raise ValueError unless rtol is None or lies in [0, 1); `otherwise` as in `check_count`."""
    if rtol is not None:
        check_number(f"{solver}: rtol", rtol, below=1.0, otherwise=otherwise)


def classify_curvature(curvature: float, gain: float, scale: float, error: float) -> Status | None:
    """What a direction d says about A, or None if ``d'Ad > 4 error ||A|| d'd``.

    Args:
        curvature: ``d'Ad / d'd``.
        gain: ``||A d|| / ||d||``.
        scale: the largest gain met so far, an estimate of ``||A||`` from below.
        error: of products, as `product_error`.
    """
    if not (math.isfinite(curvature) and math.isfinite(gain)):
        return Status.NON_FINITE
    if curvature > 4.0 * error * scale:
        return None
    # A semidefinite A has ||Ad||^2 <= ||A|| d'Ad: then d is, to rounding, a null vector that b has a part along.
    return Status.INCONSISTENT if gain <= 4.0 * math.sqrt(error) * scale else Status.NEGATIVE_CURVATURE


def is_null(curvature: float, gain: float, scale: float, error: float) -> bool:
    """Whether a direction is, to rounding, a null vector of A; arguments as for `classify_curvature`."""
    return abs(curvature) <= 4.0 * error * scale and gain <= 4.0 * math.sqrt(error) * scale


def _unmeasured(solution: Solution) -> tuple[float, float]:
    return solution.residual_norms[0], math.nan


def _compare(x: Params, b: Params) -> tuple[float, float, float]:
    """``||x||``, ``||x - b|| / ||b||`` and the cosine between x and b, in one transfer."""
    norm_x, norm_b, change, product = torch.stack(
        [tree.norm(x), tree.norm(b), tree.norm(tree.sub(x, b)), tree.dot(x, b)]
    ).tolist()
    return norm_x, change / norm_b, product / (norm_x * norm_b) if norm_x > 0.0 else 0.0


def _in_units(x0: Params, b: Params, scale: float) -> Params:
    """x0 over `scale` in the order of b: the object itself where it is that already, whose product may be known."""
    if scale == 1.0 and list(x0) == list(b) and not any(leaf.requires_grad for leaf in x0.values()):
        return x0
    return {name: x0[name].detach() / scale for name in b}


def _check_start(x0: Params, b: Params) -> None:
    tree.check_params("x0", x0, may_be_sharded=True)
    if not same_structure(x0, b):
        raise ValueError(
            f"x0 must have the names and shapes of b; got {sorted(x0)} for {sorted(b)}. Pass a former Solution.value "
            "of the same variables, or None"
        )
