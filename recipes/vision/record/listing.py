"""The listing of a run's pictures, on disk and in memory, and what changed since it was written."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from bilevel.checkpoint import write_atomic

from ..errors import DataError
from ..imagesets import ImageSet
from ..pipeline.work import DIGEST, digest
from .contents import Contents, Digests

FORMAT = 1
META = "meta"
PRETEXT = "pretext"
"""The set without labels, of a run that has one."""
SETS = (PRETEXT, "train", "val", "test")
LABELLED = SETS[1:]
DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile)
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Listing:
    """One set of pictures as it was when it was listed.

    Attributes:
        count: how many.
        whole: one digest of all of them, where they come from no image files; else None.
        names, ends: uint8 and int64 [N], the files' names one behind the other and where each ends.
        sizes, mtimes: int64 [N], bytes, and times of modification (ns).
        digests, known: uint8 [N, `DIGEST`] and bool [N], of the files' contents, and which are known.
        labels: uint8 [N, `DIGEST`], digests of each one's label; None without labels.
    """

    count: int
    whole: bytes | None
    names: Digests
    ends: Ints
    sizes: Ints
    mtimes: Ints
    digests: Digests
    known: np.ndarray[Any, np.dtype[np.bool_]]
    labels: Digests | None

    @classmethod
    def of(cls, images: ImageSet, contents: Contents) -> Listing:
        """That of a set as it is now; digests that are added to `contents` later are in it."""
        encoded, labels = contents.encoded, label_digests(images)
        none = np.zeros(0, dtype=np.int64)
        if encoded is None:
            empty = np.zeros((0, DIGEST), dtype=np.uint8)
            whole = digest(contents.whole() + (b"" if labels is None else labels.tobytes()))
            return cls(len(images), whole, empty[:, 0], none, none, none, empty, np.zeros(0, dtype=bool), None)
        names, ends = bytearray(), np.zeros(len(encoded), dtype=np.int64)
        for position in range(len(encoded)):
            names += os.fsencode(encoded.file_name(position))
            ends[position] = len(names)
        return cls(
            *(len(images), None, np.frombuffer(bytes(names), dtype=np.uint8), ends),
            *(encoded.file_sizes, encoded.mtimes, contents.digests, contents.known, labels),
        )

    def name(self, position: int) -> str:
        """The name of one file."""
        start = int(self.ends[position - 1]) if position else 0
        return os.fsdecode(self.names[start : int(self.ends[position])].tobytes())

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """What is saved of it."""
        fields = ("names", "ends", "sizes", "mtimes", "digests", "known")
        found = {name: getattr(self, name) for name in fields}
        found["count"] = np.asarray(self.count)
        found["whole"] = np.frombuffer(self.whole or b"", dtype=np.uint8)
        if self.labels is not None:
            found["labels"] = self.labels
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Listing:
        """Inverse of `arrays`. Raises KeyError or ValueError on anything else."""
        fields = {name: arrays[name] for name in ("names", "ends", "sizes", "mtimes", "digests", "known")}
        count = int(arrays["count"])
        whole = arrays["whole"].tobytes() or None
        lengths = {len(fields[name]) for name in ("ends", "sizes", "mtimes", "digests", "known")}
        if lengths != {0 if whole else count}:
            raise ValueError(f"{lengths} rows instead of {count}")
        return cls(count, whole, labels=arrays.get("labels"), **fields)


def label_digests(images: ImageSet) -> Digests | None:
    """By name for single labels, so that a class that is added or renamed does not relabel the others."""
    if images.labels is None:
        return None
    if images.kind == "single-label":
        of_class = [digest(name.encode("utf-8", "surrogateescape")) for name in images.classes]
        table = np.frombuffer(b"".join(of_class), dtype=np.uint8).reshape(-1, DIGEST)
        return table[images.labels.numpy()]
    classes = json.dumps(images.classes).encode()
    rows = [digest(classes + row.numpy().tobytes()) for row in images.labels.cpu().contiguous()]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, DIGEST)


@final
@dataclass(frozen=True, eq=False)
class Record:
    """What a run's folder says about its pictures.

    Attributes:
        listings: of the run's sets, by their names.
        versions: of torch and torchvision, for one pair of which views are the same to the bit.
    """

    listings: dict[str, Listing]
    versions: dict[str, str]

    @classmethod
    def of(cls, sets: Mapping[str, ImageSet], contents: Mapping[str, Contents]) -> Record:
        """That of a run's sets as they are now."""
        return cls({part: Listing.of(images, contents[part]) for part, images in sets.items()}, versions_now())

    def save(self, path: Path) -> None:
        """Write it; the file is the old or the new one at any time."""
        meta = json.dumps({"format": FORMAT, "versions": self.versions}).encode()
        arrays: dict[str, Any] = {META: np.frombuffer(meta, dtype=np.uint8)}
        for part, listing in self.listings.items():
            arrays |= {f"{part}-{name}": array for name, array in listing.arrays().items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, sets: Sequence[str] = SETS) -> Record | None:
        """The one of a run with these sets in a file; None where there is no file.

        Raises:
            DataError: it is damaged.
        """
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                meta = json.loads(arrays[META].tobytes())
                if meta["format"] != FORMAT:
                    raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
                found: dict[str, dict[str, Any]] = {part: {} for part in sets}
                for name in arrays.files:
                    part, _, field = name.partition("-")
                    if field:
                        found[part][field] = arrays[name]
            return cls({part: Listing.from_arrays(arrays) for part, arrays in found.items()}, dict(meta["versions"]))
        except DAMAGED as error:
            raise DataError(
                f"{path} cannot be read ({error}), so that nobody can tell whether the images are still those of this "
                "run; restore the file, or start the run anew with --overwrite"
            ) from error

    def recall(self, now: Record, contents: Mapping[str, Contents]) -> None:
        """Give `contents` the digests of files whose name, size and time are `now` what they are here.

        The others of the same size whose digest is recorded are hashed anew.

        Raises:
            DataError: a file cannot be read.
        """
        for part, old in self.listings.items():
            own, new = contents[part], now.listings[part]
            if new.whole is not None or old.whole is not None:
                continue
            here, there = _matched(new, old)
            recorded = old.known[there]
            here, there = here[recorded], there[recorded]
            same = (new.sizes[here] == old.sizes[there]) & (new.mtimes[here] == old.mtimes[there])
            # Those of unknown size lie elsewhere than the file whose time is known.
            same &= new.sizes[here] >= 0
            own.add(here[same].tolist(), [row.tobytes() for row in old.digests[there[same]]])
            own.look(here[~same & (new.sizes[here] == old.sizes[there])].tolist())


