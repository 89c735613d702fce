"""Implicit-gradient solvers, one algorithm a file; `base` holds the abstract solver."""

from bilevel.solvers.approximate_inverse import ApproximateInverse
from bilevel.solvers.base import Solver
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.escalating import Escalating
from bilevel.solvers.identity import Identity
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.nystrom import Nystrom
from bilevel.solvers.preconditioner import Diagonal, NystromPreconditioner, Preconditioner

__all__ = [
    "CG",
    "MINRES",
    "ApproximateInverse",
    "Dense",
    "Diagonal",
    "Escalating",
    "Identity",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "Solver",
]
