"""Columns of a table of `datasets`: which holds the pictures, which the labels, and those labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import DataError
from ...pictures.arrow import optional_package
from .labels import Labels, by_value

# By their names, so that the package is imported only where a data set is opened.
IMAGE, CLASS, VALUE = "Image", "ClassLabel", "Value"
STORED = {"bytes", "path"}
LABEL_NAMES = ("label", "labels")


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _element(feature: Any) -> Any:
    """What a list column is a list of; None where it is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _type(feature: Any) -> str:
    """What a plain column holds: "bool", "int64", "string" ...; "" for one that is not plain."""
    return feature.dtype if _kind(feature) == VALUE else ""


def _is_number(feature: Any) -> bool:
    return _type(feature).startswith(("int", "uint", "float"))


def _holds_files(feature: Any) -> bool:
    """Whether a column may hold the bytes of image files without saying so, as in parquet that others wrote."""
    return _type(feature) in ("binary", "large_binary") or (isinstance(feature, dict) and set(feature) == STORED)


def _check_there(features: Mapping[str, Any], column: str, option: str, name: str) -> None:
    if column not in features:
        raise DataError(f"{name}: there is no column {column!r} for {option}; there are: {', '.join(features)}")


def image_column(features: Mapping[str, Any], chosen: str | None, name: str) -> str:
    """The column of pictures: the one of type Image, or `chosen`, which may also hold bytes, or bytes and a path.

    Raises DataError where there is none or several, or where `chosen` is no such column.
    """
    if chosen is not None:
        _check_there(features, chosen, "image", name)
        if _kind(features[chosen]) != IMAGE and not _holds_files(features[chosen]):
            raise DataError(
                f"{name}: the column {chosen!r} holds {features[chosen]}, no images: cast it by "
                f"cast_column({chosen!r}, datasets.Image()) and save the data set again"
            )
        return chosen
    found = [column for column, feature in features.items() if _kind(feature) == IMAGE]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{name}: several columns are images ({', '.join(found)}): choose one by ?image={found[0]}")
    raise DataError(
        f"{name}: none of the columns ({', '.join(features)}) is of type Image: choose one that holds image files by "
        " ?image=COLUMN, or cast one by cast_column(COLUMN, datasets.Image()) and save the data set again"
    )


def image_sizes(table: Any, column: str, where: str) -> npt.NDArray[np.int64]:
    """Bytes of each row's picture, -1 where only its path is kept; read without the pictures.

    Raises DataError, naming the row, where there is neither.
    """
    pc = optional_package("pyarrow.compute")
    held = table.column(column)
    is_struct = hasattr(held.type, "num_fields") and held.type.num_fields > 0
    lengths = pc.binary_length(pc.struct_field(held, "bytes") if is_struct else held)
    sizes = pc.fill_null(lengths, -1).to_numpy().astype(np.int64)
    paths = pc.struct_field(held, "path") if is_struct else held
    nothing = (sizes < 0) & pc.is_null(paths).to_numpy()
    if nothing.any():
        raise DataError(f"{where}: row {int(nothing.argmax())} has no picture in {column!r}: take that row out")
    return sizes


def label_columns(features: Mapping[str, Any], chosen: str | None, name: str) -> list[str]:
    """The columns of labels: `chosen`, several by commas; the one of ClassLabel, of lists of them, or named label.

    Empty where there is none, or `chosen` is empty. Raises DataError where several could be meant.
    """
    if chosen is not None:
        columns = [column for column in chosen.split(",") if column]
        for column in columns:
            _check_there(features, column, "label", name)
        return columns
    found = [column for column, held in features.items() if CLASS in (_kind(held), _kind(_element(held)))]
    found = found or [column for column in LABEL_NAMES if column in features]
    if len(found) > 1:
        raise DataError(
            f"{name}: several columns are labels ({', '.join(found)}): choose one by ?label={found[0]}, or none by "
            "?label="
        )
    return found


