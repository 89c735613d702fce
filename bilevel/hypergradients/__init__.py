"""Hypergradients: the linear system behind them, the ways to compute them, the check of one."""

from bilevel.hypergradients.check import check_hypergradient
from bilevel.hypergradients.first_order import darts_hypergradient, sama_hypergradient
from bilevel.hypergradients.hypergradient import (
    Hypergradient,
    OnFailure,
    SolverError,
    SolverWarning,
    hypergradient,
    through_system,
)
from bilevel.hypergradients.penalty import penalty_hypergradient
from bilevel.hypergradients.system import System, Tikhonov, linearize
from bilevel.hypergradients.torch_updates import from_optimizer
from bilevel.hypergradients.unrolled import unrolled_hypergradient
from bilevel.hypergradients.updates import AdamUpdate, SGDUpdate

__all__ = [
    "AdamUpdate",
    "Hypergradient",
    "OnFailure",
    "SGDUpdate",
    "SolverError",
    "SolverWarning",
    "System",
    "Tikhonov",
    "check_hypergradient",
    "darts_hypergradient",
    "from_optimizer",
    "hypergradient",
    "linearize",
    "penalty_hypergradient",
    "sama_hypergradient",
    "through_system",
    "unrolled_hypergradient",
]
