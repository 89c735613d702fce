"""Fetching archives, with their checksums, and unpacking them without leaving the folder."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO
from urllib.parse import urlsplit

from ...errors import DataError

# RuntimeError is torchvision's word for another checksum and for too many redirections.
ARCHIVE_ERRORS = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Archive:
    """A file to fetch: `url`, its published `md5`, `into`: the folder below the root where it goes and is unpacked.

    `inner`: archives within it, to be unpacked to the same place. A file that is no archive is kept as it is.
    """

    url: str
    md5: str
    into: str = "."
    inner: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(urlsplit(self.url).path).name


def _safe(name: str, archive: Path) -> Path:
    """The path of a member. Raises DataError if it is absolute or leads out of the folder, on any system."""
    path = PureWindowsPath(name)  # takes both kinds of slashes for such, and knows drives
    if path.drive or path.root or ".." in path.parts:
        raise DataError(f"{archive} holds {name!r}, which would be written outside its folder: not unpacked")
    return Path(*path.parts)


def _tar_members(stored: tarfile.TarFile, archive: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """The files of a tar archive; links and devices are refused, since none of the published sets holds any."""
    for member in stored:
        path = _safe(member.name, archive)
        if member.isdir():
            continue
        content = stored.extractfile(member) if member.isfile() else None
        if content is None:
            raise DataError(f"{archive} holds {member.name!r}, a link or device: not unpacked")
        yield path, content


def _zip_members(stored: zipfile.ZipFile, archive: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """The files of a zip archive; a link's entry is written as a small plain file, so that none can be followed."""
    for member in stored.infolist():
        path = _safe(member.filename, archive)
        if not member.is_dir():
            yield path, stored.open(member)


def _write(content: IO[bytes] | gzip.GzipFile, target: Path) -> None:
    """Write a file so that one cut short by an interruption never has its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with content, part.open("wb") as written:
        shutil.copyfileobj(content, written, 1 << 20)
    os.replace(part, target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` (.tar, .tar.gz, .tgz, .zip, or one .gz file) into `folder`; any other file is left as it is.

    Raises DataError on a member that is absolute, leads out of the folder, or is a link or a device, and on a damaged
    archive. Nothing here depends on the filters of `tarfile`, which Python 3.11 has in some of its versions only.
    """
    name = archive.name
    try:
        if name.endswith((".tar", ".tar.gz", ".tgz")):
            with tarfile.open(archive) as stored:
                for path, content in _tar_members(stored, archive):
                    _write(content, folder / path)
        elif name.endswith(".zip"):
            with zipfile.ZipFile(archive) as stored:
                for path, content in _zip_members(stored, archive):
                    _write(content, folder / path)
        elif name.endswith(".gz"):
            with gzip.open(archive) as content:
                _write(content, folder / name.removesuffix(".gz"))
    except ARCHIVE_ERRORS as error:
        raise DataError(f"{archive} cannot be unpacked ({error}): remove it and fetch it again") from error


def fetch(archive: Archive, root: Path) -> None:
    """Download `archive`, check its MD5 and unpack it below `root`. Raises DataError if any of it fails.

    A file that is there already with the right checksum is not downloaded again.
    """
    from torchvision.datasets.utils import download_url  # nearly as long to import as torch

    folder = root / archive.into
    try:
        download_url(archive.url, folder, archive.name, archive.md5)
    except ARCHIVE_ERRORS as error:
        raise DataError(f"the download of {archive.url} failed ({error})") from error
    unpack(folder / archive.name, folder)
    for inner in archive.inner:
        unpack(folder / inner, folder)
