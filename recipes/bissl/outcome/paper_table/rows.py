"""Reads finished runs, and makes the rows of Table 1 of their results and the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ....experiment.configuration import explain, read_config_file
from ....experiment.errors import ConfigError
from ....experiment.folder.run_folder import CONFIG, RESULTS
from ....experiment.statistics import holm
from ...settings.arms import BASELINE, METHOD, REQUIRED, in_order
from ...settings.paper import TITLES, PaperVersion, Score, paper_entry, paper_name

COUNTS = ("pretext_steps", "label_steps", "seconds")


class _Lenient(BaseModel):
    """Checks the fields that the table reads; a run may record others."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class Measured(_Lenient):
    """A metric of an arm; None where it is undefined."""

    mean: float | None
    std: float | None


class Difference(_Lenient):
    """What a run found between the arms `a` and `b`."""

    a: str
    b: str
    metric: str
    difference: float | None
    ci95: list[float] | None = Field(min_length=2, max_length=2)
    test: str
    p_value: float | None = Field(ge=0, le=1)


class Environment(_Lenient):
    """What a run was made with."""

    device: str | None = None
    device_name: str | None = None


class RunResults(_Lenient):
    """The part of `results.json` that the table reads."""

    seeds: list[int]
    repeats: Literal["finetune", "pipeline"]
    primary_metric: str
    variants: dict[str, dict[str, Measured | int | float]]
    comparisons: list[Difference]
    notes: list[str] = []
    environment: Environment = Environment()

    @model_validator(mode="after")
    def _complete(self) -> "RunResults":
        for arm in REQUIRED:
            if not isinstance(self.variants.get(arm, {}).get(self.primary_metric), Measured):
                raise ValueError(f"variants: {arm!r} has no {self.primary_metric!r}, the primary metric")
        for arm, entry in self.variants.items():
            for count in COUNTS:
                if not isinstance(entry.get(count), int | float):
                    raise ValueError(f"variants: {arm!r} has no {count}")
        return self

    def metrics(self, arm: str) -> list[str]:
        """The arm's metrics, the primary one first."""
        found = [name for name, value in self.variants[arm].items() if isinstance(value, Measured)]
        return sorted(found, key=lambda name: name != self.primary_metric)

    def measured(self, arm: str, metric: str) -> Measured:
        """A metric that the arm has."""
        value = self.variants[arm][metric]
        assert isinstance(value, Measured), "metrics() names what can be asked for"
        return value

    def counts(self, arm: str) -> list[float]:
        """The arm's `COUNTS`, in their order."""
        values = [self.variants[arm][name] for name in COUNTS]
        return [value for value in values if not isinstance(value, Measured)]

    def against(self, arm: str, metric: str) -> Difference | None:
        """The comparison of BiSSL with `arm`, None where the run made none."""
        found = (c for c in self.comparisons if (c.a, c.b, c.metric) == (METHOD, arm, metric))
        return next(found, None)


@dataclass(frozen=True)
class FinishedRun:
    """A run whose results have been read and checked."""

    directory: Path
    dataset: str
    results: RunResults
    paper_version: PaperVersion = "v2"


@dataclass(frozen=True)
class Row:
    """One arm of one run in one metric, against BiSSL.

    Attributes:
        dataset: the downstream set, with the run's folder where several runs are on it.
        arm: the arm that BiSSL is compared with, or "bissl" in the row of its own score and cost.
        pretext_steps, label_steps, hours: of the arm, in one repeat.
        p_holm: the p-value after Holm's correction over all rows of the table.
        paper: the paper's scores of BiSSL and of the baseline, where it has them.
        notes: of the run, see `labelled_notes`.
    """

    dataset: str
    arm: str
    metric: str
    repeats: str
    seeds: int
    bissl: Measured
    other: Measured
    comparison: Difference | None
    p_holm: float | None
    paper: tuple[Score, Score] | None
    pretext_steps: float
    label_steps: float
    hours: float
    notes: tuple[str, ...]


