"""Gradient-based bilevel optimization for PyTorch: hypergradients, implicit-gradient solvers, alternating training."""

from bilevel.hypergradients import (
    AdamUpdate,
    Hypergradient,
    SGDUpdate,
    SolverError,
    SolverWarning,
    System,
    check_hypergradient,
    hypergradient,
    linearize,
    unrolled_hypergradient,
)
from bilevel.linear import CG, MINRES, Dense, Identity, LinearOperator, Neumann, Nystrom, Solution, Solver, Status
from bilevel.lower import StaleSystemError
from bilevel.nn import functional_call
from bilevel.problem import Problem, proximal, ridge
from bilevel.products import FiniteDifference, ForwardOverReverse, GaussNewton, HVPProvider, ReverseOverReverse
from bilevel.training import (
    AlternatingSchedule,
    BatchSource,
    BatchStack,
    Callback,
    Checkpointing,
    JSONLWriter,
    NonFiniteError,
    ProgressBar,
    Trainer,
)
from bilevel.tree import Params

__version__ = "0.1.0"

__all__ = [
    "CG",
    "MINRES",
    "AdamUpdate",
    "AlternatingSchedule",
    "BatchSource",
    "BatchStack",
    "Callback",
    "Checkpointing",
    "Dense",
    "FiniteDifference",
    "ForwardOverReverse",
    "GaussNewton",
    "HVPProvider",
    "Hypergradient",
    "Identity",
    "JSONLWriter",
    "LinearOperator",
    "Neumann",
    "NonFiniteError",
    "Nystrom",
    "Params",
    "Problem",
    "ProgressBar",
    "ReverseOverReverse",
    "SGDUpdate",
    "Solution",
    "Solver",
    "SolverError",
    "SolverWarning",
    "StaleSystemError",
    "Status",
    "System",
    "Trainer",
    "check_hypergradient",
    "functional_call",
    "hypergradient",
    "linearize",
    "proximal",
    "ridge",
    "unrolled_hypergradient",
]
