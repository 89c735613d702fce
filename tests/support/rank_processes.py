"""One function on several processes at once, over gloo."""

import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.experiment.ranks.processes import Launch, Ranks

WORLDS = (2, 4)


def forkserver() -> ForkServerContext:
    """Starts processes as forks of one server, which has imported what takes seconds.

    There is one server a process, with the imports that it was first asked for: all tests ask for the same.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.bissl.commands.main", "torchvision", "scipy.stats"])
    return context


def on_ranks(function: Callable[[], Any], folder: Path, *, seconds: float = 240.0) -> dict[int, list[Any]]:
    """What `function`, of a test module, returns on every rank of each of `WORLDS`; the same processes serve both.

    What comes back is what torch.load takes with weights_only: tensors, numbers and strings in dictionaries and lists.
    """
    context = forkserver()
    ports = _free_ports(len(WORLDS))
    processes = [
        context.Process(target=_rank, args=(rank, ports, function, str(folder))) for rank in range(max(WORLDS))
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        while (running := any(process.is_alive() for process in processes)) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
        assert not running, f"the ranks did not come to an end together: exit codes {codes}"
        assert codes == [0] * len(codes), codes
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {
        world: [torch.load(_result(folder, world, rank), weights_only=True) for rank in range(world)]
        for world in WORLDS
    }


def _rank(rank: int, ports: list[int], function: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(1)
    for world, port in zip(WORLDS, ports, strict=True):
        if rank < world:
            Ranks(Launch(rank, world, rank, "127.0.0.1", port)).join(torch.device("cpu"), 100.0)
            torch.save(function(), _result(Path(folder), world, rank))
            dist.destroy_process_group()


def _result(folder: Path, world: int, rank: int) -> Path:
    return folder / f"rank {rank} of {world}.pt"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
