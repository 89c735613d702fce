"""Writes the report of a run, one HTML page, from the files that the run left."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel import Status
from bilevel.checkpoint import write_atomic

from ...experiment.folder.run_folder import METRICS, REPORT, RESULTS
from ...experiment.html import Absent, Block, Bullets, Figure, Listing, Picture, Section, Text, render_page
from ...experiment.plots import Drawing
from ...experiment.records import NOT_RECORDED, Event, RunRecords, bands, number, read_run, select, variants_of
from ...experiment.tables import Table
from ..settings.arms import in_order
from .features.saved import read_features
from .reading_words import reading_lines
from .stage_curves import finetune_curves, head_curves, levels_curves, pretext_curves, solver_curves
from .wording import (
    arms_in_order,
    comparison_numbers,
    mean_and_std,
    metric_direction,
    metric_names,
    number_text,
    p_text,
    repeats_sentence,
    seconds_text,
    steps_text,
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` from its `config.json`, `metrics.jsonl` and `results.json`, and from what the
    command `features` left there, if it did.

    The file holds its own style and drawings and asks nothing of the network. A piece that the run has not (yet)
    recorded is shown as "not recorded"; without `results.json` a banner says that the run is not finished.

    Returns:
        The path of the report.

    Raises:
        ValueError: `run_dir` is no directory, an artifact is broken (the message names file and line), or matplotlib
            is not installed. A last line of `metrics.jsonl` that was cut off is left out and mentioned.
    """
    try:
        run = read_run(run_dir)
        page = render_page(_title(run), _opening(run), _sections(run, run_dir))
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        # The files are JSON that may have been changed by hand: any field can hold anything.
        raise ValueError(
            f"{run_dir}: {RESULTS}, {METRICS} or the config hold something else than a run writes ({error})"
        ) from error
    path = run_dir / REPORT
    write_atomic(path, page.encode())
    return path


def _sections(run: RunRecords, run_dir: Path) -> list[Section]:
    events, arms = run.events, in_order(variants_of(run.events))
    return [
        Section("Results", _results(run.results)),
        Section("Comparisons", _comparisons(run.results)),
        *_images(run.results),
        Section("Notes", _notes(run.results)),
        Section("Pretext stage", _figure(pretext_curves(events, arms), "Pretext stage, by arm.")),
        Section("Head warm-up", _figure(head_curves(events, arms), "Head on a frozen backbone, by arm.")),
        Section("BiSSL stage: both levels", _figure(levels_curves(events, arms), _LEVELS_CAPTION)),
        Section("BiSSL stage: the linear systems", _solver(events, arms)),
        Section("Fine-tuning", _figure(finetune_curves(events, arms), _FINETUNE_CAPTION)),
        *_features(run_dir),
        Section("Environment", _pairs((run.results or {}).get("environment"))),
        Section("Configuration", _configuration(run.config)),
    ]


_LEVELS_CAPTION = (
    "Each level over its own steps. A smooth lower loss beside a wild upper one points at the upper learning rate or "
    "at systems that were not solved (next section)."
)
_SOLVER_CAPTION = (
    "Mean over the upper steps of an alternation; the shade spans smallest to largest. Residual: ‖v − A x‖ / ‖v‖. "
    "‖x − v‖ / ‖v‖ and cos(x, v) say what solving changed against using v as it is: near 0 and 1, the products bought "
    "little. Stationarity is the norm of the lower gradient: the implicit gradient assumes it is small. Its noise is "
    "the standard error of that gradient over the batches of the system: up to a few times 1, they cannot tell the "
    "lower variables from a solution. A negative curvature means that the system was not positive definite there. The "
    "residual within the last solve is the one that the iterations carry along."
)
_FINETUNE_CAPTION = "Thick: mean over the seeds, as far as all of them got. Thin: single seeds."


def _title(run: RunRecords) -> str:
    preset = (run.results or {}).get("preset") or (run.config or {}).get("preset") or NOT_RECORDED
    return f"BiSSL run, preset {preset}"


def _opening(run: RunRecords) -> list[Block]:
    written = NOT_RECORDED if run.written is None else run.written.strftime("%Y-%m-%d %H:%M")
    blocks: list[Block] = [Text(f"Last artifact written: {written}")]
    if run.results is None:
        said = f"There is no {RESULTS} yet; what follows is what has been recorded so far."
        blocks.append(Text(said, "warning", lead="Run not finished."))
    if run.partial_line is not None:
        said = f"Line {run.partial_line} of {METRICS}, the last one, was cut off while being written and is left out."
        blocks.append(Text(said, "warning"))
    return blocks


def _results(results: Mapping[str, Any] | None) -> list[Block]:
    if not results or not results.get("variants"):
        return []
    rows = []
    for arm, entry in arms_in_order(results).items():
        costs = [
            steps_text(entry, "pretext_steps"),
            steps_text(entry, "label_steps"),
            seconds_text(entry.get("seconds")),
        ]
        for metric in metric_names(results):
            scores = entry.get(metric) or {}
            per_seed = ", ".join(number_text(value) for value in scores.get("per_seed") or ()) or NOT_RECORDED
            name = f"{metric} {metric_direction(results, metric)}".strip()
            rows.append([arm, name, mean_and_std(scores), per_seed, *costs])
    headings = ["arm", "metric", "mean ± std", "per seed", "pretext steps", "label steps", "seconds"]
    seeds = ", ".join(str(seed) for seed in results.get("seeds") or ()) or NOT_RECORDED
    primary = results.get("primary_metric") or NOT_RECORDED
    legend = (
        f"Primary metric: {primary}. Seeds: {seeds}. Accuracies are in percent; an arrow points to the better side; "
        "the spread is the standard deviation over seeds."
    )
    return [Text(legend), Table(headings, rows, left=2)]