def labels_of(tables: Sequence[Any], features: Mapping[str, Any], columns: Sequence[str], name: str) -> Labels | None:
    """The labels of all rows, in order; None without columns.

    ClassLabel gives its classes, in which -1 and null are no label; texts, whole numbers and booleans the values that
    occur, sorted; lists of ClassLabel several classes an image; floats, and lists of as many, targets. Several columns
    are several classes if they are booleans, else targets. Raises DataError on any other kind.
    """
    if not columns:
        return None
    if len(columns) > 1:
        return _side_by_side(tables, features, columns, name)
    feature, held = features[columns[0]], _joined(tables, columns[0])
    if _kind(feature) == CLASS:
        return Labels(torch.from_numpy(_filled(held, -1).astype(np.int64)), tuple(feature.names))
    element = _element(feature)
    if _kind(element) == CLASS:
        return Labels(_several_classes(held, len(element.names), f"{name}: {columns[0]}"), tuple(element.names))
    if _type(element).startswith("float"):
        return _vectors(held, f"{name}: {columns[0]}")
    if _type(feature).startswith("float"):
        return _side_by_side(tables, features, columns, name)
    if _is_number(feature) or _type(feature) in ("string", "large_string", "bool"):
        coded = held.dictionary_encode()
        return by_value(_filled(coded.indices, -1).astype(np.int64), coded.dictionary.to_pylist())
    raise DataError(
        f"{name}: the column {columns[0]!r} holds {feature}, which is no label: choose another by ?label=COLUMN, none "
        "by ?label=, or cast it to ClassLabel, a list of ClassLabel or floats"
    )


def _joined(tables: Sequence[Any], column: str) -> Any:
    """A column of all tables as one array."""
    pyarrow = optional_package("pyarrow")
    chunks = [chunk for table in tables for chunk in table.column(column).chunks]
    return pyarrow.concat_arrays(chunks) if chunks else pyarrow.array([])


def _filled(held: Any, value: Any) -> npt.NDArray[Any]:
    """An array with `value` for null."""
    return held.fill_null(value).to_numpy(zero_copy_only=False)


def _side_by_side(tables: Sequence[Any], features: Mapping[str, Any], columns: Sequence[str], name: str) -> Labels:
    """Columns of booleans or numbers as one label an image."""
    if all(_type(features[column]) == "bool" for column in columns):
        values = np.stack([_filled(_joined(tables, column), False) for column in columns], axis=1)
        return Labels(torch.from_numpy(values.astype(np.bool_)), tuple(columns))
    for column in columns:
        if not _is_number(features[column]):
            raise DataError(
                f"{name}: the column {column!r} holds {features[column]}; several columns of labels must be booleans "
                "(several classes an image) or numbers (a regression)"
            )
    held = [_joined(tables, column).cast("float64") for column in columns]
    values = np.stack([_filled(column, float("nan")) for column in held], axis=1)
    return Labels(torch.from_numpy(values.astype(np.float32)), tuple(columns))


def _lengths(held: Any, where: str) -> npt.NDArray[Any]:
    """How many elements each list has. Raises DataError on a null."""
    if held.null_count:
        row = int(held.is_null().to_numpy(zero_copy_only=False).argmax())
        raise DataError(f"{where}: row {row} has no labels: write an empty list for no class, or take that row out")
    return held.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _several_classes(held: Any, count: int, where: str) -> torch.Tensor:
    """Lists of classes as bool [N, count]."""
    lengths = _lengths(held, where)
    rows, classes = np.repeat(np.arange(len(held)), lengths), _filled(held.flatten(), -1).astype(np.int64)
    wrong = (classes < 0) | (classes >= count)
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"{where}: row {rows[at]} has class {classes[at]}, but {count} classes run from 0 to {count - 1}"
        )
    values = np.zeros((len(held), count), dtype=np.bool_)
    values[rows, classes] = True
    return torch.from_numpy(values)


def _vectors(held: Any, where: str) -> Labels:
    """Lists of floats, all as long, as targets that are called by their numbers."""
    lengths = _lengths(held, where)
    if len(set(lengths.tolist())) > 1:
        row = int((lengths != lengths[0]).argmax())
        raise DataError(f"{where}: row {row} has {lengths[row]} targets, but row 0 has {lengths[0]}")
    values = _filled(held.flatten().cast("float64"), float("nan")).reshape(len(held), -1).astype(np.float32)
    return Labels(torch.from_numpy(values), tuple(str(target) for target in range(values.shape[1])))
