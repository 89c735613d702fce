"""Training: levels, schedule, data, callbacks and the trainer."""

from bilevel.training.batches import BatchSource, BatchStack, derive_seed
from bilevel.training.callbacks import Callback, Checkpointing, Diagnostics, JSONLWriter, ProgressBar
from bilevel.training.inspection import Inspect, last_indices, write_inspection
from bilevel.training.level import NonFiniteError
from bilevel.training.schedule import AlternatingSchedule
from bilevel.training.trackers import TensorBoardLogger, Tracker, TrackerError, WandbLogger
from bilevel.training.trainer import Trainer

__all__ = [
    "AlternatingSchedule",
    "BatchSource",
    "BatchStack",
    "Callback",
    "Checkpointing",
    "Diagnostics",
    "Inspect",
    "JSONLWriter",
    "NonFiniteError",
    "ProgressBar",
    "TensorBoardLogger",
    "Tracker",
    "TrackerError",
    "Trainer",
    "WandbLogger",
    "derive_seed",
    "last_indices",
    "write_inspection",
]
