"""Hypergradients: the methods that compute them, the linear system behind them, the check of one."""

from bilevel.hypergradients.hypergradient import as_method, hypergradient
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.linearize import linearize
from bilevel.hypergradients.lower_solution import LowerSolution, lower_solution
from bilevel.hypergradients.method import (
    LowerStep,
    Method,
    MethodState,
    Proposal,
    Setup,
    UpperStep,
    check_proposal,
    check_serves,
    unwritten,
)
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.penalty import Penalty
from bilevel.hypergradients.result import (
    AdjointSolve,
    Hypergradient,
    OnFailure,
    SolverError,
    SolverWarning,
    check_on_failure,
    needed_tikhonov,
    report_failure,
)
from bilevel.hypergradients.sama import SAMA
from bilevel.hypergradients.self_check.check import HypergradientCheck, check_hypergradient
from bilevel.hypergradients.single_loop import (
    BOME,
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AdjointLoop,
    AmIGO,
    Estimate,
    Point,
    SingleLoop,
    StocBiO,
    directions,
)
from bilevel.hypergradients.system import System
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.hypergradients.updates.torch_updates import TorchUpdate, from_optimizer, restored_update, saved_update
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate, Update
from bilevel.lower import Draw, Oracles, Partition, Tikhonov

__all__ = [
    "BOME",
    "F2SA",
    "FSLA",
    "MASOBA",
    "MRBO",
    "SABA",
    "SAMA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "AdamUpdate",
    "AdjointLoop",
    "AdjointSolve",
    "AmIGO",
    "Draw",
    "Estimate",
    "Hypergradient",
    "HypergradientCheck",
    "Implicit",
    "LowerSolution",
    "LowerStep",
    "Method",
    "MethodState",
    "OnFailure",
    "OneStep",
    "Oracles",
    "Partition",
    "Penalty",
    "Point",
    "Proposal",
    "SGDUpdate",
    "Setup",
    "SingleLoop",
    "SolverError",
    "SolverWarning",
    "StocBiO",
    "System",
    "Tikhonov",
    "TorchUpdate",
    "Unrolled",
    "Update",
    "UpperStep",
    "as_method",
    "check_hypergradient",
    "check_on_failure",
    "check_proposal",
    "check_serves",
    "directions",
    "from_optimizer",
    "hypergradient",
    "linearize",
    "lower_solution",
    "needed_tikhonov",
    "report_failure",
    "restored_update",
    "saved_update",
    "unwritten",
]
