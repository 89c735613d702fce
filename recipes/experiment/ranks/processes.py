"""The processes (ranks) that make one run together: how each is started, joins the others, and leaves them.

A rank that ends leaves its exit code in a store that all ranks reach (liveness.py). Where an exchange fails the others
look there, and end too: with that code, or with `LOST` and a message that names the ranks that left none. Where a rank
may wait inside NCCL, which does not fail, a thread does so in its place (watch.py).
"""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bilevel.distributed import CollectiveError, agree

from ..errors import ConfigError
from ..folder.process_identity import describe, has_ended, identity
from ..terminal import command_name, printable
from .liveness import Liveness
from .watch import GRACE, PATIENCE, Watch

LOST = 76
"""Exit code of a rank that has lost another one, which left no exit code."""
UNEXPLAINED = -1
"""Left in place of an exit code by a rank that knows only that an exchange has failed."""
_LOOPBACK = ("127.0.0.1", "localhost")
_CONTINUE = "the same command with --resume continues from the last checkpoint"


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process by its environment.

    Attributes:
        rank, world_size: this process's number, from 0, and how many there are.
        local_rank: its number on this machine, which is also that of its GPU.
        address, port: where the key-value store is served.
        attempt: how often torchrun has started all of them again.
        served: whether torchrun serves the store, instead of rank 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    attempt: int = 0
    served: bool = False

    @classmethod
    def of_environment(cls) -> "Launch":
        """One process where WORLD_SIZE is 1, or neither it nor RANK and MASTER_ADDR are set.

        Raises:
            ConfigError: naming the variable that is missing or not a number that it can be.
        """
        meant = {"RANK", "MASTER_ADDR"} <= os.environ.keys()
        if meant and "WORLD_SIZE" not in os.environ:
            raise ConfigError("WORLD_SIZE: RANK and MASTER_ADDR are set, but WORLD_SIZE is not; set it, or unset those")
        world_size = _number("WORLD_SIZE", least=1, default=1)
        if world_size == 1:
            return cls()
        launch = cls(
            _number("RANK"),
            world_size,
            _number("LOCAL_RANK"),
            _text("MASTER_ADDR"),
            _number("MASTER_PORT", least=1, most=65535),
            _number("TORCHELASTIC_RESTART_COUNT", default=0),
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
        if launch.rank >= world_size:
            raise ConfigError(f"RANK: must be below WORLD_SIZE={world_size}, got {launch.rank}")
        return launch


class Ranks:
    """Membership of this process in its run: joining the other ranks, leaving them, and why they were lost.

    Nothing is done where it is the only one.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._liveness: Liveness | None = None
        self._watch: Watch | None = None
        self._identities: list[dict[str, Any]] = []
        self._exit_code: int | None = None
        self._lost: set[int] = set()

    def refuse_several(self, what: str) -> None:
        """Raise ConfigError where there are several processes, for what is made for one."""
        if self.launch.world_size > 1:
            raise ConfigError(
                f"WORLD_SIZE: {what} runs in one process, but {self.launch.world_size} were started; start it without "
                "torchrun"
            )

    def join(self, device: torch.device, timeout: float) -> None:
        """Make the process group, of gloo and on GPUs also nccl, and from then on watch the others.

        Args:
            timeout: seconds that an exchange waits for the other ranks, and this call for their start.

        Raises:
            ConfigError: the others did not come.
        """
        launch, limit = self.launch, timedelta(seconds=timeout)
        if launch.world_size == 1:
            return
        if launch.address in _LOOPBACK and "lo" in [name for _, name in socket.if_nameindex()]:
            # All ranks are on this machine: nobody else is to connect.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Small messages go between the hosts, so that no GPU is waited for.
        on_gpus = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        # NCCL's own watchdog, which aborts the process, comes after ours.
        exchange = limit + timedelta(seconds=2 * GRACE) if on_gpus else limit
        try:
            store = _open(launch, limit, serve=launch.rank == 0 and not launch.served)
            dist.init_process_group(
                backend, store=store, timeout=exchange, rank=launch.rank, world_size=launch.world_size
            )
            store.set(f"process/{launch.rank}", json.dumps(identity()))
            self._identities = [json.loads(store.get(f"process/{rank}")) for rank in range(launch.world_size)]
            self._liveness = Liveness(store, launch.rank, launch.world_size)
            self._watch = Watch(
                _open(launch, limit),
                launch.rank,
                launch.world_size,
                # Gloo's exchanges fail by themselves.
                end=self._end if on_gpus else None,
                has_ended=lambda rank: has_ended(self._identities[rank]),
                silent=max(0.0, timeout - PATIENCE),
                served=launch.served,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if (isinstance(error, OSError) and error.errno == errno.EADDRINUSE) or "EADDRINUSE" in reason:
                raise ConfigError(
                    f"MASTER_PORT: {launch.port} is in use on this machine; choose another, and one process a RANK"
                ) from error
            raise ConfigError(
                f"MASTER_ADDR: the {launch.world_size} ranks did not meet at {launch.address}:{launch.port} within "
                f"{timeout:g} s ({reason}); start as many as WORLD_SIZE says, and see that all reach that address"
            ) from error

    def leave(self, code: int) -> bool:
        """Leave the run with an exit code; returns whether this rank is to print why.

        Rank 0 prints what all ranks know; another one what rank 0 does not know of.
        """
        rank, liveness = self.launch.rank, self._liveness
        if liveness is None or self._watch is None:
            # Before the ranks have met: torchrun shows what all print, and gives all the same command line.
            return rank == 0 or self.launch.local_rank == 0 or not self.launch.served
        own = self._leave_code(liveness, code)
        self._watch.leave()
        # Wakes those who wait for this rank. On a GPU with work under way it may not return.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(GRACE)
        if rank > 0:
            liveness.wait("exit code", {0})
            first = liveness.read("exit code").get(0)
            prints = first is None or own not in (first, UNEXPLAINED)
            liveness.write("done", 1)
        else:
            # The store may end with this process: not before the others have read what they want.
            prints = True
            liveness.wait("done", set(range(1, self.launch.world_size)) - self._lost)
        self._watch.close()
        return prints and code != 0

    def explain(self, error: CollectiveError) -> tuple[str, int]:
        """Why an exchange failed, as a message and this rank's exit code."""
        liveness = self._liveness
        if liveness is None or self._watch is None:
            return str(error), LOST
        self._watch.leave()
        self._leave_code(liveness, UNEXPLAINED)
        everyone = set(range(self.launch.world_size))
        liveness.wait("exit code", everyone)
        codes = liveness.read("exit code")
        reasons = sorted(rank for rank, code in codes.items() if code != UNEXPLAINED)
        if reasons:
            return self._ended(reasons[0], codes[reasons[0]])
        lost = [0] if liveness.server_lost else sorted(everyone - codes.keys())
        self._lost = set(lost)
        why = self._silent(lost) if lost else str(error)
        return f"{why}; {_CONTINUE}", LOST

    def _end(self, lost: dict[int, int | None]) -> None:
        """End this process now, whose main thread waits for lost ranks where nothing wakes it."""
        codes = {rank: code for rank, code in sorted(lost.items()) if code not in (None, UNEXPLAINED)}
        said, code = self._silent(sorted(lost)), LOST
        if codes:
            said, code = self._ended(*next(iter(codes.items())))  # type: ignore[arg-type]
        words = f"rank {self.launch.rank}: stopped: {said}, and this rank still waits for it after {PATIENCE:g} s"
        print(f"{command_name()}: {printable(words)}; {_CONTINUE}", file=sys.stderr, flush=True)
        if self._liveness is not None:
            self._leave_code(self._liveness, UNEXPLAINED)
        os._exit(code)

    def _ended(self, rank: int, code: int) -> tuple[str, int]:
        return f"{self._name(rank)} has ended with exit code {code}", code

    def _silent(self, ranks: list[int]) -> str:
        return f"{', '.join(map(self._name, ranks))} has ended without a word, or stands still"

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({describe(self._identities[rank])})"

    def _leave_code(self, liveness: Liveness, code: int) -> int:
        """Leave the exit code for the others; the first one that this rank has left counts, and is returned."""
        if self._exit_code is None:
            self._exit_code = code
            liveness.write_exit_code(code)
        return self._exit_code


@contextmanager
def first_on_each_machine(launch: Launch) -> Iterator[None]:
    """Enter the block on rank 0 first, then on one rank of each other machine, then on the rest.

    Each finds what those before have downloaded. Nothing in the block may exchange.
    """
    turn = 0 if launch.rank == 0 else 1 if launch.local_rank == 0 else 2
    for _ in range(turn):
        agree(False)
    yield
    for _ in range(turn, 2):
        agree(False)


def _open(launch: Launch, limit: timedelta, *, serve: bool = False) -> dist.Store:
    """A connection to the key-value store that torchrun, or else rank 0 (`serve`), serves for this attempt.

    At a loopback address no other machine reaches it.
    """
    listening = None
    if serve and launch.address in _LOOPBACK:
        listening = socket.create_server((launch.address, launch.port))
    store = dist.TCPStore(
        launch.address,
        launch.port,
        is_master=serve,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    return dist.PrefixStore(f"bilevel/{launch.attempt}", store)


def _text(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{name}: WORLD_SIZE is above 1, but {name} is not set; start by torchrun, or set it")
    return value


def _number(name: str, *, least: int = 0, most: int = 10**6, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    text = _text(name)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigError(f"{name}: must be a whole number from {least} to {most}, got {text!r}")
    return int(text)
