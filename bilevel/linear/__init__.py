"""Linear operators, solvers of A x = b that say what happened, preconditioners."""

from bilevel.linear.lanczos import spectrum_bounds
from bilevel.linear.operators import (
    FunctionOperator,
    LinearOperator,
    MeanOperator,
    SampledOnce,
    ScaledOperator,
    SumOperator,
    TikhonovOperator,
    WatchedOperator,
    mean_and_error,
)
from bilevel.linear.preconditioner import Diagonal, NystromPreconditioner, Preconditioner
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import Solver
from bilevel.linear.solvers.adjoint_iteration import AdjointIteration
from bilevel.linear.solvers.approximate_inverse import ApproximateInverse
from bilevel.linear.solvers.cg import CG
from bilevel.linear.solvers.dense import Dense
from bilevel.linear.solvers.escalating import Escalating
from bilevel.linear.solvers.gmres import GMRES
from bilevel.linear.solvers.identity import Identity
from bilevel.linear.solvers.minres import MINRES
from bilevel.linear.solvers.neumann import Neumann
from bilevel.linear.solvers.nystrom import Nystrom

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "AdjointIteration",
    "ApproximateInverse",
    "Dense",
    "Diagonal",
    "Escalating",
    "FunctionOperator",
    "Identity",
    "LinearOperator",
    "MeanOperator",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "SampledOnce",
    "ScaledOperator",
    "Solution",
    "Solver",
    "Status",
    "SumOperator",
    "TikhonovOperator",
    "WatchedOperator",
    "mean_and_error",
    "spectrum_bounds",
]
