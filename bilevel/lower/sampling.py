"""Whether lower batches are samples of more data, and a batch in two halves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel import tree
from bilevel.lower.per_problem import PerProblem
from bilevel.problem import Problem


@dataclass
class _Met:
    """Contents of the first batches that came with a Problem, and whether others have come since."""

    first: tuple[str, ...] | None = None
    others: bool = False


_met = PerProblem(_Met)


def are_samples(problem: Problem, contents: Callable[[], tuple[str, ...]]) -> bool:
    """Whether the Problem has come with lower batches of different contents: none of them is then known to be all data.

    Args:
        contents: tells those of the present batches; asked until others have come.
    """
    met = _met.of(problem)
    if not met.others:
        now = contents()
        met.first = now if met.first is None else met.first
        met.others = now != met.first
    return met.others


def halves(problem: Problem, batch: Any) -> list[Any] | None:
    """A batch as two parts by `Problem.split_batch`; None where it cannot be split so."""
    tensors = list(tree.tensors_in(batch))
    length = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if length < 2:
        return None
    try:
        parts = problem.split_batch(batch, (length + 1) // 2)
    except ValueError:
        return None
    return parts if len(parts) == 2 else None
