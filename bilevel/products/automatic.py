"""The provider that measures: which exact Hessian-vector product works on an objective, and which is fastest."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.checks import check_number
from bilevel.products.hvp import (
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    Linearization,
    Objective,
    ReverseOverReverse,
)
from bilevel.tree import Params

_REPEATS = 3
_EXPECTED_PRODUCTS = 5

HVP = HVPProvider | Literal["auto"]
"""What arguments named `hvp` take: a provider, or "auto" for a new `Automatic`."""


@dataclass(frozen=True)
class Measurement:
    """One candidate on one objective.

    Attributes:
        provider: the candidate.
        seconds: time of a product, the median of three after one that is not counted; None where it does not work.
            For kept graphs, the mean over the batches and over five products of each: every batch's first at the
            recomputed price, the later ones at the kept price where the budget keeps the batch's graph.
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

    Finite differences are taken only where neither works, because they are far off on networks with kinks. Two
    candidates that disagree by more than the dtype's rounding allows (1e-3 in float32, 1e-8 in float64) are a defect of
    the objective or of torch: the reverse one is kept, and the report shows the difference. Whether the products of the
    one that is kept have lost curvature is examined as for any provider (`Problem.check_curvature`).

    What is chosen on the first of several ranks holds for all of them.

    Args:
        memory_budget: bytes that the kept graphs of one system may hold, as in `ReverseOverReverse`. Kept graphs are
            tried only with a budget, because their memory is the user's to give; how many batches of a system would be
            kept is reckoned from the first batch's graph.

    Attributes:
        report: one `Measurement` per candidate, empty before the first objective.

    Raises:
        ValueError: a budget that is not a number of bytes >= 0.
    """

    def __init__(self, memory_budget: float | None = None) -> None:
        if memory_budget is not None:
            check_number("Automatic: memory_budget (bytes)", memory_budget)
        self.memory_budget = memory_budget
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
        return self.linearize_all([objective], upper, lower)[0]

    def linearize_all(
        self, objectives: Sequence[Objective], upper: Params, lower: Params, *, resident: Iterable[Tensor] = ()
    ) -> list[Linearization]:
        resident = list(resident)
        if self._chosen is None and objectives:
            first = _FirstBatch(objectives[0], upper, lower, resident)
            self.report = _measure(first)
            if self.memory_budget is not None:
                self.report += _measure_kept(first, self.report, self.memory_budget, len(objectives))
            chosen = self._candidates().index(_choose(self.report, lower))
            self._chosen = self._candidates()[distributed.from_first_rank(chosen)]
        return [] if self._chosen is None else self._chosen.linearize_all(objectives, upper, lower, resident=resident)

    def state_dict(self) -> dict[str, str | None]:
        """What was chosen, in words, for a run that goes on elsewhere with the same provider."""
        return {"chosen": None if self._chosen is None else str(self._chosen)}

    def load_state_dict(self, state: Mapping[str, str | None]) -> None:
        """Inverse of `state_dict`; with a choice nothing is measured any more.

        Raises:
            ValueError: a choice that is not among the candidates of this one.
        """
        candidates = {str(provider): provider for provider in self._candidates()}
        chosen = state["chosen"]
        if chosen is not None and chosen not in candidates:
            raise ValueError(
                f"Automatic: the state chose {chosen}, and the candidates here are {list(candidates)}; resume with the "
                f"same memory_budget, here {self.memory_budget!r}"
            )
        self._chosen = None if chosen is None else candidates[chosen]
        self.report = ()

    def _candidates(self) -> list[HVPProvider]:
        candidates = [ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()]
        if self.memory_budget is not None:
            candidates.append(ReverseOverReverse(keep_graph=True, memory_budget=self.memory_budget))
        return candidates

    def __str__(self) -> str:
        lines = []
        for entry in self.report:
            chosen = " (chosen)" if entry.provider == self._chosen else ""
            milliseconds = 1e3 * (entry.seconds or 0.0)
            took = entry.failure or f"{milliseconds:.2f} ms a product, differs by {entry.difference:.1e}"
            lines.append(f"{entry.provider}{chosen}: {took}")
        return "\n".join(lines) or f"Automatic, nothing measured, {self._chosen or 'nothing'} chosen"


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


@dataclass(frozen=True)
class _FirstBatch:
    """What is measured: one objective at one point, and a fixed random vector."""

    objective: Objective
    upper: Params
    lower: Params
    resident: Sequence[Tensor]

    def linearize(self, provider: HVPProvider) -> Linearization:
        return provider.linearize_all([self.objective], self.upper, self.lower, resident=self.resident)[0]

    def vector(self) -> Params:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in self.lower.items()}


def _measure(batch: _FirstBatch) -> tuple[Measurement, ...]:
    vector = batch.vector()
    report: list[Measurement] = []
    reference: Params | None = None
    for provider in (ReverseOverReverse(), ForwardOverReverse()):
        linearization = batch.linearize(provider)
        try:
            product = linearization.hessian(vector)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, distributed.CollectiveError | torch.OutOfMemoryError) and distributed.world_size() > 1:
                # Of this rank alone: the others cannot try the next candidate with it.
                raise
            # The reason is kept in the report, and shown if no candidate works.
            report.append(Measurement(provider, None, None, str(error).splitlines()[0]))
            continue
        if distributed.agree(float(tree.norm(product)) == 0.0) and _curved(batch, vector):
            failure = (
                "its product is zero where gradients differ: some operation has no second derivative and says nothing"
            )
            report.append(Measurement(provider, None, None, failure))
            continue
        reference = product if reference is None else reference
        report.append(Measurement(provider, _median_seconds(linearization, vector), _difference(product, reference)))
    return tuple(report)


def _measure_kept(
    batch: _FirstBatch, report: Sequence[Measurement], memory_budget: float, batches: int
) -> tuple[Measurement, ...]:
    """Reverse-over-reverse with kept graphs, where its recomputing form works."""
    recomputed = report[0].seconds
    if recomputed is None:
        return ()
    provider = ReverseOverReverse(keep_graph=True, memory_budget=memory_budget)
    linearization, vector = batch.linearize(provider), batch.vector()
    product = linearization.hessian(vector)
    size = linearization.kept_bytes()
    if size is None:
        failure = f"not even one batch's graph fits in memory_budget={memory_budget:g} bytes"
        return (Measurement(provider, None, None, failure),)
    kept = min(batches, int(memory_budget // max(size, 1)))
    later_share = kept / batches * (_EXPECTED_PRODUCTS - 1) / _EXPECTED_PRODUCTS
    seconds = recomputed - later_share * (recomputed - _median_seconds(linearization, vector))
    reference = batch.linearize(ReverseOverReverse()).hessian(vector)
    return (Measurement(provider, seconds, _difference(product, reference)),)


def _difference(product: Params, reference: Params) -> float:
    return float(tree.norm(tree.sub(product, reference))) / max(float(tree.norm(reference)), 1e-300)


def _curved(batch: _FirstBatch, vector: Params) -> bool:
    """Whether the gradient changes along `vector` by more than rounding."""
    product = batch.linearize(FiniteDifference()).hessian(vector)
    return distributed.agree(float(tree.norm(product)) > 1e-3 * float(tree.norm(vector)))


def _choose(report: tuple[Measurement, ...], lower: Params) -> HVPProvider:
    working = [entry for entry in report if entry.seconds is not None]
    if not working:
        return FiniteDifference()
    tolerance = 1e-8 if all(leaf.dtype == torch.float64 for leaf in lower.values()) else 1e-3
    if any((entry.difference or 0.0) > tolerance for entry in working[1:]):
        return working[0].provider
    return min(working, key=lambda entry: entry.seconds or 0.0).provider


def _median_seconds(linearization: Linearization, vector: Params) -> float:
    return sorted(_seconds(linearization, vector) for _ in range(_REPEATS))[_REPEATS // 2]


def _seconds(linearization: Linearization, vector: Params) -> float:
    device = next(iter(vector.values())).device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    linearization.hessian(vector)
    return now() - began
