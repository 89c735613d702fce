"""Work shared by processes that see one folder, on one machine or many: who does what, and what the dead left."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .process_identity import has_ended, identity

BEATS = 6
"""Renewals of a claim within its lease: a few may fail before anybody takes the work for abandoned."""


class ClaimLost(RuntimeError):
    """Somebody took the work over, since this process had not renewed its claim for longer than the lease."""


class Claims:
    """Claims on pieces of work, by name, as files ``<name>.<generation>.claim`` in a folder.

    The highest generation holds the work. Generation g+1 may be created only once the file of g has not been touched
    for a lease, or its process is seen to have ended, which only its own machine can tell. Creation is exclusive, so
    that of several who try one succeeds, and a claim is never renamed or deleted by others while it counts. A holder
    that was only suspended finds the higher generation and stops.

    Ages are differences of modification times within the folder, "now" being that of a file made there at the time:
    both come from the clock of the file system, so that clocks of machines may differ. On NFS attributes are cached
    for up to a minute: a lease of 180 s or more is safe.

    Args:
        folder: made where missing; on a file system that all see.
        lease: seconds without renewal after which work counts as abandoned.
    """

    def __init__(self, folder: Path, lease: float) -> None:
        self.folder, self.lease = folder, lease
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> "Claim | None":
        """The claim on the work, or None while somebody else holds it."""
        held = self._generations(name)
        if held and self._counts(held[-1]):
            return None
        path = self._path(name, held[-1][0] + 1 if held else 0)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w") as file:
            json.dump(identity(), file)
        return Claim(self, name, path)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Host, process, job and seconds since the last renewal of the claim that counts; None where work is free."""
        held = self._generations(name)
        if not held or not self._counts(held[-1]):
            return None
        return {**_process(held[-1][1]), "age": self.age(held[-1])}

    def age(self, generation: tuple[int, Path]) -> float:
        """Seconds since the claim was renewed, by the file system's clock; infinite once it is gone."""
        probe = self.folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.write_bytes(b"x")
            return probe.stat().st_mtime - generation[1].stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)

    def generation(self, name: str) -> Path | None:
        """The claim that counts, abandoned or not."""
        held = self._generations(name)
        return held[-1][1] if held else None

    def clear(self, name: str) -> None:
        """Delete all claims on work that is done, the one that counts last."""
        for _, path in self._generations(name):
            path.unlink(missing_ok=True)

    def _counts(self, generation: tuple[int, Path]) -> bool:
        return self.age(generation) <= self.lease and not has_ended(_process(generation[1]))

    def _generations(self, name: str) -> list[tuple[int, Path]]:
        """(generation, file), lowest first."""
        found = [(int(path.name.split(".")[-2]), path) for path in self.folder.glob(f"{name}.*.claim")]
        return sorted(found)

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}.claim"


def _process(path: Path) -> dict[str, Any]:
    """Who made a claim, as `identity`."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        # Released, or not yet written, since it was listed.
        return {"host": "?", "pid": None}


class Claim:
    """One held claim, renewed by a thread while `kept` is entered."""

    def __init__(self, claims: Claims, name: str, path: Path) -> None:
        self._claims, self.name, self._path = claims, name, path
        self._done, self._lost = threading.Event(), threading.Event()

    @contextmanager
    def kept(self) -> Iterator["Claim"]:
        """Renew the claim until the block ends; then give it up."""
        thread = threading.Thread(target=self._renew, name=f"claim {self.name}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            if not self._lost.is_set():
                self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Do nothing while the claim is held.

        Raises:
            ClaimLost: somebody else took over.
        """
        if self._lost.is_set():
            raise ClaimLost(
                f"{self._path} was taken over: this process stood still for longer than its lease of "
                f"{self._claims.lease:g} s"
            )

    def _renew(self) -> None:
        while not self._done.wait(self._claims.lease / BEATS):
            if self._claims.generation(self.name) != self._path:
                self._lost.set()
                return
            try:
                # Without times: the file system's own clock.
                os.utime(self._path)
            except FileNotFoundError:
                self._lost.set()
                return
            except OSError:
                # A file system that does not answer for a while; the next beats may reach it within the lease.
                continue
