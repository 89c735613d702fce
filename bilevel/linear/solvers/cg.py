"""Conjugate gradients, global, layer-wise, preconditioned and recycled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

from bilevel import tree
from bilevel.checks import check_count, check_kind
from bilevel.linear.account import Account, CountedOperator
from bilevel.linear.conjugate_gradients import ConjugateGradients
from bilevel.linear.inexact import InexactProducts
from bilevel.linear.lanczos import union_of_ranges
from bilevel.linear.operators import LinearOperator
from bilevel.linear.preconditioner import Inverse, Preconditioner
from bilevel.linear.quasi_newton import Pair, QuasiNewton, loaded_pairs, saved_pairs
from bilevel.linear.recycling import Directions
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver, check_rtol, reads_are_free
from bilevel.tree import Params


@dataclass
class _Prepared:
    """What one operator's right-hand sides share; filled by the first of them, which gives the shapes.

    Attributes:
        saved, pairs: directions of earlier operators with their products, as they came from a checkpoint, and with
            those of this one.
    """

    directions: Directions
    inexact: InexactProducts | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)
    pairs: list[Pair] | None = None
    inverse: Inverse | None = None
    noise: float | None = None
    norm_a: float = 0.0
    min_curvature: float | None = None
    ritz_range: tuple[float, float] | None = None


@final
@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes and Stiefel 1952) for symmetric positive definite A.

    Args:
        max_iterations: at most this many iterations, one product each.
        rtol: stop once ``||b - A x|| <= rtol ||b||``; None makes exactly max_iterations (status BUDGET). Either way the
            solve ends early where the residual has reached the rounding level, below which no iteration helps.
            "noise" takes for rtol the standard error of ``A x / ||b||`` that comes from the choice of the batches whose
            mean A is, ``se(A d) ||x|| / (||d|| ||b||)`` with d the first direction and x the first iterate of a state:
            it is measured on the first product, for nothing, kept for later right-hand sides and reported as
            `Solution.noise`. No product is then spent on digits that other batches would change. The status is
            AT_THE_NOISE, or LOST_IN_THE_NOISE where the noise exceeds the right-hand side.
        layerwise: take step lengths and conjugation coefficients per leaf while the product stays the full one. This
            is the variant that BiSSL's authors use (appendix B.3). It is *not* an exact solver: where it converges, it
            converges to ``A x = b + sum_i [A, D_i] d_i`` with D_i the block-diagonal matrix of step lengths, which is
            biased unless A is block-diagonal.
        through_negative_curvature: for the layer-wise method, which in the published algorithm makes all its
            iterations through directions with ``d'Ad <= 0``: go on there too, whatever the residual does. Only a null
            vector of A and numbers that are not finite still end the solve. What came of it is said: `min_curvature`,
            and in place of BUDGET the status NEGATIVE_CURVATURE_PASSED, which counts as what was asked for, or DIVERGED
            where the residual has grown tenfold. The global method always stops; `MINRES` solves indefinite systems.
        preconditioner: a symmetric positive definite approximation of A, made once for a state and kept for every
            right-hand side, its products counted in the first solve. The stopping rule stays on the residual itself.
        recycle: keep at most this many search directions in the state, for two vectors of memory each. Later
            right-hand sides start from their projection on the kept ones, which takes no product and leaves a known
            residual, and search only what these leave over (`Directions`).
        memory: keep at most this many search directions with their products, for two vectors of memory each, also
            beyond the operator: `Implicit` hands them from one system of a training to the next, and they are saved
            with a checkpoint. They precondition later right-hand sides and systems as a limited-memory BFGS
            approximation of the inverse (Morales and Nocedal 2000; `QuasiNewton`), which takes no product. Worth it
            where systems change slowly and a few large eigenvalues stay, as over the alternations of a training.
        inexact: make products after the first one on as many of A's batches as their noise asks for, so that what they
            leave out is expected to change the residual by at most 0.7 of the tolerance (`InexactProducts`, with the
            sources), and make one more step at the end along the next direction, whose product nobody makes and whose
            length is told by the largest curvature met. The last residual is then an expectation, not a measurement:
            that of the recursion, times what the step before brought, at least 1/2, with what the products have
            missed. It ends the iterations and makes the status, so that CONVERGED means "on average": the true one may
            be a few times as large. With a fixed budget (rtol=None) there is no tolerance to fall short of: products
            are whole, and only the last step is added. A breakdown is believed of a product over all batches alone.

    The residual of the recursion is the true one up to rounding for the global method, and is measured by one more
    product wherever rounding or an inexact operator could matter; if it turns out above rtol, iterations go on from
    it. In the layer-wise method the recursion's vector is not the residual, so the true one is always measured at the
    end, by one more product, and decides the status.

    A is most often a mean over batches, and solving it far more accurately than these agree on it makes the result
    biased in the mean, by about the square of `Solution.noise`: ``E[A^-1]`` is not ``E[A]^-1``. An rtol near the noise,
    more batches or a Tikhonov term help, more iterations do not (`Hypergradient.warning`).

    On a GPU a fixed budget (rtol=None, without memory and inexact) is made without a synchronisation between the first
    and the last product: a breakdown freezes the iterate there and is read at the end, so that all products are made.

    Raises:
        ValueError: max_iterations < 1, rtol outside [0, 1), recycle < 0, layerwise together with a preconditioner or
            with recycle, memory or inexact, through_negative_curvature without layerwise, memory together with a
            preconditioner, inexact together with recycle; at solve, a preconditioner that is not positive
            definite, or rtol="noise" where the operator is no mean over two batches or more.
        TypeError: a preconditioner that is not a `Preconditioner`.
    """

    max_iterations: int = 10
    rtol: float | Literal["noise"] | None = 1e-3
    layerwise: bool = False
    preconditioner: Preconditioner | None = None
    recycle: int = 0
    through_negative_curvature: bool = False
    memory: int = 0
    inexact: bool = False

    def __post_init__(self) -> None:
        check_count("CG: max_iterations", self.max_iterations, least=1)
        if self.rtol != "noise":
            check_rtol("CG", self.rtol, otherwise="'noise', or None for a fixed budget")
        check_count("CG: recycle", self.recycle, least=0)
        check_count("CG: memory", self.memory, least=0)
        check_kind("CG: inexact", self.inexact, bool, "True or False")
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(
                f"CG: preconditioner must be a Preconditioner or None, got {type(self.preconditioner).__name__}"
            )
        check_kind("CG: through_negative_curvature", self.through_negative_curvature, bool, "True or False")
        if self.through_negative_curvature and not self.layerwise:
            raise ValueError(
                "CG: through_negative_curvature=True is for layerwise=True, the published algorithm; the global method "
                "has no minimum to step towards there. Leave it out, or take MINRES for an indefinite system"
            )
        if self.layerwise and self.preconditioner is not None:
            raise ValueError("CG: layerwise=True takes no preconditioner; leave one of the two out")
        if self.layerwise and (self.recycle or self.memory or self.inexact):
            raise ValueError(
                "CG: layerwise=True has no conjugate directions to recycle or to remember, and no inexact products, "
                f"but recycle={self.recycle}, memory={self.memory}, inexact={self.inexact}; leave them out"
            )
        if self.recycle and self.inexact:
            raise ValueError(
                f"CG: recycle={self.recycle} answers later right-hand sides by products, which inexact=True makes of "
                "some batches alone; take memory, by which these precondition instead, or leave one of the two out"
            )
        if self.memory and self.preconditioner is not None:
            raise ValueError(
                f"CG: memory={self.memory} makes a preconditioner of its own; leave memory or preconditioner out"
            )

    @property
    def learns(self) -> bool:
        kept = self.recycle or self.memory or self.preconditioner is not None
        return bool(kept or self.inexact or self.rtol == "noise")

    @property
    def tolerance(self) -> float | None:
        return None if isinstance(self.rtol, str) else self.rtol

    def prepare(self, operator: Any) -> _Prepared:
        return _Prepared(Directions(self.recycle), InexactProducts() if self.inexact else None)

    def memory_of(self, state: _Prepared) -> dict[str, Any]:
        return dict(state.saved) if state.pairs is None else saved_pairs(state.pairs)

    def remember(self, state: _Prepared, memory: Mapping[str, Any]) -> None:
        state.saved = memory

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: _Prepared) -> Solution:
        products = 0
        if self.preconditioner is not None and state.inverse is None:
            counted = CountedOperator(operator)
            state.inverse = self.preconditioner.prepare(counted, b)
            products = counted.products
            if state.inverse is None:
                return Solution(b, Status.NON_FINITE, (1.0, math.nan), 0, products)
        if state.pairs is None:
            state.pairs = loaded_pairs(state.saved, b)
        if state.pairs:
            state.inverse = QuasiNewton(state.pairs)
        if state.inexact is not None:
            state.inexact.begin()
        rtol = (state.noise or 0.0) if isinstance(self.rtol, str) else self.rtol
        account = Account(operator, b, self.max_iterations, rtol, products)
        account.noise = state.noise
        r = b if x0 is None else account.residual(x0)
        start = account.relative(r)
        if operator.agree(not math.isfinite(start)):
            return account.close(Status.NON_FINITE, b, (start, math.nan))
        relative = start
        account.norm_a = state.norm_a
        if len(state.directions):
            ahead = state.directions.project(tree.zeros_like(b) if x0 is None else x0, r)
            projected = account.relative(ahead[1])
            if projected < start:
                (x0, r), relative = ahead, projected
        run = ConjugateGradients(
            account,
            layerwise=self.layerwise,
            through=self.through_negative_curvature,
            inverse=state.inverse,
            directions=state.directions,
            stop_at_noise=self.rtol == "noise" and state.noise is None,
            inexact=state.inexact,
            memory=self.memory,
            watched=self.rtol is not None or self.inexact or self.memory > 0 or reads_are_free(b),
        )
        found = run.solve(x0, r, relative)
        state.pairs = [*state.pairs, *run.met][-self.memory :] if self.memory else []
        state.noise, state.norm_a = account.noise, account.norm_a if self.recycle else 0.0
        solution = replace(found, residual_norms=(start, found.residual_norms[1]), noise=account.noise)
        return self._with_kept_estimates(solution, state) if self.recycle else solution

    def _with_kept_estimates(self, solution: Solution, state: _Prepared) -> Solution:
        """What earlier solves met holds for the directions that this one took over."""
        curvatures = [c for c in (state.min_curvature, solution.min_curvature) if c is not None]
        state.min_curvature = min(curvatures, default=None)
        state.ritz_range = union_of_ranges([state.ritz_range, solution.ritz_range])
        return replace(solution, min_curvature=state.min_curvature, ritz_range=state.ritz_range)
