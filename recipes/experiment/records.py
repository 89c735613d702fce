"""Reads a run's configuration, results and events back from its folder, orders the events and makes curves of them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.checkpoint import write_atomic

from .folder.run_folder import CONFIG, METRICS, RESULTS

NOT_RECORDED = "not recorded"
"""Stands in the place of what a run has not recorded."""

Event = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class RunRecords:
    """The artifacts of one run directory; None and empty where the run has not written them.

    Attributes:
        config: the run's configuration.
        results: the final table, in the layout of `results.json`.
        events: the objects of `metrics.jsonl`, in the order they were written.
        partial_line: number of a last line that was cut off while being written, and left out.
        written: when the newest of the files was last written; None without any file.
    """

    config: dict[str, Any] | None
    results: dict[str, Any] | None
    events: tuple[Event, ...]
    partial_line: int | None
    written: datetime | None


@dataclass(frozen=True)
class Curve:
    """A recorded quantity over steps, of one variant and seed; NaN where the run recorded null."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Band:
    """Mean, smallest and largest finite value of a quantity at each x; NaN where there is none."""

    x: Array
    mean: Array
    low: Array
    high: Array


def read_run(run_dir: Path) -> RunRecords:
    """Read the artifacts in `run_dir`.

    Raises:
        ValueError: `run_dir` is no directory, a JSON file does not hold an object, or a line of `metrics.jsonl`
            is broken (a last line without its line end is taken as cut off, and left out).
    """
    if not run_dir.is_dir():
        raise ValueError(f"run_dir: {str(run_dir)!r} is not a directory; give the output directory of a run")
    events, partial_line = _read_events(run_dir / METRICS)
    paths = [path for path in (run_dir / n for n in (METRICS, RESULTS, CONFIG)) if path.is_file()]
    newest = max((path.stat().st_mtime for path in paths), default=None)
    return RunRecords(
        config=_read_object(run_dir / CONFIG),
        results=_read_object(run_dir / RESULTS),
        events=events,
        partial_line=partial_line,
        written=None if newest is None else datetime.fromtimestamp(newest),
    )


def order_events(path: Path, place: Callable[[Event], Any]) -> None:
    """Put the lines of a `metrics.jsonl` in the order of `place`, a function of an event; equal ones keep their order.

    Stages that are made side by side write as they come. A line that was cut off while being written is left out.

    Raises:
        ValueError: a line is broken.
    """
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    places = [place(_parse_event(path, number, line)) for number, line in enumerate(lines, start=1)]
    ordered = [lines[index] for index in sorted(range(len(lines)), key=places.__getitem__)]
    if ordered != lines:
        write_atomic(path, b"".join(ordered))


def select(events: Sequence[Event], stage: str, event: str) -> list[Event]:
    """The events of one kind, one for each variant, seed and step.

    A resumed run repeats the steps after its checkpoint: what it recorded last stands.
    """
    latest: dict[tuple[str, int, int], Event] = {}
    for record in events:
        if record["stage"] == stage and record["event"] == event:
            key = (record["variant"], record["seed"], record["step"])
            latest[key] = latest.get(key, {}) | record
    return list(latest.values())


def variants_of(events: Sequence[Event]) -> list[str]:
    """The variants that recorded anything, by name."""
    return sorted({record["variant"] for record in events})


def curves(events: Sequence[Event], field: str, *, x: str = "step") -> dict[str, dict[int, Curve]]:
    """Variant -> seed -> curve of `field` over `x`; events without either are passed over."""
    points: dict[str, dict[int, dict[float, float]]] = {}
    for record in events:
        if field in record and x in record:
            by_seed = points.setdefault(record["variant"], {})
            by_seed.setdefault(record["seed"], {})[number(record, x)] = number(record, field)
    return {
        variant: {seed: _curve(values) for seed, values in sorted(by_seed.items())}
        for variant, by_seed in points.items()
    }


def bands(events: Sequence[Event], field: str, *, x: str) -> dict[str, Band]:
    """Variant -> band of `field`, over the events (of all seeds) that share a value of `x`."""
    groups: dict[str, dict[float, list[float]]] = {}
    for record in events:
        if field in record and x in record:
            by_x = groups.setdefault(record["variant"], {})
            by_x.setdefault(number(record, x), []).append(number(record, field))
    return {variant: _band(by_x) for variant, by_x in groups.items()}


def mean_curve(by_seed: dict[int, Curve]) -> Curve:
    """Mean over seeds at the steps that all of them recorded, so that no seed's absence shows as a jump."""
    common = set.intersection(*(set(curve.x.tolist()) for curve in by_seed.values())) if by_seed else set()
    steps = np.array(sorted(common), dtype=np.float64)
    rows = [curve.y[np.isin(curve.x, steps)] for curve in by_seed.values()]
    return Curve(steps, np.mean(rows, axis=0) if rows else steps)


def thin(curve: Curve, limit: int = 2000) -> Curve:
    """At most `limit` points: the smallest and the largest of each stretch of steps, so that spikes stay visible."""
    if curve.x.size <= limit:
        return curve
    kept: list[int] = []
    for stretch in np.array_split(np.arange(curve.x.size), limit // 2):
        values = curve.y[stretch]
        if np.isnan(values).all():
            kept.append(int(stretch[0]))
        else:
            kept += sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])})
    return Curve(curve.x[kept], curve.y[kept])


def number(record: Event, field: str) -> float:
    """The field as a float, NaN for null.

    Raises:
        ValueError: the field is absent or no number.
    """
    value = record.get(field)
    if value is None and field in record:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        place = f"stage {record['stage']!r}, event {record['event']!r}, step {record['step']!r}"
        raise ValueError(f"{METRICS}: {field!r} is {value!r} at {place}; it must be a number or null")
    return float(value) if math.isfinite(value) else math.nan


def _curve(points: dict[float, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, dtype=np.float64), np.array([points[step] for step in steps], dtype=np.float64))


def _band(groups: dict[float, list[float]]) -> Band:
    rows = []
    for x in sorted(groups):
        values = [value for value in groups[x] if math.isfinite(value)] or [math.nan]
        rows.append((x, sum(values) / len(values), min(values), max(values)))
    return Band(*np.array(rows, dtype=np.float64).T)


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore the file or run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; restore the file or run again")
    return content


def _read_events(path: Path) -> tuple[tuple[Event, ...], int | None]:
    if not path.is_file():
        return (), None
    *lines, rest = path.read_bytes().split(b"\n")
    events = [_parse_event(path, index, line) for index, line in enumerate(lines, start=1) if line.strip()]
    if not rest.strip():
        return tuple(events), None
    try:
        json.loads(rest)
    except ValueError:
        return tuple(events), len(lines) + 1
    return (*events, _parse_event(path, len(lines) + 1, rest)), None


def _parse_event(path: Path, index: int, line: bytes) -> Event:
    remedy = "remove the line, or run again into an empty directory"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {index}: not valid JSON ({error}); {remedy}") from error
    kinds = {"stage": str, "variant": str, "seed": int, "event": str, "step": int}
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {index}: holds a {type(record).__name__}, not an object; {remedy}")
    for field, kind in kinds.items():
        if not isinstance(record.get(field), kind):
            raise ValueError(
                f"{path}, line {index}: {field!r} is {record.get(field)!r}, not of type {kind.__name__}; {remedy}"
            )
    return record
