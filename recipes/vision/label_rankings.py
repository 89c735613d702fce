"""How labels rank by a score of how wrong each looks, and, where the truth is known, how well."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..experiment.html import Absent, Block, Figure
from ..experiment.plots import Panel, draw
from ..experiment.records import Curve
from ..experiment.statistics import area_under_curve, areas_apart, precision_at_recall

RECALLS = np.arange(1, 101) / 100
HEADINGS = {
    "area_under_curve": ("area under curve", ".4f"),
    **{name: (name, ".4f") for name in ("precision", "recall")},
    "suspicious": ("suspicious", ",.0f"),
}
"""Titles and formats of a ranking's figures."""
Scores = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Ranking:
    """Scores of the samples, float [N], high for suspicious ones, and which of them are called so, bool [N]."""

    scores: Scores
    suspicious: Mask

    def figures(self, wrong: Mask | None) -> dict[str, float | None]:
        """How many are called suspicious and, where the truth is known: area under the curve, precision and recall."""
        found: dict[str, float | None] = {"suspicious": float(self.suspicious.sum())}
        if wrong is None:
            return found
        hits = float((self.suspicious & wrong).sum())
        found["area_under_curve"] = area_under_curve(self.scores, wrong)
        found["precision"] = hits / self.suspicious.sum() if self.suspicious.any() else None
        found["recall"] = hits / wrong.sum() if wrong.any() else None
        return found

    def curve(self, wrong: Mask | None) -> Scores | None:
        """Precision at `RECALLS`, None where the truth is unknown or no label wrong."""
        return None if wrong is None or not wrong.any() else precision_at_recall(self.scores, wrong, RECALLS)


Ranked = tuple[Mapping[str, Ranking], Mask | None]
"""Rankings of one repeat by name, and which labels are wrong; None where nobody knows."""


def ahead_lines(repeats: Sequence[Ranked], name: str) -> list[str]:
    """A sentence for each ranking whose area under the curve is above that of `name` by more than chance, best first.

    More than chance: the mean difference over the repeats is above 1.96 times the mean of its standard errors. Repeats
    share their samples, so that more of them make the error no smaller. Those with less than two wrong or two right
    labels, or without the truth, say nothing.
    """
    told = [(one, wrong) for one, wrong in repeats if wrong is not None and 2 <= wrong.sum() <= len(wrong) - 2]
    found = list[tuple[float, str]]()
    own = np.mean([area_under_curve(one[name].scores, wrong) or 0.0 for one, wrong in told]) if told else 0.0
    for other in told[0][0] if told else ():
        apart = [areas_apart(one[other].scores, one[name].scores, wrong) for one, wrong in told]
        difference, error = np.mean(apart, axis=0).tolist()
        if difference > 1.96 * error:
            words = f'here "{other}" ranks better, by more than chance: area under the curve {own + difference:.4f}'
            found.append((difference, f'{words} against {own:.4f} of "{name}"'))
    return [words for _, words in sorted(found, reverse=True)]


def limit_words(share: float, trusted: int) -> str:
    """What a limit means that a `share` of so many trusted pictures is above, and how exact it is."""
    variance = share * (1.0 - share)
    return (
        f"suspicious: a loss above that of all but {share:.0%} of the trusted pictures, under models that have seen "
        f"neither; so about {share:.0%} of the right labels are called suspicious too where they are like the trusted "
        f"ones, with a standard error of {math.sqrt(variance / trusted):.1%} for {trusted:,} of these; "
        f"{math.ceil(variance * 1e4):,} would make it 1%"
    )


def precision_drawn(repeats: Sequence[Ranked], seeds: Sequence[int]) -> list[Block]:
    """Precision over recall of each ranking, in percent, for a page.

    Raises:
        ValueError: matplotlib is not installed.
    """
    found: dict[str, dict[int, Curve]] = {}
    for seed, (rankings, wrong) in zip(seeds, repeats, strict=True):
        for name, ranking in rankings.items():
            curve = ranking.curve(wrong)
            if curve is not None:
                found.setdefault(name, {})[seed] = Curve(100.0 * RECALLS, 100.0 * curve)
    drawing = draw("precision-recall", [Panel("precision (%)", "recall (%)", found)], list(found))
    caption = "Of the most suspicious labels that hold so much of the wrong ones, the share that is wrong."
    return [Absent()] if drawing is None else [Figure(drawing, caption)]
