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
from ..experiment.html import Absent, Block, Bullets, Figure, Gallery, Listing, Picture, Section, Text, render_page
from ..experiment.plots import Panel, draw
from ..experiment.records import Curve
from ..experiment.statistics import over_repeats
from ..experiment.tables import Table, mean_text
from ..vision.pictures.thumbnail import png
from .data import Pictures
from .ranking import CONFIDENT, METHOD, OUT_OF_FOLD, RECALLS, Repeat
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
HEADINGS = {"area_under_curve": "area under curve", **{name: name for name in ("precision", "recall", "suspicious")}}
TESTED = {"trusted": "accuracy on trusted pictures", "samples": "on the data's right labels"}
ACCURACIES = {
    "all labels": "before: all labels as they are",
    "kept": "after: what is kept",
    "weighted": "all labels by their learned weights",
    "trusted alone": "no label but the trusted ones",
}


def notes(config: Config, pictures: Pictures, repeat: Repeat) -> list[str]:
    """What a reader of the results must know."""
    sets, source = repeat.sets, config.data.source
    where = config.data.trusted or f"a fraction {config.data.trusted_fraction:g} of each class"
    lines = [
        f"{len(sets.given):,} pictures of {source} are looked at, in {len(pictures.data.classes)} classes; "
        f"{len(sets.labels):,} are trusted ({where})",
        f"features: {config.features.section.features}; scores are of models that have not seen the picture, "
        f"{config.folds} folds",
        f"suspicious: a loss above that of all but {config.false_alarms:.0%} of the trusted pictures, which these "
        "models have not seen either; so about as many of the right labels are called suspicious too",
        "accuracies are cross-validated: what is tested was used neither for weights, nor for what is kept",
    ]
    if config.data.flips is not None:
        lines.append(f"wrong labels were planted ({config.data.flips}); other labels are taken for right")
    copies, classes, given = pictures.copies, pictures.data.classes, pictures.data.labels
    if (copies >= 0).any():
        lines.append(f"{int((copies >= 0).sum()):,} pictures of the data are copies of trusted ones and are left out")
    assert given is not None, "read with labels"
    for row in ((copies >= 0) & (copies != given)).nonzero()[:, 0].tolist():
        told = pictures.name(row), classes[int(given[row])], classes[int(copies[row])]
        lines.append("{} has the label {}, and its trusted copy {}".format(*told))
    if CONFIDENT not in repeat.rankings:
        lines.append('confident learning is left out: pip install "bilevel[cleaning]" brings cleanlab')
    return lines


def summarise(
    config: Config, pictures: Pictures, repeats: Sequence[Repeat], seconds: float, device: torch.device
) -> dict[str, Any]:
    """The content of results.json."""
    rankings = {
        name: over_repeats([r.rankings[name].figures(r.wrong) for r in repeats]) for name in repeats[0].rankings
    }
    accuracy = {name: over_repeats([repeat.accuracy[name] for repeat in repeats]) for name in ACCURACIES}
    return {
        "seeds": list(config.repeats),
        "rankings": rankings,
        "accuracy": accuracy,
        "seconds": seconds,
        "environment": environment(device, ["torchvision"]),
        "notes": notes(config, pictures, repeats[0]),
    }


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The rankings, and the accuracies before and after, for the page and the terminal."""
    return [
        _table_of(results["rankings"], "ranking", "Rankings", HEADINGS),
        _table_of(
            {ACCURACIES[n]: one for n, one in results["accuracy"].items()}, "fitted to", "Before and after", TESTED
        ),
    ]


def _table_of(figures: Mapping[str, Any], what: str, title: str, headings: Mapping[str, str]) -> Table:
    """Those of the headings whose figures are there, a row a name."""
    columns = [column for column in headings if all(column in one for one in figures.values())]
    forms = [",.0f" if column == "suspicious" else ".4f" for column in columns]
    rows = [[n, *map(mean_text, [one[column] for column in columns], forms)] for n, one in figures.items()]
    return Table([what, *(headings[column] for column in columns)], rows, title=title)


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
    count = int(first.rankings[METHOD].suspicious.sum())
    opening = [
        Text(
            f"{count:,} of {len(order):,} labels are suspicious; the {min(config.shown, len(order)):,} most suspicious "
            f"pictures are below, all of them in {RANKING}, most suspicious first. Look before you change a label."
        )
    ]
    shown = Gallery([_picture(pictures, first, place) for place in order[: config.shown].tolist()])
    sections = [Section("Most suspicious pictures", [shown])]
    if repeats[0].wrong is not None:
        sections.append(Section("How well they are found", _curves(results["seeds"], repeats)))
    sections.append(Section("Figures", [*tables(results), Bullets([f"{n}: {MEANINGS[n]}" for n in first.rankings])]))
    sections.append(Section("What to know", [Bullets(results["notes"])]))
    settings = Listing("all fields", config.model_dump_json(indent=2))
    return render_page("Suspicious labels", opening, [*sections, Section("Configuration", [settings])])


def _curves(seeds: Sequence[int], repeats: Sequence[Repeat]) -> list[Block]:
    """Precision over recall of each ranking, in percent."""
    found: dict[str, dict[int, Curve]] = {}
    for seed, repeat in zip(seeds, repeats, strict=True):
        for name in repeat.rankings:
            curve = repeat.curve(name)
            if curve is not None:
                found.setdefault(name, {})[seed] = Curve(100.0 * RECALLS, 100.0 * curve)
    drawing = draw("precision-recall", [Panel("precision (%)", "recall (%)", found)], list(found))
    caption = "Of the most suspicious labels that hold so much of the wrong ones, the share that is wrong."
    return [Absent()] if drawing is None else [Figure(drawing, caption)]


def _picture(pictures: Pictures, repeat: Repeat, place: int) -> Picture:
    """One sample with its labels, as PNG."""
    row, classes = int(repeat.sets.rows[place]), pictures.data.classes
    given, predicted = (classes[int(labels[place])] for labels in (repeat.sets.given, repeat.predicted))
    lines = [f"given {given}, predicted {predicted}", pictures.name(row)]
    if repeat.sets.right is not None:
        right = classes[int(repeat.sets.right[place])]
        lines.insert(1, "the label is right" if right == given else f"right: {right}")
    return Picture(png(pictures.data.images.at(row), THUMBNAIL), "image/png", "\n".join(lines))
