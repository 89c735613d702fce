"""Every exchange between ranks through NCCL, in a group of the one rank that a single GPU has; by gloo on a CPU."""

# torch documents its stores as torch.distributed's, and does not list them there.
# pyright: reportPrivateImportUsage=false

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bilevel import CG, Implicit, Params, hypergradient
from bilevel import distributed as bd
from tests.support.problems.device_networks import made


class Several(int):
    """One, which is not taken for the count of a single process: exchanges are made that it would do without."""

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return int.__hash__(self)


@pytest.fixture(params=["both", "alone"])
def group(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """NCCL with gloo for small messages, as the recipes join it, and NCCL alone."""
    backends = {"both": "cpu:gloo,cuda:nccl", "alone": "nccl"} if device.type == "cuda" else {"both": "gloo"}
    if request.param not in backends:
        pytest.skip("gloo is alone on a CPU")
    # Nothing listens for other processes.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group(backends[request.param], store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(bd, "world_size", lambda: Several(1))
    yield device
    dist.destroy_process_group()


def exchanged(device: torch.device) -> dict[str, Any]:
    x = torch.arange(6.0, device=device).reshape(3, 2)
    tree = {"a": x, "b": x[0].double()}
    copies, sent = [x.t(), x.clone()], {"x": x.cpu(), "words": ["a", None, 2.5]}
    bd.replicate(copies)
    bd.check_replicated("x", tree)
    return {
        "mean": bd.mean_over_ranks({"a": x, "b": x[0]}),
        "with gradient": bd.mean_with_gradients(x.sum(), {"a": x}),
        "agree": (bd.agree(True), bd.agree(False)),
        "largest": bd.largest_over_ranks(7),
        "from first": bd.from_first_rank(5),
        "on first": bd.on_first_rank(lambda: sent)["x"],
        "words": bd.on_first_rank(lambda: sent)["words"],
        "rows": bd.rows_of_all(3),
        "gathered": bd.gather(x),
        "replicated": copies,
    }


def test_one_rank_gets_back_what_it_brings(group: torch.device) -> None:
    found, x = exchanged(group), torch.arange(6.0, device=group).reshape(3, 2)
    assert found.pop("words") == ["a", None, 2.5]
    torch.testing.assert_close(
        found,
        {
            "mean": {"a": x, "b": x[0]},
            "with gradient": (x.sum(), {"a": x}),
            "agree": (True, False),
            "largest": 7,
            "from first": 5,
            "on first": x.cpu(),
            "rows": (3,),
            "gathered": x,
            "replicated": [x.t(), x],
        },
        rtol=0.0,
        atol=0.0,
    )


def test_gather_differentiates_twice(group: torch.device) -> None:
    x = torch.tensor([[0.5, -1.0], [2.0, 3.0]], device=group, dtype=torch.float64, requires_grad=True)

    def loss(gathered: Tensor) -> Tensor:
        return gathered.pow(3).sum() * gathered.sum()

    found, expected = [], []
    for value, results in ((bd.gather(x), found), (x, expected)):
        (slope,) = torch.autograd.grad(loss(value), x, create_graph=True)
        (product,) = torch.autograd.grad(slope.square().sum(), x)
        results += [slope.detach(), product]
    torch.testing.assert_close(found, expected)


def test_a_hypergradient_over_the_group_is_that_without(group: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Params:
        problem, upper, lower, batch = made("weight norm", group)
        method = Implicit(CG(3, rtol=None))
        return hypergradient(problem, upper, lower, method, upper_batch=batch, lower_batches=[batch]).grad

    over = gradient()
    monkeypatch.setattr(bd, "world_size", lambda: 1)
    alone = gradient()
    assert all(torch.equal(over[name], alone[name]) for name in alone)
