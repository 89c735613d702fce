"""Plans the runs of the paper's Figure 2, both arms at several lengths of pre-training, and collects their scores."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ....experiment.configuration import differences
from ....experiment.errors import ConfigError
from ....experiment.folder.run_folder import RESULTS, RunDirectory
from ....experiment.statistics import mean_std
from ...settings.arms import METHOD
from ...settings.config import Config, build_config
from ...settings.plan import batches_per_epoch
from ..paper_table.rows import read_finished


@dataclass(frozen=True)
class Point:
    """One length of pre-training: both arms' configuration, and the folder of their run."""

    epochs: int
    config: Config
    directory: RunDirectory


def warmup_cut(config: Config, count_images: Callable[[], int]) -> int:
    """How many epochs shorter than the baseline's pre-training BiSSL's warm-up is.

    Where pretext.baseline_epochs is set, by as many as it is longer than pretext.epochs (the paper's presets: 100 of
    600). Where it is null, by the bilevel stage's pretext steps, rounded to epochs: both arms then make equally many.

    Args:
        count_images: Gives the number of pretext images; called only where it is needed.

    Raises:
        ConfigError: the baseline is shorter than the warm-up.

    Source: paper, sections 4.2.2 (composite configuration) and 4.3.1: 100 epochs for any length.
    """
    longer, warm = config.pretext.baseline_epochs, config.pretext.epochs
    if longer is None:
        epoch = batches_per_epoch(count_images(), config.pretext.batch_size)
        return round(config.bissl.alternations * config.bissl.lower_steps / epoch)
    if longer < warm:
        raise ConfigError(
            f"pretext.baseline_epochs: {longer} is less than pretext.epochs, {warm}; figure2 shortens the warm-up by "
            "their difference. Set it to null for equal pretext steps"
        )
    return longer - warm


def config_at(config: Config, epochs: int, cut: int) -> Config:
    """`config` with `epochs` of pre-training in all: of the baseline, or of warm-up and bilevel stage together.

    Raises:
        ConfigError: nothing is left for the warm-up.
    """
    # Weights that were trained elsewhere need none.
    least = cut + (0 if config.model.init_backbone else 1)
    if epochs < least:
        raise ConfigError(
            f"--epochs: {epochs} is too short: the bilevel stage counts for {cut} of them, so that the warm-up would "
            f"have {epochs - cut}; the least is {least}"
        )
    baseline = None if config.pretext.baseline_epochs is None else epochs
    return build_config(config, {"pretext": {"epochs": epochs - cut, "baseline_epochs": baseline}})


def is_finished(point: Point) -> bool:
    """Whether the point's folder holds the results of exactly its configuration.

    Raises:
        ConfigError: it holds something else, or damaged results.
    """
    saved, path = point.directory.saved_config(), point.directory.path
    if saved is None or not (path / RESULTS).exists():
        return False
    if differences(saved, json.loads(point.config.model_dump_json())):
        return False
    # The configuration is written first: results may still be those of fewer seeds or arms.
    results = read_finished(path).results
    repeats = point.config.pipeline_seeds or point.config.seeds
    return len(results.seeds) == repeats and set(results.variants) == set(point.config.arms)


def summary(points: Sequence[tuple[Point, dict[str, Any]]], cut: int) -> dict[str, Any]:
    """The content of figure2.json, from each point and its results.json.

    Raises:
        ConfigError: a score is missing or not finite.
    """
    config, first = points[0][0].config, points[0][1]
    metric = first["primary_metric"]
    return {
        "dataset": config.data.downstream,
        "metric": metric,
        "higher_is_better": first["variants"][METHOD][metric]["higher_is_better"],
        "repeats": first["repeats"],
        "seeds": first["seeds"],
        "warmup_shorter_by": cut,
        "points": [
            {
                "epochs": point.epochs,
                "run": point.directory.path.name,
                "arms": {arm: _entry(point, arm, results["variants"][arm], metric) for arm in config.arms},
            }
            for point, results in points
        ],
    }


def _entry(point: Point, arm: str, values: dict[str, Any], metric: str) -> dict[str, Any]:
    per_seed = values[metric]["per_seed"]
    if not per_seed or None in per_seed:
        raise ConfigError(f"{point.directory.path}: {metric} of {arm} is not finite in a seed; see its report")
    mean, deviation = mean_std(per_seed)
    return {"mean": mean, "std": deviation, "per_seed": per_seed, "pretext_steps": values["pretext_steps"]}


def csv_text(content: dict[str, Any]) -> str:
    """figure2.csv: a row a length, arm and seed, with the arm's mean and standard deviation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["epochs", "arm", "metric", "seed", "value", "mean", "std", "pretext_steps"])
    for point in content["points"]:
        for arm, entry in point["arms"].items():
            spread = "" if entry["std"] is None else entry["std"]
            for seed, value in zip(content["seeds"], entry["per_seed"], strict=True):
                row = [point["epochs"], arm, content["metric"], seed, value, entry["mean"], spread]
                writer.writerow([*row, entry["pretext_steps"]])
    return buffer.getvalue()
