"""What the folder of a run of BiSSL holds besides the files that every recipe writes, and what --resume may change."""

from pathlib import Path

from ...experiment.folder.run_folder import RunDirectory

FEATURES, FEATURES_PICTURE = "features.json", "features.png"

IMAGES = "images.npz"
"""The record of a run's images."""

PROJECT = "bissl"
"""Of the runs in a viewer such as W&B."""

MARKS = frozenset({"preset", "pretext", "downstream", "bissl", "finetune"})
"""Fields by which a saved config is recognised as one of this program."""

SAFE_TO_CHANGE = frozenset(
    {
        "seeds",
        "arms",
        "device",
        "threads",
        "jobs",
        "nonfinite_skips",
        "compute.cudnn_benchmark",
        "rank_timeout",
        "tracking",
        "data.root",
        "data.download",
        "data.storage",
        "data.num_workers",
        "data.cache",
        "data.prefetch_factor",
        "downstream.eval_batch_size",
        "pretext.monitor_every",
        "pretext.checkpoint_every",
        "bissl.checkpoint_every",
        "finetune.checkpoint_every",
    }
)
"""Fields that may differ on resume: they change what is run or shown, not what an unfinished stage computes."""


def run_directory(path: Path) -> RunDirectory:
    """The folder of a run of this recipe."""
    return RunDirectory(path, MARKS, SAFE_TO_CHANGE, (IMAGES, FEATURES, FEATURES_PICTURE))
