"""The prediction as tables of a page."""

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import table

PREDICTION_HEADER = (
    *("upper level", "GPUs", "pretext alone, h", "limited by", "BiSSL stage, h", "limited by", "both, h"),
    *("stage / its lower steps", "GB a GPU"),
)
SHARES_HEADER = (
    *("what", "GPUs", "compute", "augmentation", "all-reduce", "BatchNorm", "contrastive", "loading, beside"),
    "limited by",
)
PARTS = ("compute", "augmentation", "reduction", "statistics", "contrastive", "loading")
WORDS = {"reduction": "all-reduce", "statistics": "BatchNorm's exchange", "contrastive": "contrastive loss"}


def predicted(figures: Mapping[str, Any]) -> dict[str, str]:
    """By the names of a page's markers."""
    return {
        "assumptions": _assumptions(figures),
        "prediction": table(PREDICTION_HEADER, _prediction(figures)),
        "shares": table(SHARES_HEADER, _shares(figures)),
        "cores": table(
            ("loaded from", "images/s and core", "GPUs", "cores a GPU needs", "pretext alone, h", "limited by"),
            _loading(figures),
        ),
        "fine-tuning": table(
            ("set", "train / val", "GPUs", "fine-tuning, min", "its validation, min", "limited by"), _after(figures)
        ),
    }


def _limit(name: str) -> str:
    return WORDS.get(name, name)


def _assumptions(figures: Mapping[str, Any]) -> str:
    machine, assumed = figures["assumptions"]["machine"], figures["assumptions"]
    return (
        f"Assumed: {machine['rate']:,.0f} images a second and GPU for a pretext step, both views of an image counted "
        f"once; {machine['bandwidth'] / 1e9:g} GB a second sent by a GPU, {1e6 * machine['latency']:g} µs for the "
        f"smallest collective; {machine['cores']:g} cores that load for each GPU, {machine['memory'] / 1e9:g} GB of "
        "memory.\n\n"
        f"Measured: a product costs {machine['product_cost']:.2f} gradients (above); finishing the views takes "
        f"{100 * machine['augmentation']:.1f}% of a gradient's time (`pretext.json`: step over pipeline, on a CPU); "
        f"a core loads {machine['loading']:,.0f} images a second from the disk cache (`loading.json`); settings that "
        f"solve once an alternation make {assumed['products']['default']} products with K = 5 and "
        f"{assumed['products']['two_batches']} with K = 2 (`alternation.json`); at the peak live "
        f"{machine['vectors']:.0f} vectors (`sharding.json`).\n\n"
        f"Counted: {machine['flops'] / 1e9:.2f} GFLOP for a gradient over one image, and an image of a batch takes "
        f"{machine['step_bytes'] / 1e6:.1f} MB in a gradient and {machine['product_bytes'] / 1e6:.1f} MB in a product, "
        "in float32."
    )


def _prediction(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["plan"],
            str(row["gpus"]),
            f"{row['baseline_hours']:.3g}",
            _limit(row["baseline_limit"]),
            f"{row['stage_hours']:.3g}",
            _limit(row["stage_limit"]),
            f"{row['total_hours']:.3g}",
            f"{row['stage_over_plain']:.1f}",
            f"{row['gigabytes']:.2g}",
        ]
        for row in figures["prediction"]
    ]


def _shares(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [row["what"], str(row["gpus"]), *(f"{row[part]:.3g}" for part in PARTS), _limit(row["limit"])]
        for row in figures["shares"]
    ]


def _loading(figures: Mapping[str, Any]) -> list[list[str]]:
    ways = figures["assumptions"]["ways"]
    return [
        [
            row["way"],
            f"{ways[row['way']]:,.0f}" if row["way"] in ways else "",
            str(row["gpus"]),
            f"{row['cores']:.1f}",
            f"{row['hours']:.3g}",
            _limit(row["limit"]),
        ]
        for row in figures["loading"]
    ]


def _after(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["set"],
            f"{row['images'][0]:,} / {row['images'][1]:,}",
            str(row["gpus"]),
            f"{row['fine_tuning']:.3g}",
            f"{row['validation']:.3g}",
            _limit(row["limit"]),
        ]
        for row in figures["after"]
    ]
