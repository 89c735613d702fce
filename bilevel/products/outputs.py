"""A network's outputs, in whatever structure: their tensors, and the structure made anew with others.

Structures are tensors in nested mappings, lists, tuples and dataclasses, beside None, numbers and strings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.products.graph import reached
from bilevel.tree import Params


def differentiable(outputs: Any) -> Params:
    """The tensors that have derivatives, real and complex ones, by their place; a bare tensor's place is ''."""
    return {place: leaf for place, leaf in _leaves(outputs) if _has_derivatives(leaf)}


def replaced(outputs: Any, given: Params) -> Any:
    """The structure with other tensors in the places that `given` names."""
    tensors = iter([given.get(place, leaf) for place, leaf in _leaves(outputs) if isinstance(leaf, Tensor)])
    return tree.map_tensors(lambda _: next(tensors), outputs)


def joined(parts: Sequence[Any]) -> Any:
    """The structure with the rows of all parts below each other.

    Raises:
        ValueError: parts of different structures, or with different values of what is no tensor.
    """
    first, leaves = dict(_leaves(parts[0])), [dict(_leaves(part)) for part in parts]
    for other in leaves:
        if first.keys() != other.keys():
            places = first.keys() ^ other.keys()
            raise ValueError(
                f"lower_outputs: the tensors of one chunk of the batch are not those of another, {sorted(places)[:3]}; "
                "give every chunk outputs of one structure"
            )
        for place, leaf in first.items():
            if not isinstance(leaf, Tensor) and leaf != other[place]:
                raise ValueError(
                    f"lower_outputs{place} is {leaf!r} in one chunk of the batch and {other[place]!r} in another; for "
                    "micro-batching return a tensor with one row per sample, and leave sums to lower_output_loss"
                )
    return replaced(
        parts[0],
        {p: torch.cat([part[p] for part in leaves]) for p, leaf in first.items() if isinstance(leaf, Tensor)},
    )


def split_rows(whole: Params, parts: Sequence[Params]) -> list[Params]:
    """Tensors with the rows of all parts, cut into rows as those of the parts."""
    cut = {place: leaf.split([len(part[place]) for part in parts]) for place, leaf in whole.items()}
    return [{place: leaves[k] for place, leaves in cut.items()} for k in range(len(parts))]


def check_loss(value: Tensor, outputs: Params) -> Tensor:
    """The loss of outputs, if its graph begins at these.

    Raises:
        ValueError: it begins at none of them.
    """
    if outputs and not reached([value], outputs):
        raise ValueError(
            "lower_output_loss reaches none of the outputs that it is given, so that its derivatives are all zero; "
            "compute it from its argument `outputs`, without detach() and without outputs that were kept elsewhere (an "
            "attribute of the Problem or of the structure)"
        )
    return value


def check_outputs(outputs: Any) -> Any:
    """Raise TypeError unless this is a structure that has a tensor with derivatives."""
    kinds = "a tensor, or tensors in dicts, lists, tuples or dataclasses (beside None, numbers and strings)"
    for place, leaf in _leaves(outputs):
        if not isinstance(leaf, (Tensor, int, float, complex, str, type(None))):
            raise TypeError(f"lower_outputs must return {kinds}, got {type(leaf).__name__} in outputs{place}")
    if not differentiable(outputs):
        raise TypeError(
            f"lower_outputs must return {kinds}, got {type(outputs).__name__} without a floating-point tensor"
        )
    return outputs


def check_rows(outputs: Any, chunk: Any) -> Any:
    """Raise unless every tensor of a chunk's outputs has a row for each sample; samples are counted where all tensors
    of the chunk agree."""
    check_outputs(outputs)
    # Nested tensors have no shape.
    lengths = {tensor.size(0) if tensor.dim() else None for tensor in tree.tensors_in(chunk)}
    for place, leaf in _leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or (len(lengths) == 1 and len(leaf) not in lengths)):
            raise ValueError(
                f"micro-batching needs outputs with one row per sample, got shape {tuple(leaf.shape)} in "
                f"lower_outputs{place} for a chunk whose tensors have the lengths "
                f"{sorted([] if length is None else [length] for length in lengths)}; stack views along dimension 1, "
                "as [n, views, d], leave means over samples to lower_output_loss, let it take variables from `upper`"
            )
    return outputs


def _has_derivatives(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _leaves(outputs: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What is no container, with its place, in the order of `tree.map_tensors`."""
    if isinstance(outputs, Mapping):
        for key, item in outputs.items():
            yield from _leaves(item, f"{place}[{key!r}]")
    elif isinstance(outputs, (list, tuple)):
        for index, item in enumerate(outputs):
            yield from _leaves(item, f"{place}[{index}]")
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        for field in fields(outputs):
            if field.init:
                yield from _leaves(getattr(outputs, field.name), f"{place}.{field.name}")
    else:
        yield place, outputs
