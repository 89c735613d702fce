"""Decoded pictures kept on a disk, so that every epoch after the first is spared the decoding."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.interruption import Interrupted, installed

from ...experiment.folder.folder_lease import DURATION
from ...experiment.folder.leases import Leases
from ..errors import DataError
from ..pictures.base import Images, Item
from ..pictures.decoding import decoders
from ..pictures.mapped import CHECK, MappedImages, PixelFile, remedy
from ..views.crops import Size, resized
from .reduction import View, kept_size, needs
from .workers import available_cores

FORMAT = 1
PIXELS, ROWS, FACTS = "pixels.bin", "rows.npy", "facts.json"
SAMPLE = 64
"""Pictures that are decoded to tell the size of all."""
SPARE = 2**28
"""Bytes that are left free on the disk."""
POLL = 0.5


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class PictureCache:
    """Decoded pictures of image sets, in folders of `folder`, one for each set.

    Its name is a hash of the set's fingerprint (paths, sizes and times of its files), of what its views need, and of
    the decoders' versions and rules. A folder appears whole or not at all; of several processes that want it one makes
    it, and the others wait. A picture is kept at the size that `kept_size` gives.

    Args:
        folder: made where missing; on a disk that all processes of this machine see.
        say: told, before anything is written, how much it will be.
    """

    folder: Path
    say: Callable[[str], None] = _say

    def kept(self, images: Images, views: Sequence[View], name: str) -> Images:
        """The pictures as they are kept, decoded now unless they are there; those in memory and unknown ones as given.

        Args:
            views: all that will be made of them.
            name: of the set, for messages.

        Raises:
            DataError: a picture cannot be read, what is kept is damaged, the disk is too small, or `folder` lies in the
                set's own folder.
            Interrupted: the run was asked to stop meanwhile.
        """
        kept = self._place(images, views)
        if kept is None:
            return images
        try:
            self._make(kept, images, views, name)
        except OSError as error:
            cause = error.strerror or error
            raise DataError(f"data.cache: {kept} cannot be written ({cause}); name another folder") from error
        return replace(read_pictures(kept), read_from=images)

    def plan(self, images: Images, views: Sequence[View], name: str) -> str | None:
        """What `kept` would write, in words; None for nothing, since it is there or nothing is kept of such pictures.

        Raises:
            DataError: as `kept`.
        """
        kept = self._place(images, views)
        if kept is None or kept.exists():
            return None
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        size, free = self.size(images, views), shutil.disk_usage(there).free
        nearly = "about " if len(images) > SAMPLE else ""
        about = f"{len(images):,} decoded pictures of {name} take {nearly}{_told(size)}"
        if size + SPARE > free:
            raise DataError(f"data.cache: {about}, but {self.folder} has {_told(free)} free; name a larger disk")
        return f"{about} in {kept} ({_told(free)} free)"

    def size(self, images: Images, views: Sequence[View]) -> int:
        """Bytes that the pictures will take, from a sample of them."""
        chosen = torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).long().tolist()
        sizes = [3 * int(np.prod(kept_size(_size(item.picture()), views))) for item in images.items(chosen)]
        return round(sum(sizes) / len(sizes) * len(images))

    def _place(self, images: Images, views: Sequence[View]) -> Path | None:
        """The folder of these pictures; None where nothing is kept of such ones."""
        fingerprint = None if images.in_memory or not len(images) else images.fingerprint()
        if fingerprint is None:
            return None
        self._check_place(images)
        return self.folder / f"pictures-{_key(fingerprint, views)}"

    def _make(self, kept: Path, images: Images, views: Sequence[View], name: str) -> None:
        """See that the folder is there: by this process, or by another one, for which this one waits."""
        leases = None
        while not kept.exists():
            leases = Leases(self.folder, DURATION) if leases is None else leases
            lease = leases.take(kept.name)
            if lease is None:
                _check_stop()
                time.sleep(POLL)
                continue
            with lease.kept():
                if not kept.exists():
                    self._write(kept, images, views, name)

    def _check_place(self, images: Images) -> None:
        own = os.path.realpath(self.folder)
        for folder in images.folders():
            real = os.path.realpath(folder)
            if os.path.commonpath((own, real)) == real:
                raise DataError(f"data.cache: {self.folder} lies in the data folder {folder}; name another folder")

    def _write(self, kept: Path, images: Images, views: Sequence[View], name: str) -> None:
        for left in self.folder.glob(f".{kept.name}.*"):
            # Of a process that was killed: this one holds the lease.
            shutil.rmtree(left)
        self.say(f"data.cache: {self.plan(images, views, name)}; decoding them once")
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{kept.name}."))
        try:
            _write_pictures(temporary, images, views)
            temporary.chmod(0o755)
            temporary.rename(kept)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_pictures(kept: Path) -> MappedImages:
    """The pictures in a folder of a cache. Raises DataError, naming the file, where it is damaged or missing."""
    try:
        facts = json.loads((kept / FACTS).read_text(encoding="utf-8"))
        rows = np.load(kept / ROWS, allow_pickle=False)
        if hashlib.sha256(rows.tobytes()).hexdigest() != facts["rows"]:
            raise ValueError("its content is not what was written")
        count, size = len(rows), (kept / PIXELS).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{PIXELS} has {size} bytes instead of {facts['bytes']}")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"the cache {kept} is damaged ({error}): {remedy(str(kept / FACTS))}") from error
    PixelFile(str(kept / PIXELS))
    return MappedImages(str(kept / PIXELS), rows, np.arange(count))


def _key(fingerprint: str, views: Sequence[View]) -> str:
    content = [FORMAT, fingerprint, needs(views), {**decoders(), "torch": str(torch.__version__)}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write_pictures(folder: Path, images: Images, views: Sequence[View]) -> None:
    rows = np.zeros((len(images), CHECK + 1), dtype=np.int64)
    end = 0
    with (folder / PIXELS).open("wb") as file:
        for position, (picture, original) in enumerate(_decoded(images, views)):
            content = picture.permute(1, 2, 0).contiguous().numpy().tobytes()
            rows[position] = end, *picture.shape, *original, zlib.crc32(content)
            file.write(content)
            end += len(content)
        _synchronise(file)
    with (folder / ROWS).open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        _synchronise(file)
    facts = {"rows": hashlib.sha256(rows.tobytes()).hexdigest(), "bytes": end, **decoders()}
    with (folder / FACTS).open("wb") as file:
        file.write(json.dumps(facts).encode())
        _synchronise(file)


def _synchronise(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _decoded(images: Images, views: Sequence[View]) -> Iterator[tuple[Tensor, Size]]:
    """Every picture at the size at which it is kept, and its own size, by a few threads."""
    threads = available_cores()
    waiting = deque[Future[tuple[Tensor, Size]]]()
    pool = ThreadPoolExecutor(threads)
    try:
        for position in range(len(images)):
            waiting.append(pool.submit(_kept_picture, images.items([position])[0], views))
            if len(waiting) > 4 * threads:
                _check_stop()
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _kept_picture(item: Item, views: Sequence[View]) -> tuple[Tensor, Size]:
    picture = item.picture()
    original = _size(picture)
    return resized(picture.unsqueeze(0), *kept_size(original, views), "bicubic")[0], original


def _size(picture: Tensor) -> Size:
    return picture.shape[1], picture.shape[2]


def _check_stop() -> None:
    """Raise Interrupted once this process was asked to stop; other ranks are not asked, which may do something else."""
    handler = installed()
    if handler is not None and handler.asked_by is not None:
        raise Interrupted(signal.Signals(handler.asked_by))


def _told(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
