"""Files below one folder as a few arrays: a million of them take less than a hundred megabytes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from ..errors import DataError

HIDDEN, NO_SUFFIX, DANGLING, NO_FILE = "hidden", "no suffix", "links to nowhere", "not a file"
# What stands behind the last dot of "Mr. Smith" or "frame.0001" is no kind of file.
SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]{0,9}")


class FileTable:
    """N files below the folder `root`, in a fixed order: relative paths, sizes and times of modification.

    Paths are slices of one string of bytes, encoded as by `os.fsencode`; a choice of the files shares that string.
    """

    def __init__(
        self, root: str, names: bytes, starts: np.ndarray, lengths: np.ndarray, facts: np.ndarray | None
    ) -> None:
        """`names[starts[i] : starts[i] + lengths[i]]` is file i; `facts`: int64 [N, 2], or None to look when asked."""
        self.root = root
        self._names, self._starts, self._lengths, self._facts = names, starts, lengths, facts

    @classmethod
    def of(cls, root: str | Path, relative: Iterable[str]) -> FileTable:
        """The files at these paths below `root`, in this order. Sizes and times are looked up when asked for."""
        names, ends = bytearray(), array("q", [0])
        for name in relative:
            names += os.fsencode(name)
            ends.append(len(names))
        bounds = np.asarray(ends)
        return cls(os.fspath(root), bytes(names), bounds[:-1], np.diff(bounds).astype(np.int32), None)

    def __len__(self) -> int:
        return len(self._starts)

    def relative(self, position: int) -> str:
        """The path of one file below `root`."""
        start = self._starts[position]
        return os.fsdecode(self._names[start : start + self._lengths[position]])

    def path(self, position: int) -> str:
        """The path of one file, `root` included."""
        return os.path.join(self.root, self.relative(position))

    def select(self, positions: Tensor | np.ndarray) -> FileTable:
        """The files at `positions` (integers), in that order; their paths are not copied."""
        chosen = np.asarray(positions, dtype=np.int64)
        facts = None if self._facts is None else self._facts[chosen]
        return FileTable(self.root, self._names, self._starts[chosen], self._lengths[chosen], facts)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N], bytes. Raises DataError if a file that was not looked at before is missing."""
        return self._known()[:, 0]

    @property
    def mtimes(self) -> np.ndarray:
        """int64 [N], the times of the last modification in nanoseconds. Raises DataError as `sizes` does."""
        return self._known()[:, 1]

    def fingerprint(self) -> str:
        """SHA-256 of the root, and of each file's relative path, size and time of modification, in this order.

        Raises DataError if a file that was not looked at before is missing.
        """
        content = hashlib.sha256(os.fsencode(os.path.realpath(self.root)))
        for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True):
            # No path holds this byte.
            content.update(self._names[start : start + length] + b"\0")
        content.update(np.ascontiguousarray(self._known()).tobytes())
        return content.hexdigest()

    def _known(self) -> np.ndarray:
        if self._facts is None:
            facts = array("q")
            for position in range(len(self)):
                path = self.path(position)
                try:
                    found = os.stat(path)
                except OSError as error:
                    raise DataError(f"{path} cannot be read ({error.strerror}): it must be a file") from error
                facts.extend((found.st_size, found.st_mtime_ns))
            self._facts = np.asarray(facts).reshape(-1, 2)
        return self._facts


