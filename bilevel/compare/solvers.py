"""What is compared: solvers of a growing number of iterations, and solvers that stop by themselves."""

from collections.abc import Callable, Mapping

from bilevel.linear import (
    CG,
    GMRES,
    MINRES,
    AdjointIteration,
    Dense,
    Diagonal,
    Escalating,
    Identity,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Solver,
)

Family = Solver | Callable[[int], Solver]
"""A solver as it is, or one for a number of iterations."""
Families = Mapping[str, Family]

RANK = 30


def standard_solvers(tikhonov: float | None = None, *, symmetric: bool = True) -> dict[str, Family]:
    """Every solver of the library by name, simple ones first; those that iterate as functions of the iterations.

    Args:
        tikhonov: multiple of the identity that A is known to contain, for the Nyström models; None where none is known.
        symmetric: False leaves those that serve where A is not.
    """
    if not symmetric:
        return {
            "GMRES": lambda n: GMRES(n, None, None),
            "adjoint iteration": lambda n: AdjointIteration(n, None),
            "Identity": Identity(),
            "Dense": Dense(),
        }
    model = NystromPreconditioner(RANK, tikhonov=tikhonov)
    return {
        "CG": lambda n: CG(n, None),
        "Neumann": lambda n: Neumann(n),
        "Identity": Identity(),
        "MINRES": lambda n: MINRES(n, None),
        "CG, recycled": lambda n: CG(n, None, recycle=64),
        "Nyström": lambda n: Nystrom(RANK, tikhonov=tikhonov, max_refinements=n, rtol=None),
        "CG, Nyström": lambda n: CG(n, None, preconditioner=model),
        "CG, diagonal": lambda n: CG(n, None, preconditioner=Diagonal()),
        "Escalating(CG)": lambda n: Escalating(CG(n, None)),
        "layer-wise CG": lambda n: CG(n, None, layerwise=True),
        "Dense": Dense(),
    }


def stopping_solvers(tikhonov: float | None = None, *, symmetric: bool = True) -> dict[str, Solver]:
    """As they would be used: fixed numbers of iterations and rules that end a solve; arguments as for
    `standard_solvers`."""
    if not symmetric:
        return {
            "GMRES to 1e-2": GMRES(50, None, 1e-2),
            "adjoint iteration to 1e-2": AdjointIteration(50, 1e-2),
            "Identity": Identity(),
        }
    model = NystromPreconditioner(RANK, tikhonov=tikhonov)
    return {
        "Identity": Identity(),
        "CG to the noise": CG(50, "noise"),
        "CG to 1e-2": CG(50, 1e-2),
        "Neumann to 1e-2": Neumann(50, 1e-2),
        "CG, 2 iterations": CG(2, None),
        "CG, 5 iterations": CG(5, None),
        "MINRES to 1e-2": MINRES(50, 1e-2),
        "CG recycled, to the noise": CG(50, "noise", recycle=40),
        "CG recycled, to 1e-2": CG(50, 1e-2, recycle=40),
        "Nyström to 1e-2": Nystrom(RANK, tikhonov=tikhonov, max_refinements=50, rtol=1e-2),
        "CG, Nyström, to 1e-2": CG(50, 1e-2, preconditioner=model),
        "layer-wise CG, 5 iterations": CG(5, None, layerwise=True),
    }


def of_budget(family: Family, iterations: int) -> Solver:
    """The family's solver that makes so many iterations."""
    return family if isinstance(family, Solver) else family(iterations)


def preparation(solver: Solver, size: int) -> int:
    """Products that a solver spends once a state, before or beside its iterations; at most one a variable."""
    if isinstance(solver, Escalating):
        return preparation(solver.solver, size)
    if isinstance(solver, Dense):
        return size
    count = 0
    if isinstance(solver, Neumann) and solver.scale == "auto":
        # Of five Lanczos steps the first one's product is the series' own.
        count = 4
    elif isinstance(solver, Nystrom):
        count = solver.rank
    elif isinstance(solver, CG) and isinstance(solver.preconditioner, NystromPreconditioner):
        count = solver.preconditioner.rank
    elif isinstance(solver, CG) and isinstance(solver.preconditioner, Diagonal):
        count = solver.preconditioner.probes
    return min(count, size)
