"""The files of a commit in a temporary folder."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

OF_HOOKS = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}


class CheckoutError(ValueError):
    """What is compared is no checkout, or the commit is none of it; the message says what to give."""


def resolve(checkout: Path, commit: str) -> str:
    """The commit's full name.

    Raises:
        CheckoutError: the folder is not in a git checkout, or has no such commit; or git is not installed.
    """
    if shutil.which("git") is None:
        raise CheckoutError("git is not installed: the files of the commit cannot be had")
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if top.returncode != 0:
        raise CheckoutError(f"--tree: {checkout} is no git checkout ({top.stderr.strip()}); name the folder of one")
    if Path(top.stdout.strip()).resolve() != checkout.resolve():
        raise CheckoutError(f"--tree: {checkout} lies in the git checkout {top.stdout.strip()}; name that one")
    found = _git(checkout, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode != 0:
        raise CheckoutError(f"--against: {checkout} has no commit {commit!r}; git log lists them")
    return found.stdout.strip()


@contextmanager
def files_of(checkout: Path, commit: str) -> Iterator[Path]:
    """A temporary folder with the files of a resolved commit, removed at the end; the checkout's index is not touched.

    Other temporary files are made in that folder meanwhile, so that a signal in the moment of their making leaves none.

    Raises:
        CheckoutError: git could not write them.
    """
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        tree, index = Path(folder).resolve() / "tree", {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        tree.mkdir()
        for command in (("read-tree", commit), ("checkout-index", "--all", f"--prefix={tree}/")):
            done = _git(checkout, *command, more=index)
            if done.returncode != 0:
                raise CheckoutError(f"--against: git {command[0]} failed for {commit}: {done.stderr.strip()}")
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield tree
        finally:
            tempfile.tempdir = before


def _git(checkout: Path, *arguments: str, more: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    # In a hook git says by variables which checkout it works on, which may be another one.
    ours = {name: value for name, value in os.environ.items() if name not in OF_HOOKS}
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**ours, **(more or {})}, check=False)
