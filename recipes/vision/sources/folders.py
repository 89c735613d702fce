"""Images in folders, one folder a class: finding the files and decoding them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..imagesets import DataError
from ..pictures.rgb import to_rgb

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
PARTS = ("train", "val", "test")
MAX_PIXELS = 50_000_000
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
CHUNK = 256
SMALL_FILE = 8192


@dataclass(frozen=True)
class FolderListing:
    """The image files of a folder in a fixed order; `labels` are positions in `classes`, `parts` positions in `files`.

    `parts` has the key "train" alone for a folder of class folders, and also "val" and "test" where these exist.
    """

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    parts: dict[str, list[int]]


def _subfolders(folder: Path) -> list[Path]:
    """Folders directly inside, sorted by name; hidden ones do not count."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; hidden ones do not count. Raises DataError on a link to a folder around it."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for directory, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        here = os.path.realpath(directory)
        for name in subfolders:
            # Followed, it would list the same images again and again, in training and test sets alike.
            if f"{here}{os.sep}".startswith(f"{os.path.realpath(os.path.join(directory, name))}{os.sep}"):
                raise DataError(f"{os.path.join(directory, name)} links to a folder that it lies in: remove the link")
        found += [Path(directory, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    return sorted(found)


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files. Raises DataError if there is no class folder or an empty one."""
    classes = {entry.name: _images_in(entry) for entry in _subfolders(folder)}
    if not classes:
        raise DataError(f"{folder} has no class folder: put the images of each class into a folder of its own there")
    for name, files in classes.items():
        if not files:
            raise DataError(
                f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))}): add images or remove the folder"
            )
    return classes


def _split_folders(folder: Path) -> list[str]:
    """Which of train/, val/ and test/ `folder` is made of; none where its folders are the classes.

    Raises DataError on any other folder beside them, a "valid" say, which would otherwise be passed over.
    """
    names = [entry.name for entry in _subfolders(folder)]
    # A class may be called "train"; then it holds images and neither val/ nor test/ stands beside it.
    if "train" not in names or not (_subfolders(folder / "train") or {"val", "test"} & set(names)):
        return []
    for name in names:
        if name not in PARTS:
            raise DataError(f"{folder / name} is neither train, val nor test: rename it or move it elsewhere")
    return [part for part in PARTS if part in names]


def list_folder(folder: Path) -> FolderListing:
    """The images below `folder`: class folders, or train/ and optionally val/ and test/ with class folders in each.

    Raises DataError if the folder is missing, has no class folder, has an empty one, if val/ or test/ has a class that
    train/ lacks, or if another folder stands beside these three.
    """
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder}: give the path of a folder that holds one folder a class")
    try:
        trees = {part: _class_folders(folder / part) for part in _split_folders(folder)} or {
            "train": _class_folders(folder)
        }
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): make it readable or move it") from error
    classes = tuple(trees["train"])
    files: list[Path] = []
    labels: list[int] = []
    parts: dict[str, list[int]] = {}
    for part, tree in trees.items():
        start = len(files)
        for name, members in tree.items():
            if name not in trees["train"]:
                raise DataError(f"{folder / part / name} is a class that {folder / 'train'} does not have")
            files += members
            labels += [classes.index(name)] * len(members)
        parts[part] = list(range(start, len(files)))
    return FolderListing(classes, tuple(files), tuple(labels), parts)


def _square(image: Image.Image, side: int) -> Image.Image:
    """The central square at `side` px, bicubic and antialiased."""
    width, height = image.size
    short = min(width, height)
    # Cropped before it is resized: the longer side of a narrow strip would grow without bound.
    if width != height:
        left, top = round((width - short) / 2), round((height - short) / 2)
        image = image.crop((left, top, left + short, top + short))
    return image if short == side else image.resize((side, side), Image.Resampling.BICUBIC)


def decode(file: Path, side: int) -> np.ndarray:
    """One image as RGB, uint8 [side, side, 3]: the central square, resized.

    Raises DataError, naming the file, if it cannot be decoded, is cut short, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{file} has {width} x {height} px, more than {MAX_PIXELS:,}: scale it down")
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
            return np.asarray(_square(to_rgb(image), side))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file} is too large to be decoded safely ({error}): scale it down") from error
    except DECODE_ERRORS as error:
        raise DataError(f"{file} cannot be decoded ({error}): it is damaged or not an image; replace it") from error


def _threads(files: Sequence[Path]) -> int:
    """How many threads decode `files`: one a core, but a single one for small files."""
    sample = files[:: max(1, len(files) // 16)]
    # A link to nowhere has no size; its decoding says so.
    mean_size = sum(os.path.getsize(file) for file in sample if os.path.isfile(file)) / len(sample)
    # Of a 32 x 32 JPEG's time little is spent in the decoder, outside the interpreter's lock; threads would lose by it.
    return 1 if mean_size < SMALL_FILE else min(32, os.cpu_count() or 1)


def decode_all(files: Sequence[Path], side: int) -> Tensor:
    """All `files` as one uint8 tensor [len(files), 3, side, side], decoded by a pool of threads; see `decode`."""
    if not files:
        return torch.empty(0, 3, side, side, dtype=torch.uint8)
    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    target = images.numpy()

    def fill(start: int) -> None:
        for position, file in enumerate(files[start : start + CHUNK], start):
            target[position] = decode(file, side).transpose(2, 0, 1)

    pool = ThreadPoolExecutor(_threads(files))
    try:
        for _ in pool.map(fill, range(0, len(files), CHUNK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images
