"""What a reader must know, in words: before a run, of its results, and how they came about."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..experiment.terminal import counted
from ..vision.label_rankings import ahead_lines, limit_words
from .data import Pictures
from .ranking import CONFIDENT, METHOD, Repeat, ranked
from .settings import Config

LISTED = 10
"""Pictures named in a sentence at most."""
WEAK = 0.5
"""Accuracy below which features are called so."""


def beforehand(config: Config, pictures: Pictures) -> list[str]:
    """What pictures and labels give to think about."""
    section, lines = config.data, list[str]()
    if section.trusted is None and section.truth is None and section.flips is None:
        lines.append(
            f"no trusted pictures are named: {section.trusted_fraction:.0%} of the given labels are taken as trusted, "
            "wrong ones among them too; --trusted names pictures whose labels somebody has checked"
        )
    wrong = pictures.contradictions
    if wrong:
        more = f" and {len(wrong) - LISTED:,} more, all in results.json" if len(wrong) > LISTED else ""
        lines.append(
            "certain wrong labels, of copies of trusted pictures, which stand neither in the gallery nor in the table: "
            f"{', '.join(wrong[:LISTED])}{more}"
        )
    lines += [f"{images.name}: {images.passed_over}" for images in pictures.parts.values() if images.passed_over]
    return lines


def findings(repeats: Sequence[Repeat], results: Mapping[str, Any]) -> list[str]:
    """What the results give to think about."""
    accuracy = {name: one["trusted"] for name, one in results["accuracy"].items()}
    lines, right = list[str](), accuracy["weighted"]["mean"]
    if right < WEAK:
        lines.append(
            f"weak features: the weighted model gets {1 - right:.0%} of the held-out trusted pictures wrong, and many "
            "wrong labels stay hidden; find better features first (--model.features, --backbone)"
        )
    lines += [f"{line}, by which page and table are ordered" for line in ahead_lines(ranked(repeats), METHOD)]
    before, after = accuracy["all labels"], accuracy["kept"]
    if after["mean"] <= before["ci95"][1]:
        lines.append(
            f"without the suspicious pictures a model does no better beyond chance: {after['mean']:.4f} of the trusted "
            f"pictures right after, {before['mean']:.4f} before"
        )
    return lines


def notes(config: Config, pictures: Pictures, repeat: Repeat) -> list[str]:
    """How the results came about."""
    sets, source = repeat.sets, config.data.source
    where = config.data.trusted or f"a fraction {config.data.trusted_fraction:g} of each class"
    lines = [
        f"{counted(len(sets.given), 'picture')} of {source} in {len(pictures.data.classes)} classes, all looked at; "
        f"{len(sets.labels):,} are trusted ({where})",
        f"features: {config.features.section.features}; scores are of models that have not seen the picture, "
        f"{config.folds} folds",
        limit_words(config.false_alarms, len(sets.labels)),
        "each ranking has a limit of its own, so that they call different numbers suspicious: by losses that of the "
        "trusted pictures under the same model, by weights the one that all start from, confident learning by its own "
        "counts; the area under the curve needs none",
        "accuracies are cross-validated: what is tested was used neither for weights, nor for what is kept; in "
        "brackets Wilson's interval at 95%, by the number of trusted pictures",
    ]
    if config.data.flips is not None:
        lines.append(f"wrong labels were planted ({config.data.flips}); other labels are taken for right")
    copies = int((pictures.copies >= 0).sum())
    if copies:
        lines.append(f"left out of the data as copies of trusted pictures: {copies:,}")
    lines += [f"a certain wrong label: {one}" for one in pictures.contradictions]
    if CONFIDENT not in repeat.rankings:
        lines.append('confident learning is left out: pip install "bilevel[cleaning]" brings cleanlab')
    return lines
