"""Paths as people write them."""

import os
from pathlib import Path

from ..errors import ConfigError


def user_path(given: str | Path) -> Path:
    """The path with a home folder in the place of ``~`` or ``~user`` at its beginning, however it was given.

    A shell replaces them only at the beginning of a word: not in ``--output-dir=~/runs``.

    Raises:
        ConfigError: there is no such user, nor a file of that name.
    """
    path = os.path.expanduser(os.fspath(given))
    if path.startswith("~") and not os.path.lexists(name := path.partition("/")[0]):
        raise ConfigError(f"{given}: this machine knows no home folder of {name}; write the path in full")
    return Path(path)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or would be found below it, if both were there.

    Links are followed, also those directly in `folder` and in its folders. What is hidden in it (names with a dot at
    the beginning) is not found.
    """
    place = Path(os.path.realpath(path))
    for root in _roots(folder):
        if place == root or root in place.parents:
            return not any(part.startswith(".") for part in place.relative_to(root).parts)
    return False


def _roots(folder: Path) -> list[Path]:
    """A folder, and what links in it and in its folders lead to."""
    found = [Path(os.path.realpath(folder))]
    levels = [[folder], [entry for entry in _entries(folder) if entry.is_dir()]]
    for entry in (entry for level in levels for parent in level for entry in _entries(parent)):
        if entry.is_symlink() and entry.is_dir():
            found.append(Path(os.path.realpath(entry)))
    return found


def _entries(folder: Path) -> list[Path]:
    """What is directly in a folder and not hidden; nothing where it cannot be listed."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
