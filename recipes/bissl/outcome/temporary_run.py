"""Makes a run for a script: in a temporary folder, without a word, of which only the results are kept."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...experiment.folder.run_folder import METRICS
from ..settings.config import Config
from ..training.artifacts import artifact_store
from ..training.context import Context, Datasets
from .pipeline import run_pipeline, summarise


def results_of(config: Config) -> dict[str, Any]:
    """All stages of all arms on the CPU, in a temporary folder: what a run would write to its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        path, data, quiet = Path(folder), Datasets(config), Console(quiet=True)
        context = Context(config, torch.device("cpu"), artifact_store(path), path / METRICS, data, quiet)
        return summarise(context, run_pipeline(context))
