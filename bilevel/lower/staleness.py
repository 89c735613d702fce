"""What tensors looked like, to tell later whether anything has changed since."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 4096


class StaleSystemError(RuntimeError):
    """A `System` was used after something that it was built from changed."""


@dataclass(frozen=True)
class Mark:
    """What a tensor looked like: version counters miss writes through `.data` and collectives, a sum catches most."""

    name: str
    identity: int
    version: int
    checksum: str


def take_marks(named: Iterable[tuple[str, Tensor]]) -> tuple[Mark, ...]:
    """A mark of each tensor; the checksums are read back once a device."""
    named = list(named)
    sums = _checksums([tensor for _, tensor in named])
    versions = [-1 if tensor.is_inference() else tensor._version for _, tensor in named]
    rows = zip(named, versions, sums, strict=True)
    return tuple(Mark(name, id(tensor), version, checksum) for (name, tensor), version, checksum in rows)


def check_marks(before: Sequence[Mark], now: Sequence[Mark]) -> None:
    """Raise StaleSystemError, naming the tensor, where two rows of marks differ."""
    if [mark.name for mark in before] != [mark.name for mark in now]:
        raise StaleSystemError("lower_batches: tensors were added or taken away after linearize; call linearize again")
    for old, new in zip(before, now, strict=True):
        if old.identity != new.identity:
            raise StaleSystemError(f"{new.name} is another tensor than at linearize; call linearize again")
        if old != new:
            raise StaleSystemError(
                f"{new.name} changed after linearize (version {old.version} -> {new.version}, checksum "
                f"{old.checksum} -> {new.checksum}); call linearize again"
            )


class BufferWatch:
    """The buffers that passes have read, as they were when first read."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Mark]] = {}

    def note(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of buffers not met before."""
        new = [(f"buffer {name!r}", tensor) for name, tensor in named if id(tensor) not in self._seen]
        for (_, tensor), mark in zip(new, take_marks(new), strict=True):
            self._seen[id(tensor)] = tensor, mark

    def check(self) -> None:
        """Raise StaleSystemError if one of them has changed."""
        marks = [mark for _, mark in self._seen.values()]
        check_marks(marks, take_marks([(mark.name, tensor) for tensor, mark in self._seen.values()]))


def _checksums(tensors: Sequence[Tensor]) -> list[str]:
    """Sums over samples, read back once a device; as text, so that a NaN equals itself."""
    sums: dict[int, str] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        values = torch.stack([_sample_sum(tensors[index]) for index in here]).tolist()
        sums.update(zip(here, map(float.hex, values), strict=True))
    return [sums[index] for index in range(len(tensors))]


def _sample_sum(tensor: Tensor) -> Tensor:
    tensor = _numbers(tensor.detach())
    # In the order of memory, so that flattening a channels-last batch copies nothing.
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.permute(order).reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].resolve_conj().resolve_neg()
    return (torch.view_as_real(sample) if sample.is_complex() else sample).to(torch.float64).sum()


def _numbers(tensor: Tensor) -> Tensor:
    """What a tensor of any layout holds, as a strided one."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.is_nested or tensor.layout in _COMPRESSED:
        tensor = tensor.values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.int_repr() if tensor.is_quantized else tensor


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
