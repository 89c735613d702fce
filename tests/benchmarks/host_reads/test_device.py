"""The simulated device calculates as the CPU does, and sees what crosses over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.host_reads.device import DeviceError, DeviceTensor, SimulatedDevice
from bilevel import tree

X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])

READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool(x.sum() > 0.0),
    "if": lambda x: 1 if x.sum() > 0.0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to another dtype too": lambda x: x.to("cpu", torch.float64),
    "copy_ to the host": lambda x: torch.zeros(2, 3).copy_(x),
    "equal": lambda x: torch.equal(x, x + 1.0),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0.0],
    "assignment by a mask": lambda x: x.clone().__setitem__(x > 0.0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0.0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: (x > 0.0).long().flatten().bincount(),
}

QUIET: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda x: torch.where(x > 0.0, x, 0.0),
    "arithmetic with numbers": lambda x: 2.0 * x + 1,
    "index": lambda x: x[1],
    "gather": lambda x: x.gather(1, x.argsort(dim=1)),
    "index by places": lambda x: x[:, x[0].argsort()],
    "like": lambda x: torch.zeros_like(x) + torch.full((), 3.0, device=x.device),
    "foreach": lambda x: torch._foreach_norm([x, x]),  # pyright: ignore[reportPrivateImportUsage]
    "in place": lambda x: x.clone().mul_(2.0).add_(x, alpha=0.5),
    "sort": lambda x: x.sort(dim=1).values,
    "a tensor of numbers that are on the device": lambda x: torch.stack([x.sum(), x.max()]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_counted(read: Callable[[Tensor], Any]) -> None:
    with SimulatedDevice() as device:
        x = device.put(X)
        with device.watched() as found:
            read(x)
    assert [crossing.kind for crossing in found if crossing.kind != "made"] == ["read"]
    assert all(crossing.place.startswith("tests/benchmarks/host_reads/test_device.py:") for crossing in found)


def values(found: Any) -> list[Tensor]:
    return [leaf.numbers if isinstance(leaf, DeviceTensor) else leaf for leaf in tree_leaves(found)]


@pytest.mark.parametrize("operation", QUIET.values(), ids=QUIET)
def test_what_stays_on_the_device_is_no_crossing_and_has_the_same_numbers(operation: Callable[[Tensor], Any]) -> None:
    with SimulatedDevice() as device:
        x = device.put(X)
        with device.watched() as found:
            result = operation(x)
    assert not found
    for here, there in zip(values(result), values(operation(X)), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3),
        lambda x: x * torch.zeros(()),
        lambda x: x + torch.tensor(2.0),
        lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, 0.0),
        lambda x: x @ torch.ones(3, 2),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: torch._foreach_add([x, x], [x, torch.ones(2, 3)]),  # pyright: ignore[reportPrivateImportUsage]
    ],
)
def test_tensors_of_two_devices_are_refused(operation: Callable[[Tensor], Any]) -> None:
    with SimulatedDevice() as device:
        x = device.put(X)
        with pytest.raises(DeviceError, match=r"takes tensors of the device and of the CPU at tests/.*test_device.py:"):
            operation(x)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x),
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    ],
)
def test_a_copy_to_the_device_is_counted(copy: Callable[[Tensor], Any]) -> None:
    with SimulatedDevice() as device:
        x = device.put(X)
        before = device.count("copy")
        copy(x)
    assert device.count("copy") == before + 1
    assert device.count("read") == 0


@pytest.mark.parametrize(
    "make",
    [lambda: torch.zeros(2), lambda: torch.tensor(1.0), lambda: torch.randn(3), lambda: torch.arange(4)],
)
def test_a_tensor_of_the_cpu_is_counted(make: Callable[[], Tensor]) -> None:
    with SimulatedDevice() as device, device.watched() as found:
        make()
    assert [crossing.kind for crossing in found] == ["made"]


@pytest.mark.parametrize("make", [Tensor.double, lambda x: x.sum(dtype=torch.float64)])
def test_a_device_without_float64_refuses_it(make: Callable[[Tensor], Tensor]) -> None:
    with SimulatedDevice(float64=False) as device:
        x = device.put(X)
        assert torch.equal(values(tree.wide(x))[0], X)
        assert tree.wide(X).dtype == x.cpu().double().dtype == torch.float64
        with pytest.raises(TypeError, match=r"makes float64 on a device that has none at tests/.*test_device.py:"):
            make(x)
    assert make(X).dtype == torch.float64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()


def products(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Loss, gradient, a Hessian product by reverse mode twice, and one by forward over reverse."""
    variables = {name: leaf.detach() for name, leaf in module.named_parameters()}
    buffers = {name: leaf.clone() for name, leaf in module.named_buffers()}

    def loss(y: dict[str, Tensor]) -> Tensor:
        fresh = {name: leaf.clone() for name, leaf in buffers.items()}
        return torch.func.functional_call(module, {**y, **fresh}, (images,)).square().mean()

    y = {name: leaf.clone().requires_grad_() for name, leaf in variables.items()}
    value = loss(y)
    gradient = torch.autograd.grad(value, list(y.values()), create_graph=True)
    twice = torch.autograd.grad(gradient, list(y.values()), grad_outputs=list(variables.values()))
    forward = torch.func.jvp(torch.func.grad(loss), (variables,), (variables,))[1]
    return [leaf.detach() for leaf in (value, *gradient, *twice, *forward.values())]


def test_derivatives_of_a_network_are_those_of_the_cpu() -> None:
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = products(net(), images)
    with SimulatedDevice() as device:
        module = device.put(net())
        found = products(module, device.put(images))
    assert all(isinstance(leaf, DeviceTensor) and leaf.device.type == "meta" for leaf in found)
    for here, there in zip(values(found), expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)
    assert not [crossing for crossing in device.crossings if crossing.kind != "made"]


def test_a_module_is_moved_with_its_buffers_and_stays_a_module() -> None:
    with SimulatedDevice() as device:
        module = device.put(net().requires_grad_(False))
        leaves = [*module.parameters(), *module.buffers()]
        assert all(isinstance(leaf, DeviceTensor) for leaf in leaves)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert list(module.state_dict()) == list(net().state_dict())


def test_generators_of_the_device_draw_there() -> None:
    with SimulatedDevice() as device:
        generator = torch.Generator(device.put(X).device).manual_seed(3)
        drawn = torch.randn(4, device="meta", generator=generator)
        assert isinstance(drawn, DeviceTensor)
        assert torch.equal(drawn.numbers, torch.randn(4, generator=torch.Generator().manual_seed(3)))


def test_outside_of_it_a_tensor_of_the_device_is_refused() -> None:
    with SimulatedDevice() as device:
        x = device.put(X)
    with pytest.raises(RuntimeError, match="outside of `with SimulatedDevice"):
        x.sum()


def test_torch_is_afterwards_as_it_was() -> None:
    before = torch.tensor, torch.as_tensor, torch.Generator, torch.autocast
    with SimulatedDevice():
        pass
    assert before == (torch.tensor, torch.as_tensor, torch.Generator, torch.autocast)
