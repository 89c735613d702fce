"""A fixed partition of the data, whose blocks come in shuffled order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_count, check_function
from bilevel.distributed import world_size
from bilevel.lower import Partition
from bilevel.training.data.batches import BatchSource, derive_seed


@final
class Blocks(BatchSource, Partition):
    """The points 0 to size - 1 cut once into blocks of `block_size`, a last one being smaller; every pass gives each
    block once, in an order that is a function of (seed, pass) alone.

    Methods that keep something for every block (SABA's tables) or go through the whole set (SRBA, SPIDER) need such
    data: `BatchStack` and a shuffling DataLoader group samples anew in every pass, so that a block would mean nothing.

    Args:
        size: n, the number of points.
        block_size: points a block.
        load: ``load(indices) -> batch``; `indices` is int64 [points]. The same points give the same batch: no random
            augmentation. Over several ranks each loads its share, `bilevel.distributed.shard`; derivatives are means
            over the ranks, so that their number must divide the points of every batch.
        seed: of the order, >= 0.
        sweep_size: points a batch where the whole set is gone through at once; default 4096, at least `block_size`.

    Raises:
        TypeError: a `load` that cannot be called.
        ValueError: sizes below 1, blocks larger than the data, a negative seed, what is no whole number; when they are
            made or a stage begins, blocks or batches of a sweep that the ranks' number does not divide.
    """

    def __init__(
        self,
        size: int,
        block_size: int,
        load: Callable[[Tensor], Any],
        *,
        seed: int,
        sweep_size: int = 4096,
    ) -> None:
        check_count("Blocks: size", size, least=1)
        check_count("Blocks: block_size", block_size, least=1)
        check_count("Blocks: seed", seed, least=0)
        check_count("Blocks: sweep_size", sweep_size, least=1)
        check_function("Blocks: load", load, "a function of the points' indices that returns their batch")
        if block_size > size:
            raise ValueError(f"Blocks: block_size={block_size} is larger than the data ({size} points); reduce it")
        self.size, self.block_size, self.load, self.seed = size, block_size, load, seed
        self.sweep_size = max(sweep_size, block_size)
        self._points = torch.arange(size).split(block_size)
        self._pass, self._cursor = 0, 0
        self._order = self._permutation()
        self._check_shares()

    def _check_shares(self) -> None:
        """Raise where the ranks would have unequal shares of a block or of a batch of a sweep."""
        ranks = world_size()
        sizes = {"block_size": self.block_size, "size": self.size}
        if self.size > self.sweep_size:
            sizes["sweep_size"] = self.sweep_size
        for argument, points in sizes.items():
            if points % ranks:
                raise ValueError(
                    f"Blocks: {argument}={points} points cannot be shared evenly by {ranks} ranks, and some points "
                    f"would count more than others in the mean over them; make it a multiple of {ranks}"
                )

    def __len__(self) -> int:
        return len(self._points)

    def block(self, index: int) -> Any:
        return self.load(self._points[index])

    def weight(self, index: int) -> float:
        return len(self) * len(self._points[index]) / self.size

    def sweep(self) -> Iterator[tuple[Any, float]]:
        starts = range(0, self.size, self.sweep_size)
        for first in starts:
            points = torch.arange(first, min(first + self.sweep_size, self.size))
            yield self.load(points), len(starts) * len(points) / self.size

    @property
    def blocks(self) -> Partition:
        return self

    @property
    def last_block(self) -> int | None:
        return self._order[self._cursor - 1] if self._cursor else None

    @property
    def last_indices(self) -> Tensor | None:
        index = self.last_block
        return None if index is None else self._points[index]

    def begin_stage(self, steps: int) -> None:
        # The ranks may have met after the blocks were made.
        self._check_shares()

    def next(self) -> Any:
        if self._cursor == len(self):
            self._pass, self._cursor = self._pass + 1, 0
            self._order = self._permutation()
        self._cursor += 1
        return self.block(self._order[self._cursor - 1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "block_size": self.block_size,
            "seed": self.seed,
            "pass": self._pass,
            "cursor": self._cursor,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.check_fields(state)
        for name, own in (("size", self.size), ("block_size", self.block_size), ("seed", self.seed)):
            if state[name] != own:
                raise ValueError(
                    f"Blocks: the state has {name}={state[name]}, these {name}={own}; resume with the same data, block "
                    "size and seed"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        self._pass, self._cursor = state["pass"], state["cursor"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "blocks", self._pass))
        return torch.randperm(len(self), generator=generator).tolist()
