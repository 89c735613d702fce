"""A read or a tensor of the CPU that is planted in a path is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.host_reads import paths, vision
from benchmarks.host_reads.device import DeviceError
from bilevel import CG, Neumann, Params, tree
from bilevel.linear import GMRES, Solver
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.benchmarks.host_reads.test_paths import assert_quiet

PROVIDERS: list[HVPProvider] = [ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Any]) -> None:
    """In the lower objective of the problem that the paths run."""
    plain = paths.Net.lower_objective

    def faulty(self: paths.Net, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        loss = plain(self, upper, lower, batch)
        fault(batch)
        return loss

    monkeypatch.setattr(paths.Net, "lower_objective", faulty)


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda x: x.sum().item(), "read: _local_scalar_dense"),
        (lambda x: x.tolist(), "read: _to_copy"),
        (lambda x: torch.zeros(3), "made: zeros"),
        (lambda x: torch.tensor(1.0, device=x.device), "copy: _to_copy"),
    ],
)
def test_in_a_product(
    monkeypatch: pytest.MonkeyPatch, provider: HVPProvider, fault: Callable[[Tensor], Any], what: str
) -> None:
    plant(monkeypatch, fault)
    with pytest.raises(AssertionError, match=what):
        assert_quiet(paths.product(provider)["product"])


@pytest.mark.parametrize("tensor", [lambda: torch.zeros(()), lambda: torch.ones(6, 4)])
def test_a_tensor_of_the_cpu_among_those_of_the_device(
    monkeypatch: pytest.MonkeyPatch, tensor: Callable[[], Tensor]
) -> None:
    plant(monkeypatch, lambda x: x + tensor())
    with pytest.raises(DeviceError, match="takes tensors of the device and of the CPU"):
        paths.product(ReverseOverReverse())


@pytest.mark.parametrize("solver", [CG(6, None), CG(6, None, recycle=6), Neumann(6), GMRES(6, rtol=None)], ids=str)
@pytest.mark.parametrize(
    "fault", [lambda x: x.sum().item(), lambda x: torch.zeros(2)], ids=["a read", "a tensor of the CPU"]
)
def test_between_the_products_of_a_fixed_budget(
    monkeypatch: pytest.MonkeyPatch, solver: Solver, fault: Callable[[Tensor], Any]
) -> None:
    plain = tree.axpy

    def faulty(alpha: Any, x: Params, y: Params) -> Params:
        fault(next(iter(x.values())))
        return plain(alpha, x, y)

    monkeypatch.setattr(tree, "axpy", faulty)
    with pytest.raises(AssertionError, match="a device path crosses over"):
        assert_quiet(paths.solved(solver)["between products"])


@pytest.mark.parametrize("name", ["Implicit(CG(3, rtol=None))", "SOBA"])
def test_in_a_step_of_a_trainer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, _ = paths.steps(paths.METHODS[name])
    plant(monkeypatch, lambda x: x.sum().item())
    after, _ = paths.steps(paths.METHODS[name])
    assert all(len(after[step]) > len(before[step]) for step in before)


def test_in_a_loss_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = vision.SimCLR.output_loss
    monkeypatch.setattr(vision.SimCLR, "output_loss", lambda self, z: plain(self, z) * (1.0 + 0.0 * float(z.sum())))
    crossings = [crossing for found in vision.loss_of("SimCLR").values() for crossing in found]
    with pytest.raises(AssertionError, match="read: _local_scalar_dense at"):
        assert_quiet(crossings)
