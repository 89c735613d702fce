"""The report of a run: one HTML file that needs nothing but itself, made from the run's artifacts alone."""

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bilevel import Status
from bilevel.checkpoint import write_atomic

from ...experiment.plots import Drawing, finetune_figure, head_figure, levels_figure, pretext_figure, solver_figure
from ...experiment.records import (
    METRICS_FILE,
    RESULTS_FILE,
    Event,
    RunRecords,
    alternation_bands,
    arms_of,
    number,
    read_run,
    select,
)
from .features.record import read_features
from .results_table import (
    NOT_RECORDED,
    arms_in_order,
    comparison_numbers,
    count_text,
    mean_and_std,
    metric_direction,
    metric_names,
    number_text,
    p_text,
    repeats_sentence,
    seconds_text,
)

REPORT_FILE = "report.html"

# The policy makes the browser refuse any request, should a string from the data ever get past the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --page: #ffffff; --line: #d4d9df; --soft: #f3f5f7; --warn: #fff1cf; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe3e8; --page: #16191d; --line: #3a4047; --soft: #20252b; --warn: #4a3a10; }
}
body { color: var(--text); background: var(--page); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.banner { background: var(--warn); padding: 0.6rem 1rem; border-radius: 4px; }
.absent { opacity: 0.7; font-style: italic; }
figure { margin: 0.8rem 0; }
figure svg, figure img { width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { opacity: 0.85; max-width: 60rem; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; }
"""


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
        page = _page(_title(run), _sections(run, run_dir))
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        # The files are JSON that may have been changed by hand: any field can hold anything.
        raise ValueError(
            f"{run_dir}: {RESULTS_FILE}, {METRICS_FILE} or the config hold something else than a run writes ({error})"
        ) from error
    path = run_dir / REPORT_FILE
    write_atomic(path, page.encode())
    return path


def _sections(run: RunRecords, run_dir: Path) -> list[str]:
    arms = arms_of(run.events)
    return [
        _header(run),
        _section("Results", _results(run.results)),
        _section("Comparisons", _comparisons(run.results)),
        _section("Notes", _notes(run.results)),
        _section("Pretext stage", _figure(pretext_figure(run.events, arms), "Pretext stage, by arm.")),
        _section("Head warm-up", _figure(head_figure(run.events, arms), "Head on a frozen backbone, by arm.")),
        _section("BiSSL stage: both levels", _figure(levels_figure(run.events, arms), _LEVELS_CAPTION)),
        _section("BiSSL stage: the linear systems", _solver(run.events, arms)),
        _section("Fine-tuning", _figure(finetune_figure(run.events, arms), _FINETUNE_CAPTION)),
        *_features(run_dir),
        _section("Environment", _pairs((run.results or {}).get("environment"))),
        _section("Configuration", _configuration(run.config)),
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


def _page(title: str, sections: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _title(run: RunRecords) -> str:
    preset = (run.results or {}).get("preset") or (run.config or {}).get("preset") or NOT_RECORDED
    return f"BiSSL run, preset {preset}"


def _header(run: RunRecords) -> str:
    written = NOT_RECORDED if run.written is None else run.written.strftime("%Y-%m-%d %H:%M")
    parts = [f"<h1>{escape(_title(run))}</h1>", f"<p>Last artifact written: {escape(written)}</p>"]
    if run.results is None:
        parts.append(
            f'<p class="banner"><strong>Run not finished.</strong> There is no {RESULTS_FILE} yet; '
            "what follows is what has been recorded so far.</p>"
        )
    if run.partial_line is not None:
        parts.append(
            f'<p class="banner">Line {run.partial_line} of {METRICS_FILE}, the last one, was cut off while being '
            "written and is left out.</p>"
        )
    return "\n".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _absent() -> str:
    return f'<p class="absent">{NOT_RECORDED}</p>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table of escaped cells, the first `left` columns aligned to the left and the others as numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ("" if index < left else ' class="number"' for index in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells("th", headings)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _results(results: Mapping[str, Any] | None) -> str:
    if not results or not results.get("arms"):
        return _absent()
    rows = []
    for arm, entry in arms_in_order(results).items():
        costs = [
            count_text(entry.get("pretext_steps")),
            count_text(entry.get("label_steps")),
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
    return f"<p>{escape(legend)}</p>{_table(headings, rows, left=2)}"


def _comparisons(results: Mapping[str, Any] | None) -> str:
    comparisons = (results or {}).get("comparisons")
    if not results or not comparisons:
        return _absent()
    rows = []
    for item in comparisons:
        pair = f"{item.get('a', NOT_RECORDED)} − {item.get('b', NOT_RECORDED)}"
        p_values = [p_text(item.get(name)).removeprefix("= ") for name in ("p_value", "p_holm")]
        test = str(item.get("test") or NOT_RECORDED)
        rows.append([pair, str(item.get("metric", NOT_RECORDED)), test, *comparison_numbers(item), *p_values])
    headings = ["arms", "metric", "test", "difference", "95% interval", "p", "p after Holm's correction"]
    meaning = repeats_sentence(results) or f"What was repeated over seeds: {NOT_RECORDED}."
    return f"{_table(headings, rows, left=3)}<p>{escape(meaning)}</p>"


def _notes(results: Mapping[str, Any] | None) -> str:
    notes = (results or {}).get("notes")
    if not notes:
        return _absent()
    return "<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in notes) + "</ul>"


def _figure(drawing: Drawing | None, caption: str) -> str:
    if drawing is None:
        return _absent()
    if drawing.not_finite:
        caption = f"{caption} {drawing.not_finite} recorded value(s) were null or not finite and leave gaps."
    return f"<figure>\n{drawing.svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _solver(events: Sequence[Event], arms: Sequence[str]) -> str:
    upper, ends = select(events, "bissl", "upper"), select(events, "bissl", "alternation")
    figure = _figure(solver_figure(events, arms), _SOLVER_CAPTION)
    statuses = Counter(
        (record["arm"], record["seed"], record["status"]) for record in upper if record.get("status") is not None
    )
    if not statuses:
        return f"{figure}\n<h3>How the solves ended</h3>\n{_absent()}"
    meanings = {status.name: status.value for status in Status}
    status_rows = [
        [arm, str(seed), status, meanings.get(status, NOT_RECORDED), f"{count:,}"]
        for (arm, seed, status), count in sorted(statuses.items())
    ]
    status_headings = ["arm", "seed", "status", "what it means and asks for", "solves"]
    multiples, cost_rows = alternation_bands(upper, "stationarity_over_noise"), []
    for arm in dict.fromkeys(arm for arm, *_ in sorted(statuses)):
        products = _sum(upper, arm, "num_hvps")
        adaptations = sum(record["arm"] == arm for record in select(events, "bissl", "adaptation"))
        costs = [products, _sum(upper, arm, "iterations"), str(adaptations), _sum(ends, arm, "seconds")]
        last = float(multiples[arm].mean[-1]) if arm in multiples else math.nan
        cost_rows.append([arm, *costs, NOT_RECORDED if math.isnan(last) else number_text(last)])
    cost_headings = ["arm", "operator products", "iterations", "adaptations", "seconds in alternations"]
    cost_headings.append("stationarity / its noise, last alternation")
    return (
        f"{figure}\n<h3>How the solves ended</h3>\n{_table(status_headings, status_rows, left=4)}"
        f"\n<h3>What the stage cost, and where it ended</h3>\n{_table(cost_headings, cost_rows)}"
    )


def _sum(records: Sequence[Event], arm: str, field: str) -> str:
    values = [number(record, field) for record in records if record["arm"] == arm and field in record]
    finite = [value for value in values if value == value]
    if not finite:
        return NOT_RECORDED
    return f"{sum(finite):,.1f}" if field == "seconds" else f"{sum(finite):,.0f}"


def _features(run_dir: Path) -> list[str]:
    """The section of the features' picture, where the run has one."""
    found = read_features(run_dir)
    if found is None:
        return []
    record, picture = found
    caption = escape(f"{record.caption()} Statistics of BatchNorm: {record.batch_norm}.")
    # Drawn on white, so that the page's colours do not matter to it.
    source = base64.b64encode(picture).decode()
    figure = f'<figure>\n<img alt="{caption}" src="data:image/png;base64,{source}">\n'
    rows = [
        [
            arm,
            *(
                NOT_RECORDED if (value := entry.scores.get(name)) is None else f"{value:.3g}"
                for name in record.definitions
            ),
        ]
        for arm, entry in record.arms.items()
    ]
    meanings = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in record.definitions.items())
    content = f"{figure}<figcaption>{caption}</figcaption>\n</figure>\n"
    content += f"{_table(['arm', *record.definitions], rows)}<ul>{meanings}</ul>"
    return [_section("Features before fine-tuning", content)]


def _pairs(mapping: Mapping[str, Any] | None) -> str:
    if not mapping:
        return _absent()
    texts = ((str(name), value if isinstance(value, str) else json.dumps(value)) for name, value in mapping.items())
    return _table(["name", "value"], texts, left=2)


def _configuration(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return _absent()
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return f"<details><summary>all fields</summary><pre>{escape(text)}</pre></details>"
