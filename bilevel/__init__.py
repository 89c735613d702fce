"""Gradient-based bilevel optimization for PyTorch: hypergradients, implicit-gradient solvers, alternating training."""

from bilevel.hvp import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.hypergradient import Hypergradient, SolverError, SolverWarning, hypergradient
from bilevel.modules import functional_call
from bilevel.operators import LinearOperator
from bilevel.problem import Problem, proximal, ridge
from bilevel.solution import Solution, Status
from bilevel.solvers import CG, Dense, Identity, Neumann, Solver
from bilevel.system import StaleSystemError, System, linearize
from bilevel.tree import Params

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Dense",
    "FiniteDifference",
    "ForwardOverReverse",
    "HVPProvider",
    "Hypergradient",
    "Identity",
    "LinearOperator",
    "Neumann",
    "Params",
    "Problem",
    "ReverseOverReverse",
    "Solution",
    "Solver",
    "SolverError",
    "SolverWarning",
    "StaleSystemError",
    "Status",
    "System",
    "functional_call",
    "hypergradient",
    "linearize",
    "proximal",
    "ridge",
]
