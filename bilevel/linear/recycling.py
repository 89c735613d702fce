"""Directions of earlier solves, kept for later right-hand sides of the same operator."""

from typing import final

from torch import Tensor

from bilevel import tree
from bilevel.tree import Params


@final
class Directions:
    r"""A-conjugate directions p_i with their products A p_i: the Krylov space of earlier solves.

    They answer a new right-hand side by projection, without any product: the Galerkin solution on their span and its
    residual are

    .. math:: x = \sum_i \alpha_i p_i, \qquad r - \sum_i \alpha_i A p_i, \qquad
       \alpha_i = \frac{p_i^\top r}{p_i^\top A p_i},

    and later directions are made conjugate to them, so that nothing is searched twice (deflated conjugate gradients:
    Saad, Yeung, Erhel and Guyomarc'h 2000).

    Args:
        limit: most directions kept, for two vectors of memory each; the earliest ones stay.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[tuple[Params, Params, Tensor]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def offer(self, direction: Params, product: Params, energy: Tensor) -> bool:
        """Keep p, A p and p'A p > 0, if there is room; whether there was."""
        room = len(self._kept) < self.limit
        if room:
            self._kept.append((direction, product, energy))
        return room

    def truncate(self, count: int) -> None:
        """Keep the first `count` directions."""
        del self._kept[count:]

    def project(self, x: Params, r: Params) -> tuple[Params, Params]:
        """x and its residual r after the Galerkin correction."""
        for direction, product, energy in self._twice():
            share = tree.dot(direction, r) / energy
            x, r = tree.axpy(share, direction, x), tree.axpy(-share, product, r)
        return x, r

    def conjugate(self, vector: Params) -> Params:
        """The part of `vector` that is conjugate to all directions."""
        for direction, product, energy in self._twice():
            vector = tree.axpy(-tree.dot(product, vector) / energy, direction, vector)
        return vector

    def _twice(self) -> list[tuple[Params, Params, Tensor]]:
        """Directions are conjugate only as far as rounding left them so; a second pass takes what the first left."""
        return self._kept + self._kept
