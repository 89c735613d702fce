"""Gradient-based bilevel optimization for PyTorch: hypergradients, implicit-gradient solvers, alternating training."""

from bilevel.batches import BatchSource, BatchStack
from bilevel.callbacks import Callback, Checkpointing, JSONLWriter, ProgressBar
from bilevel.check import check_hypergradient
from bilevel.gauss_newton import GaussNewton
from bilevel.hvp import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.hypergradient import Hypergradient, SolverError, SolverWarning, hypergradient
from bilevel.level import NonFiniteError
from bilevel.modules import functional_call
from bilevel.operators import LinearOperator
from bilevel.problem import Problem, proximal, ridge
from bilevel.schedule import AlternatingSchedule
from bilevel.solution import Solution, Status
from bilevel.solvers import CG, MINRES, Dense, Identity, Neumann, Nystrom, Solver
from bilevel.staleness import StaleSystemError
from bilevel.system import System, linearize
from bilevel.trainer import Trainer
from bilevel.tree import Params
from bilevel.unrolled import unrolled_hypergradient
from bilevel.updates import AdamUpdate, SGDUpdate

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
