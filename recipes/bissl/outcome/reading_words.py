"""What a run will read, in words: for the terminal before it starts, and for its report."""

from collections.abc import Mapping
from typing import Any

from ...vision.pictures.space import available_memory, size_text
from ..training.datasets import Datasets

ALL_CLASSES = 20
FIRST, LAST = 4, 2

COPIES = {
    "test": "{} pretext {} of test images, byte for byte, and {} left out",
    "val": "{} pretext {} of validation images, and {} kept: the best epoch is chosen by images seen before",
}
NOT_COMPARED = (
    "whether pretext images are copies of test images is not known: image files are compared with image files alone, "
    "and other images where both sets lie in memory (data.storage memory)"
)


def start_lines(data: Datasets) -> list[str]:
    """What a run will read, by whom, and what that takes of this machine's memory."""
    facts = data.reading()
    lines = reading_lines(facts)
    if any(facts[part]["storage"] == "stream" for part in ("pretext", "train", "val", "test")):
        count = data.workers.count
        by = "this process" if count == 0 else f"{count} worker process{'' if count == 1 else 'es'}"
        lines.append(f"images are read and cropped by {by}")
    return lines + [line for line in (memory_line(facts), data.workers.describe()) if line is not None]


def reading_lines(facts: Mapping[str, Any]) -> list[str]:
    """Lines about the facts of `vision.record.reading`, none of them about the machine: the report has them too."""
    labelled = [facts[part] for part in ("train", "val", "test")]
    lines = [f"pretext images: {_count(facts['pretext']['images'])} of {_where([facts['pretext']])}"]
    counts = ", ".join(f"{facts[part]['images']:,} {word}" for part, word in _PARTS.items())
    lines.append(f"labelled images: {counts} of {_where(labelled)}")
    if facts["classes"] is not None:
        lines.append(_classes(facts["classes"]))
    passed_over = dict.fromkeys((one["source"], one["passed_over"]) for one in (facts["pretext"], *labelled))
    lines += [f"{source}: {words}" for source, words in passed_over if words]
    lines += [_copies(pair, count) for pair, count in facts["copies"].items() if count]
    return lines if facts["compared"] else [*lines, NOT_COMPARED]


def memory_line(facts: Mapping[str, Any]) -> str | None:
    """How much memory images take on this machine, and how much there is; None where none lies in memory."""
    held = [facts[part]["decoded_bytes"] for part in ("pretext", "train", "val", "test")]
    taken, there = sum(filter(None, held)), available_memory()
    if not taken:
        return None
    left = "" if there is None else f"; {size_text(there)} are left"
    return f"images in memory take {size_text(taken)}{left}"


_PARTS = {"train": "to train on", "val": "to validate on", "test": "to test on"}


def _count(count: int) -> str:
    return f"{count:,}"


def _where(sets: list[Mapping[str, Any]]) -> str:
    sizes = [one["bytes"] for one in sets]
    size = "" if None in sizes else f", {size_text(sum(sizes))}"
    stored = {"memory": "in memory", "stream": "read when they are needed"}
    how = " or ".join(stored[kind] for kind in dict.fromkeys(one["storage"] for one in sets))
    return f"{', '.join(dict.fromkeys(one['source'] for one in sets))}{size}, {how}"


def _classes(classes: Mapping[str, int]) -> str:
    entries = [f"{name} {count:,}" for name, count in classes.items()]
    if len(entries) <= ALL_CLASSES:
        return f"{len(entries)} classes with labelled images: {', '.join(entries)}"
    least, most = (extreme(classes, key=lambda name: classes[name]) for extreme in (min, max))
    shown = ", ".join([*entries[:FIRST], "...", *entries[-LAST:]])
    return (
        f"{len(entries)} classes with labelled images: {shown}; the fewest {classes[least]:,} ({least}), the most "
        f"{classes[most]:,} ({most})"
    )


def _copies(pair: str, count: int) -> str:
    be = "is" if count == 1 else "are"
    if pair in COPIES:
        return COPIES[pair].format(f"{count:,}", "image is a copy" if count == 1 else "images are copies", be)
    one, _, other = pair.partition(" and ")
    return f"{count:,} {other} image{' is a copy' if count == 1 else 's are copies'} of {one} images, byte for byte"
