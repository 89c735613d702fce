"""Leases on pieces of work: files in a folder that all processes see, on one machine or on many.

Written here rather than taken from filelock, whose leases are never taken over on NFS (docs/reliability.md).
"""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .process_identity import has_ended, identity

RENEWALS = 6
"""Renewals of a lease within its duration: a few may fail before anybody takes the work for abandoned."""


class LeaseLost(RuntimeError):
    """Another process took the work over, since this one had not renewed its lease for longer than its duration."""


class Leases:
    """Leases on pieces of work, by name, as files ``<name>.<generation>.lease`` in a folder.

    The highest generation holds the work. Generation g+1 may be created only once the file of g has not been touched
    for `duration`, or its process is seen to have ended, which only its own machine can tell. Creation is exclusive, so
    that of several who try one succeeds, and no file is renamed or deleted by others while it counts. A holder that was
    only suspended finds a higher generation, or its own gone, and stops.

    Ages are differences of modification times within the folder, "now" being that of a file made there at the time:
    both come from the clock of the file system, so that clocks of machines may differ. On NFS attributes are cached
    for up to a minute: a duration of 180 s or more is safe.

    Args:
        folder: made where missing; on a file system that all see.
        duration: seconds without renewal after which work counts as abandoned.
    """

    def __init__(self, folder: Path, duration: float) -> None:
        self.folder, self.duration = folder, duration
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> "Lease | None":
        """The lease on the work, or None while somebody else holds it."""
        newest = self.newest(name)
        if newest is not None and self._counts(newest):
            return None
        path = self.folder / f"{name}.{0 if newest is None else _generation(newest) + 1}.lease"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w") as file:
            json.dump(identity(), file)
        return Lease(self, name, path)

    def holder(self, name: str) -> dict[str, Any] | None:
        """The holder's `identity` and the seconds since its last renewal, as "age"; None where the work is free."""
        newest = self.newest(name)
        if newest is None or not self._counts(newest):
            return None
        return {**_holder(newest), "age": self._age(newest)}

    def newest(self, name: str) -> Path | None:
        """The file of the highest generation, abandoned or not."""
        return max(self.folder.glob(f"{name}.*.lease"), key=_generation, default=None)

    def clear(self, name: str, *, through: float = float("inf")) -> None:
        """Delete the files of generations up to `through`, the highest last: no other process finds an older one."""
        for path in sorted(self.folder.glob(f"{name}.*.lease"), key=_generation):
            if _generation(path) <= through:
                path.unlink(missing_ok=True)

    def _counts(self, path: Path) -> bool:
        return self._age(path) <= self.duration and not has_ended(_holder(path))

    def _age(self, path: Path) -> float:
        """Seconds since the renewal, by the file system's clock; infinite once the file is gone."""
        probe = self.folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.write_bytes(b"x")
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)


class Lease:
    """One piece of work leased to this process, renewed by a thread while `kept` is entered."""

    def __init__(self, leases: Leases, name: str, path: Path) -> None:
        self._leases, self._name, self._path = leases, name, path
        self._done, self._lost = threading.Event(), threading.Event()

    @contextmanager
    def kept(self) -> Iterator["Lease"]:
        """Renew the lease until the block ends; then give it up, with the files of dead holders before it."""
        thread = threading.Thread(target=self._renew, name=f"lease {self._name}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            if not self._lost.is_set():
                self._leases.clear(self._name, through=_generation(self._path))

    def check(self) -> None:
        """Do nothing while the lease is held.

        Raises:
            LeaseLost: another process took over.
        """
        if self._lost.is_set():
            raise LeaseLost(
                f"{self._path} was taken over: this process stood still for longer than its lease of "
                f"{self._leases.duration:g} s"
            )

    def _renew(self) -> None:
        while not self._done.wait(self._leases.duration / RENEWALS):
            try:
                if self._leases.newest(self._name) == self._path:
                    # Without times: the file system's own clock.
                    os.utime(self._path)
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                # A file system that does not answer for a while; the next renewals may reach it in time.
                continue
            self._lost.set()
            return


def _generation(path: Path) -> int:
    return int(path.name.split(".")[-2])


def _holder(path: Path) -> dict[str, Any]:
    """The `identity` of the process that made a lease."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        # Given up, or not yet written, since it was listed.
        return {"host": "?", "pid": None}
