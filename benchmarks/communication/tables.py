"""The figures of `communication` as tables."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.communication.model import Messages, Schedule, Sizes, by_step, pretext_step, sent
from benchmarks.pages import conditions, table

NETWORKS = {
    "10 Gbit/s Ethernet (assumed)": (50e-6, 1.1e9),
    "100 Gbit/s InfiniBand (assumed)": (20e-6, 11e9),
    "NVLink in one machine (assumed)": (15e-6, 150e9),
}
"""Seconds that a collective takes however small it is, and bytes a second that a rank sends."""


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """By the names of a page's markers."""
    return {
        "exchange-counted": _counted(figures),
        "exchange-resnet18": _resnet18(figures),
        "exchange-networks": _networks(figures),
        "exchange-reductions": _reductions(figures),
        "exchange-steps": _steps(figures),
        "exchange-conditions": conditions(figures),
    }


def _counted(figures: Mapping[str, Any]) -> str:
    rows = []
    for batch_norm, steps in figures["counts"].items():
        for name, entries in steps.items():
            messages: Messages = Counter({(kind, size): count for kind, size, count in entries})
            kinds = [sum(n for (kind, _), n in messages.items() if kind == k) for k in ("all-reduce", "all-gather")]
            rows.append([batch_norm, name, *map(str, kinds), f"{sent(messages, 2) / 2**10:,.0f}"])
    return table(["BatchNorm", "step", "all-reduces", "all-gathers", "KiB sent by a rank"], rows)


def _resnet18(figures: Mapping[str, Any]) -> str:
    rows = []
    for batch_norm, worlds in figures["paper"].items():
        by_ranks = [(sizes.ranks, by_step(sizes, Schedule())) for sizes in map(_sizes, worlds)]
        for name in by_ranks[0][1]:
            bytes_sent = [f"{sent(steps[name], ranks) / 1e6:,.0f}" for ranks, steps in by_ranks]
            rows.append([batch_norm, name, f"{by_ranks[0][1][name].total():,}", *bytes_sent])
    header = [f"MB sent by each of {sizes['ranks']}" for sizes in figures["paper"]["local"]]
    return table(["BatchNorm", "step", "collectives", *header], rows)


def _networks(figures: Mapping[str, Any]) -> str:
    """A pretext step of the paper's on eight ranks."""
    first, last = figures["reductions"][0], figures["reductions"][-1]
    # A rank of two sends as many bytes as an all-reduce has.
    measured = first["median"], last["bytes"] / max(last["median"] - first["median"], 1e-9)
    rows = []
    for network, (latency, bandwidth) in {"gloo over loopback (measured)": measured, **NETWORKS}.items():
        for batch_norm, worlds in figures["paper"].items():
            sizes = next(size for size in map(_sizes, worlds) if size.ranks == 8)
            messages = pretext_step(sizes)
            waits, sends = messages.total() * latency, sent(messages, sizes.ranks) / bandwidth
            rate = sizes.batch / sizes.ranks / (waits + sends)
            facts = f"{1e6 * latency:.0f}", _digits(bandwidth / 1e9)
            rows.append([network, *facts, batch_norm, _digits(1e3 * waits), _digits(1e3 * sends), f"{rate:,.0f}"])
    header = ["network", "latency, µs", "GB/s", "BatchNorm", "latencies, ms", "bytes, ms", "images/s of a rank"]
    return table(header, rows)


def _reductions(figures: Mapping[str, Any]) -> str:
    rows = []
    for entry in figures["reductions"]:
        milliseconds = [_digits(1e3 * entry[name]) for name in ("median", "q1", "q3")]
        size, rate = entry["bytes"], entry["bytes"] / entry["median"] / 1e9
        shown = f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
        rows.append([shown, milliseconds[0], f"{milliseconds[1]} to {milliseconds[2]}", _digits(rate)])
    return table(["all-reduce of", "ms", "quartiles", "GB/s sent by a rank"], rows)


def _steps(figures: Mapping[str, Any]) -> str:
    rows = []
    for entry in figures["steps"]:
        messages, step, exchange = pretext_step(_sizes(entry["sizes"])), entry["step"], entry["exchange"]
        share = f"{100 * exchange['median'] / step['median']:.0f}%"
        milliseconds = [_digits(1e3 * value["median"]) for value in (step, exchange)]
        quartiles = [f"{_digits(1e3 * value['q1'])} to {_digits(1e3 * value['q3'])}" for value in (step, exchange)]
        shown = [f"{milliseconds[0]} ({quartiles[0]})", f"{milliseconds[1]} ({quartiles[1]})", share]
        rows.append([entry["batch_norm"], str(entry["batch"]), str(messages.total()), *shown])
    header = ["BatchNorm", "batch", "collectives", "step, ms (quartiles)", "in collectives, ms (quartiles)", "share"]
    return table(header, rows)


def _digits(value: float) -> str:
    """Three of them; whole numbers from 100 up."""
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"


def _sizes(fields: Mapping[str, Any]) -> Sizes:
    lists = {name: tuple(fields[name]) for name in ("backbone_norms", "head_norms")}
    return Sizes(**{**fields, **lists})
