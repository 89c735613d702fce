"""The figures on sharded parameters as tables of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import conditions, table
from benchmarks.sharding.model import FLOAT, Size, by_layout, largest

Figures = Mapping[str, Mapping[str, Any]]
"""By the version of torch."""

SIZES = {
    "ResNet-18, projector": Size(11.44e6, 8),
    "1 billion": Size(1e9, 8, pairs=48, activations=8 * 1024 * 2048),
    "7 billion": Size(7e9, 64, pairs=64, activations=8 * 1024 * 4096),
}
"""The last two are transformers with 24 and 32 blocks, of widths 2048 and 4096, on 8 sequences of 1024 tokens."""

DEVICE, BANDWIDTH = 80e9, 50e9
"""Bytes of a device's memory, and bytes a second that it sends."""


def newest(figures: Figures) -> Mapping[str, Any]:
    return figures[max(figures, key=lambda version: [int(part) for part in version.split("+")[0].split(".")[:2]])]


def held(figures: Figures) -> float:
    """Vectors at the peak of a step with K = 5, with y, x, and a momentum of each."""
    return newest(figures)["vectors"]["CG, 5 iterations"]["5"] + 4.0


def rows_of(figures: Figures, parts: Sequence[str]) -> list[list[str]]:
    """What was tried and what came of it, one column a version; neighbours with one beginning and one outcome share a
    row."""
    rows: list[tuple[str, list[str], list[str]]] = []
    for trials in zip(*(found["trials"] for found in figures.values()), strict=True):
        if trials[0]["part"] not in parts:
            continue
        head, _, what = trials[0]["what"].rpartition(": ")
        answers = [trial["answer"] for trial in trials]
        if rows and head and rows[-1][0] == head and rows[-1][2] == answers:
            rows[-1][1].append(what)
        else:
            rows.append((head, [what], answers))
    return [[f"{head}: {'; '.join(what)}" if head else what[0], *answers] for head, what, answers in rows]


def messages(figures: Figures, parts: Sequence[str]) -> str:
    """Errors and wrong results, each once, with the versions it was met in."""
    met: dict[tuple[str, str], list[str]] = {}
    for version, found in figures.items():
        for trial in found["trials"]:
            if trial["part"] in parts and trial["answer"] in ("error", "wrong"):
                text = trial["message"] or f"a product that differs by {trial['error']:.3g} from the right one"
                met.setdefault((trial["what"], text), []).append(version.split("+")[0])
    return "\n".join(f"- {what} ({', '.join(where)}): {_quoted(text)}" for (what, text), where in met.items())


def _quoted(text: str) -> str:
    return text if text.startswith("a product") else f"`{text.replace('`', chr(39))}`"


def layouts(figures: Figures) -> list[list[str]]:
    rows = []
    for name, size in SIZES.items():
        sized = Size(**{**vars(size), "vectors": held(figures)})
        for layout, (exchange, kept) in by_layout(sized).items():
            if layout == "tensor-parallel" and not size.activations:
                continue
            sent = exchange.sent(size.ranks)
            rows.append(
                [
                    name,
                    str(size.ranks),
                    layout,
                    f"{sent / 1e9:.3g}",
                    f"{sent / BANDWIDTH:.2g}",
                    f"{FLOAT * kept / 1e9:.3g}",
                ]
            )
    return rows


def tables(figures: Figures) -> dict[str, str]:
    versions = [f"torch {version.split('+')[0]}" for version in figures]
    found = newest(figures)
    many = ", ".join(
        f"{name}: {by['1']:.1f} with K = 1 and {by['5']:.1f} with K = 5" for name, by in found["vectors"].items()
    )
    counted = [
        [what, *(str((counts or {}).get(kind, "") if counts else "not differentiable") for kind in KINDS)]
        for what, counts in found["collectives"].items()
    ]
    vectors = held(figures)
    return {
        "sharding trials": table(("tried", *versions), rows_of(figures, ("a", "b"))),
        "sharding messages": messages(figures, ("a", "b")),
        "sharding bilevel": table(("tried", *versions), rows_of(figures, ("c",))),
        "sharding vectors": "Vectors of P numbers at the peak of a hypergradient, above the variables: "
        f"{many}. With y, x and a momentum of each these are {vectors:.0f} at K = 5: {FLOAT * vectors:.0f} bytes a "
        "parameter in float32. A "
        f"device of 80 GB is full, without any activations, at {largest(DEVICE, vectors) / 1e9:.2g} billion "
        f"parameters; 8 of them with everything sharded at {largest(DEVICE, vectors, 8) / 1e9:.2g} billion.",
        "sharding layouts": table(
            ("lower level", "ranks", "parameters and vectors", "GB sent a product", "s at 50 GB/s", "GB a rank"),
            layouts(figures),
        ),
        "sharding counted": table(("collectives", *KINDS), counted),
        "sharding conditions": "\n\n".join(conditions(of) for of in figures.values()),
    }


KINDS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
