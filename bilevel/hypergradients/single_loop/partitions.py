"""What methods ask of data with a fixed partition: the whole sum, and a table of what every block gave last."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.method import MethodState, Setup, UpperStep
from bilevel.hypergradients.single_loop.frame import Point
from bilevel.lower import Draw, Oracles, Partition
from bilevel.tree import Params


def check_partitions(method: str, setup: Setup | UpperStep) -> tuple[int, int]:
    """The numbers of blocks of the lower and the upper data.

    Raises:
        ValueError: a level's data have no fixed partition.
    """

    def count(level: str, blocks: Partition | None) -> int:
        if blocks is None:
            raise ValueError(
                f"{level}: {method} needs data that are cut into fixed blocks, and these group their samples anew in "
                "every pass; pass bilevel.training.Blocks(size, block_size, load, seed=...), or a list of batches, "
                "which all count the same"
            )
        return len(blocks)

    return count("lower", setup.lower_blocks), count("upper", setup.upper_blocks)


def whole_directions(oracles: Oracles, at: Point, step: UpperStep) -> tuple[Tensor, Point]:
    """F and the three directions on all samples of both levels."""
    samples = _sweep(step.lower_blocks, step.lower_draws), _sweep(step.upper_blocks, step.upper_draws)
    below = _mean([oracles.lower(at.upper, at.lower, at.v, draw) for draw in samples[0]])
    above = _mean([oracles.upper(at.upper, at.lower, draw) for draw in samples[1]])
    _, d_y, product, cross = below
    loss, d_x, d_f = above
    return loss["value"], Point(tree.sub(d_x, cross), d_y, tree.sub(product, d_f))


@final
class SagaTable:
    """Rows phi_b of the parts that block b gave when it was drawn last, with their mean; one level's.

    The mean is moved with every row, in float32 at least: in fewer bits its small changes would be lost.

    Args:
        state: rows and mean of a `MethodState`; None begins at zero.
        blocks: the partition.
        parts: what the drawn block gives now, each a tree.
    """

    def __init__(self, state: MethodState | None, blocks: Partition | None, parts: Sequence[Params]) -> None:
        assert blocks is not None
        self.parts = parts
        self.new = torch.cat([tree.flatten(part) for part in parts])
        if state is None:
            wide = torch.promote_types(self.new.dtype, torch.float32)
            self.rows, self.mean = (
                self.new.new_zeros(len(blocks), len(self.new)),
                torch.zeros_like(self.new, dtype=wide),
            )
        else:
            self.rows, self.mean = state["rows"].to(self.new.device), state["mean"].to(self.new.device)

    def estimate(self, draw: Draw) -> list[Params]:
        """``new - row + mean`` for each part."""
        self.change = self.new.to(self.mean.dtype) - self.rows[draw.block]
        sizes = [tree.size(part) for part in self.parts]
        chunks = (self.change + self.mean).split(sizes)
        return [tree.unflatten(chunk, part) for chunk, part in zip(chunks, self.parts, strict=True)]

    def following(self) -> MethodState:
        """The table after the step; its row is the old one until `write`."""
        return {"rows": self.rows, "mean": self.mean + self.change / len(self.rows)}

    def write(self, draw: Draw) -> None:
        """Put what the block gave into its row."""
        self.rows[draw.block] = self.new


def _sweep(blocks: Partition | None, draws: Sequence[Draw]) -> Iterator[Draw]:
    """The whole set, with seeds from that of the step's own sample."""
    assert blocks is not None
    for number, (batch, weight) in enumerate(blocks.sweep()):
        yield Draw(batch, draws[0].seed + number, None, weight)


def _mean(samples: Sequence[tuple[Tensor, *tuple[Params, ...]]]) -> list[Params]:
    """Value and trees, each the mean over the samples."""
    trees = [({"value": value}, *parts) for value, *parts in samples]
    return [tree.scale(1.0 / len(trees), reduce(tree.add, column)) for column in zip(*trees, strict=True)]
