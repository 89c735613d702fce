"""`compare_solvers`: every solver on one's own problem."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bilevel import distributed, tree
from bilevel.checks import check_count, check_kind, check_number, check_variables
from bilevel.compare.curves import ITERATIONS, KnownSystem, measure_curves
from bilevel.compare.measuring import Deadline, interleaved, machine
from bilevel.compare.reference import DENSE_SIZE, Place, Reference, find_reference, own_randomness
from bilevel.compare.report import SolverReport
from bilevel.compare.solvers import Families, standard_solvers, stopping_solvers
from bilevel.compare.successive import measure_successive
from bilevel.hypergradients import SolverWarning, System
from bilevel.linear import Identity, Solver
from bilevel.lower import (
    ResidualProblem,
    Selection,
    Tikhonov,
    check_batch,
    check_batches,
    differentiates,
    upper_derivatives,
)
from bilevel.problem import Problem
from bilevel.products import HVP, as_provider
from bilevel.tree import Params

_FOR_PACES, _FOR_REFERENCE, _FOR_CURVES = 0.05, 0.4, 0.8
"""Parts of the time that is left."""
_PER_RIGHT_HAND_SIDE = 40
"""Products that a right-hand side is worth."""


@differentiates
def compare_solvers(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    upper_batches: Sequence[Any],
    lower_batches: Sequence[Any],
    solvers: Families | None = None,
    hvp: HVP | None = None,
    damping: float = 0.0,
    tikhonov: Tikhonov = 0.0,
    implicit: Selection | None = None,
    iterations: Sequence[int] = ITERATIONS,
    seconds: float = 60.0,
    seed: int = 0,
) -> SolverReport:
    r"""Compare solvers of the linear system of one's own problem at one point: error against products and time.

    The system is A x = dF/dy of `linearize`, one A for the lower batches and one right-hand side for each upper batch.
    Each solver makes a growing number of iterations, once for each right-hand side with a fresh state and once for the
    later ones with the state that the first has left. Errors :math:`\|x - x^*\| / \|x^*\|` are against a reference
    :math:`x^*` in float64, where the problem computes in it: by `Dense` where A is small, else by a long solve of CG,
    or of MINRES where A is indefinite. Where A is not symmetric (fixed points, roots, proximal problems) it is GMRES
    beside the adjoint iteration. The noise of the batches is the standard error of x, to first order

    .. math:: \frac{1}{\|x^*\|} \Big(\frac{1}{K (K - 1)} \sum_k \|A^{-1} (A_k - A) x^*\|^2\Big)^{1/2}

    over the K lower batches, or the two halves of a single one; an error below it buys nothing.

    Nothing is written: variables, buffers and the default generators stay as they are. Systems have the same random
    masks.

    Args:
        upper, lower: where the system is taken; the lower variables best solved.
        upper_batches: each gives a right-hand side; three or four show what later ones cost.
        lower_batches: those of one system, as many as are trained with (`Implicit.hessian_batches`).
        solvers: what is compared in place of `standard_solvers`, by name: solvers, or functions of the number of
            iterations, ``{"CG": lambda n: CG(n, None), "mine": CG(5, None, layerwise=True)}``.
        hvp, damping, tikhonov, implicit: as for `linearize`; use those of the training.
        iterations: numbers of iterations of the curves' points, ascending.
        seconds: a budget. Nothing is begun that is not likely to be done in time, and the report says what was cut; at
            the least there are ten iterations of the reference and a point each of the first two solvers.
        seed: of random masks.

    Raises:
        TypeError: an argument of the wrong kind, such as a DataLoader in place of batches.
        ValueError: no batches, numbers out of range, an upper objective whose gradient in the lower variables is zero,
            a system without a solution, or several processes.
    """
    check_kind("problem", problem, Problem, "an instance of a Problem")
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_batches(lower_batches)
    _check_upper_batches(upper_batches)
    _check_iterations(iterations)
    check_number("seconds", seconds, positive=True)
    check_count("seed", seed, least=0)
    families = _checked_solvers(solvers)
    if distributed.world_size() > 1:
        raise ValueError("compare_solvers runs in one process; call it on one rank before the group is made")
    deadline = Deadline(seconds)
    options = {"damping": damping, "tikhonov": tikhonov, "implicit": implicit}
    provider = None if hvp is None else as_provider(hvp)
    place = Place(problem, tree.detach(upper), tree.detach(lower), lower_batches, provider, seed, options)
    devices = list({leaf.device for leaf in lower.values()})
    with own_randomness(devices), warnings.catch_warnings():
        # What `linearize` warns of is said in the report, once.
        warnings.simplefilter("ignore", SolverWarning)
        return SolverReport(_measured(place, upper_batches, families, iterations, deadline, seconds))


def _measured(
    place: Place,
    upper_batches: Sequence[Any],
    families: Families | None,
    iterations: Sequence[int],
    deadline: Deadline,
    seconds: float,
) -> dict[str, Any]:
    """The figures of a report."""
    system = place.linearize(Identity())
    derivatives = [_derivatives(place, system, index, upper_batches[index]) for index in range(1)]
    unit, product = _paces(place, system, derivatives[0][2], deadline)
    # Few right-hand sides that are solved for say more than many that are not.
    count = min(len(upper_batches), max(1, int(seconds / (product * _PER_RIGHT_HAND_SIDE))))
    derivatives += [_derivatives(place, system, index, upper_batches[index]) for index in range(1, count)]
    cuts = [] if count == len(upper_batches) else [f"only {count} of {len(upper_batches)} upper batches were taken"]
    rights = [v for _, _, v in derivatives]
    reference = find_reference(place, rights, product, deadline.share(_FOR_REFERENCE))
    name = type(place.problem).__name__
    known = KnownSystem(
        name, place.linearize, place.gradient, rights, reference.exact, iterations=iterations, noise=reference.noise
    )
    drawn, stopping = _solvers(families, system)
    curves, more = measure_curves(known, drawn, unit, deadline=deadline.share(_FOR_CURVES), pace=product)
    successive, others = measure_successive(known, stopping, deadline=deadline, pace=product)
    return {
        "environment": machine(next(iter(place.lower.values())).device),
        "system": name,
        "seconds": seconds,
        "facts": _facts(place, system, derivatives, reference, unit, product),
        "curves": curves,
        "successive": successive,
        "cuts": [*cuts, *more, *others],
    }


def _derivatives(place: Place, system: System, index: int, batch: Any) -> tuple[torch.Tensor, Params, Params]:
    """F, dF/dx and dF/dy, which is not zero."""
    found = upper_derivatives(place.problem, place.upper, place.lower, system.implicit, batch)
    finite = tree.all_finite(found[2])
    if not finite or float(tree.norm(found[2])) == 0.0:
        raise ValueError(
            f"upper_batches[{index}]: dF/dy is {'zero' if finite else 'not finite'}, so that there is no system to "
            "solve; the upper objective must depend on the implicit lower variables"
        )
    return found


def _solvers(families: Families | None, system: System) -> tuple[Families, dict[str, tuple[Solver, None]]]:
    """Those of the curves, and those that meet the right-hand sides one after the other."""
    if families is not None:
        return families, {name: (family, None) for name, family in families.items() if isinstance(family, Solver)}
    # Without a regularizer A is a Hessian and what is added to it.
    term = system.tikhonov
    known = float(term) if isinstance(term, (int, float)) and term > 0.0 and not system.regularized else None
    size = tree.size(system.variables(system.lower))
    all_of_them = standard_solvers(known, symmetric=system.operator.symmetric)
    drawn = {name: family for name, family in all_of_them.items() if name != "Dense" or size <= DENSE_SIZE}
    # The noise is that of several batches.
    alone = len(system.lower_batches) == 1
    stopping = stopping_solvers(known, symmetric=system.operator.symmetric)
    stopping = {name: solver for name, solver in stopping.items() if not (alone and "noise" in name)}
    return drawn, {name: (solver, None) for name, solver in stopping.items()}


def _paces(place: Place, system: System, b: Params, deadline: Deadline) -> tuple[float, float]:
    """Seconds of a gradient and of a product, medians of as many as take little of the time."""
    functions: dict[str, Callable[[], object]] = {"gradient": place.gradient, "product": lambda: system.operator(b)}
    once = interleaved(functions, 1, warm_up=0)
    repeats = min(15, int(_FOR_PACES * deadline.left() / (once["gradient"].median + once["product"].median)))
    found = interleaved(functions, repeats, warm_up=0) if repeats else once
    return found["gradient"].median, found["product"].median


def _facts(
    place: Place,
    system: System,
    derivatives: Sequence[tuple[torch.Tensor, Params, Params]],
    reference: Reference,
    unit: float,
    product: float,
) -> dict[str, Any]:
    """What is known of the system and of the point."""
    (loss, direct, b), residual = derivatives[0], isinstance(place.problem, ResidualProblem)
    x = tree.unflatten(reference.exact[0].to(next(iter(b.values())).device), b)
    gradient, gradient_noise = system.gradient_and_noise()
    implicit, by_identity = system.cross(x), system.cross(b)
    exact, plain = tree.sub(direct, implicit), tree.sub(direct, by_identity)
    kept = ("solver", "dtype", "residual", "accuracy", "status", "remarks")
    return {
        "variables": tree.size(b),
        "upper_variables": tree.size(place.upper),
        "batches": len(place.batches),
        "right_hand_sides": len(derivatives),
        "regularized": system.regularized,
        "symmetric": system.operator.symmetric,
        "eigenvalues": None if reference.eigenvalues is None else list(reference.eigenvalues),
        "eigenvalues_complete": reference.complete,
        "bounds": None if reference.bounds is None else list(reference.bounds),
        "reference": {name: value for name, value in asdict(reference).items() if name in kept},
        "noise": reference.noise,
        "noise_from": reference.noise_from,
        "loss": float(loss),
        "residual": residual,
        "flaw": system.flaw(),
        "stationarity": float(tree.norm(gradient)),
        "gradient_noise": None if gradient_noise is None else float(gradient_noise),
        # F(x, y*) - F(x, y) to first order; that of an objective has A divided by the weight of the regularizer.
        "gain": -float(tree.dot(x, gradient)) / (1.0 if residual else system.weight),
        "identity": _beside(plain, exact, (direct, implicit)),
        "lost_curvature": system.curvature.lost(),
        "gradient_seconds": unit,
        "product_seconds": product,
    }


def _beside(found: Params, exact: Params, parts: Sequence[Params]) -> dict[str, float] | None:
    """Relative error and cosine of a hypergradient beside the reference's; None where that is, to the rounding of its
    parts, zero."""
    rounding = max((torch.finfo(leaf.dtype).eps for leaf in exact.values()), default=0.0)
    if float(tree.norm(exact)) <= 10.0 * rounding * max(float(tree.norm(part)) for part in parts):
        return None
    return {
        "error": _ratio(tree.norm(tree.sub(found, exact)), tree.norm(exact)),
        "cosine": _ratio(tree.dot(found, exact), tree.norm(found) * tree.norm(exact)),
    }


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """a / b, 0 where both are."""
    return float(a / b) if float(b) != 0.0 else 0.0


def _check_upper_batches(upper_batches: object) -> None:
    if isinstance(upper_batches, (list, tuple)) and upper_batches:
        return check_batch("upper_batches", upper_batches)
    raise TypeError(
        f"upper_batches must be a list of one or more batches, got {upper_batches!r:.40}; pass [batch] for a single "
        "one, of a DataLoader list(itertools.islice(loader, 3))"
    )


def _check_iterations(iterations: Sequence[int]) -> None:
    for count in iterations:
        check_count("iterations", count, least=1)
    if not iterations or list(iterations) != sorted(set(iterations)):
        raise ValueError(f"iterations must be ascending numbers, got {list(iterations)}")


def _checked_solvers(solvers: Families | None) -> Families | None:
    if solvers is None:
        return None
    if not isinstance(solvers, Mapping) or not solvers:
        raise TypeError(
            "solvers must be a mapping of names to solvers, or to functions of the number of iterations such as "
            f"{{'CG': lambda n: CG(n, None)}}; got a {type(solvers).__name__}"
        )
    for name, family in solvers.items():
        made = family if isinstance(family, Solver) or not callable(family) else family(1)
        if not isinstance(made, Solver):
            raise TypeError(
                f"solvers[{name!r}] must be a solver such as CG(5), or a function of the number of iterations that "
                f"makes one such as lambda n: CG(n, None); got {family!r:.40}"
            )
    return {str(name): family for name, family in solvers.items()}
