"""Penalties that are not smooth, by their proximal maps."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel.lower.kinds.maps import Parameter, ProximalMap, check_parameter, of_name
from bilevel.tree import Params


@final
class L1(ProximalMap):
    r"""The proximal map of :math:`h(y) = \sum_i \alpha_i |y_i|`, soft thresholding by :math:`\eta \alpha` (the Lasso:
    Tibshirani 1996).

    Args:
        weight: alpha >= 0; a number, a tensor that broadcasts against each variable, or these by name. A name that is
            left out has no penalty.

    Raises:
        TypeError: a weight of another kind.
        ValueError: a negative number.
    """

    def __init__(self, weight: Parameter) -> None:
        check_parameter("L1: weight", weight)
        self.weight = weight

    def __call__(self, point: Params, step: float) -> Params:
        moved = {}
        for name, z in point.items():
            weight = of_name(self.weight, name, z)
            moved[name] = z if weight is None else _soft(z, step * weight)
        return moved

    def distances(self, point: Params, step: float) -> Params:
        weights = {name: of_name(self.weight, name, z) for name, z in point.items()}
        return {n: torch.stack([point[n] - step * w, point[n] + step * w]) for n, w in weights.items() if w is not None}


@final
class ElasticNet(ProximalMap):
    r"""The proximal map of :math:`h(y) = \alpha \sum_i |y_i| + \tfrac{\beta}{2} \|y\|^2` (Zou and Hastie 2005): soft
    thresholding by :math:`\eta \alpha`, divided by :math:`1 + \eta \beta`.

    Args:
        weight, ridge: alpha, beta >= 0, each as the weight of `L1`. A name that is left out of `weight` has neither.

    Raises:
        TypeError: a weight of another kind.
        ValueError: a negative number.
    """

    def __init__(self, weight: Parameter, ridge: Parameter) -> None:
        check_parameter("ElasticNet: weight", weight)
        check_parameter("ElasticNet: ridge", ridge)
        self._l1, self.ridge = L1(weight), ridge

    @property
    def weight(self) -> Parameter:
        """alpha."""
        return self._l1.weight

    def __call__(self, point: Params, step: float) -> Params:
        moved = {}
        for name, y in self._l1(point, step).items():
            penalised = of_name(self.weight, name, y) is not None
            ridge = of_name(self.ridge, name, y) if penalised else None
            moved[name] = y if ridge is None else y / (1.0 + step * ridge)
        return moved

    def distances(self, point: Params, step: float) -> Params:
        return self._l1.distances(point, step)


@final
class GroupL1(ProximalMap):
    r"""The proximal map of :math:`h(y) = \sum_g \alpha_g \|y_g\|`, which shrinks each group's norm by
    :math:`\eta \alpha_g` down to 0 (the group Lasso: Yuan and Lin 2006).

    Args:
        weight: alpha >= 0; a number, a tensor that broadcasts against the groups (one number each), or these by name. A
            name that is left out has no penalty.
        groups: the group of each entry, whole numbers from 0 in a tensor of the variable's shape, or such tensors by
            name. None, and for a name that is left out: each slice along the last dimension is a group, so that a
            vector is one and a matrix has one in each row.

    Raises:
        TypeError: a weight or groups of another kind.
        ValueError: a negative number; at a call, groups of another shape than the variable.
    """

    def __init__(self, weight: Parameter, groups: Tensor | Mapping[str, Tensor] | None = None) -> None:
        check_parameter("GroupL1: weight", weight)
        for part in groups.values() if isinstance(groups, Mapping) else [] if groups is None else [groups]:
            if not isinstance(part, Tensor) or part.is_floating_point() or part.is_complex():
                raise TypeError(
                    "GroupL1: groups must be a tensor of whole numbers, one for each entry, or a mapping of names to "
                    f"these, got {part.dtype if isinstance(part, Tensor) else type(part).__name__}"
                )
        self.weight, self.groups = weight, groups

    def __call__(self, point: Params, step: float) -> Params:
        moved = dict(point)
        for name, z in point.items():
            weight = of_name(self.weight, name, z)
            if weight is None:
                continue
            norms, labels = self._norms(name, z)
            alive = norms > step * weight
            # Not divided where the group is 0, whose derivative is that of a constant.
            safe = torch.where(alive, norms, torch.ones_like(norms))
            share = torch.where(alive, 1.0 - step * weight / safe, torch.zeros_like(norms))
            shares = (share.unsqueeze(-1) if z.dim() else share) if labels is None else share[labels]
            moved[name] = z * shares
        return moved

    def distances(self, point: Params, step: float) -> Params:
        weights = {name: of_name(self.weight, name, z) for name, z in point.items()}
        return {n: self._norms(n, point[n])[0] - step * w for n, w in weights.items() if w is not None}

    def _norms(self, name: str, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm of each group, with derivative 0 at 0, and the labels where there are some."""
        labels = self.groups.get(name) if isinstance(self.groups, Mapping) else self.groups
        if labels is None:
            squares = (z.unsqueeze(0) if z.dim() == 0 else z).square().sum(-1)
        else:
            if labels.shape != z.shape:
                raise ValueError(
                    f"GroupL1: groups has shape {tuple(labels.shape)} and variable {name!r} {tuple(z.shape)}; give "
                    "each entry the number of its group"
                )
            labels = labels.to(z.device)
            count = int(labels.max()) + 1
            squares = z.new_zeros(count).index_add(0, labels.reshape(-1), z.square().reshape(-1))
        zero = squares == 0.0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt()), labels


def _soft(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(z > threshold, z - threshold, torch.where(z < -threshold, z + threshold, torch.zeros_like(z)))
