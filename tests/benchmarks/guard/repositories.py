"""Small git repositories, of which the working tree differs from the commit."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    """What git prints."""
    author = {f"GIT_{role}_{what}": "nobody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **author, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
    )
    return done.stdout.strip()


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")


def repository(folder: Path, committed: Mapping[str, str], changed: Mapping[str, str]) -> str:
    """Makes a repository with one commit, and changes its working tree; the commit's name."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    write(folder, committed)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    write(folder, changed)
    return git(folder, "rev-parse", "HEAD")
