"""Gradient-based bilevel optimization for PyTorch: hypergradients, implicit-gradient solvers, alternating training.

Here are the names that a first reader needs; the others are public in their rooms: `bilevel.hypergradients`,
`bilevel.linear`, `bilevel.products`, `bilevel.training`, `bilevel.compare`, `bilevel.nn`.
"""

from bilevel.hypergradients import (
    SABA,
    SOBA,
    Hypergradient,
    Implicit,
    Method,
    OneStep,
    Penalty,
    SGDUpdate,
    SolverError,
    SolverWarning,
    Unrolled,
    check_hypergradient,
    hypergradient,
    linearize,
    lower_solution,
)
from bilevel.linear import CG, GMRES, MINRES, Identity, Neumann, Status
from bilevel.nn import functional_call
from bilevel.problem import Problem, proximal, ridge
from bilevel.training import (
    AlternatingSchedule,
    BatchStack,
    Checkpointing,
    Level,
    ProgressBar,
    Trainer,
)
from bilevel.tree import Params

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "SABA",
    "SOBA",
    "AlternatingSchedule",
    "BatchStack",
    "Checkpointing",
    "Hypergradient",
    "Identity",
    "Implicit",
    "Level",
    "Method",
    "Neumann",
    "OneStep",
    "Params",
    "Penalty",
    "Problem",
    "ProgressBar",
    "SGDUpdate",
    "SolverError",
    "SolverWarning",
    "Status",
    "Trainer",
    "Unrolled",
    "check_hypergradient",
    "functional_call",
    "hypergradient",
    "linearize",
    "lower_solution",
    "proximal",
    "ridge",
]