class FileScan:
    """Finds the files below folders of `root` whose names end in one of `suffixes` (small letters, with the dot).

    `passed_over` counts the others: by their suffix or "no suffix", hidden entries, links to nowhere, and what is no
    file. Links are followed.
    """

    def __init__(self, root: str | Path, suffixes: Collection[str]) -> None:
        self.root = os.fspath(root)
        self.passed_over: Counter[str] = Counter()
        self._suffixes = frozenset(suffixes)
        self._names, self._ends, self._facts = bytearray(), array("q", [0]), array("q")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, relative: str, found: os.stat_result) -> None:
        """One more file, whatever its name."""
        self._names += os.fsencode(relative)
        self._ends.append(len(self._names))
        self._facts.extend((found.st_size, found.st_mtime_ns))

    def add_below(self, folder: str = "") -> int:
        """Add the files at any depth below the folder `folder` of the root, in the order of sorted paths; how many.

        Raises DataError on a folder that cannot be listed, on a link to a folder that it lies in (followed, it would
        list the same files again and again, in training and test sets alike) and on a file that links to nowhere.
        """
        before = len(self)
        around = [os.path.realpath(self.root)]
        # (relative path with a slash, names left in falling order, which of them are folders)
        stack: list[tuple[str, list[str], frozenset[str]]] = []
        self._enter(folder, around, stack)
        while stack:
            prefix, names, folders = stack[-1]
            if not names:
                stack.pop()
                around.pop()
                continue
            name = names.pop()
            if name in folders:
                self._enter(prefix + name, around, stack)
            else:
                self._look(prefix + name)
        return len(self) - before

    def table(self) -> FileTable:
        """What was found, in the order in which it was added."""
        ends = np.asarray(self._ends)
        facts = np.asarray(self._facts).reshape(-1, 2)
        return FileTable(self.root, bytes(self._names), ends[:-1], np.diff(ends).astype(np.int32), facts)

    def folders_in(self, folder: str, beside: str) -> list[str]:
        """The folders directly in `folder`, sorted; what lies beside them is counted, files by the reason `beside`."""
        names = []
        for entry in entries(os.path.join(self.root, folder)):
            role = self._role(entry)
            if role == "folder":
                names.append(entry.name)
            elif role == "file":
                self.passed_over[beside] += 1
        return sorted(names)

    def _role(self, entry: os.DirEntry[str]) -> Literal["folder", "file"] | None:
        """What an entry is; None, and counted, if it is passed over."""
        name = entry.name
        if name.startswith("."):
            reason = HIDDEN
        elif is_folder(entry):
            return "folder"
        elif os.path.splitext(name)[1].lower() in self._suffixes:
            return "file"
        elif entry.is_symlink() and not os.path.exists(entry.path):
            reason = DANGLING
        else:
            suffix = os.path.splitext(name)[1].lower()
            reason = suffix if SUFFIX.fullmatch(suffix) else NO_SUFFIX
        self.passed_over[reason] += 1
        return None

    def _enter(self, folder: str, around: list[str], stack: list[tuple[str, list[str], frozenset[str]]]) -> None:
        """Put a folder's entries on the stack."""
        path = os.path.join(self.root, folder) if folder else self.root
        link = bool(folder) and os.path.islink(path)
        real = os.path.join(around[-1], os.path.basename(folder)) if stack and not link else os.path.realpath(path)
        if link and any(f"{outer}{os.sep}".startswith(f"{real}{os.sep}") for outer in around):
            raise DataError(f"{path} links to a folder that it lies in: remove the link")
        names, folders = [], []
        for entry in entries(path):
            role = self._role(entry)
            if role is not None:
                names.append(entry.name)
            if role == "folder":
                folders.append(entry.name)
        names.sort(reverse=True)
        around.append(real)
        stack.append((f"{folder}{os.sep}" if folder else "", names, frozenset(folders)))

    def _look(self, relative: str) -> None:
        path = os.path.join(self.root, relative)
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): restore the file or remove it") from error
        if stat.S_ISREG(found.st_mode):
            self.add(relative, found)
        else:
            self.passed_over[NO_FILE] += 1


def entries(folder: str | Path) -> Iterable[os.DirEntry[str]]:
    """A folder's entries in no order. Raises DataError if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            yield from found
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}): make it readable or move it") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is not. Raises DataError where none can tell."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise DataError(f"{entry.path} cannot be read ({error.strerror}): make it readable or move it") from error
