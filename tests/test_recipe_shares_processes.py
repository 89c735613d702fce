"""Outputs that two processes computed in shares are those of one; of many types, and of fewer samples than ranks."""

import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from bilevel.tree import tensors_in
from recipes.bissl.shares import on_shares


def outputs_of(calls: list[int], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Rows that depend on their own sample alone, of several types."""
    x = inputs["x"]
    calls.append(len(x))
    return {
        "scores": x.sin() * inputs["y"][:, None],
        "half": [x.bfloat16(), x.double()],
        "kinds": (x > 0.2, (9 * x).long(), (9 * x).to(torch.int32), (9 * x).to(torch.uint8)),
    }


def inputs_of(count: int) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 3 * count).abs().view(count, 3), "y": torch.arange(count) / 3}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    calls: list[int] = []
    with torch.no_grad():
        found = [on_shares(partial(outputs_of, calls), inputs_of(count)) for count in range(1, 6)]
    torch.save({"found": found, "calls": calls}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_outputs_of_two_ranks_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Public by its documentation, if not by its module's list of names.
    context = torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        worker, (port, str(tmp_path)), nprocs=2, join=False
    )
    assert context is not None
    deadline = time.monotonic() + 60
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not come to an end together"
    finally:
        for process in context.processes:
            assert process is not None
            process.kill()
    computed = [[1, 1, 2, 2, 3], [1, 1, 1, 2, 2]]
    for rank, calls in enumerate(computed):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        assert result["calls"] == calls
        for count, found in zip(range(1, 6), result["found"], strict=True):
            expected = outputs_of([], inputs_of(count))
            assert found.keys() == expected.keys()
            for mine, alone in zip(tensors_in(found), tensors_in(expected), strict=True):
                assert mine.dtype == alone.dtype
                assert torch.equal(mine, alone)
