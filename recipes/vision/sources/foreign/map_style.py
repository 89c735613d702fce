"""Any map-style `torch.utils.data.Dataset` by its name, and its labels without its images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ....experiment.plugins import PluginError, resolve
from ...errors import DataError
from ...pictures.own_dataset import OwnDataset, OwnImages, to_picture
from ..sources import Request, Source
from .labels import Labels, assembled, by_value, coded
from .options import split_options, tell
from .parts import consecutive, renamed, wanted_parts

ROWS = ("targets", "labels", "_labels")
PAIRS = ("samples", "imgs")


def gives_sets(source: str) -> bool:
    """Whether `module:Class` has `pretext()` or `downstream()`, and so is a `CustomSource` rather than a Dataset.

    Raises:
        DataError: the name leads nowhere.
    """
    try:
        found = resolve(split_options(source)[0])
    except PluginError as error:
        raise DataError(f"the data source {error}") from error
    return any(callable(getattr(found, method, None)) for method in ("pretext", "downstream"))


def _value(text: str) -> Any:
    """An option's value: as JSON where it is that, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    """A label in Python's own types."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _stored(made: Any) -> list[Any] | None:
    """The labels of all items that a Dataset keeps beside its images; None where it has none of as many."""
    if isinstance(made, Subset):
        inner = _stored(made.dataset)
        return None if inner is None else [inner[index] for index in made.indices]
    count = len(made)
    label: Callable[[int], Any] | None = getattr(made, "label", None)
    if callable(label):
        return [_plain(label(index)) for index in range(count)]
    for attribute in ROWS:
        rows = getattr(made, attribute, None)
        if isinstance(rows, list | tuple | Tensor | np.ndarray) and len(rows) == count:
            return [_plain(row) for row in _plain(rows)]
    for attribute in PAIRS:
        pairs = getattr(made, attribute, None)
        if isinstance(pairs, list) and len(pairs) == count and all(len(pair) > 1 for pair in pairs):
            return [_plain(pair[1]) for pair in pairs]
    return None


def _label_in(sample: Any) -> tuple[Any] | None:
    """The label in what `__getitem__` gave; None where there is none."""
    return (_plain(sample[1]),) if isinstance(sample, tuple | list) and len(sample) > 1 else None


@lru_cache(maxsize=4)
def _values(dataset: OwnDataset, indices: tuple[int, ...]) -> list[Any] | None:
    """The labels of the items at `indices`; None where there are none. Remembered: reading all may take long."""
    stored = _stored(dataset.instance())
    first = _label_in(dataset.sample(indices[0]))
    if stored is not None:
        for index in (indices[0], indices[-1]):
            given = _label_in(dataset.sample(index))
            if given is not None and given[0] != stored[index]:
                raise DataError(
                    f"{dataset.name}: item {index} comes with the label {given[0]!r}, but its list of labels says "
                    f"{stored[index]!r}: make them agree, by a method label(index) for example"
                )
        return [stored[index] for index in indices]
    if first is None:
        return None
    tell(
        f"{dataset.name} keeps no labels beside its images (targets, labels, samples, label(index)): "
        f"all {len(indices):,} items are read once for theirs"
    )
    values = [_label_in(dataset.sample(index)) for index in indices]
    for index, value in zip(indices, values, strict=True):
        if value is None:
            raise DataError(f"{dataset.name}: item {index} has no label, but item {indices[0]} has")
    return [value[0] for value in values if value is not None]


