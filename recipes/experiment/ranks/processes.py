"""The processes (ranks) that make one run together: started by torchrun or srun, joined, and left again.

A rank that ends says so, with its exit code, in a register that all ranks see. Where an exchange fails the others look
there, and end too: with the code of the one that said something, or naming the one that did not.
"""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bilevel.distributed import CollectiveError, agree

from ..errors import ConfigError
from ..folder.process_identity import describe, identity
from .liveness import GRACE, Register

LOST = 76
"""Exit code of a rank that another one left without a word."""
_LOOPBACK = ("127.0.0.1", "localhost")


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
    """This process among those of its run; nothing is done where it is the only one."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._register: Register | None = None
        self._who: list[str] = []
        self._said: int | None = None
        self._silent: set[int] = set()

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
        if launch.address in _LOOPBACK and "lo" in [name for _, name in socket.if_nameindex()]:
            # All ranks are on this machine: nobody else is to connect.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Small messages go between the hosts, so that no GPU is waited for.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store = _open(launch, limit, keeper=launch.rank == 0 and not launch.served)
            dist.init_process_group(backend, store=store, timeout=limit, rank=launch.rank, world_size=launch.world_size)
            store.set(f"who/{launch.rank}", describe(identity()))
            self._who = [store.get(f"who/{rank}").decode() for rank in range(launch.world_size)]
            self._register = Register(store, _open(launch, limit), launch.rank, launch.world_size)
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
        """Say that this rank ends, and with which exit code; whether this rank is to tell why.

        Rank 0 tells what all ranks know; another one what rank 0 does not know of.
        """
        rank, register = self.launch.rank, self._register
        if register is None:
            # Before the ranks have met: torchrun shows what all say, and gives all the same command line.
            return rank == 0 or self.launch.local_rank == 0 or not self.launch.served
        said = self._say(register, code)
        # Wakes those who wait for this rank. On a GPU with work under way it may not return.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(GRACE)
        if rank > 0:
            register.wait("left", {0})
            first = register.read("left").get(0)
            tells = first is None or said not in (first, LOST)
            register.write("done", 1)
        else:
            # The register may end with this process: when the others have read what they want.
            tells = True
            register.wait("done", set(range(1, self.launch.world_size)) - self._silent)
        register.close()
        return tells and code != 0

    def account(self, error: CollectiveError) -> tuple[str, int]:
        """Why an exchange failed, as a message and this rank's exit code."""
        register = self._register
        if register is None:
            return str(error), LOST
        self._say(register, LOST)
        everyone = set(range(self.launch.world_size))
        register.wait("left", everyone)
        codes = register.read("left")
        reasons = sorted(rank for rank, code in codes.items() if code != LOST)
        if reasons:
            first = reasons[0]
            return f"{self._name(first)} has ended with exit code {codes[first]}", codes[first]
        silent = [0] if register.lost else sorted(everyone - codes.keys())
        self._silent = set(silent)
        names = ", ".join(self._name(rank) for rank in silent)
        why = f"{names} has ended without a word, or stands still" if silent else str(error)
        return f"{why}; the same command with --resume continues from the last checkpoint", LOST

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._who[rank]})"

    def _say(self, register: Register, code: int) -> int:
        """The first word counts; what this rank has said."""
        if self._said is None:
            self._said = code
            register.write("left", code)
        return self._said


@contextmanager
def first_on_each_machine(launch: Launch) -> Iterator[None]:
    """Let rank 0 go through the block first, then one rank of each other machine, then the rest: each finds what those
    before have downloaded. Nothing in the block may exchange."""
    turn = 0 if launch.rank == 0 else 1 if launch.local_rank == 0 else 2
    for _ in range(turn):
        agree(False)
    yield
    for _ in range(turn, 2):
        agree(False)


def _open(launch: Launch, limit: timedelta, *, keeper: bool = False) -> dist.Store:
    """A connection to the key-value store that torchrun, or else rank 0, keeps for this attempt.

    At a loopback address no other machine reaches it.
    """
    listening = None
    if keeper and launch.address in _LOOPBACK:
        listening = socket.create_server((launch.address, launch.port))
    store = dist.TCPStore(
        launch.address,
        launch.port,
        is_master=keeper,
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
