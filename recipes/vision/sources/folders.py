"""Images in folders: class folders, split folders, or any without labels; finding the files."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .file_table import FileScan, FileTable, entries, is_folder

# Those of torchvision's ImageFolder, and two more names of JPEG.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
BESIDE = "pictures beside class folders"
PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# A class folder may keep its pictures in one folder of such a name.
CONTAINERS = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "frames", "jpg", "jpeg", "png"})
REASONS = 6


@dataclass(frozen=True, eq=False)
class FolderListing:
    """The N image files of a folder in a fixed order.

    `labels`: int64 [N], positions in `classes`, or None for unlabelled images. `parts`: positions (int64) in `files` of
    "train", and also of "val" and "test" where the folder has them; of "unlabelled" alone for unlabelled images.
    `passed_over`: how many files were not taken, by reason in words.
    """

    files: FileTable
    classes: tuple[str, ...]
    labels: Tensor | None
    parts: dict[str, Tensor]
    passed_over: Counter[str]


def part_of(name: str) -> str | None:
    """The part ("train", "val" or "test") that a folder or a word of this name means, in any case; None for another."""
    return next((part for part, names in PART_NAMES.items() if name.casefold() in names), None)


def passed_over_words(passed_over: Counter[str]) -> str:
    """Such as "passed over 12 files (.gif 7, no suffix 3, pictures beside class folders 2)"; "" for none."""
    count = passed_over.total()
    if not count:
        return ""
    reasons = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{reason} {number:,}" for reason, number in reasons[:REASONS]]
    if len(reasons) > REASONS:
        told.append(f"others {sum(number for _, number in reasons[REASONS:]):,}")
    return f"passed over {count:,} file{'s' if count > 1 else ''} ({', '.join(told)})"


def _because(passed_over: Counter[str]) -> str:
    """The end of a sentence about missing images."""
    words = passed_over_words(passed_over)
    return f"; {words}" if words else ""


def _subfolders(folder: Path) -> list[str]:
    """The names of the folders directly inside, sorted; hidden ones do not count."""
    return sorted(entry.name for entry in entries(folder) if not entry.name.startswith(".") and is_folder(entry))


def _split_folders(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Part -> its folder, where the folders `names` in `folder` are parts of a set; none where they are classes.

    Raises DataError on another folder beside them, which would otherwise be passed over, and on two for one part.
    """
    meant = {name: part_of(name) for name in names}
    trains = [name for name, part in meant.items() if part == "train"]
    # A class may be called "train"; then it holds images and neither val/ nor test/ stands beside it.
    if not trains or not ({"val", "test"} & set(meant.values()) or any(_subfolders(folder / name) for name in trains)):
        return {}
    found: dict[str, str] = {}
    for name, part in meant.items():
        if part is None:
            raise DataError(f"{folder / name} is neither train, val nor test: rename it or move it elsewhere")
        if part in found:
            raise DataError(f"{folder / found[part]} and {folder / name} both mean the {part} part: keep one of them")
        found[part] = name
    return {part: found[part] for part in PART_NAMES if part in found}


@dataclass(frozen=True)
class _Inside:
    """What one folder holds: the first folder inside that does not just hold another one, and the folders in that."""

    first: str
    children: dict[str, str]
    pictures: bool

    @classmethod
    def of(cls, directories: set[str]) -> _Inside:
        """From the relative paths of all folders inside that directly hold images ("" for the folder itself)."""
        first = os.path.commonpath(directories)
        names = {path[len(first) :].lstrip(os.sep).split(os.sep)[0] for path in directories} - {""}
        return cls(first, {name.casefold(): name for name in sorted(names)}, first in directories)


def _insides(files: FileTable) -> dict[str, _Inside]:
    """What each folder directly below the root holds."""
    directories: defaultdict[str, set[str]] = defaultdict(set)
    for position in range(len(files)):
        top, _, rest = files.relative(position).partition(os.sep)
        directories[top].add(rest.rpartition(os.sep)[0])
    return {top: _Inside.of(paths) for top, paths in directories.items()}