def _classes(made: Any) -> tuple[str, ...] | None:
    """The names that a Dataset gives its classes, if it does."""
    if isinstance(made, Subset):
        return _classes(made.dataset)
    names = getattr(made, "classes", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    return tuple(", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in names)


def _labels(values: Sequence[Any], classes: tuple[str, ...] | None, name: str) -> Labels:
    """Labels by the types of the values: whole numbers and texts one class, lists of booleans several, floats targets.

    Raises DataError, with what came, on other types and on a mixture.
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} or kinds <= {bool}:
        if classes is None or kinds == {bool}:
            return by_value(*coded(values))
        return Labels(torch.tensor([-1 if value is None else value for value in values]), classes)
    if kinds == {str}:
        if classes is None:
            return by_value(*coded(values))
        places = {label: place for place, label in enumerate(classes)} | {None: -1}
        strange = next((value for value in values if value not in places), None)
        if strange is not None:
            raise DataError(f"{name}: an item has the label {strange!r}, which is not among its classes")
        return Labels(torch.tensor([places[value] for value in values]), classes)
    if kinds <= {int, float} and None not in values:
        return _rows([[value] for value in values], torch.float32, classes)
    if kinds == {list} and None not in values and len({len(value) for value in values}) == 1 and values[0]:
        inner = {type(element) for value in values for element in value}
        if inner == {bool}:
            return _rows(values, torch.bool, classes)
        if float in inner and inner <= {int, float}:
            return _rows(values, torch.float32, classes)
        kinds = {*kinds, *inner}
    raise DataError(
        f"{name}: labels must be whole numbers or texts (one class an item), lists of booleans that are all as long "
        "(several classes), or floats or lists of floats (a regression), not "
        f"{' and '.join(sorted(kind.__name__ for kind in kinds))}, such as {str(values[0])[:80]}"
    )


def _rows(values: Sequence[Any], dtype: torch.dtype, classes: tuple[str, ...] | None) -> Labels:
    rows = torch.tensor(values, dtype=dtype)
    return Labels(rows, classes or tuple(str(column) for column in range(rows.shape[1])))


def _parts(made: Any, name: str) -> dict[str, Tensor]:
    """The parts that a Dataset fixes itself, by our names; all of it is train where it fixes none."""
    parts = getattr(made, "parts", None)
    parts = parts() if callable(parts) else parts
    if parts is None:
        return {"train": torch.arange(len(made))}
    if not isinstance(parts, dict) or not parts:
        raise DataError(f"{name}: its parts must be a dictionary of names and indices, not {type(parts).__name__}")
    found = {part: torch.as_tensor(indices, dtype=torch.int64) for part, indices in renamed(parts, name).items()}
    together = torch.cat(list(found.values()))
    if bool(((together < 0) | (together >= len(made))).any()):
        raise DataError(f"{name}: its parts have indices outside 0 to {len(made) - 1}")
    if len(together.unique()) != len(together):
        raise DataError(f"{name}: its parts have an item in common, or one twice: every item belongs to one part")
    for part, indices in found.items():
        if not len(indices):
            raise DataError(f"{name}: its {part} part is empty: leave it out")
    return found


def open_map_style(text: str, request: Request, labelled: bool = True) -> Source:
    """The items of the Dataset that `module:Class`, or `module:function`, makes; `?key=value&...` are its arguments.

    Values are JSON, or else texts. An item is an image (see `to_picture`) or a tuple that begins with one and its
    label. Labels come from a method `label(index)`, or from `targets`, `labels`, `_labels`, `samples` or `imgs` of the
    Dataset's length; where there is none of these, every item is read once, and the console tells so; without
    `labelled` they are left alone. Classes are its `classes`, or the labels that occur. `parts`, an attribute or a
    method, may give indices of train, val, test and unlabelled items. Each item is made with torch's, NumPy's and
    Python's generators seeded by its index, so that it is the same each time and in every process; each process makes
    an instance of its own.

    Raises:
        DataError: the name leads nowhere, or to nothing map-style; it raises; images or labels of other kinds.
    """
    factory, options = split_options(text)
    dataset = OwnDataset(text, factory, json.dumps({key: _value(value) for key, value in options.items()}))
    made = dataset.instance()
    parts = wanted_parts(_parts(made, text), request.purpose, text)
    indices = torch.cat(list(parts.values()))
    first = dataset.sample(int(indices[0]))
    to_picture(
        first[0] if isinstance(first, tuple | list) and first else first, f"{text}: the image of item {indices[0]}"
    )
    needed = labelled and "unlabelled" not in parts and (request.purpose == "downstream" or "test" not in parts)
    values = _values(dataset, tuple(indices.tolist())) if needed else None
    labels = None if values is None else _labels(values, _classes(made), text)
    positions = consecutive({part: len(held) for part, held in parts.items()})
    return assembled(text, OwnImages(dataset, indices), positions, labels)
