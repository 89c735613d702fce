"""Implicit-gradient solvers, one algorithm a file; `base` holds the abstract solver."""

from bilevel.solvers.base import Solver
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.identity import Identity
from bilevel.solvers.neumann import Neumann

__all__ = ["CG", "Dense", "Identity", "Neumann", "Solver"]