def read_finished(directory: Path) -> FinishedRun:
    """The run in `directory`.

    Raises:
        ConfigError: it is no run, is not finished, or a file of it is damaged; the message names the folder or file.
    """
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory}: holds no run, there is no {CONFIG}; give a run's output folder")
    if not (directory / RESULTS).is_file():
        raise ConfigError(f"{directory}: not finished, there is no {RESULTS}; continue the run with --resume")
    config, content = (_readable(directory / name) for name in (CONFIG, RESULTS))
    data = config.get("data")
    dataset = data.get("downstream") if isinstance(data, dict) else None
    if not isinstance(dataset, str):
        raise ConfigError(f"{directory / CONFIG}: damaged, data.downstream must be a name, got {dataset!r}")
    name = paper_name(dataset)
    try:
        results = RunResults.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{directory / RESULTS}: damaged, {'; '.join(explain(error))}") from error
    named = config.get("paper_version", "v2")
    version = next((known for known in get_args(PaperVersion) if known == named), None)
    if version is None:
        raise ConfigError(f"{directory / CONFIG}: damaged, paper_version must be v2 or v1, got {named!r}")
    return FinishedRun(directory, name if name in TITLES else dataset, results, version)


def main_rows(runs: Sequence[FinishedRun], version: PaperVersion) -> list[Row]:
    """BiSSL against the baseline, a row a run and metric, in the order of the paper's Table 1."""
    return _corrected(
        [
            _row(run, label, BASELINE, metric, version)
            for label, run in _labelled(runs)
            for metric in run.results.metrics(METHOD)
            if metric in run.results.metrics(BASELINE)
        ]
    )


def arm_rows(runs: Sequence[FinishedRun], version: PaperVersion) -> list[Row]:
    """BiSSL against every arm in the primary metric, with each arm's cost; BiSSL's own row comes first in a run."""
    return _corrected(
        [
            _row(run, label, arm, run.results.primary_metric, version)
            for label, run in _labelled(runs)
            for arm in in_order(run.results.variants)
            if run.results.primary_metric in run.results.metrics(arm)
        ]
    )


def labelled_notes(runs: Sequence[FinishedRun]) -> list[tuple[str, list[str]]]:
    """(label, what a reader must know) of each run, the meaning of the crop and the device among it."""
    return [(label, _notes(run)) for label, run in _labelled(runs)]


def on_gpu(runs: Sequence[FinishedRun]) -> bool:
    """Whether all runs were made on a GPU, so that their hours are GPU hours."""
    return all(run.results.environment.device == "cuda" for run in runs)


def _notes(run: FinishedRun) -> list[str]:
    device = run.results.environment.device_name
    return [*run.results.notes, *([] if device is None else [f"made on {device}"])]


def _readable(path: Path) -> dict[str, Any]:
    try:
        return read_config_file(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: damaged ({error})") from error


def _labelled(runs: Sequence[FinishedRun]) -> list[tuple[str, FinishedRun]]:
    order = {name: place for place, name in enumerate(TITLES)}
    names = [run.dataset for run in runs]
    labels = [
        run.dataset if names.count(run.dataset) == 1 else f"{run.dataset} ({run.directory.resolve().name})"
        for run in runs
    ]
    pairs = list(zip(labels, runs, strict=True))
    return sorted(pairs, key=lambda pair: (order.get(pair[1].dataset, len(order)), pair[0]))


def _row(run: FinishedRun, label: str, arm: str, metric: str, version: PaperVersion) -> Row:
    results = run.results
    paper = paper_entry(run.dataset, version)
    pretext_steps, label_steps, seconds = results.counts(arm)
    return Row(
        dataset=label,
        arm=arm,
        metric=metric,
        repeats=results.repeats,
        seeds=len(results.seeds),
        bissl=results.measured(METHOD, metric),
        other=results.measured(arm, metric),
        comparison=results.against(arm, metric),
        p_holm=None,
        paper=None if paper is None else paper.scores.get(metric),
        pretext_steps=pretext_steps,
        label_steps=label_steps,
        hours=seconds / 3600,
        notes=tuple(_notes(run)),
    )


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with their p-values corrected as one family."""
    found = holm([row.comparison.p_value if row.comparison else None for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, found, strict=True)]
