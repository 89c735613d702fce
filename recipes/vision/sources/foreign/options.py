"""What stands behind a source's path, as in `hf:PATH?image=photo&label=breed`; cache folders; lines on the console."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import DataError

# What follows the last question mark is options only if it begins as one: `shard-00?.tar` is a pattern.
WITH_OPTIONS = re.compile(r"(?P<name>.+?)\?(?P<options>\w+=[^?]*)", re.DOTALL)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the options, and the options.

    Raises:
        DataError: an option without `=`, or one given twice.
    """
    match = WITH_OPTIONS.fullmatch(text)
    if match is None:
        return text, {}
    options: dict[str, str] = {}
    for option in match["options"].split("&"):
        key, separator, value = option.partition("=")
        if not separator or not key:
            raise DataError(f"{text}: {option!r} is not an option of the form name=value")
        if key in options:
            raise DataError(f"{text}: the option {key} is given twice")
        options[key] = value
    return match["name"], options


def check_options(options: Collection[str], known: Collection[str], name: str) -> None:
    """Raise DataError on an option that the source `name` does not have, or an empty one."""
    for option in options:
        if option not in known:
            raise DataError(f"{name}: there is no option {option!r}; there are: {', '.join(known)}")


def cache_path(kind: str, files: Sequence[Path], settings: object = None) -> Path:
    """Where in the user's cache folder lies what is made of `files` as they are now (path, size, time) and `settings`.

    Raises OSError where a file is gone.
    """
    states = [os.stat(file) for file in files]
    facts = [(os.path.abspath(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, states, strict=True)]
    key = hashlib.sha256(json.dumps([facts, settings]).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "bilevel" / kind / key


def tell(line: str) -> None:
    """Say something on the console, beside what the program gives."""
    print(line, file=sys.stderr)


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
