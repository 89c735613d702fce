"""Memory that pictures take once they are decoded, and memory that is there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from ..errors import DataError
from .base import EncodedImages, Images
from .decoding import DECODE_ERRORS

SAMPLE = 32
"""Pictures whose sizes are looked at for the mean of all."""

MARGIN = 1.2
"""Memory taken while pictures are read, as a multiple of what they take afterwards."""

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")


def decoded_bytes(images: Images) -> int | None:
    """What they take as uint8 pixels of three channels: exact in memory, else from the sizes of a few; None: unknown.

    Only the first bytes of files are decoded, for their sizes. A picture that cannot be read counts for nothing here.
    """
    if images.in_memory:
        return images.nbytes
    if not isinstance(images, EncodedImages) or not len(images):
        return None
    places = torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().to(torch.int64).tolist()
    sizes = [size for item in images.items(places) if (size := _pixels(item.content(), item.name)) is not None]
    return None if not sizes else round(3 * sum(sizes) / len(sizes) * len(images))


def _pixels(content: bytes, name: str) -> int | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        return None


def check_fits(images: Images, name: str) -> None:
    """Refuse to read pictures into memory that has no room for them.

    Raises:
        DataError: the decoded pictures take more than there is.
    """
    needed, there = decoded_bytes(images), available_memory()
    if needed is not None and there is not None and MARGIN * needed > there:
        raise DataError(
            f"{name}: {len(images):,} images take about {size_text(needed)} of memory once they are decoded, and "
            f"{size_text(there)} are there; set data.storage to stream, which reads them when they are needed"
        )


def available_memory() -> int | None:
    """Bytes that this process can still take: of the machine's, and of its control group's limits; None: unknown."""
    found = [value for value in (_of_the_machine(), *_of_control_groups()) if value is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _of_control_groups() -> Iterator[int | None]:
    """What is left in each group that this process is in, of version 2 or 1, up to the root of what is mounted."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, root = ("memory.max", "memory.current"), CGROUPS
        elif "memory" in controllers.split(","):
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), CGROUPS / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path may be that of the host, and its group is what is mounted.
        for folder in {group, *(parent for parent in group.parents if parent.is_relative_to(root)), root}:
            yield _left(folder, *names)


def _left(folder: Path, limit: str, usage: str) -> int | None:
    try:
        # "max" where there is none.
        allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().split("\n") if line)
    except (OSError, ValueError):
        return None
    # Pages of files are given up when memory is needed.
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, allowed - used + cached)


def size_text(count: float) -> str:
    """A number of bytes with three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