def versions_now() -> dict[str, str]:
    """Those of torch and torchvision."""
    return {"torch": str(torch.__version__), "torchvision": version("torchvision")}


def _matched(new: Listing, old: Listing) -> tuple[Ints, Ints]:
    """Positions in both of files of one name."""
    if np.array_equal(new.ends, old.ends) and np.array_equal(new.names, old.names):
        both = np.arange(new.count)
        return both, both
    places = {old.name(position): position for position in range(old.count)}
    pairs = [(at, places[name]) for at in range(new.count) if (name := new.name(at)) in places]
    here, there = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    return here, there


def changes(old: Record, new: Record, shown: Callable[[list[str]], str]) -> list[str]:
    """What is other in the `new` record than in the `old` one, in lines; none where a run may go on.

    Names, sizes and, where both are known, contents count, and labels; neither times of modification nor the place of
    the source do, nor the size of a pretext file that has not been read yet, such as a damaged one. `shown` makes a few
    words of a list of names.
    """
    lines = []
    if PRETEXT in new.listings:
        lines = _changed({"": old.listings[PRETEXT]}, {"": new.listings[PRETEXT]}, PRETEXT, shown)
    before, now = ({part: one for part, one in record.listings.items() if part != PRETEXT} for record in (old, new))
    return lines + _changed(before, now, "labelled", shown)


@dataclass(frozen=True)
class _Row:
    """One file of a listing."""

    part: str
    listing: Listing
    position: int

    @property
    def is_unread(self) -> bool:
        """Whether it is a pretext file that nothing has been learnt from yet, which may be replaced."""
        return self.listing.labels is None and not self.listing.known[self.position]

    def differs(self, other: _Row) -> str | None:
        """In what; None for nothing."""
        mine, theirs = (self.listing, self.position), (other.listing, other.position)
        if self.listing.sizes[self.position] != other.listing.sizes[other.position] and not self.is_unread:
            return "of another size"
        if all(listing.known[at] for listing, at in (mine, theirs)) and not np.array_equal(
            *(listing.digests[at] for listing, at in (mine, theirs))
        ):
            return "of another content"
        labels = [None if listing.labels is None else listing.labels[at] for listing, at in (mine, theirs)]
        if (labels[0] is None) != (labels[1] is None) or (labels[0] is not None and not np.array_equal(*labels)):  # type: ignore[arg-type]
            return "with another label"
        return f"in another set ({self.part} before, {other.part} now)" if self.part != other.part else None


def _changed(
    old: Mapping[str, Listing], new: Mapping[str, Listing], what: str, shown: Callable[[list[str]], str]
) -> list[str]:
    if all(_same(old[part], new[part]) for part in old):
        return []
    if any(listing.whole is not None for listing in (*old.values(), *new.values())):
        wrong = [part or what for part in old if not _same(old[part], new[part])]
        told = ", ".join(f"{old[part].count:,} before and {new[part].count:,} now" for part in old if part in new)
        return [f"{what}: other pixels, labels or numbers of images ({', '.join(wrong)}; {told})"]
    before, now = _rows(old), _rows(new)
    found: dict[str, list[str]] = {}
    for name in before.keys() | now.keys():
        if name not in now or name not in before:
            kind: str | None = "removed" if name in before else "added"
        else:
            kind = before[name].differs(now[name])
        if kind is not None:
            found.setdefault(kind, []).append(name)
    if not found and list(before) != list(now):
        return [f"{what}: the same files in another order"]
    return [f"{what}: {len(names):,} {kind} ({shown(sorted(names))})" for kind, names in sorted(found.items())]


def _same(old: Listing, new: Listing) -> bool:
    """Whether nothing changed, seen at once."""
    if old.whole is not None or new.whole is not None:
        return old.whole == new.whole and old.count == new.count
    if not (np.array_equal(old.ends, new.ends) and np.array_equal(old.names, new.names)):
        return False
    if not np.array_equal(old.sizes, new.sizes):
        return False
    both = old.known & new.known
    if not np.array_equal(old.digests[both], new.digests[both]):
        return False
    return (old.labels is None) == (new.labels is None) and (
        old.labels is None or new.labels is None or np.array_equal(old.labels, new.labels)
    )


def _rows(listings: Mapping[str, Listing]) -> dict[str, _Row]:
    """All files by name; where two sets have files of one name, with the set's."""
    rows = [_Row(part, listing, at) for part, listing in listings.items() for at in range(listing.count)]
    named = {row.listing.name(row.position): row for row in rows}
    if len(named) == len(rows):
        return named
    return {f"{row.part}: {row.listing.name(row.position)}": row for row in rows}
