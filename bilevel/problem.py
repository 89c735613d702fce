"""The abstract bilevel problem and ready-made regularizers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import tree
from bilevel.tree import Params


class Problem(ABC):
    r"""A bilevel problem

    .. math:: \min_x F(x, y^*(x)) \quad\text{s.t.}\quad y^*(x) \in \arg\min_y G(x, y),
              \qquad G(x, y) = L(x, y) + \lambda\, r(x, y)

    with upper variables x, lower variables y, both `Params`. A subclass states F (`upper_objective`), L
    (`lower_objective`) and, if there is one, r (`regularizer`). Objectives are pure functions of their arguments: they
    return a 0-d tensor, bind modules through `functional_call` and write to nothing. An expectation over a batch is
    a mean, so that the mean over several batches is the objective on their union.

    For lower levels that are fixed points, constrained, penalised by what is not smooth, or roots, derive from one of
    the kinds in `bilevel.lower`.
    """

    regularization_weight: float = 0.0
    """lambda >= 0, the weight of `regularizer` in the lower level."""

    curvature_depends_on_upper: bool = True
    """Whether d2L/dydy or d2r/dydy changes with x. False lets one `System` serve many upper steps."""

    check_curvature: bool = True
    """Whether second derivatives of the lower level are examined, once for each Problem, for what a custom autograd
    Function or a ``detach`` cuts off. False where a stop-gradient is meant, or to save the price."""

    @abstractmethod
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        """L(x, y) on one batch, without the regularizer; 0-d."""

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        """F(x, y) on one batch; 0-d. A Problem for `lower_solution` alone, whose loss stands outside, needs none."""
        raise TypeError(
            f"{type(self).__name__} does not define upper_objective, which hypergradients and trainers need; define "
            "it, or take bilevel.hypergradients.lower_solution, above which any loss can stand"
        )

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Any:
        """z(x, y) with ``lower_objective = lower_output_loss(x, z)``; only `GaussNewton` and micro-batching ask for it.

        A tensor, or tensors in nested mappings, lists, tuples and dataclasses, beside None, numbers and strings.
        Integer and boolean tensors, such as indices and masks, are passed on to the loss.

        For micro-batching one row of each tensor belongs to each sample, in the batch's order: two views of n samples
        make ``[n, 2, d]``. What is no tensor must be the same in every chunk of a batch.
        """
        raise TypeError(
            f"{type(self).__name__} does not define lower_outputs, which GaussNewton and micro-batching need; define "
            "lower_outputs and lower_output_loss, or take another provider and no micro_batch"
        )

    def lower_output_loss(self, upper: Params, outputs: Any, batch: Any) -> Tensor:
        """l(x, z), the lower objective as a function of `lower_outputs` and, for weights of samples, label smoothing
        and the like, of the upper variables; 0-d. It sees the whole batch and its outputs, also in micro-batching."""
        raise TypeError(f"{type(self).__name__} defines lower_outputs but not lower_output_loss; define both")

    def split_batch(self, batch: Any, size: int) -> list[Any]:
        """A lower batch as chunks of `size` samples and a last one of at most as many, in order, for micro-batching.

        The default is `split`.

        Raises:
            ValueError: tensors of different lengths, or no tensor that has a length.
        """
        return split(batch, size)

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        """r(x, y), unweighted and 0-d; None (the default) where the problem has none."""
        return None

    def implicit(self, name: str) -> bool:
        """Whether the lower variable `name` responds to the upper ones; the others are held fixed in the solve."""
        return True

    def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
        """Called by the trainer after lower step number `step` (from 1), for example to move a momentum target. What it
        changes belongs into `state_dict`."""
        return None

    def after_upper_step(self, upper: Params, lower: Params, batch: Any, step: int) -> None:
        """Called by the trainer after upper step number `step` (from 1) with that step's batch."""
        return None

    def reset_lower(self, upper: Params) -> Params | None:
        """New lower values at the start of an alternation (iMAML restarts from x), or None to go on from the old.

        With new values the trainer clears the lower optimizer's state, and leaves the lower scheduler where it is: a
        learning rate that decays goes on decaying over the alternations.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond the variables.

        By default the buffers of all modules that are attributes of the Problem, or lie in lists, tuples and
        dictionaries among these; and their parameters too where `after_lower_step` or `after_upper_step` is defined,
        which may move them (momentum targets). Define both methods for anything else that changes: tensors of one's
        own, modules that the Problem reaches otherwise.
        """
        moved = type(self).after_lower_step is not Problem.after_lower_step
        moved |= type(self).after_upper_step is not Problem.after_upper_step
        states = {path: _module_state(module, parameters=moved) for path, module in modules_of(self).items()}
        return {path: state for path, state in states.items() if state}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; tensors change in place.

        Raises:
            ValueError: the state is of other modules than the default `state_dict` finds here.
        """
        own = Problem.state_dict(self)
        for path in {**own, **state}:
            saved, here = state.get(path, {}), own.get(path, {})
            if not isinstance(saved, Mapping) or {n: t.shape for n, t in here.items()} != {
                n: getattr(t, "shape", None) for n, t in saved.items()
            }:
                raise ValueError(
                    f"{type(self).__name__}: the state's {path!r} is not that of a module here, whose modules have "
                    f"buffers under {sorted(own)}; build the Problem as it was built then, or define both state_dict "
                    "and load_state_dict"
                )
        for path, module in modules_of(self).items():
            targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for name, value in state.get(path, {}).items():
                targets[name].copy_(value)


def modules_of(problem: Problem) -> dict[str, nn.Module]:
    """The modules that are attributes of a Problem, or lie in lists, tuples and dictionaries among these, by path."""

    def within(path: str, value: object) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, nn.Module):
            yield path, value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from within(f"{path}[{index}]", item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from within(f"{path}[{key!r}]", item)

    return dict(pair for name, value in vars(problem).items() for pair in within(name, value))


def split(batch: Any, size: int) -> list[Any]:
    """A batch as chunks of `size` samples and a last one of at most as many, in order.

    Every tensor inside nested mappings (which become dicts), lists, tuples and dataclasses is cut along dimension 0;
    everything else goes into each chunk.

    Raises:
        ValueError: tensors of different lengths, or no tensor that has a length; a tensor that torch does not cut along
            dimension 0 (nested, sparse, quantised by channel).
    """

    def cut(tensor: Tensor, start: int) -> Tensor:
        try:
            return tensor[start : start + size]
        except RuntimeError as error:
            kind = (
                "nested"
                if tensor.is_nested
                else str(tensor.layout if tensor.layout is not torch.strided else tensor.dtype)
            )
            raise ValueError(
                f"split: torch does not cut a {kind.removeprefix('torch.')} tensor along dimension 0; define "
                "split_batch in the Problem, or keep the batch's tensors dense"
            ) from error

    def chunk(start: int) -> Any:
        return tree.map_tensors(lambda tensor: cut(tensor, start), batch)

    return [chunk(start) for start in range(0, _length(batch), size)]


def proximal(upper: Params, lower: Params, pairs: Mapping[str, str] | None = None) -> Tensor:
    r"""Proximal regularizer :math:`r = \tfrac12 \sum_i \|y_{l_i} - x_{u_i}\|^2` (iMAML; BiSSL, eq. 3).

    Args:
        pairs: lower name -> upper name. By default every lower variable is paired with the upper one of its name.

    Raises:
        ValueError: a name that is not there, no pair at all, or paired tensors of different shapes.
    """
    pairs = {name: name for name in lower} if pairs is None else pairs
    if not pairs:
        raise ValueError("proximal: no pairs of (lower, upper) variables; pass pairs={'lower name': 'upper name'}")
    terms = []
    for lower_name, upper_name in pairs.items():
        if lower_name not in lower or upper_name not in upper:
            raise ValueError(
                f"proximal: no lower {lower_name!r} or no upper {upper_name!r}; pass pairs={{'lower name': "
                f"'upper name'}} of the lower names {list(lower)} and the upper names {list(upper)}"
            )
        a, b = lower[lower_name], upper[upper_name]
        if a.shape != b.shape:
            raise ValueError(
                f"proximal: lower {lower_name!r} has shape {tuple(a.shape)} but upper {upper_name!r} {tuple(b.shape)}"
            )
        terms.append((a - b).square().sum())
    return 0.5 * torch.stack(terms).sum()


def ridge(lower: Params) -> Tensor:
    r"""Plain ridge regularizer :math:`r = \tfrac12 \|y\|^2` over all lower variables."""
    return 0.5 * torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()


def _module_state(module: nn.Module, *, parameters: bool) -> dict[str, Tensor]:
    named = {**(dict(module.named_parameters()) if parameters else {}), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def _length(batch: Any) -> int:
    """The number of samples, on which all tensors of the batch agree."""
    # Nested tensors have no shape.
    lengths = [tensor.size(0) if tensor.dim() else 0 for tensor in tree.tensors_in(batch)]
    for index, length in enumerate(lengths):
        if length == 0 or length != lengths[0]:
            raise ValueError(
                f"split: tensor {index} of the batch has {length} samples along dimension 0 and tensor 0 has "
                f"{lengths[0]}; give every tensor one row per sample, or define split_batch in the Problem"
            )
    if not lengths:
        raise ValueError(f"split: no tensor in the batch, a {type(batch).__name__}; define split_batch in the Problem")
    return lengths[0]
