"""Implicit-gradient solvers, one algorithm a file; `base` holds the abstract solver."""

from bilevel.linear.preconditioner import Diagonal, NystromPreconditioner, Preconditioner
from bilevel.linear.solver import Solver
from bilevel.linear.solvers.approximate_inverse import ApproximateInverse
from bilevel.linear.solvers.cg import CG
from bilevel.linear.solvers.dense import Dense
from bilevel.linear.solvers.escalating import Escalating
from bilevel.linear.solvers.identity import Identity
from bilevel.linear.solvers.minres import MINRES
from bilevel.linear.solvers.neumann import Neumann
from bilevel.linear.solvers.nystrom import Nystrom

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
