"""What the directions of earlier systems say about the inverse of this one."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from bilevel import tree
from bilevel.checks import same_structure
from bilevel.tree import Params

Pair = tuple[Params, Params]
"""A direction p and its product A p."""


@final
class QuasiNewton:
    r"""The limited-memory BFGS approximation M^-1 of A^-1 from pairs (p_i, q_i = A p_i), oldest first:

    .. math:: M_0^{-1} = \gamma I, \qquad M_{i+1}^{-1} = V_i M_i^{-1} V_i^\top + \rho_i p_i p_i^\top, \qquad
       V_i = I - \rho_i p_i q_i^\top, \quad \rho_i = \frac{1}{p_i^\top q_i}, \quad
       \gamma = \max_i \frac{p_i^\top q_i}{q_i^\top q_i}

    It is symmetric, and positive definite because all p_i'q_i are positive, maps q_i to p_i for the last pair and for
    all pairs of A-conjugate directions, and serves as a preconditioner for systems that change slowly (Morales and
    Nocedal 2000; the two-loop recursion: Nocedal 1980). gamma is the inverse of the smallest of the pairs' scales, that
    of A beside the few large eigenvalues that the pairs are about.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = [(p, q, tree.dot(p, q)) for p, q in pairs]
        self.gamma = torch.stack([energy / tree.dot(q, q) for _, q, energy in self.pairs]).max()

    def __call__(self, r: Params) -> Params:
        shares = []
        for p, q, energy in reversed(self.pairs):
            share = tree.dot(p, r) / energy
            shares.append(share)
            r = tree.axpy(-share, q, r)
        result = tree.scale(self.gamma, r)
        for (p, q, energy), share in zip(self.pairs, reversed(shares), strict=True):
            result = tree.axpy(share - tree.dot(q, result) / energy, p, result)
        return result


def saved_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Pairs as nested dictionaries, for a checkpoint."""
    return {str(i): {"direction": p, "product": q} for i, (p, q) in enumerate(pairs)}


def loaded_pairs(saved: Mapping[str, Any], like: Params) -> list[Pair]:
    """Pairs of `saved_pairs` on the devices of `like`; none where they are of other variables."""
    pairs = [(saved[str(i)]["direction"], saved[str(i)]["product"]) for i in range(len(saved))]
    return [(_placed(p, like), _placed(q, like)) for p, q in pairs if _alike(p, like)]


def _alike(p: Params, like: Params) -> bool:
    return same_structure(p, like) and all(p[name].dtype == leaf.dtype for name, leaf in like.items())


def _placed(x: Params, like: Params) -> Params:
    return {name: x[name].to(leaf.device) for name, leaf in like.items()}
