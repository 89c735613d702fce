"""Copies to a device: what arrives, when, from where, and whose memory it is."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.training import Transfer, transfer_to
from bilevel.tree import map_tensors, tensors_in
from tests.support.fake_cuda import CUDA, FakeCuda

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Labelled:
    images: Tensor
    name: str


BATCHES: dict[str, Any] = {
    "a tensor": torch.arange(6.0).reshape(2, 3) + 1,
    "bytes": torch.arange(1, 13, dtype=torch.uint8).reshape(2, 1, 2, 3),
    "truth values": torch.tensor([True, False]),
    "one number": torch.tensor(3),
    "no entries": torch.zeros(0, 3),
    "not contiguous": (torch.arange(6.0).reshape(2, 3) + 1).T,
    "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "a tuple": (torch.ones(2), torch.ones(3, dtype=torch.int64)),
    "a dictionary": {"views": [torch.ones(2), (torch.full((2,), 2.0), 3)], "label": torch.arange(1, 4)},
    "a dataclass": Labelled(torch.ones(2, 3), "a"),
    "a named tuple": Pair(torch.ones(2), [3]),
    "no tensor": {"name": "a", "number": 1},
}


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    alike = all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs)
    return alike and type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize("kind", BATCHES)
def test_what_arrives_is_what_was_sent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, cuda = BATCHES[kind], FakeCuda(monkeypatch)
    there = Transfer(CUDA)(batch)
    assert same(there, batch)
    count = len(list(tensors_in(batch)))
    assert cuda.pinned == len(cuda.copies) == count
    assert cuda.all_recorded()


def test_a_copy_is_waited_for_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    arriving = Transfer(CUDA).begin((torch.ones(3), torch.ones(2)))
    copies = arriving._batch
    assert not any(bool(copy.any()) for copy in copies), "begun, and not made"
    assert all(bool(copy.all()) for copy in arriving.take())


def test_batches_arrive_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    transfer = Transfer(CUDA)
    first, second = transfer.begin(torch.tensor([1.0])), transfer.begin(torch.tensor([2.0]))
    assert float(second.take()) == 2.0
    assert float(first.take()) == 1.0
    assert float(first.take()) == 1.0


def test_what_was_sent_may_be_overwritten_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    transfer, buffer, under_way = Transfer(CUDA), torch.zeros(3), []
    for number in range(4):
        buffer.fill_(number)
        under_way.append(transfer.begin(buffer))
    assert [arriving.take().tolist() for arriving in under_way] == [[float(number)] * 3 for number in range(4)]


def test_what_is_on_its_device_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"a": torch.ones(2), "b": [torch.ones(3)]}
    there = Transfer(CPU)(batch)
    assert all(a is b for a, b in zip(tensors_in(there), tensors_in(batch), strict=True))
    meta = map_tensors(lambda tensor: tensor.to("meta"), batch)
    there = Transfer(torch.device("meta"))(meta)
    assert all(a is b for a, b in zip(tensors_in(there), tensors_in(meta), strict=True))
    cuda = FakeCuda(monkeypatch)
    assert Transfer(CUDA)([]) == []
    assert not cuda.copies


def test_other_devices_are_reached_too() -> None:
    assert [tensor.is_meta for tensor in Transfer(torch.device("meta"))((torch.ones(2), torch.ones(3)))] == [True, True]


def test_one_stream_a_device() -> None:
    assert transfer_to(CPU) is transfer_to(torch.device("cpu"))
    assert transfer_to(torch.device("cuda", 0)) is not transfer_to(torch.device("cuda", 1))


def test_copies_beside_a_busy_device_are_whole(device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    transfer, buffer = Transfer(device), torch.zeros(1 << (22 if on_gpu else 4))
    busy = torch.randn(4096, 4096, device=device) if on_gpu else torch.randn(4, 4)
    under_way = []
    for number in range(1, 9):
        buffer.fill_(number)
        # What is on its device is not copied.
        under_way.append(transfer.begin({"batch": buffer if on_gpu else buffer.clone(), "there": busy}))
        busy = (busy @ busy).tanh()
    for number, arriving in enumerate(under_way, 1):
        taken = arriving.take()
        assert taken["batch"].device.type == device.type
        assert bool((taken["batch"] == number).all())
        assert taken["there"].device.type == device.type
