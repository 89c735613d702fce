"""The table of contents of WebDataset shards: where each sample's image lies, and its label."""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import DataError
from ..folders import SUFFIXES

# A member may have any number of suffixes, `input.jpg` say, of which the last decides.
IMAGE_SUFFIXES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
META = re.compile(r"__[^/]*__($|/)")
LABEL_BYTES = 4096


@dataclass
class TarIndex:
    """Samples in the order of their shards; see `TarImages` for the arrays.

    `codes`: for each, the position of its label's text in `labels`, or -1.
    """

    shard: array[int] = field(default_factory=lambda: array("i"))
    starts: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    codes: array[int] = field(default_factory=lambda: array("q"))
    names: bytearray = field(default_factory=bytearray)
    name_sizes: array[int] = field(default_factory=lambda: array("i"))
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """A regular file of a shard: what its sample is called, its suffixes in small letters, where its bytes lie."""

    name: str
    key: str
    suffix: str
    start: int
    size: int


def _refuse_compressed(shard: Path, file: BinaryIO) -> None:
    """Raise DataError where the file begins as a compressed one does."""
    begin = file.read(8)
    for magic, kind in COMPRESSED.items():
        if begin.startswith(magic):
            raise DataError(f"{shard} is compressed by {kind}: unpack it to an uncompressed .tar, images gain nothing")
    file.seek(0)


def _check_end(shard: Path, file: BinaryIO, offset: int) -> None:
    """Raise DataError unless the archive ends at `offset` as it should: by blocks of zeros alone."""
    file.seek(offset)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise DataError(f"{shard} is cut short: it ends without the mark of its end; write or copy it again")
    file.seek(offset)
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise DataError(
                f"{shard} holds more behind byte {offset} that is not a member: it is damaged, or tar files were "
                "joined; write it again"
            )


def members(shard: Path) -> Iterator[Member]:
    """The regular files of a shard that belong to samples, by its headers alone.

    The rule is WebDataset's: the sample is the name up to the first dot of its last part; names without a dot and
    those like `__this__` belong to none. Raises DataError, naming the shard: missing, compressed, damaged, cut short,
    or with a link or a sparse file as a member.
    """
    try:
        with open(shard, "rb") as file:
            _refuse_compressed(shard, file)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would grow by a kilobyte a member
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if member.isdir() or not (stem and dot) or META.match(member.name):
                        continue
                    if not member.isreg() or member.sparse is not None:
                        raise DataError(
                            f"{shard}: {member.name} is a link, a device or a sparse file: write the shard with the "
                            "files themselves (tar --dereference --hard-dereference)"
                        )
                    key = f"{folder}/{stem}" if folder else stem
                    yield Member(member.name, key, suffix.lower(), member.offset_data, member.size)
                _check_end(shard, file, archive.offset)
    except tarfile.TarError as error:
        raise DataError(f"{shard} is damaged, cut short or no tar file ({error}): write or copy it again") from error
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror}): check the path and its permissions") from error


def _samples(shard: Path) -> Iterator[dict[str, Member]]:
    """The samples of a shard: members by suffix. Raises DataError where a sample's members do not lie side by side."""
    seen: set[str] = set()
    key, sample = "", {}
    for member in members(shard):
        if member.key != key or not sample:
            if sample:
                yield sample
            if member.key in seen:
                raise DataError(
                    f"{shard}: the sample {member.key!r} comes twice, or its members do not lie side by side: "
                    "write the shard with sorted names (tar --sort=name) and one sample a name"
                )
            key, sample = member.key, {}
            seen.add(key)
        if member.suffix in sample:
            raise DataError(f"{shard} holds {member.name} twice: keep one of them")
        sample[member.suffix] = member
    if sample:
        yield sample


def _image_of(sample: dict[str, Member], shard: Path, wanted: str | None) -> Member:
    """The sample's image. Raises DataError where there is none, or several and none is `wanted`."""
    found = {suffix: member for suffix, member in sample.items() if suffix.rpartition(".")[2] in IMAGE_SUFFIXES}
    if wanted is not None:
        found = {suffix: member for suffix, member in sample.items() if suffix == wanted}
    if len(found) == 1:
        return next(iter(found.values()))
    key, suffixes = next(iter(sample.values())).key, ", ".join(f".{suffix}" for suffix in sample)
    if not found:
        kinds = f"no .{wanted}" if wanted is not None else "no image"
        raise DataError(f"{shard}: the sample {key!r} has {kinds} (it has {suffixes}): take it out, or add its image")
    raise DataError(
        f"{shard}: the sample {key!r} has several images ({', '.join(f'.{suffix}' for suffix in found)}): say which to "
        f"take by ?image={next(iter(found))}"
    )


def _label_of(member: Member, shard: Path, file: BinaryIO) -> str:
    """The text of a label. Raises DataError where it is empty, long or not text."""
    if member.size <= LABEL_BYTES:
        file.seek(member.start)
        try:
            text = file.read(member.size).decode("utf-8").strip()
        except UnicodeDecodeError:
            text = ""
        if text:
            return text
    raise DataError(f"{shard}: {member.name} must hold a class as text, a number or a name, in at most {LABEL_BYTES} B")


def indexed(shards: Sequence[Path], image: str | None, label: str | None) -> TarIndex:
    """All samples of `shards`: of each the image and, where `label` names a suffix, the label.

    Only headers and labels are read. Raises DataError, naming shard and sample, on what `members` refuses, on samples
    with no image or several, and on shards that hold the same samples.
    """
    index = TarIndex()
    contents: dict[int, Path] = {}
    for position, shard in enumerate(shards):
        before = len(index.names)
        facts = []
        with open(shard, "rb") as file:
            for sample in _samples(shard):
                found = _image_of(sample, shard, image)
                text = _label_of(sample[label], shard, file) if label is not None and label in sample else None
                name = found.name.encode("utf-8", "replace")
                index.shard.append(position)
                index.starts.append(found.start)
                index.sizes.append(found.size)
                index.codes.append(-1 if text is None else index.labels.setdefault(text, len(index.labels)))
                index.names += name
                index.name_sizes.append(len(name))
                facts.append(found.size)
        if not facts:
            raise DataError(f"{shard} holds no sample: name its files like 0001.jpg and 0001.cls, or remove it")
        content = hash((bytes(index.names[before:]), tuple(facts)))
        if content in contents:
            raise DataError(f"{shard} holds the same samples as {contents[content]}: keep one of them")
        contents[content] = shard
    return index