def _comparisons(results: Mapping[str, Any] | None) -> list[Block]:
    comparisons = (results or {}).get("comparisons")
    if not results or not comparisons:
        return []
    rows = []
    for item in comparisons:
        pair = f"{item.get('a', NOT_RECORDED)} − {item.get('b', NOT_RECORDED)}"
        p_values = [p_text(item.get(name)).removeprefix("= ") for name in ("p_value", "p_holm")]
        test = str(item.get("test") or NOT_RECORDED)
        rows.append([pair, str(item.get("metric", NOT_RECORDED)), test, *comparison_numbers(item), *p_values])
    headings = ["arms", "metric", "test", "difference", "95% interval", "p", "p after Holm's correction"]
    meaning = repeats_sentence(results) or f"What was repeated over seeds: {NOT_RECORDED}."
    return [Table(headings, rows, left=3), Text(meaning)]


def _notes(results: Mapping[str, Any] | None) -> list[Block]:
    notes = (results or {}).get("notes")
    return [Bullets([str(note) for note in notes])] if notes else []


def _images(results: Mapping[str, Any] | None) -> list[Section]:
    facts = (results or {}).get("images")
    return [Section("Images", [Bullets(reading_lines(facts))])] if facts else []


def _figure(drawing: Drawing | None, caption: str) -> list[Block]:
    return [] if drawing is None else [Figure(drawing, caption)]


def _solver(events: Sequence[Event], arms: Sequence[str]) -> list[Block]:
    upper = select(events, "bissl", "upper")
    figure = _figure(solver_curves(events, arms), _SOLVER_CAPTION) or [Absent()]
    statuses = Counter(
        (record["variant"], record["seed"], record["status"]) for record in upper if record.get("status") is not None
    )
    ends_title, cost_title = "How the solves ended", "What the stage cost, and where it ended"
    if not statuses:
        return [*figure, Absent(ends_title)]
    meanings = {status.name: status.value for status in Status}
    ends = [
        [arm, str(seed), status, meanings.get(status, NOT_RECORDED), f"{count:,}"]
        for (arm, seed, status), count in sorted(statuses.items())
    ]
    end_headings = ["arm", "seed", "status", "what it means and asks for", "solves"]
    cost_headings = ["arm", "operator products", "iterations", "adaptations", "seconds in alternations"]
    cost_headings.append("stationarity / its noise, last alternation")
    solved = dict.fromkeys(arm for arm, *_ in sorted(statuses))
    costs = [_costs(events, arm) for arm in solved]
    return [*figure, Table(end_headings, ends, left=4, title=ends_title), Table(cost_headings, costs, title=cost_title)]


def _costs(events: Sequence[Event], arm: str) -> list[str]:
    """Products, iterations, adaptations and seconds of an arm's bilevel stage, and its last relative stationarity."""
    own = [record for record in events if record["variant"] == arm]
    upper, ends = select(own, "bissl", "upper"), select(own, "bissl", "alternation")
    adaptations = len(select(own, "bissl", "adaptation"))
    multiples = bands(upper, "stationarity_over_noise", x="alternation").get(arm)
    last = math.nan if multiples is None else float(multiples.mean[-1])
    return [
        *(arm, _sum(upper, "num_hvps"), _sum(upper, "iterations"), str(adaptations), _sum(ends, "seconds")),
        NOT_RECORDED if math.isnan(last) else number_text(last),
    ]


def _sum(records: Sequence[Event], field: str) -> str:
    values = [number(record, field) for record in records if field in record]
    finite = [value for value in values if value == value]
    if not finite:
        return NOT_RECORDED
    total = sum(finite)
    # Products over some of the batches count in part.
    return f"{total:,.1f}" if field == "seconds" or not float(total).is_integer() else f"{total:,.0f}"


def _features(run_dir: Path) -> list[Section]:
    """The section of the features' picture, where the run has one."""
    found = read_features(run_dir)
    if found is None:
        return []
    features, picture = found
    rows = [
        [arm, *(_score(entry.scores.get(name)) for name in features.definitions)]
        for arm, entry in features.arms.items()
    ]
    # Drawn on white, so that the page's colours do not matter to it.
    shown = Picture(picture, "image/png", f"{features.caption()} Statistics of BatchNorm: {features.batch_norm}.")
    meanings = Bullets([f"{name}: {text}" for name, text in features.definitions.items()])
    return [Section("Features before fine-tuning", [shown, Table(["arm", *features.definitions], rows), meanings])]


def _score(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.3g}"


def _pairs(mapping: Mapping[str, Any] | None) -> list[Block]:
    if not mapping:
        return []
    rows = [[str(name), value if isinstance(value, str) else json.dumps(value)] for name, value in mapping.items()]
    return [Table(["name", "value"], rows, left=2)]


def _configuration(config: Mapping[str, Any] | None) -> list[Block]:
    return [] if config is None else [Listing("all fields", json.dumps(config, indent=2, ensure_ascii=False))]