def _same_subfolders(insides: dict[str, _Inside]) -> tuple[list[str], list[str]]:
    """Class folders that could as well be the parts of one set, and the folders that they share; or two empty lists."""
    largest = max(insides.values(), key=lambda inside: len(inside.children))
    # A part may lack a class of another one, and there may be a folder of unlabelled images beside the parts.
    tops = [top for top, i in insides.items() if len(i.children) > 1 and i.children.keys() <= largest.children.keys()]
    if len(tops) > 1 and 2 * len(tops) >= len(insides) and not all(insides[top].pictures for top in tops):
        return tops, [name for key, name in largest.children.items() if all(key in insides[t].children for t in tops)]
    names = {inside.first.casefold() for inside in insides.values()}
    name = names.pop()
    if len(insides) > 1 and name and not names and not largest.children and os.path.basename(name) not in CONTAINERS:
        return list(insides), [largest.first]
    return [], []


def _check_classes(folder: Path, files: FileTable) -> None:
    """Raise DataError if there is a single class folder, or if the class folders look like parts by other names."""
    insides = _insides(files)
    if len(insides) == 1:
        name, inside = next(iter(insides.items()))
        deeper = folder / name / inside.first
        remedy = "add a folder with the images of another class"
        if len(inside.children) > 1:
            held = _some(list(inside.children.values()))
            remedy = f"{deeper} holds several folders with images ({held}): if these are meant, give folder:{deeper}"
        raise DataError(f"{_single(folder, name)}; {remedy}")
    tops, shared = _same_subfolders(insides)
    if tops:
        raise DataError(
            f"the folders {_some(tops)} in {folder} hold the same subfolders ({_some(shared)}), as the parts of a set "
            "do: rename them to train, val and test; if they are the classes, list the images in a labels.csv there"
        )


def _single(folder: Path, name: str) -> str:
    return f"{folder} has a single class folder, {name}, and one class leaves nothing to tell apart"


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _add_classes(scan: FileScan, folder: Path, part: str, names: Sequence[str]) -> dict[str, int]:
    """Add the images of the class folders `names` below `part` ("" for the root): class -> how many.

    Raises DataError if there is no class folder or an empty one.
    """
    if not names:
        raise DataError(
            f"{folder / part} has no class folder: put the images of each class into a folder of its own there"
            f"{_because(scan.passed_over)}"
        )
    counts = {}
    for name in names:
        before = scan.passed_over.copy()
        counts[name] = scan.add_below(os.path.join(part, name))
        if not counts[name]:
            raise DataError(
                f"{folder / part / name} holds no image ({', '.join(sorted(SUFFIXES))}): "
                f"add images or remove the folder{_because(scan.passed_over - before)}"
            )
    return counts


def _check_there(folder: Path) -> None:
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder}: give the path of a folder that holds images")


def list_folder(folder: Path) -> FolderListing:
    """The images below `folder` with labels: class folders, or a train folder and val and test ones with class folders.

    Split folders go by the names in `PART_NAMES`, in any case. Raises DataError if the folder is missing, has fewer
    than two class folders or an empty one, if val or test has a class that train lacks, if another folder or a second
    one of the same meaning stands beside split folders, and if the folders look like parts under other names.
    """
    _check_there(folder)
    scan = FileScan(folder, SUFFIXES)
    names = scan.folders_in("", BESIDE)
    folders = _split_folders(folder, names)
    classes: dict[str, int] = {}
    labels: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for part, top in (folders or {"train": ""}).items():
        start = len(scan)
        counts = _add_classes(scan, folder, top, scan.folders_in(top, BESIDE) if top else names)
        if part == "train":
            classes = {name: position for position, name in enumerate(counts)}
        for name, count in counts.items():
            if name not in classes:
                raise DataError(f"{folder / top / name} is a class that {folder / folders['train']} does not have")
            labels.append(torch.full((count,), classes[name]))
        parts[part] = torch.arange(start, len(scan))
    files = scan.table()
    if not folders:
        _check_classes(folder, files)
    elif len(classes) == 1:
        said = _single(folder / folders["train"], next(iter(classes)))
        raise DataError(f"{said}; add a folder with the images of another class")
    return FolderListing(files, tuple(classes), torch.cat(labels), parts, scan.passed_over)


def list_images(folder: Path) -> FolderListing:
    """The images at any depth below `folder`, without labels, whatever its folders stand for.

    Raises DataError if the folder is missing or holds no image.
    """
    _check_there(folder)
    scan = FileScan(folder, SUFFIXES)
    if not scan.add_below():
        raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}){_because(scan.passed_over)}")
    return FolderListing(scan.table(), (), None, {"unlabelled": torch.arange(len(scan))}, scan.passed_over)
