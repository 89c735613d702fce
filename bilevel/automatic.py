"""The provider that measures: which exact Hessian-vector product works on an objective, and which is fastest."""

import time
from dataclasses import dataclass
from typing import Literal, final

import torch

from bilevel import tree
from bilevel.hvp import (
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    Linearization,
    Objective,
    ReverseOverReverse,
)
from bilevel.tree import Params

_REPEATS = 3

HVP = HVPProvider | Literal["auto"]
"""What arguments named `hvp` take: a provider, or "auto" for a new `Automatic`."""


@dataclass(frozen=True)
class Measurement:
    """One candidate on one objective.

    Attributes:
        provider: the candidate.
        seconds: median of three products, after one that is not counted; None where it does not work.
        difference: relative distance of its product from that of the first candidate that works.
        failure: why it does not work, empty where it does.
    """

    provider: HVPProvider
    seconds: float | None
    difference: float | None
    failure: str = ""


@final
class Automatic(HVPProvider):
    """``hvp="auto"``: tries reverse-over-reverse and forward-over-reverse on the first objective it is given, and keeps
    the faster one for all later ones.

    Finite differences are taken only where neither works, because they are far off on networks with kinks. Kept graphs
    are not tried, because their memory is the user's to give. Two candidates that disagree by more than the dtype's
    rounding allows (1e-3 in float32, 1e-8 in float64) are a defect of the objective or of torch: the reverse one is
    kept, and the report shows the difference.

    Attributes:
        report: one `Measurement` per candidate, empty before the first objective.
    """

    def __init__(self) -> None:
        self.report: tuple[Measurement, ...] = ()
        self._chosen: HVPProvider | None = None

    @property
    def chosen(self) -> HVPProvider | None:
        """The provider in use; None before the first objective."""
        return self._chosen

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the provider in use is exact."""
        return self._chosen is None or self._chosen.exact

    def linearize(self, objective: Objective, upper: Params, lower: Params) -> Linearization:
        if self._chosen is None:
            self.report = _measure(objective, upper, lower)
            self._chosen = _choose(self.report, lower)
        return self._chosen.linearize(objective, upper, lower)

    def __str__(self) -> str:
        lines = []
        for entry in self.report:
            chosen = " (chosen)" if entry.provider == self._chosen else ""
            milliseconds = 1e3 * (entry.seconds or 0.0)
            took = entry.failure or f"{milliseconds:.2f} ms a product, differs by {entry.difference:.1e}"
            lines.append(f"{entry.provider}{chosen}: {took}")
        return "\n".join(lines) or "Automatic, nothing measured yet"


def as_provider(hvp: HVP | None) -> HVPProvider:
    """The provider that an argument stands for; None is ``ReverseOverReverse()``.

    Raises:
        TypeError: neither a provider nor "auto".
    """
    if hvp is None:
        return ReverseOverReverse()
    if hvp == "auto":
        return Automatic()
    if not isinstance(hvp, HVPProvider):
        raise TypeError(f"hvp must be a provider such as ReverseOverReverse() or 'auto', got {hvp!r}")
    return hvp


def _measure(objective: Objective, upper: Params, lower: Params) -> tuple[Measurement, ...]:
    generator = torch.Generator().manual_seed(0)
    vector = {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in lower.items()}
    report: list[Measurement] = []
    reference: Params | None = None
    for provider in (ReverseOverReverse(), ForwardOverReverse()):
        linearization = provider.linearize(objective, upper, lower)
        try:
            product = linearization.hessian(vector)
        except (RuntimeError, NotImplementedError) as error:
            # The reason is kept in the report, and shown if no candidate works.
            report.append(Measurement(provider, None, None, str(error).splitlines()[0]))
            continue
        if float(tree.norm(product)) == 0.0 and _curved(objective, upper, lower, vector):
            failure = (
                "its product is zero where gradients differ: some operation has no second derivative and says nothing"
            )
            report.append(Measurement(provider, None, None, failure))
            continue
        reference = product if reference is None else reference
        difference = float(tree.norm(tree.sub(product, reference))) / max(float(tree.norm(reference)), 1e-300)
        times = sorted(_seconds(linearization, vector) for _ in range(_REPEATS))
        report.append(Measurement(provider, times[_REPEATS // 2], difference))
    return tuple(report)


def _curved(objective: Objective, upper: Params, lower: Params, vector: Params) -> bool:
    """Whether the gradient changes along `vector` by more than rounding."""
    product = FiniteDifference().linearize(objective, upper, lower).hessian(vector)
    return float(tree.norm(product)) > 1e-3 * float(tree.norm(vector))


def _choose(report: tuple[Measurement, ...], lower: Params) -> HVPProvider:
    working = [entry for entry in report if entry.seconds is not None]
    if not working:
        return FiniteDifference()
    tolerance = 1e-8 if all(leaf.dtype == torch.float64 for leaf in lower.values()) else 1e-3
    if any((entry.difference or 0.0) > tolerance for entry in working):
        return working[0].provider
    return min(working, key=lambda entry: entry.seconds or 0.0).provider


def _seconds(linearization: Linearization, vector: Params) -> float:
    device = next(iter(vector.values())).device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    linearization.hessian(vector)
    return now() - began
