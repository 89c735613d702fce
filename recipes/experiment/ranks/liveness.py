"""Where the processes (ranks) of one run leave word for each other, beside their exchanges: it outlives those."""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

BEAT = 1.0
"""Seconds between two signs of life."""
GRACE = 5.0
"""Seconds without one after which a rank is taken for dead, and without an answer the register's keeper."""
PATIENCE = 60.0
"""Seconds that living ranks are waited for: they may compute for a while before they notice that others have left."""
_POLL = 0.05


class Register:
    """Numbers by name and rank in a store that all ranks reach, and whether each rank lives.

    Args:
        store: for words.
        pulse: another connection to the same store, for a thread that gives signs of life.
    """

    def __init__(self, store: dist.Store, pulse: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: dist.Store | None = store
        self._done = threading.Event()
        threading.Thread(target=self._beat, args=(pulse,), daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether its keeper is gone, or does not answer."""
        return self._store is None

    def write(self, name: str, number: int) -> None:
        """This rank's number."""
        self._ask(lambda store: store.set(f"{name}/{self.rank}", str(number)))

    def read(self, name: str) -> dict[int, int]:
        """The numbers of the ranks that have one."""
        found: dict[int, int] = {}

        def read(store: dist.Store) -> None:
            for rank in range(self.world_size):
                if store.check([f"{name}/{rank}"]):
                    found[rank] = int(store.get(f"{name}/{rank}"))

        self._ask(read)
        return found

    def wait(self, name: str, ranks: set[int]) -> None:
        """Until all of `ranks` that live have a number; no longer than `PATIENCE`."""
        began = time.monotonic()
        lived: dict[int, tuple[int | None, float]] = {}
        while not self.lost and (missing := ranks - self.read(name).keys()):
            beats, now = self.read("beat"), time.monotonic()
            for rank in missing:
                if rank not in lived or beats.get(rank) != lived[rank][0]:
                    lived[rank] = beats.get(rank), now
            if now - began > PATIENCE or all(now - lived[rank][1] > GRACE for rank in missing):
                return
            time.sleep(_POLL)

    def close(self) -> None:
        """Give no further sign of life."""
        self._done.set()

    def _beat(self, store: dist.Store) -> None:
        try:
            while not self._done.wait(BEAT):
                store.add(f"beat/{self.rank}", 1)
        except (RuntimeError, OSError):
            # The keeper is gone: nobody looks any more.
            return

    def _ask(self, question: Callable[[dist.Store], None]) -> None:
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

        # A keeper that stands still would be waited for without end.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(GRACE)
        if not answered.is_set():
            self._store = None
