"""Makes a run for a script: in a temporary folder, without a word, of which only the results are kept."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...experiment.workspace import Workspace
from ..settings.config import Config
from ..training.compute import Computing
from ..training.costs import artifact_store
from ..training.datasets import Datasets
from .pipeline import Pipeline
from .results import summarise


def results_of(config: Config) -> dict[str, Any]:
    """All stages of all arms on the CPU, in a temporary folder: what a run would write to its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        path, device = Path(folder), torch.device("cpu")
        workspace = Workspace(path, artifact_store(path), Console(quiet=True))
        pipeline = Pipeline(config, Datasets(config), Computing(config.compute, device), workspace)
        return summarise(pipeline.run(), config, pipeline.data, device)
