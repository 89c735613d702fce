"""Samples of a level's data, and data that are cut into fixed blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Draw:
    """A sample of one level's data. It can be evaluated at any number of points, with the same random masks.

    Attributes:
        batch: whatever the Problem's objective takes.
        seed: of random masks.
        block: which block of a fixed partition this is, from 0; None where the data have none.
        weight: what its objective counts for: B n_b / n for block b of B, with n_b of n points, so that the mean over
            all blocks is the objective on all points; 1 otherwise.
    """

    batch: Any
    seed: int
    block: int | None = None
    weight: float = 1.0


class Partition(ABC):
    """Blocks that make up a whole set, numbered from 0: the same samples in a block whenever it is asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of blocks, B."""

    @abstractmethod
    def block(self, index: int) -> Any:
        """One block's batch."""

    @abstractmethod
    def weight(self, index: int) -> float:
        """``B n_b / n`` of a block of n_b among n samples: the mean over blocks, each by its weight, is that over all
        samples."""

    def sweep(self) -> Iterator[tuple[Any, float]]:
        """The whole set as batches with weights, whose weighted mean is that over all samples."""
        return ((self.block(index), self.weight(index)) for index in range(len(self)))
