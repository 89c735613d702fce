"""What a linear solve gives back."""

from dataclasses import dataclass
from enum import Enum

from bilevel.tree import Params


class Status(Enum):
    """How a solve ended; the value says what happened and what to do.

    tikhonov stands for a multiple of the identity that is added to A (`TikhonovOperator`, `linearize`).
    """

    CONVERGED = "converged: the relative residual is at or below rtol"
    AT_THE_NOISE = (
        'at the noise: the residual is at or below what another choice of batches would change (rtol="noise"); more '
        "Hessian batches lower it"
    )
    LOST_IN_THE_NOISE = (
        "lost in the noise: another choice of batches would change A x by more than the right-hand side "
        '(rtol="noise"), so that these cannot tell the solution from zero; take more Hessian batches, or raise tikhonov'
    )
    BUDGET = "budget: the fixed number of iterations that was asked for was made (rtol=None)"
    NEGATIVE_CURVATURE_PASSED = (
        "negative curvature passed: the fixed number of iterations that was asked for was made through a direction "
        "with d'Ad <= 0 (through_negative_curvature=True), so A is not positive definite and what was found need not "
        "be near a solution; raise tikhonov where it should be"
    )
    NOT_CONVERGED = (
        "not converged: the residual is above rtol after max_iterations or at the rounding level; raise "
        "max_iterations, rtol or tikhonov"
    )
    NEGATIVE_CURVATURE = (
        "negative curvature: a direction with d'Ad <= 0 was met, so A is not positive definite and the best iterate "
        "before it was kept; raise tikhonov, train the lower level further, or use MINRES"
    )
    DIVERGED = (
        "diverged: the residual grew, and the best iterate was kept (layer-wise the last one); raise tikhonov, give "
        "Neumann a smaller scale, or take GMRES in place of AdjointIteration, whose map does not contract"
    )
    NON_FINITE = (
        "non-finite: a NaN or an infinity came up and the last finite iterate was kept; check data, losses and step "
        "sizes"
    )
    INCONSISTENT = (
        "inconsistent: A is singular and the right-hand side is not in its range, so there is no solution; raise "
        "tikhonov, or leave the variables without curvature out of `implicit`"
    )

    @property
    def ok(self) -> bool:
        """Whether the solve did what was asked."""
        return self in (
            Status.CONVERGED,
            Status.AT_THE_NOISE,
            Status.LOST_IN_THE_NOISE,
            Status.BUDGET,
            Status.NEGATIVE_CURVATURE_PASSED,
        )


@dataclass(frozen=True)
class Solution:
    """An approximate solution x of A x = b and what is known about it.

    Attributes:
        value: x; finite whenever b is.
        status: how the solve ended.
        residual_norms: ``||b - A x|| / ||b||`` at the start and at the end: true residuals, not a recursion that may
            have drifted from them; the last one of ``CG(inexact=True)`` is an expectation. NaN where it was not
            measured (`Identity` makes no product, `Neumann(1)` from a start none but that with it).
        iterations: iterations made.
        num_hvps: products with A, each over all the batches, preparation included; one over m of the K batches counts
            m / K (`CG(inexact=True)`).
        min_curvature: smallest ``d'A d / d'd`` met over all directions d (over the whole tree), None if none was met.
        relative_change: ``||x - b|| / ||b||``: how far the solve moved the right-hand side.
        cosine: cosine of the angle between x and b.
        residual_curve: relative residual after each iteration as the recursion carries it along, which rounding, an
            inexact operator or the layer-wise method take away from the true one; empty where there is no recursion.
        ritz_range: smallest and largest Ritz value met. In exact arithmetic both lie between the extreme eigenvalues
            of A, and all of `Dense`'s are attained. None where none came for nothing (`Identity`, layer-wise or
            preconditioned CG, Neumann with a given scale).
        tikhonov: Tikhonov's addition to A after a breakdown (`Escalating`). Where it is not 0, value, status,
            iterations, residual_norms and residual_curve are those of ``(A + tikhonov I) x = b``; the other numbers
            stay those of A.
        noise: standard error of A x, relative to b, from the choice of A's batches, measured on one product for
            nothing: by ``CG(rtol="noise")``, and by a `System` of several batches in one process. None otherwise: it
            was not measured.
        residual_without_tikhonov: ``||b - A x|| / ||b||`` where tikhonov is not 0; None otherwise, residual_norms
            saying it.
    """

    value: Params
    status: Status
    residual_norms: tuple[float, float]
    iterations: int
    num_hvps: float
    min_curvature: float | None = None
    relative_change: float = 0.0
    cosine: float = 1.0
    residual_curve: tuple[float, ...] = ()
    ritz_range: tuple[float, float] | None = None
    tikhonov: float = 0.0
    residual_without_tikhonov: float | None = None
    noise: float | None = None
