"""Direct solves with a randomized low-rank model."""

import math
from dataclasses import dataclass, replace
from typing import Any, final

from bilevel import tree
from bilevel.checks import check_count
from bilevel.linear.account import Account, CountedOperator
from bilevel.linear.conjugate_gradients import ConjugateGradients
from bilevel.linear.operators import LinearOperator
from bilevel.linear.sketch import Sketch, check_model, draw_sketch
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_rtol, reads_are_free
from bilevel.tree import Params


@dataclass
class _Drawn:
    """The sketch, drawn at the first right-hand side, which gives the shapes."""

    sketch: Sketch | None = None


@final
@dataclass(frozen=True)
class Nystrom(Solver):
    r"""Nystrom's low-rank model of A, inverted by Woodbury's identity, with the residual measured.

    For A = rho I + B with B near low rank, a Gaussian sample of `rank` orthonormal directions W and their products
    give (Hataya and Yamada 2023 for hypergradients; in the stable form of Frangella, Tropp and Udell 2023)

    .. math:: \hat A = \rho I + (B W)(W^T B W)^+ (B W)^T = \rho I + U \Lambda U^T, \qquad
       x = U (\rho I + \Lambda)^{-1} U^T b + \rho^{-1} (I - U U^T) b.

    It is exact where B is positive semidefinite of rank at most `rank`. The products are made once for a state, at the
    first right-hand side; every later one takes a single product, which measures the residual. Where that is above
    rtol, conjugate gradients preconditioned with the modulus of the model refine x. Memory: twice `rank` vectors while
    the sample is drawn, `rank` vectors afterwards.

    Args:
        rank: products for the sample (the number of variables if that is less).
        tikhonov: rho, the multiple of the identity that A is known to contain: 1 in BiSSL's I + H/c, the `tikhonov` of
            `linearize` where the lower objective has no regularizer. None takes the smallest eigenvalue of W'AW,
            which is near rho where the variables are many more than `rank` and keeps B positive on the sample. With
            a given rho, B may be indefinite: then of its core W'BW only the larger two thirds of the directions, and
            those beyond the largest of the rarer sign, are kept (Nakatsukasa and Park 2023), and the model is exact up
            to two thirds of `rank`.
        max_refinements: at most this many iterations of conjugate gradients, one product each; 0 leaves the model's
            solution as it is.
        rtol: refine until ``||b - A x|| <= rtol ||b||``; None makes exactly max_refinements (status BUDGET).
        seed: of the sample.

    An indefinite A is met if the sample's compression W'AW shows it (reported as `min_curvature`): the model's
    solution still counts where its residual is small, and is NEGATIVE_CURVATURE where it is not, since conjugate
    gradients cannot refine it. With x0 the model is applied to the residual of x0. The direct solve counts as one
    iteration.

    Raises:
        ValueError: rank < 1, a Tikhonov term that is not positive, max_refinements < 0, rtol outside [0, 1), a negative
            seed.
    """

    rank: int = 20
    tikhonov: float | None = None
    max_refinements: int = 5
    rtol: float | None = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_model("Nystrom", self.rank, self.tikhonov, self.seed)
        check_count("Nystrom: max_refinements", self.max_refinements, least=0)
        check_rtol("Nystrom", self.rtol)

    @property
    def tolerance(self) -> float | None:
        return self.rtol

    def prepare(self, operator: Any) -> _Drawn:
        return _Drawn()

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Drawn) -> Solution:
        products = 0
        if state.sketch is None:
            counted = CountedOperator(operator)
            state.sketch = draw_sketch(counted, b, self.rank, self.tikhonov, self.seed)
            products = counted.products
        if state.sketch is None:
            return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, products)
        account = Account(operator, b, 1 + self.max_refinements, self.rtol, products)
        solution = self._solve_with(state.sketch, account, x0)
        return replace(solution, ritz_range=state.sketch.ritz_range)

    def _solve_with(self, sketch: Sketch, account: Account, x0: Params | None) -> Solution:
        account.norm_a, account.min_curvature = sketch.norm_a, sketch.ritz_range[0]
        b, agree = account.b, account.operator.agree
        r0 = b if x0 is None else account.residual(x0)
        start = account.relative(r0)
        if agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        x = sketch.solve(r0) if x0 is None else tree.add(x0, sketch.solve(r0))
        r = account.residual(x)
        relative = account.relative(r)
        if agree(not math.isfinite(relative)):
            return account.close(Status.NON_FINITE, b if x0 is None else x0, (start, math.nan))
        account.curve.append(relative)
        at_rounding = account.at_rounding_level(x, relative)
        if at_rounding or account.good_enough(relative):
            return account.close(account.verdict(relative, at_rounding), x, (start, relative))
        indefinite = sketch.ritz_range[0] < -4.0 * account.product_error * account.norm_a
        useful = relative <= (1.0 - math.sqrt(account.product_error)) * start
        if self.max_refinements > 0 and not indefinite:
            watched = self.rtol is not None or reads_are_free(b)
            run = ConjugateGradients(account, inverse=sketch.precondition, watched=watched)
            refined = run.solve(x, r, relative) if useful else run.solve(x0, r0, start)
            return replace(refined, residual_norms=(start, refined.residual_norms[1]))
        if not useful:
            x = b if x0 is None else x0
            relative = account.relative(account.residual(b)) if x0 is None else start
        return account.close(self._unrefined(account, relative, start, indefinite), x, (start, relative))

    def _unrefined(self, account: Account, relative: float, start: float, indefinite: bool) -> Status:
        """The status of a model's solution that is not good enough."""
        grown = relative > (1.0 + math.sqrt(account.product_error)) * start
        if indefinite and (grown or self.max_refinements > 0 or self.rtol is not None):
            return Status.NEGATIVE_CURVATURE
        return Status.DIVERGED if grown else account.verdict(relative, at_rounding=False)
