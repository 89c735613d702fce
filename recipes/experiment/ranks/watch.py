"""A thread that ends this process where another rank is lost and nothing else can.

A rank that waits inside NCCL for a lost one is woken by nothing: it can raise no error and hear no signal. Torch lets
go of the interpreter while it waits, so that threads run on.
"""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import threading
from collections.abc import Callable

import torch.distributed as dist

HEARTBEAT = 1.0
"""Seconds between two heartbeats of a rank."""
GRACE = 5.0
"""Seconds without a heartbeat after which a rank counts as dead, and without an answer the store's server."""
PATIENCE = 60.0
"""Seconds that living ranks are waited for: they may compute for a while before they notice that others have left."""
FAILED = "failed"
"""How many ranks have left an exit code that is not 0."""

End = Callable[[dict[int, int | None]], None]
"""Ends the process; given the lost ranks, each with the exit code that it has left."""


class Watch:
    """Heartbeats of this rank and, where it is to `end`, an eye on those of the others.

    `end` is called once a rank has counted as lost for `PATIENCE` seconds: one that has left an exit code other than 0,
    whose process has ended, that serves the store and is gone, or that was silent for `silent` seconds (`GRACE` at
    least); none of these where it has left the exit code 0. Time in which this process stood still itself does not
    count.

    Args:
        store: a connection to the ranks' store for this alone.
        has_ended: whether a rank's process is known to have.
        served: whether the store is no rank's, so that its end says nothing of one.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        end: End | None = None,
        has_ended: Callable[[int], bool] = lambda rank: False,
        silent: float = float("inf"),
        served: bool = False,
    ) -> None:
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self._end, self._has_ended = end, has_ended
        self._silence = max(silent, GRACE)
        self._done, self._leaving = threading.Event(), threading.Event()
        self._silent, self._codes = dict.fromkeys(self.others, 0.0), dict[int, int]()
        self._unanswered, self._server_gone = 0.0, False
        self._servers = [] if served or rank == 0 else [0]
        threading.Thread(target=self._send, args=(store,), daemon=True).start()
        if end is not None:
            threading.Thread(target=self._look, args=(end,), daemon=True).start()

    def leave(self) -> None:
        """The process ends by itself from here: only heartbeats go on."""
        self._leaving.set()

    def close(self) -> None:
        """Send no further heartbeat."""
        self.leave()
        self._done.set()

    def _send(self, store: dist.Store) -> None:
        beats, rounds = dict.fromkeys(self.others, -1), 0
        every = max(1, round(GRACE / HEARTBEAT))
        try:
            while not self._done.wait(HEARTBEAT):
                store.add(f"heartbeat/{self.rank}", 1)
                self._unanswered, rounds = 0.0, rounds + 1
                if self._end is None:
                    continue
                failed = store.add(FAILED, 0) > 0
                # A server that ends well takes the store with it, and can be asked no more.
                asked = [rank for rank in self.others if (failed or rank in self._servers) and rank not in self._codes]
                self._codes |= exit_codes(store, asked)
                for rank in self.others if rounds % every == 0 else ():
                    before, beats[rank] = beats[rank], store.add(f"heartbeat/{rank}", 0)
                    self._silent[rank] = self._silent[rank] + every * HEARTBEAT if beats[rank] == before else 0.0
                    if self._silent[rank] and rank not in self._codes:
                        self._codes |= exit_codes(store, [rank])
        except (RuntimeError, OSError):
            self._server_gone = True

    def _look(self, end: End) -> None:
        """Never asks the store, which may not answer."""
        since: dict[int, float] = {}
        while not self._leaving.wait(HEARTBEAT):
            self._unanswered += HEARTBEAT
            since = {rank: since.get(rank, 0.0) + HEARTBEAT for rank in self._lost()}
            due = [rank for rank, seconds in since.items() if seconds > PATIENCE]
            if due:
                end({rank: self._codes.get(rank) for rank in due})
                return

    def _lost(self) -> list[int]:
        watched = [rank for rank in self._servers if self._codes.get(rank) != 0]
        if watched and (self._server_gone or self._has_ended(0) or self._unanswered > self._silence):
            return watched
        return [rank for rank in self.others if self._is_lost(rank)]

    def _is_lost(self, rank: int) -> bool:
        if rank in self._codes:
            return self._codes[rank] != 0
        return self._silent[rank] > self._silence or (self._silent[rank] >= GRACE and self._has_ended(rank))


def exit_codes(store: dist.Store, ranks: list[int]) -> dict[int, int]:
    """Those that some ranks have left."""
    names = {rank: f"exit code/{rank}" for rank in ranks}
    return {rank: int(store.get(name)) for rank, name in names.items() if store.check([name])}
