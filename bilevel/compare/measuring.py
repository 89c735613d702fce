"""Interleaved timings, the machine they were taken on, and how long is left."""

import datetime
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch


@dataclass(frozen=True)
class Timing:
    """One number for each repeat: seconds, or multiples of another timing of the same repeats."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def q1(self) -> float:
        return self._quartile(0)

    @property
    def q3(self) -> float:
        return self._quartile(2)

    def over(self, other: "Timing") -> "Timing":
        """Multiples of `other`, repeat by repeat, so that a slow moment of the machine divides out."""
        return Timing(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))

    def record(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.q1, "q3": self.q3}

    def _quartile(self, index: int) -> float:
        if len(self.samples) == 1:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=4, method="inclusive")[index]


def synchronize() -> None:
    """Wait for the accelerator, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds of a clock, everything that was begun being done."""
    synchronize()
    return time.perf_counter()


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 1) -> dict[str, Timing]:
    """Seconds of each function, all of them once in every repeat, after `warm_up` rounds that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warm_up, repeats):
        for name, function in functions.items():
            start = now()
            function()
            seconds = now() - start
            if repeat >= 0:
                samples[name].append(seconds)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@final
class Deadline:
    """A moment after which nothing more is begun; None never comes."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds, 0 once it is over."""
        return max(self.end - time.perf_counter(), 0.0)

    def share(self, part: float) -> "Deadline":
        """An earlier one, after this part of what is left."""
        left = self.left()
        return Deadline(None if math.isinf(left) else part * left)


def processor() -> str:
    """The processor's name, where the system tells."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(encoding="utf-8"), re.M)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measured time depends on besides the code."""
    place = torch.device(device)
    return {
        "date": datetime.date.today().isoformat(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
    }
