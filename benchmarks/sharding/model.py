"""What a product with A exchanges, and what its vectors take, where parameters are whole on every rank or sharded.

A product by a double backward makes four passes over the layers of a batch: forwards, backwards for the gradient g, and
through both of these again, forwards with the vector v in place of g, and backwards to H v. The parameters W are needed
in each, v in the third.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT = 4
"""Bytes of a number."""

PASSES = 4


@dataclass(frozen=True)
class Size:
    """Of one product.

    Attributes:
        parameters: P, of the lower level.
        ranks: n.
        batches: K Hessian batches, one after the other.
        pairs: layers in pairs, the first cut by its outputs and the second by its inputs, in tensor parallelism; a
            transformer's block has two.
        activations: numbers that a batch has between two pairs, on one rank.
        vectors: of P numbers, that live at the peak of a solve.
    """

    parameters: float
    ranks: int
    batches: int = 5
    pairs: int = 2
    activations: float = 0.0
    vectors: float = 20.0


@dataclass(frozen=True)
class Exchange:
    """Numbers that go through the collectives of one product: those gathered, scattered and reduced as sums over all
    ranks. How often each happens does not count here."""

    gathered: float = 0.0
    scattered: float = 0.0
    reduced: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in ring algorithms: ``(n - 1) / n`` times those gathered and scattered, twice as much
        of those reduced."""
        return FLOAT * (ranks - 1) / ranks * (self.gathered + self.scattered + 2.0 * self.reduced)


def data_parallel(size: Size) -> Exchange:
    """Vectors and parameters whole on every rank: one mean for the K batches together."""
    return Exchange(reduced=size.parameters)


def fully_sharded(size: Size, *, kept: bool = False) -> Exchange:
    """Each batch gathers W for its passes (`kept`: for all of them at once) and v; g and H v are summed into shards."""
    gathers = (1 if kept else PASSES) + 1
    numbers = size.batches * size.parameters
    return Exchange(gathered=gathers * numbers, scattered=2 * numbers)


def tensor_parallel(size: Size) -> Exchange:
    """Nothing of the length of W: a sum of activations for each pair of layers in each pass, but for the two that would
    be gradients by the data."""
    return Exchange(reduced=size.batches * (PASSES * size.pairs - 2) * size.activations)


def by_layout(size: Size) -> Mapping[str, tuple[Exchange, float]]:
    """What a product exchanges, and numbers that a rank holds of W and vectors, by where parameters are."""
    whole, shard = size.vectors * size.parameters, size.vectors * size.parameters / size.ranks
    return {
        "whole on every rank (as here)": (data_parallel(size), whole),
        "FSDP2, gathered anew in every pass": (fully_sharded(size), shard),
        "FSDP2, gathered once a batch": (fully_sharded(size, kept=True), shard + 2.0 * size.parameters),
        "tensor-parallel": (tensor_parallel(size), shard),
    }


def largest(memory: float, vectors: float, sharded_over: int = 1) -> float:
    """Parameters whose vectors fit into so many bytes of each rank, with nothing left for activations."""
    return memory * sharded_over / (FLOAT * vectors)
