"""The processes (ranks) that make one run together: started by torchrun or srun, joined, and left again.

A rank that ends says so, with its exit code, in a register that all ranks see. Where an exchange fails the others look
there, and end too: with the code of the one that said something, or naming the one that did not.
"""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bilevel.distributed import CollectiveError, agree
from recipes.bissl.config import ConfigError
from recipes.bissl.process_identity import describe, identity

LOST = 76
"""Exit code of a rank that another one left without a word."""
GRACE = 5.0
"""Seconds in which ranks that are alive notice that another one has left, and say so."""
_POLL = 0.05
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process by its environment.

    Attributes:
        rank, world_size: this process's number, from 0, and how many there are.
        local_rank: its number on this machine, which is also that of its GPU.
        address, port: where the register is.
        attempt: how often torchrun has started all of them again.
        served: whether torchrun keeps the register, instead of rank 0.
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
        """One process where WORLD_SIZE is not set, or 1.

        Raises:
            ConfigError: naming the variable that is missing or not a number that it can be.
        """
        world_size = _number("WORLD_SIZE", least=1, default=1)
        if world_size == 1:
            return cls()
        launch = cls(
            _number("RANK"),
            world_size,
            _number("LOCAL_RANK"),
            _text("MASTER_ADDR"),
            _number("MASTER_PORT", least=1),
            _number("TORCHELASTIC_RESTART_COUNT", default=0),
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
        if launch.rank >= world_size:
            raise ConfigError(f"RANK: must be below WORLD_SIZE={world_size}, got {launch.rank}")
        return launch


class Ranks:
    """This process among those of its run; nothing is done where it is the only one."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._register: dist.Store | None = None
        self._who: list[str] = []
        self._said: int | None = None
        self._accounted = False

    def refuse_several(self, what: str) -> None:
        """Raise ConfigError where there are several processes, for what is made for one."""
        if self.launch.world_size > 1:
            raise ConfigError(
                f"WORLD_SIZE: {what} runs in one process, but {self.launch.world_size} were started; start it without "
                "torchrun"
            )

    def join(self, device: torch.device, timeout: float) -> None:
        """Make the process group, of gloo and on GPUs also nccl.

        Args:
            timeout: seconds that an exchange waits for the other ranks, and this call for their start.

        Raises:
            ConfigError: the others did not come.
        """
        launch, limit = self.launch, timedelta(seconds=timeout)
        if launch.world_size == 1:
            return
        if launch.address in _LOOPBACK:
            # All ranks are on this machine: nobody else is to connect.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Small messages go between the hosts, so that no GPU is waited for.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store = dist.PrefixStore(f"bilevel/{launch.attempt}", open_register(launch, limit))
            dist.init_process_group(backend, store=store, timeout=limit, rank=launch.rank, world_size=launch.world_size)
            store.set(f"who/{launch.rank}", describe(identity()))
            self._who = [store.get(f"who/{rank}").decode() for rank in range(launch.world_size)]
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"MASTER_ADDR: the {launch.world_size} ranks did not meet at {launch.address}:{launch.port} within "
                f"{timeout:g} s ({reason}); start as many as WORLD_SIZE says, and see that all reach that address"
            ) from error
        self._register = store

    def leave(self, code: int) -> bool:
        """Say that this rank ends, and with which exit code; whether this rank is to tell why.

        Rank 0 tells what all ranks know; another one what rank 0 does not know of.
        """
        rank = self.launch.rank
        if self._register is None:
            # Before the ranks have met one a machine tells; where the register is gone, everybody who is left.
            return self._said is not None or rank == 0 or self.launch.local_rank == 0
        said = self._say(code)
        # Wakes those who wait for this rank. On a GPU with work under way it may not return.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(GRACE)
        others = set(range(1, self.launch.world_size))
        if rank > 0:
            self._wait("left", {0})
            tells = code != 0 and self._read("left").get(0) != said
            self._write("done", 1)
            return tells
        if not (self.launch.served or self._accounted):
            # The register ends with this process: when the others have read what they want.
            self._wait("done", others)
        return True

    def account(self, error: CollectiveError) -> tuple[str, int]:
        """Why an exchange failed, as a message and this rank's exit code."""
        if self._register is None:
            return str(error), LOST
        self._say(LOST)
        everyone = set(range(self.launch.world_size))
        self._wait("left", everyone)
        self._accounted = True
        codes = self._read("left")
        reasons = sorted(rank for rank, code in codes.items() if code != LOST)
        if reasons:
            first = reasons[0]
            return f"{self._name(first)} has ended with exit code {codes[first]}", codes[first]
        silent = sorted(everyone - codes.keys()) if codes else [0]
        names = ", ".join(self._name(rank) for rank in silent)
        why = f"{names} has ended without a word, or stands still" if silent else str(error)
        return f"{why}; the same command with --resume continues from the last checkpoint", LOST

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._who[rank]})"

    def _say(self, code: int) -> int:
        """The first word counts; what this rank has said."""
        if self._said is None:
            self._said = code
            self._write("left", code)
        return self._said

    def _wait(self, what: str, ranks: set[int]) -> None:
        """Until all of `ranks` have an entry, or time is up."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until and self._register is not None and not ranks <= self._read(what).keys():
            time.sleep(_POLL)

    def _write(self, what: str, number: int) -> None:
        """This rank's entry in the register."""
        self._ask(lambda register: register.set(f"{what}/{self.launch.rank}", str(number)))

    def _read(self, what: str) -> dict[int, int]:
        """The entries that there are, by rank."""
        entries: dict[int, int] = {}

        def read(register: dist.Store) -> None:
            for rank in range(self.launch.world_size):
                if register.check([f"{what}/{rank}"]):
                    entries[rank] = int(register.get(f"{what}/{rank}"))

        self._ask(read)
        return entries

    def _ask(self, question: Callable[[dist.Store], None]) -> None:
        """Ask the register, which is forgotten where its keeper is gone or does not answer."""
        register = self._register
        if register is None:
            return
        answered = threading.Event()

        def ask() -> None:
            try:
                question(register)
            except (RuntimeError, OSError):
                # Nobody is left who could answer.
                return
            answered.set()

        # A keeper that stands still would be waited for without end.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(GRACE)
        if not answered.is_set():
            self._register = None


@contextmanager
def first_on_each_machine(launch: Launch) -> Iterator[None]:
    """Let one rank a machine go through the block first, for example to download what the others then find."""
    if launch.local_rank > 0:
        agree(False)
    yield
    if launch.local_rank == 0:
        agree(False)


def open_register(launch: Launch, limit: timedelta) -> dist.Store:
    """The key-value store that torchrun, or else rank 0, keeps; at a loopback address no other machine reaches it."""
    keeper = launch.rank == 0 and not launch.served
    listening = None
    if keeper and launch.address in _LOOPBACK:
        listening = socket.create_server((launch.address, launch.port), reuse_port=False)
    return dist.TCPStore(
        launch.address,
        launch.port,
        is_master=keeper,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )


def _text(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{name}: WORLD_SIZE is above 1, but {name} is not set; start by torchrun, or set it")
    return value


def _number(name: str, *, least: int = 0, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    text = _text(name)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}: must be a whole number of at least {least}, got {text!r}")
    return int(text)
