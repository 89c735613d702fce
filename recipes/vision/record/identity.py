"""Which pictures a run reads: the digests that stand for them, and the record that its folder keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np

from bilevel.distributed import on_first_rank, rank

from ..errors import DataError
from ..imagesets import ImageSet
from ..pipeline.work import DIGEST
from .contents import Contents, names_digest
from .copies import copies_between
from .listing import PRETEXT, SETS, Record, changes, label_digests

SHOWN = 5


def _quiet(line: str) -> None:
    """Says nothing."""


@final
class Identity:
    """The sets of a run, told from any others.

    Args:
        images: gives a set by its name; each is asked for when it is needed.
        sets: their names; all but "pretext" have labels.
    """

    def __init__(self, images: Callable[[str], ImageSet], sets: Sequence[str] = SETS) -> None:
        self._images, self._sets = images, tuple(sets)
        self._labelled = tuple(part for part in sets if part != PRETEXT)
        self._contents: dict[str, Contents] = {}
        self._digests: dict[str, str] = {}
        self._record: Record | None = None
        self._path: Path | None = None

    def contents(self, part: str) -> Contents:
        """What is known of the contents of one set."""
        if part not in self._contents:
            self._contents[part] = Contents(self._images(part).images)
        return self._contents[part]

    @property
    def pretext(self) -> str:
        """A digest of the pretext set: of names and sizes in their order or, without files, of pixels."""
        if "pretext" not in self._digests:
            contents = self._completed("pretext", files=False)
            self._digests["pretext"] = on_first_rank(lambda: names_digest(contents).hex())
        return self._digests["pretext"]

    @property
    def labelled(self) -> str:
        """A digest of the labelled sets: of names, contents and labels, in their order."""
        if "labelled" not in self._digests:
            hashed = hashlib.sha256()
            for part in self._labelled:
                contents, labels = self._completed(part), label_digests(self._images(part))
                assert labels is not None, "labelled sets have labels"
                hashed.update(names_digest(contents) + contents.whole() + labels.tobytes())
            self._digests["labelled"] = on_first_rank(lambda: hashed.digest()[:DIGEST].hex())
        return self._digests["labelled"]

    def complete(self, say: Callable[[str], None]) -> None:
        """Hash what is not hashed while it is read for training: labelled images, and those in memory.

        Raises:
            DataError: a picture cannot be read.
        """
        for part in self._sets:
            self._completed(part, say)

    def copies(self) -> dict[str, int]:
        """Copies within the labelled sets, by the names of two sets; see `copies_between`."""
        return copies_between({part: self._completed(part) for part in self._labelled})

    def check(self, path: Path | None, say: Callable[[str], None]) -> None:
        """Compare the sets with a record; nothing is written. Rank 0 does so for all.

        Args:
            path: of the record; None: there is none to compare with.
            say: is told a line about what is no error.

        Raises:
            DataError: images or labels changed, in which way, or the record is damaged.
        """
        for part in self._sets:
            self._completed(part, say, files=False)
        self._record = now = Record.of({part: self._images(part) for part in self._sets}, self._contents)
        before = None if path is None or rank() > 0 else Record.load(path, self._sets)
        if path is not None and before is None and rank() == 0:
            say(f"{path} is missing: whether images have changed since the run was started cannot be told")
        if before is not None:
            before.recall(now, self._contents)
        self.complete(say)
        if before is None:
            return
        lines = changes(before, now, _some)
        if lines:
            raise DataError(
                f"the images of this run changed since it was started ({path}):\n  "
                + "\n  ".join(lines)
                + "\nPut them back as they were, or start a run anew: with --overwrite, or in another folder"
            )
        if PRETEXT in self._sets and not np.array_equal(before.listings[PRETEXT].sizes, now.listings[PRETEXT].sizes):
            say("pretext images that had not been read were replaced: stages that read them begin anew")
        if before.versions != now.versions:
            then, here = (" and ".join(f"{name} {v}" for name, v in r.versions.items()) for r in (before, now))
            say(f"this run was started with {then}; with {here}, views may differ from then on in their last bits")

    def keep(self, path: Path) -> None:
        """Write the record there, and from now on where `update` is called. Rank 0 does so for all.

        Raises:
            OSError: it cannot be written.
        """
        if self._record is None:
            self.check(None, _quiet)
        self._path = path
        self._save()

    def update(self) -> None:
        """Write the record anew where contents have become known."""
        if self._path is not None and any(contents.changed for contents in self._contents.values()):
            self._save()

    def _save(self) -> None:
        assert self._record is not None, "made by `keep`"
        assert self._path is not None, "set by `keep`"
        for contents in self._contents.values():
            contents.changed = False
        if rank() == 0:
            self._record.save(self._path)

    def _completed(self, part: str, say: Callable[[str], None] = _quiet, *, files: bool = True) -> Contents:
        """Contents that are hashed; those of files where asked, and never of pretext files that are streamed."""
        contents = self.contents(part)
        streamed = part == "pretext" and contents.on_first_read
        if (contents.encoded is None or (files and not streamed)) and not self._known(contents):
            contents.complete(say, f"{part} images")
        return contents

    @staticmethod
    def _known(contents: Contents) -> bool:
        """Whether all of it is known on rank 0: ranks must not part ways here."""
        return bool(on_first_rank(lambda: bool(contents.known.all())))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
