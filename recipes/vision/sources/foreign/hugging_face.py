"""Data sets of Hugging Face `datasets` on a disk: saved by `save_to_disk`, or parquet files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....experiment.folder.paths import user_path
from ...errors import DataError
from ...pictures.arrow import ArrowImages, arrow_table, optional_package
from ..file_table import FileScan
from ..sources import Request, Source
from .columns import image_column, image_sizes, label_columns, labels_of
from .labels import assembled
from .options import cache_path, check_options, megabytes, split_options, tell
from .parts import PARTS, consecutive, files_by_part, renamed, wanted_parts

OPTIONS = ("image", "label", *PARTS)
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
PARQUET = ".parquet"


@dataclass(frozen=True)
class Split:
    """One split: its Arrow files in order, and the kinds of their columns."""

    paths: tuple[str, ...]
    features: Mapping[str, Any]


def _split(dataset: Any, name: str) -> Split:
    """Where a Dataset lies. Raises DataError unless its rows are those of its files."""
    paths = tuple(str(file["filename"]) for file in dataset.cache_files)
    if sum(arrow_table(path).num_rows for path in paths) != len(dataset):
        raise DataError(f"{name}: its Arrow files hold other rows than the data set: save it again by save_to_disk")
    return Split(paths, dataset.features)


def _saved(path: str, wanted: Mapping[str, str], request: Request, name: str) -> dict[str, Split]:
    """The parts to open of what `save_to_disk` wrote."""
    datasets = optional_package("datasets")
    try:
        loaded = datasets.load_from_disk(path, keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: it cannot be loaded ({error}): it is damaged; save it again") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    parts = _chosen(splits, wanted, name) if wanted else renamed(splits, name)
    return {part: _split(split, name) for part, split in wanted_parts(parts, request.purpose, name).items()}


def _chosen(splits: Mapping[str, Any], wanted: Mapping[str, str], name: str) -> dict[str, Any]:
    """The splits that the options name. Raises DataError on one that is not there."""
    for part, split in wanted.items():
        if split not in splits:
            raise DataError(f"{name}: {part}={split}, but its splits are {', '.join(splits)}")
    return {part: splits[split] for part, split in wanted.items()}


def _parquet(base: Path, files: Sequence[str], request: Request, name: str) -> dict[str, Split]:
    """The parts to open of parquet files, copied to Arrow files in the cache folder where they were not before."""
    datasets = optional_package("datasets")
    groups = wanted_parts(files_by_part(files, name), request.purpose, name)
    parts = {}
    for part, positions in groups.items():
        chosen = [base / files[position] for position in positions]
        cache = cache_path("parquet", chosen)
        if not cache.exists():
            size = megabytes(sum(file.stat().st_size for file in chosen))
            tell(f"{name}: copying the parquet files of the {part} part ({size}) to Arrow files in {cache}")
        try:
            dataset = datasets.Dataset.from_parquet(
                [str(file) for file in chosen], cache_dir=str(cache), keep_in_memory=False
            )
        except Exception as error:  # whatever pyarrow and the builder raise, on damaged files and full disks alike
            cause = error.__cause__ or error
            raise DataError(f"{name}: {chosen[0]} and its like cannot be copied to {cache} ({cause})") from error
        parts[part] = _split(dataset, name)
        size = megabytes(sum(os.path.getsize(path) for path in parts[part].paths))
        tell(f"{name}: the {part} part is read from Arrow files of {size} in {cache}")
    return parts


def _parts(path: str, wanted: Mapping[str, str], request: Request, name: str) -> dict[str, Split]:
    """The parts to open. Raises DataError where `path` is neither kind of data set."""
    if any(os.path.isfile(os.path.join(path, file)) for file in (SAVED, SAVED_SPLITS)):
        return _saved(path, wanted, request, name)
    if os.path.isfile(path) and path.endswith(PARQUET):
        base, files = Path(path).parent, [os.path.basename(path)]
    elif os.path.isdir(path):
        scan = FileScan(path, {PARQUET})
        scan.add_below()
        table = scan.table()
        base, files = Path(path), [table.relative(position) for position in range(len(table))]
    else:
        raise DataError(
            f"{name}: there is no folder {path}; a data set of the hub is saved once, where there is a network, by "
            "datasets.load_dataset(NAME).save_to_disk(PATH)"
        )
    if not files:
        raise DataError(f"{name}: the folder holds neither what datasets' save_to_disk writes nor parquet files")
    if wanted:
        raise DataError(f"{name}: parts are options of saved data sets; parquet files say theirs by their names")
    return _parquet(base, files, request, name)


def _check_alike(parts: Mapping[str, Split], columns: Sequence[str], name: str) -> None:
    """Raise DataError where a part has other columns than the first, of pictures and labels."""
    first = next(iter(parts.values())).features
    for part, split in parts.items():
        for column in columns:
            if split.features.get(column) != first[column]:
                raise DataError(
                    f"{name}: the column {column!r} is {split.features.get(column)} in {part}, but {first[column]} in "
                    f"{next(iter(parts))}: cast them to the same, or choose the parts by ?train=SPLIT"
                )


def _images(splits: Sequence[Split], column: str, name: str) -> ArrowImages:
    """The pictures of all splits, one behind the other."""
    paths = [path for split in splits for path in split.paths]
    sizes = [image_sizes(arrow_table(path), column, f"{name}: {path}") for path in paths]
    file = np.repeat(np.arange(len(paths), dtype=np.int32), [len(here) for here in sizes])
    rows = [np.arange(len(here), dtype=np.int64) for here in sizes]
    return ArrowImages(tuple(paths), column, file, np.concatenate(rows), np.concatenate(sizes))


def open_hugging_face(text: str, request: Request, labelled: bool = True) -> Source:
    """The images of `PATH`, or of `PATH?image=COLUMN&label=COLUMN&train=SPLIT&test=SPLIT`.

    PATH is what `save_to_disk` wrote (a Dataset, or a DatasetDict whose splits are the parts), a folder of parquet
    files at any depth whose names say the parts, or one such file. Parquet is copied to Arrow files in the cache folder
    once; the console tells where and how large. Rows are mapped into memory, and labels are read without the images.
    Nothing is looked up in a network. Without `labelled` the labels are left alone. Columns are chosen by
    `image_column` and `labels_of`.

    Raises:
        DataError: `datasets` is not installed; nothing of the kind at PATH, or damaged; splits of unknown names,
            columns that are not clear, splits of other columns, rows without a picture or, among others, a label.
    """
    name = f"hf:{text}"
    path, options = split_options(text)
    check_options(options, OPTIONS, name)
    wanted = {part: options[part] for part in PARTS if part in options}
    parts = _parts(str(user_path(path)), wanted, request, name)
    splits = list(parts.values())
    features = splits[0].features
    column = image_column(features, options.get("image"), name)
    columns = [] if "unlabelled" in parts or not labelled else label_columns(features, options.get("label"), name)
    _check_alike(parts, [column, *columns], name)
    labels = labels_of([arrow_table(path) for split in splits for path in split.paths], features, columns, name)
    images = _images(splits, column, name)
    counts = {part: sum(arrow_table(path).num_rows for path in split.paths) for part, split in parts.items()}
    return assembled(name, images, consecutive(counts), labels)
