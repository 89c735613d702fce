"""Modules inside a differentiated objective: functional calls, layers that differentiate twice."""

from bilevel.nn.double_backward import CheapDoubleBackward
from bilevel.nn.double_precision import DoublePrecision, as_double
from bilevel.nn.functional import (
    curvature_pass,
    curvature_surroundings,
    functional_call,
    in_curvature_pass,
    noting_casts,
    noting_writers,
    training_autocast,
    training_pass,
)
from bilevel.nn.seeding import GeneratorMark, TorchMark, chunk_seeds, own_draws, seeded
from bilevel.nn.sync_batch_norm import SyncBatchNorm, synchronised

__all__ = [
    "CheapDoubleBackward",
    "DoublePrecision",
    "GeneratorMark",
    "SyncBatchNorm",
    "TorchMark",
    "as_double",
    "chunk_seeds",
    "curvature_pass",
    "curvature_surroundings",
    "functional_call",
    "in_curvature_pass",
    "noting_casts",
    "noting_writers",
    "own_draws",
    "seeded",
    "synchronised",
    "training_autocast",
    "training_pass",
]
