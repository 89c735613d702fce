"""What tensors looked like, to tell later whether anything has changed since."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.problem import Problem
from bilevel.tree import Params

_SAMPLES = 4096


class StaleSystemError(RuntimeError):
    """A `System` was used after something that it was built from changed."""


class Mark(NamedTuple):
    """What a tensor looked like: version counters miss writes through `.data` and collectives, a sum catches most.

    A view of a part of its storage shares its counter with the other parts, whose writes change nothing here: where
    its counter moves, the sum over all its entries decides (`whole`, None for other tensors). Without checksums
    counters decide alone for the others.
    """

    name: str
    identity: int
    version: int
    checksum: str | None
    whole: str | None


def take_marks(named: Iterable[tuple[str, Tensor]], *, sums: bool = True) -> tuple[Mark, ...]:
    """A mark of each tensor; the checksums are read back once a device. Without `sums` there are only those of views of
    a part of their storage, whose counters do not tell."""
    named = list(named)
    checksums = _checksums([tensor for _, tensor in named]) if sums else [None] * len(named)
    rows = zip(named, checksums, strict=True)
    return tuple(
        Mark(name, id(tensor), _version(tensor), checksum, _whole_sum(tensor) if _is_part(tensor) else None)
        for (name, tensor), checksum in rows
    )


def check_marks(before: Sequence[Mark], named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise StaleSystemError, naming the tensor, where one does not look as it did."""
    named = list(named)
    if [mark.name for mark in before] != [name for name, _ in named]:
        raise StaleSystemError("lower_batches: tensors were added or taken away after linearize; call linearize again")
    for old, (name, tensor) in zip(before, named, strict=True):
        if old.identity != id(tensor):
            raise StaleSystemError(f"{name} is another tensor than at linearize; call linearize again")
    summed = [tensor for mark, (_, tensor) in zip(before, named, strict=True) if mark.checksum is not None]
    sums = iter(_checksums(summed))
    for old, (name, tensor) in zip(before, named, strict=True):
        version, checksum = _version(tensor), None if old.checksum is None else next(sums)
        if (version != old.version and _is_written(tensor, old)) or checksum != old.checksum:
            raise StaleSystemError(
                f"{name} changed after linearize (version {old.version} -> {version}, checksum {old.checksum} -> "
                f"{checksum}); call linearize again, or keep the objectives from writing to it if nothing else does"
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
        check_marks(marks, [(mark.name, tensor) for tensor, mark in self._seen.values()])


def _checksums(tensors: Sequence[Tensor]) -> list[str]:
    """Sums over samples, read back once a device; as text, so that a NaN equals itself."""
    sums: dict[int, str] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        values = torch.stack([_sample_sum(tensors[index]) for index in here]).tolist()
        sums.update(zip(here, map(float.hex, values), strict=True))
    return [sums[index] for index in range(len(tensors))]


def _is_written(tensor: Tensor, old: Mark) -> bool:
    """Whether a counter that has moved tells of the tensor itself, not of other parts of its storage."""
    return old.whole is None or old.whole != _whole_sum(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor covers a part of its storage alone."""
    plain = tensor.layout is torch.strided and not tensor.is_nested
    return plain and tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


def _whole_sum(tensor: Tensor) -> str:
    """Over all entries, each by its place, so that an exchange of two of them is seen."""
    flat = strided(tensor.detach()).resolve_conj().resolve_neg().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    places = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=tree.widest(flat.device))
    return float.hex(float(torch.dot(tree.wide(flat), places)))


def _sample_sum(tensor: Tensor) -> Tensor:
    plain = tensor.layout is torch.strided and type(tensor) in _PLAIN and tensor.dtype in _REAL
    if plain and not tensor.is_nested and tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        return flat[:: max(1, flat.numel() // _SAMPLES)].sum(dtype=tree.widest(flat.device))
    tensor = strided(tensor.detach())
    # In the order of memory, so that flattening a channels-last batch copies nothing.
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.permute(order).reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].resolve_conj().resolve_neg()
    return tree.wide(torch.view_as_real(sample) if sample.is_complex() else sample).sum()


def strided(tensor: Tensor) -> Tensor:
    """What a tensor of any layout holds, as a strided one."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.is_nested or tensor.layout in _COMPRESSED:
        tensor = tensor.values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.int_repr() if tensor.is_quantized else tensor


_PLAIN, _REAL = (Tensor, torch.nn.Parameter), (torch.float32, torch.float64, torch.int64)
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@final
class Inputs:
    """What a linear system was built from, and whether it is still that.

    Args:
        batches: the lower ones.
        buffers: those that the lower objective has read.
        sums: take checksums of the tensors, which tell of changes that no version counter does.
    """

    def __init__(
        self,
        problem: Problem,
        upper: Params,
        lower: Params,
        batches: Sequence[Any],
        buffers: BufferWatch,
        *,
        sums: bool,
    ) -> None:
        self.problem, self.upper, self.lower, self.batches, self.buffers = problem, upper, lower, batches, buffers
        self._weight, self._invalidated = problem.regularization_weight, False
        self._marks = take_marks(self._named_tensors(), sums=sums)

    def invalidate(self) -> None:
        """Declare that it is not."""
        self._invalidated = True

    def check(self) -> None:
        """Raise StaleSystemError if tensors are other objects, other versions or have other sums."""
        if self._invalidated:
            raise StaleSystemError("the system was invalidated; call linearize again")
        weight = self.problem.regularization_weight
        if weight != self._weight:
            raise StaleSystemError(
                f"regularization_weight changed after linearize ({self._weight} -> {weight}); call linearize again"
            )
        check_marks(self._marks, self._named_tensors())
        self.buffers.check()

    def batch_sums(self) -> tuple[str, ...]:
        """Checksums of the tensors of the batches."""
        named = [(str(k), tensor) for k, batch in enumerate(self.batches) for tensor in tree.tensors_in(batch)]
        return tuple(str(mark.checksum) for mark in take_marks(named))

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        """All tensors, under the names that messages give them."""
        named = [(f"lower[{n!r}]", t) for n, t in self.lower.items()]
        if self.problem.curvature_depends_on_upper:
            named += [(f"upper[{n!r}]", t) for n, t in self.upper.items()]
        for k, batch in enumerate(self.batches):
            named += [(f"lower_batches[{k}], tensor {i}", t) for i, t in enumerate(tree.tensors_in(batch))]
        return named
