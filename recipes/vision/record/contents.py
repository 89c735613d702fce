"""What is known of the contents of pictures: a digest of each, looked at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bilevel.distributed import on_first_rank

from ..pictures.base import EncodedImages, EncodedItem, Images
from ..pictures.decoding import decode
from ..pipeline.work import DIGEST, digest

Digests = np.ndarray[Any, np.dtype[np.uint8]]
"""[N, `DIGEST`]."""

CHUNK = 64
THREADS = 32
LARGE = 2**30
"""Bytes whose hashing takes seconds, so that it is announced."""


@final
class Contents:
    """Digests of a set's pictures: of their files' bytes, or of pixels that lie in memory.

    A picture that a Dataset of the user's makes when it is read has that of its source and place.

    Attributes:
        images: the pictures, as they are read by the recipe.
        encoded: the image files that they are made from; None where there are none.
        digests: uint8 [N, `DIGEST`], zero where unknown.
        known: bool [N].
        changed: whether digests were added since `changed` was last set to False.
    """

    def __init__(self, images: Images) -> None:
        origin = images.origin
        self.images, self.encoded = images, origin if isinstance(origin, EncodedImages) else None
        self.digests: Digests = np.zeros((len(images), DIGEST), dtype=np.uint8)
        self.known = np.zeros(len(images), dtype=bool)
        self.changed = False

    def __len__(self) -> int:
        return len(self.known)

    @property
    def on_first_read(self) -> bool:
        """Whether digests come from whoever reads the files for training."""
        return self.encoded is not None and not self.images.in_memory

    def missing(self, positions: Tensor) -> Tensor:
        """Which of some pictures have no digest: bool [N]."""
        return torch.from_numpy(~self.known[positions.numpy()])

    def add(self, positions: Sequence[int] | Tensor, digests: Iterable[bytes]) -> None:
        """Note the digests of some pictures."""
        rows = list(digests)
        if rows:
            chosen = np.asarray(positions, dtype=np.int64)
            self.digests[chosen] = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, DIGEST)
            self.known[chosen] = True
            self.changed = True

    def look(self, positions: Sequence[int], *, decoded: bool = False) -> None:
        """Read and hash some pictures now, by a few threads.

        Args:
            decoded: also see that files that will be decoded when they are needed can be. Found then, a damaged one
                could not be replaced: it would be another one than the run's.

        Raises:
            DataError: one cannot be read.
        """
        for chunk, found in by_threads(partial(self._hashed, decoded=decoded), positions):
            self.add(chunk, found)

    def complete(self, say: Callable[[str], None], what: str) -> None:
        """Hash every picture whose digest is not known; rank 0 does so for all.

        Args:
            say: is told a line where that takes a while.
            what: the pictures in a few words, for that line.

        Raises:
            DataError: one cannot be read.
        """

        def make() -> Tensor:
            missing = np.flatnonzero(~self.known).tolist()
            if self.encoded is not None and missing:
                size = int(self.encoded.file_sizes[missing].clip(0).sum())
                if size >= LARGE:
                    say(f"hashing {len(missing):,} {what}, {size / 1e9:.1f} GB, so that a change of them is noticed")
            self.look(missing, decoded=True)
            return torch.from_numpy(self.digests)

        # In place: listings share them.
        self.digests[:] = on_first_rank(make).numpy()
        self.known[:] = True

    def whole(self) -> bytes:
        """One digest of all pictures in their order; every one must be known."""
        assert self.known.all(), "asked for after `complete`"
        return digest(self.digests.tobytes())

    def _hashed(self, positions: Sequence[int], decoded: bool) -> list[bytes]:
        if self.encoded is not None:
            return [self._digest(item, decoded) for item in self.encoded.items(positions)]
        return pixel_digests(self.images, positions)

    def _digest(self, item: EncodedItem, decoded: bool) -> bytes:
        content = item.content()
        if decoded and self.images is self.encoded:
            decode(content, item.name)
        return digest(content)


def pixel_digests(images: Images, positions: Sequence[int]) -> list[bytes]:
    """Digests of pictures in memory; of others, those of where they are read from."""
    items = images.items(positions)
    if not images.in_memory:
        return [digest(repr(item).encode()) for item in items]
    return [pixel_digest(item.picture()) for item in items]


def pixel_digest(picture: Tensor) -> bytes:
    """That of one picture's size and pixels."""
    return digest(repr(tuple(picture.shape)).encode() + picture.cpu().contiguous().numpy().tobytes())


def names_digest(contents: Contents) -> bytes:
    """One digest of the names and sizes of the pictures' files in their order; without files, of all contents."""
    encoded = contents.encoded
    if encoded is None:
        return contents.whole()
    hashed = hashlib.sha256()
    for position in range(len(encoded)):
        hashed.update(os.fsencode(encoded.file_name(position)) + b"\0")
    hashed.update(encoded.file_sizes.astype("<i8").tobytes())
    return hashed.digest()[:DIGEST]


def by_threads(
    function: Callable[[Sequence[int]], list[bytes]], positions: Sequence[int]
) -> Iterator[tuple[Sequence[int], list[bytes]]]:
    """What `function` gives for a few of `positions` at a time, with those, in their order; a few threads call it."""
    chunks = [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]
    pool = ThreadPoolExecutor(min(THREADS, 4 * (os.cpu_count() or 1)))
    try:
        yield from zip(chunks, pool.map(function, chunks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
