"""WebDataset: images in uncompressed tar files on this machine, found by an index that is made once."""

from __future__ import annotations

import glob
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....experiment.folder.paths import user_path
from ...errors import DataError
from ...pictures.tar_members import TarImages
from ..file_table import FileScan
from ..sources import Request, Source
from .labels import Labels, assembled, by_value, coded
from .options import cache_path, check_options, split_options, tell
from .parts import consecutive, files_by_part, wanted_parts
from .tar_index import indexed

OPTIONS = ("image", "label")
LABEL = "cls"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
ARCHIVES = frozenset({".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"})
REMOTE = re.compile(r"(pipe:|[a-z][a-z0-9+.-]*://)", re.I)
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
INDEX_FORMAT = 1
IMAGE_FIELDS = ("shard", "starts", "sizes", "names", "name_starts", "name_sizes")
FIELDS = (*IMAGE_FIELDS, "codes", "labels")


def _braces(pattern: str) -> Iterator[str]:
    """`a{0..2}` and `a{x,y}` written out, as a shell does; numbers keep their leading zeros."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = RANGE.fullmatch(match[1])
    if numbers is None:
        choices = match[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    for choice in choices:
        yield from _braces(f"{pattern[: match.start()]}{choice}{pattern[match.end() :]}")


def _check_suffixes(paths: Sequence[Path], name: str) -> None:
    """Raise DataError on shards that are compressed, which the names tell."""
    for path in paths:
        if path.name.lower().endswith(COMPRESSED):
            raise DataError(
                f"{name}: {path} is compressed, so that its members cannot be read singly: unpack it to a plain "
                ".tar (images are compressed already), or remove it"
            )


def _shards(path: str, name: str) -> tuple[Path, list[Path]]:
    """The folder that the parts' names are read below, and the tar files, sorted.

    Raises DataError on anything that is not local, on missing files, and on other archives beside or in their place.
    """
    if REMOTE.match(path):
        raise DataError(f"{name}: pipes and addresses are not read: copy the shards to a disk and give their folder")
    path = str(user_path(path))
    if os.path.isdir(path):
        base = Path(path)
        scan = FileScan(base, ARCHIVES)
        scan.add_below()
        table = scan.table()
        found = [Path(table.path(position)) for position in range(len(table))]
        files = [file for file in found if file.name.lower().endswith((".tar", *COMPRESSED))]
        remedy = "give the folder of the .tar files, or a pattern like shard-{000..009}.tar"
    else:
        base = Path(os.path.dirname(re.split(r"[*?\[{]", path)[0]))
        files = []
        for pattern in _braces(path):
            matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            files += [Path(match) for match in matches]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise DataError(f"{name}: there is no file {absent[0]} ({len(absent)} of {len(files)} are missing)")
        files = list(dict.fromkeys(files))
        remedy = "check the pattern"
    if not files:
        raise DataError(f"{name}: there is no .tar file at {path}: {remedy}")
    _check_suffixes(files, name)
    return base, files


def _arrays(shards: Sequence[Path], settings: Mapping[str, str | None]) -> dict[str, Any]:
    """The arrays of the index, made now."""
    index = indexed(shards, settings["image"], settings["label"])
    name_sizes = np.asarray(index.name_sizes, dtype=np.int32)
    ends = np.cumsum(name_sizes, dtype=np.int64)
    return {
        "shard": np.asarray(index.shard, dtype=np.int32),
        "starts": np.asarray(index.starts, dtype=np.int64),
        "sizes": np.asarray(index.sizes, dtype=np.int64),
        "codes": np.asarray(index.codes, dtype=np.int64),
        "names": np.frombuffer(bytes(index.names), dtype=np.uint8),
        "name_starts": ends - name_sizes,
        "name_sizes": name_sizes,
        "labels": np.frombuffer(json.dumps(list(index.labels)).encode(), dtype=np.uint8),
    }


def _stored(file: Path) -> dict[str, Any] | None:
    """The arrays of an index that was kept; None where there is none, or a damaged one."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {field: stored[field] for field in FIELDS}
            json.loads(arrays["labels"].tobytes())
            return arrays
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile):
        return None


def _keep(arrays: Mapping[str, Any], file: Path) -> None:
    """Write the index, whole or not at all; where that is not possible the console tells, as it will be made again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as stored:
                np.savez(stored, **arrays)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        tell(f"the index {file} cannot be kept ({error.strerror}): it is made anew by each run")


def _index(shards: Sequence[Path], settings: Mapping[str, str | None], name: str) -> dict[str, Any]:
    """The arrays of the index, from the cache folder if these very files were indexed before."""
    file = cache_path("webdataset", shards, [INDEX_FORMAT, settings]).with_suffix(".npz")
    arrays = _stored(file)
    if arrays is None:
        tell(f"{name}: reading the headers of {len(shards)} tar files; their index is kept in {file}")
        arrays = _arrays(shards, settings)
        _keep(arrays, file)
    return arrays


def _labels(arrays: Mapping[str, Any]) -> Labels | None:
    """Single labels; numbers if all of them are."""
    texts: list[str] = json.loads(arrays["labels"].tobytes())
    if not texts:
        return None
    if all(re.fullmatch(r"[+-]?\d+", text) for text in texts):
        # "7" and "007" are one class.
        places, distinct = coded([int(text) for text in texts])
        return by_value(np.append(places, -1)[arrays["codes"]], distinct)
    return by_value(arrays["codes"], texts)


def open_web_dataset(text: str, request: Request, labelled: bool = True) -> Source:
    """The images of `PATH` or `PATH?image=SUFFIX&label=SUFFIX`: tar files in the layout of WebDataset.

    PATH is a folder of .tar files at any depth, or a pattern with braces or wildcards. The members whose names agree up
    to the first dot of the last part are a sample: one image, and its class as a number or a name in `.cls`, or in the
    member whose suffix `label` gives; `image` chooses among several images. Classes are the values that occur, sorted;
    without `labelled` they are left alone. Words in the names of folders and files (`train/`, `val-000.tar`) say the
    parts.

    Raises:
        DataError: naming shard and sample: what is not local, is compressed, damaged, cut short or missing, samples
            without an image or with several, names that come twice, labels that are no text, some samples without one.
    """
    name = f"webdataset:{text}"
    path, options = split_options(text)
    check_options(options, OPTIONS, name)
    base, files = _shards(path, name)
    groups = files_by_part([os.path.relpath(file, base) for file in files], name)
    groups = wanted_parts(groups, request.purpose, name)
    shards = [files[position] for positions in groups.values() for position in positions]
    settings = {"image": options.get("image"), "label": options.get("label", LABEL)}
    arrays = _index(shards, settings, name)
    images = TarImages(
        tuple(str(shard) for shard in shards),
        **{field: arrays[field] for field in IMAGE_FIELDS},
    )
    counts = np.bincount(arrays["shard"], minlength=len(shards))
    ends = np.cumsum([len(positions) for positions in groups.values()])
    of_part = {part: int(held.sum()) for part, held in zip(groups, np.split(counts, ends[:-1]), strict=True)}
    labels = _labels(arrays) if labelled else None
    if "label" in options and labelled and labels is None:
        raise DataError(f"{name}: no sample has a member with the suffix .{options['label']}")
    return assembled(name, images, consecutive(of_part), labels)
