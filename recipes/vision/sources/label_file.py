"""A folder of images whose labels are in one file, labels.csv: one class an image, several, or numbers."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..pictures.files import FileImages
from .label_table import LabelTable, read_label_table
from .sources import Source

LABEL_FILE = "labels.csv"
CLASS_COLUMNS = ("label", "class")
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity)", re.IGNORECASE)
WITH_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")
MISSING = frozenset({"nan", "na", "n/a", "null", "none"})


def _number(table: LabelTable, text: str) -> float | None:
    """The number that a value reads, with a decimal comma where the table has such; None for a word."""
    if table.decimal_comma and "." not in text:
        text = text.replace(",", ".")
    return float(text) if NUMBER.fullmatch(text) else None


def _check_values(table: LabelTable, words: Collection[str]) -> None:
    """Raise DataError on a missing value; `words` are those that are no numbers. "none" may be one class of several."""
    for text in table.texts:
        if not text:
            raise table.refuse(text, "the value is missing; fill it in or remove the row")
        if text.casefold() == "nan" or (
            text.casefold() in MISSING and all(word.casefold() in MISSING for word in words)
        ):
            raise table.refuse(text, f"{text} stands for a missing value; fill it in or remove the row")


def _classes(table: LabelTable, words: Collection[str]) -> tuple[tuple[str, ...], Tensor]:
    """The names of the classes in the only column, and int64 [N]. Raises DataError on numbers that are not whole."""
    for text in table.texts:
        if text not in words and not WHOLE.fullmatch(text):
            raise table.refuse(
                text, f"{text} is neither the name of a class nor a whole number; call a column of targets otherwise"
            )
    names = sorted(table.texts) if words else sorted(table.texts, key=int)
    if not words:
        for one, other in pairwise(names):
            if int(one) == int(other):
                raise table.refuse(other, f"{other} is the same number as {one} elsewhere; write it in one way")
    place = {name: position for position, name in enumerate(names)}
    places = np.asarray([place[text] for text in table.texts])
    return tuple(names), torch.from_numpy(places[table.codes[:, 0]])


def _targets(table: LabelTable) -> Tensor:
    """Bool [N, C] if every value reads 0 or 1, else float32 [N, C]. Raises DataError on what is no finite number."""
    if set(table.texts) <= {"0", "1"}:
        return torch.from_numpy(np.asarray([text == "1" for text in table.texts])[table.codes])
    values = []
    for text in table.texts:
        number = _number(table, text)
        if number is None:
            raise table.refuse(text, f"{text!r} is no number; for class names keep a single column of labels")
        if abs(number) > torch.finfo(torch.float32).max:
            raise table.refuse(text, f"{text} is no finite number in 32 bits")
        values.append(number)
    return torch.from_numpy(np.asarray(values, dtype=np.float32)[table.codes])


def _labels(table: LabelTable) -> tuple[tuple[str, ...], Tensor]:
    """The names of classes or targets, and the labels."""
    words = {text: None for text in table.texts if text and _number(table, text) is None}
    _check_values(table, words)
    named = len(table.columns) == 1 and table.columns[0].casefold() in CLASS_COLUMNS
    if not named and not table.decimal_comma:
        for text in words:
            if WITH_COMMA.fullmatch(text):
                raise table.refuse(
                    text, f"{text} has a decimal comma; write a point, or separate columns by semicolons"
                )
    if named or (words and len(table.columns) == 1):
        return _classes(table, words)
    return table.columns, _targets(table)


def open_label_file(path: str) -> Source:
    """The images that labels.csv in the folder `path` lists, in its order.

    The header is `file` and the names of the labels; each row is an image's path below `path` and a value a label; see
    `read_label_table`. A single column of words, or one called label or class, makes a single-label set, whose classes
    are the values, sorted; values that all read 0 or 1 a multi-label set, and any others a regression (there write 1.0
    for 1). A column `split` fixes the parts. Raises DataError, naming the row and column, on a missing value, one that
    is no number where numbers are needed, and one that is not finite.
    """
    table = read_label_table(Path(path), Path(path) / LABEL_FILE)
    classes, labels = _labels(table)

    return Source(f"folder:{path}", classes, labels, table.parts, FileImages(table.files))
