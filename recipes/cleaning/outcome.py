"""What a run leaves for people: results.json, the ranking as a table, and the page of suspicious pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bilevel.checkpoint import write_atomic

from ..experiment.command.environment import environment
from ..experiment.errors import ConfigError
from ..experiment.folder.run_folder import REPORT, RESULTS, RunDirectory
from ..experiment.html import Bullets, Gallery, Listing, Picture, Section, Text, render_page
from ..experiment.statistics import over_repeats, share_interval
from ..experiment.tables import Table, figures_table
from ..vision.label_rankings import HEADINGS, precision_drawn
from ..vision.pictures.thumbnail import png
from .data import Pictures
from .notes import beforehand, findings, notes
from .ranking import CONFIDENT, METHOD, OUT_OF_FOLD, Repeat, ranked
from .settings import RANKING, Config

THUMBNAIL = 160
"""Longest side of a picture on the page (px)."""
MEANINGS = {
    METHOD: "the loss of the given label under the model that is fitted by the learned weights",
    OUT_OF_FOLD: "the loss under a model of all labels alike and the trusted part",
    "trusted part alone": "the loss under a model of the trusted part",
    "weights alone": "the learned weights, low ones first; suspicious below the weight that all start from",
    CONFIDENT: "cleanlab, of the probabilities of the out-of-fold model",
}
TESTED = {"trusted": ("accuracy on trusted pictures", ".4f"), "samples": ("on the data's right labels", ".4f")}
ACCURACIES = {
    "all labels": "before: all labels as they are",
    "kept": "after: what is kept",
    "weighted": "all labels by their learned weights",
    "trusted alone": "no label but the trusted ones",
}


def summarise(
    config: Config, pictures: Pictures, repeats: Sequence[Repeat], seconds: float, device: torch.device
) -> dict[str, Any]:
    """The content of results.json."""
    rankings = {
        name: over_repeats([r.rankings[name].figures(r.wrong) for r in repeats]) for name in repeats[0].rankings
    }
    accuracy = {name: over_repeats([repeat.accuracy[name] for repeat in repeats]) for name in ACCURACIES}
    for one in accuracy.values():
        one["trusted"]["ci95"] = list(share_interval(one["trusted"]["mean"], len(repeats[0].sets.labels)))
    results = {
        "seeds": list(config.repeats),
        "rankings": rankings,
        "accuracy": accuracy,
        "seconds": seconds,
        "environment": environment(device, ["torchvision"]),
        "notes": notes(config, pictures, repeats[0]),
    }
    return results | {"warnings": [*beforehand(config, pictures), *findings(repeats, results)]}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The rankings, and the accuracies before and after, for the page and the terminal."""
    accuracy = {ACCURACIES[name]: one for name, one in results["accuracy"].items()}
    return [
        figures_table(results["rankings"], "ranking", "Rankings", HEADINGS),
        figures_table(accuracy, "fitted to", "Before and after", TESTED),
    ]


def write(
    config: Config, pictures: Pictures, repeats: Sequence[Repeat], results: Mapping[str, Any], directory: RunDirectory
) -> None:
    """Write the table and the page of the first repeat, and results.json.

    Raises:
        ConfigError: a picture cannot be read any more, or matplotlib is missing; all but the page was written.
    """
    first = repeats[0]
    order = np.argsort(-first.rankings[METHOD].scores, kind="stable")
    write_atomic(directory.path / RANKING, _table(pictures, first, order).encode("utf-8", "surrogateescape"))
    directory.write_json(RESULTS, results)
    try:
        page = _page(config, pictures, repeats, results, order)
    except ValueError as error:
        raise ConfigError(f"{REPORT} was not written, all other files were: {error}") from error
    # A name that is no text is shown by the codes of its bytes.
    write_atomic(directory.path / REPORT, page.encode("utf-8", "backslashreplace"))


def _table(pictures: Pictures, repeat: Repeat, order: np.ndarray) -> str:
    """The samples, most suspicious first."""
    classes, sets, method = pictures.data.classes, repeat.sets, repeat.rankings[METHOD]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    known = [] if sets.right is None else [sets.right]
    writer.writerow(["file", "given", "predicted", "score", "weight", "suspicious", *(["right"] if known else [])])
    for place in order.tolist():
        given, predicted, *right = (classes[int(labels[place])] for labels in (sets.given, repeat.predicted, *known))
        numbers = (f"{float(values[place]):.6g}" for values in (method.scores, repeat.weights, method.suspicious))
        writer.writerow([pictures.name(int(sets.rows[place])), given, predicted, *numbers, *right])
    return text.getvalue()


def _page(
    config: Config, pictures: Pictures, repeats: Sequence[Repeat], results: Mapping[str, Any], order: np.ndarray
) -> str:
    first = repeats[0]
    count, shown = int(first.rankings[METHOD].suspicious.sum()), min(config.shown, len(order))
    end = f"{shown:,} of the {count:,}" if shown <= count else f"the {count:,}, then {shown - count:,} that are not,"
    text = (
        f"{count:,} of {len(order):,} labels are suspicious by the {METHOD}; {end} are below, the highest score first, "
        f"which is {MEANINGS[METHOD]}. All are in {RANKING}. Look before you change a label."
    )
    opening = [Text(text), *(Text(line, "warning", "Note:") for line in results["warnings"])]
    gallery = Gallery([_picture(pictures, first, place) for place in order[:shown].tolist()])
    sections = [Section("Most suspicious pictures", [gallery])]
    if repeats[0].wrong is not None:
        sections.append(Section("How well they are found", precision_drawn(ranked(repeats), results["seeds"])))
    sections.append(Section("Figures", [*tables(results), Bullets([f"{n}: {MEANINGS[n]}" for n in first.rankings])]))
    sections.append(Section("What to know", [Bullets(results["notes"])]))
    settings = Listing("all fields", config.model_dump_json(indent=2))
    return render_page("Suspicious labels", opening, [*sections, Section("Configuration", [settings])])


def _picture(pictures: Pictures, repeat: Repeat, place: int) -> Picture:
    """One sample with its labels, as PNG."""
    row, classes = int(repeat.sets.rows[place]), pictures.data.classes
    given, predicted = (classes[int(labels[place])] for labels in (repeat.sets.given, repeat.predicted))
    method = repeat.rankings[METHOD]
    called = "suspicious" if method.suspicious[place] else "not suspicious"
    score = f"score {method.scores[place]:.3g}, {called}"
    lines = [f"given {given}, predicted {predicted}", score, pictures.name(row)]
    if repeat.sets.right is not None:
        right = classes[int(repeat.sets.right[place])]
        lines.insert(1, "the label is right" if right == given else f"right: {right}")
    return Picture(png(pictures.data.images.at(row), THUMBNAIL), "image/png", "\n".join(lines))
