"""A run from a script: nothing is shown, and only its results are kept."""

import tempfile
from collections.abc import Mapping
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


def plain_lines(results: Mapping[str, Any]) -> list[str]:
    """The primary metric (a percentage) and the steps of each arm, then the first comparison; for a plain terminal."""
    metric, (first, *_) = results["primary_metric"], results["comparisons"]
    lines = [f"{'arm':<12}{'test ' + metric:<20}{'pretext steps':>14}{'label steps':>14}"]
    for name, arm in results["arms"].items():
        score = f"{arm[metric]['mean']:.1f}% +- {arm[metric]['std']:.1f}"
        lines.append(f"{name:<12}{score:<20}{arm['pretext_steps']:>14}{arm['label_steps']:>14}")
    found = f"{first['difference']:+.1f}, p = {first['p_value']:.2f}, {first['test']}"
    return [*lines, f"{first['a']} less {first['b']}: {found}; {len(results['seeds'])} seeds"]
