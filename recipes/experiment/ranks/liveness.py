"""Numbers that the ranks of a run leave for each other, and which ranks are alive, by their heartbeats (watch.py).

It has a connection of its own, and works after an exchange between the ranks has failed.
"""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from .watch import FAILED, GRACE, PATIENCE

_POLL = 0.05


class Liveness:
    """Numbers by name and rank in a key-value store that all ranks reach, their heartbeats among them."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: dist.Store | None = store

    @property
    def server_lost(self) -> bool:
        """Whether the process that serves the store is gone, or does not answer."""
        return self._store is None

    def write(self, name: str, number: int) -> None:
        """Leave this rank's number under `name`."""
        self._ask(lambda store: store.set(f"{name}/{self.rank}", str(number)))

    def write_exit_code(self, code: int) -> None:
        """Leave this rank's exit code, and for those who watch that there is one to look at."""
        self.write("exit code", code)
        if code:
            self._ask(lambda store: store.add(FAILED, 1))

    def read(self, name: str) -> dict[int, int]:
        """The numbers under `name`, of the ranks that have left one."""
        found: dict[int, int] = {}

        def read(store: dist.Store) -> None:
            for rank in range(self.world_size):
                if store.check([f"{name}/{rank}"]):
                    found[rank] = int(store.get(f"{name}/{rank}"))

        self._ask(read)
        return found

    def wait(self, name: str, ranks: set[int]) -> None:
        """Wait until all of `ranks` that are alive have left a number under `name`; no longer than `PATIENCE`."""
        began = time.monotonic()
        alive: dict[int, tuple[int | None, float]] = {}
        while not self.server_lost and (missing := ranks - self.read(name).keys()):
            beats, now = self.read("heartbeat"), time.monotonic()
            for rank in missing:
                if rank not in alive or beats.get(rank) != alive[rank][0]:
                    alive[rank] = beats.get(rank), now
            if now - began > PATIENCE or all(now - alive[rank][1] > GRACE for rank in missing):
                return
            time.sleep(_POLL)

    def _ask(self, question: Callable[[dist.Store], object]) -> None:
        store = self._store
        if store is None:
            return
        answered = threading.Event()

        def ask() -> None:
            try:
                question(store)
            except (RuntimeError, OSError):
                return
            answered.set()

        # A server that stands still would be waited for without end.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(GRACE)
        if not answered.is_set():
            self._store = None
