"""Training: levels, schedule, data, callbacks and the trainers."""

from bilevel.training.callbacks import Callback, Checkpointing, Diagnostics, JSONLWriter, ProgressBar, Record
from bilevel.training.data.batches import BatchSource, BatchStack, Cycle, derive_seed
from bilevel.training.data.blocks import Blocks
from bilevel.training.data.loader import LoaderSource
from bilevel.training.data.transfer import Arriving, Transfer, transfer_to
from bilevel.training.engine import NonFiniteError, Training
from bilevel.training.inspection import Inspect
from bilevel.training.level import Level, LRSchedule
from bilevel.training.schedule import AlternatingSchedule, power_decay
from bilevel.training.single_level import Derivatives, SingleLevelTrainer, gradient_of
from bilevel.training.trackers import TensorBoardLogger, Tracker, TrackerError, WandbLogger
from bilevel.training.trainer import Trainer

__all__ = [
    "AlternatingSchedule",
    "Arriving",
    "BatchSource",
    "BatchStack",
    "Blocks",
    "Callback",
    "Checkpointing",
    "Cycle",
    "Derivatives",
    "Diagnostics",
    "Inspect",
    "JSONLWriter",
    "LRSchedule",
    "Level",
    "LoaderSource",
    "NonFiniteError",
    "ProgressBar",
    "Record",
    "SingleLevelTrainer",
    "TensorBoardLogger",
    "Tracker",
    "TrackerError",
    "Trainer",
    "Training",
    "Transfer",
    "WandbLogger",
    "derive_seed",
    "gradient_of",
    "power_decay",
    "transfer_to",
]
