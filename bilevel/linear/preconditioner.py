"""Preconditioners: cheap positive definite approximations of an operator whose inverse is easy to apply."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_count
from bilevel.linear.operators import LinearOperator
from bilevel.linear.sketch import check_model, draw_sketch
from bilevel.linear.solver import product_error
from bilevel.sharded import check_whole
from bilevel.tree import Params

Inverse = Callable[[Params], Params]
"""r -> M^-1 r for a symmetric positive definite M."""


class Preconditioner(ABC):
    """Makes M, an approximation of A. A frozen set of options, like a solver."""

    @abstractmethod
    def prepare(self, operator: LinearOperator, like: Params) -> Inverse | None:
        """``r -> M^-1 r``, symmetric and positive definite; None if a product with A was not finite.

        Args:
            operator: A; whoever calls counts its products.
            like: a tree with the names, shapes, dtypes and devices of the right-hand sides.
        """


@final
@dataclass(frozen=True)
class Diagonal(Preconditioner):
    r"""The diagonal of A, estimated from random signs z (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007).

    .. math:: d = \frac{1}{m} \sum_{k=1}^m z_k \circ A z_k, \qquad M = \operatorname{diag} \sqrt{d^2 + s^2}

    with s the standard error of d, so that an entry which the probes leave uncertain is not taken for a small one.
    Exact where A is diagonal. Entries of no more than rounding size get the mean of the others.

    Args:
        probes: m, one product each.
        seed: of the signs.

    Raises:
        ValueError: probes < 2 (one has no spread), a negative seed.
        TypeError: at solve, leaves that are DTensors, beside which its signs would be whole.
    """

    probes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("Diagonal: probes", self.probes, least=2)
        check_count("Diagonal: seed", self.seed, least=0)

    def prepare(self, operator: LinearOperator, like: Params) -> Inverse | None:
        check_whole(like)
        generators = {leaf.device: torch.Generator(leaf.device).manual_seed(self.seed) for leaf in like.values()}
        total, squares = tree.zeros_like(like), tree.zeros_like(like)
        for _ in range(self.probes):
            signs = {name: _signs(leaf, generators[leaf.device]) for name, leaf in like.items()}
            product = operator(signs)
            sample = {name: leaf * product[name] for name, leaf in signs.items()}
            total = tree.add(total, sample)
            squares = {name: leaf + sample[name].square() for name, leaf in squares.items()}
        mean = tree.scale(1.0 / self.probes, total)
        size = {name: _size(mean[name], squares[name], self.probes) for name in like}
        if operator.agree(not tree.all_finite(size)):
            return None
        inverse = _inverse(size, product_error(operator, like))
        return lambda r: {name: leaf * inverse[name] for name, leaf in r.items()}


@final
@dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """The low-rank model of `Nystrom` with the modulus of its eigenvalues (Frangella, Tropp and Udell 2023).

    Args:
        rank, tikhonov, seed: as for `Nystrom`.

    Raises:
        ValueError: rank < 1, a Tikhonov term that is not positive, a negative seed.
    """

    rank: int = 20
    tikhonov: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_model("NystromPreconditioner", self.rank, self.tikhonov, self.seed)

    def prepare(self, operator: LinearOperator, like: Params) -> Inverse | None:
        sketch = draw_sketch(operator, like, self.rank, self.tikhonov, self.seed)
        return None if sketch is None else sketch.precondition


def _signs(leaf: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, leaf.shape, generator=generator, device=leaf.device)
    return (2 * bits - 1).to(leaf.dtype)


def _size(mean: Tensor, squares: Tensor, probes: int) -> Tensor:
    variance = (squares / probes - mean.square()).clamp(min=0.0) / (probes - 1)
    return (mean.square() + variance).sqrt()


def _inverse(size: Params, error: float) -> Params:
    flat = tree.flatten(size)
    floor = 10.0 * error * float(flat.max())
    large = flat[flat > floor]
    typical = float(large.mean()) if large.numel() else 1.0
    return {name: 1.0 / torch.where(leaf > floor, leaf, typical) for name, leaf in size.items()}
