"""Gradient-based bilevel optimization for PyTorch: hypergradients, implicit-gradient solvers, alternating training."""

from bilevel.batches import BatchSource, BatchStack
from bilevel.callbacks import Callback, Checkpointing, JSONLWriter, ProgressBar
from bilevel.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from bilevel.hvp import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.hypergradient import Hypergradient, SolverError, SolverWarning, hypergradient
from bilevel.modules import functional_call
from bilevel.operators import LinearOperator
from bilevel.problem import Problem, proximal, ridge
from bilevel.schedule import AlternatingSchedule
from bilevel.solution import Solution, Status
from bilevel.solvers import CG, Dense, Identity, Neumann, Solver
from bilevel.system import StaleSystemError, System, linearize
from bilevel.trainer import NonFiniteError, Trainer
from bilevel.tree import Params

__version__ = "0.1.0"

__all__ = [
    "CG",
    "AlternatingSchedule",
    "BatchSource",
    "BatchStack",
    "Callback",
    "CheckpointError",
    "Checkpointing",
    "Dense",
    "FiniteDifference",
    "ForwardOverReverse",
    "HVPProvider",
    "Hypergradient",
    "Identity",
    "JSONLWriter",
    "LinearOperator",
    "Neumann",
    "NonFiniteError",
    "Params",
    "Problem",
    "ProgressBar",
    "ReverseOverReverse",
    "Solution",
    "Solver",
    "SolverError",
    "SolverWarning",
    "StaleSystemError",
    "Status",
    "System",
    "Trainer",
    "functional_call",
    "hypergradient",
    "linearize",
    "load_checkpoint",
    "proximal",
    "ridge",
    "save_checkpoint",
]
