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
