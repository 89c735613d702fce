"""Random masks of one pass: the default generators seeded for its length, and put back."""

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, final

import numpy as np
import torch

from bilevel.distributed import rank, world_size

_MT19937_BYTES = 624 * 4 + 4


@contextmanager
def own_draws() -> Iterator[None]:
    """An ordinary pass on this rank's samples: it leaves the default generators as equal on all ranks as they were."""
    if world_size() == 1:
        yield
        return
    with seeded(int(torch.randint(2**31 - 1, ()))):
        yield


def chunk_seeds(seed: int, count: int) -> list[int]:
    """One seed for each chunk of a batch whose seed is `seed`; a single chunk has the batch's own."""
    generator = torch.Generator().manual_seed(seed)
    return [seed, *torch.randint(2**31 - 1, (count - 1,), generator=generator).tolist()]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the default generators of torch, NumPy and Python, and restores them afterwards.

    Each of several ranks has a seed of its own: its samples are other ones, and shall not share their masks.
    """
    seed = (seed + 2654435761 * rank()) % 2**32
    mark = GeneratorMark()
    try:
        # torch.manual_seed would keep a stack trace for a GPU that is not in use yet, which takes milliseconds.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        mark.restore()


@final
class TorchMark:
    """Where torch's default generators stand, those of the CPU and of CUDA devices."""

    def __init__(self) -> None:
        self._cpu = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def moved(self) -> bool:
        """Whether any of them has been drawn from, or seeded, since."""
        same = torch.equal(self._cpu, torch.default_generator.get_state())
        return not (same and all(map(torch.equal, self._cuda, torch.cuda.get_rng_state_all() if self._cuda else [])))

    def restore(self) -> None:
        """Put them back to where they stood."""
        torch.default_generator.set_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@final
class GeneratorMark:
    """Where the default generators of torch, NumPy and Python stand."""

    def __init__(self) -> None:
        self._torch, self._numpy, self._python = TorchMark(), _NumpyState(), random.getstate()

    def moved(self) -> bool:
        """Whether any of them has been drawn from, or seeded, since."""
        return self._torch.moved() or self._python != random.getstate() or not self._numpy.is_current()

    def restore(self) -> None:
        """Put them back to where they stood."""
        self._torch.restore()
        self._numpy.restore()
        random.setstate(self._python)


class _NumpyState:
    """The state of NumPy's default generator, to be put back.

    NumPy takes 70 microseconds to give it as an array and take it back, half of what a small pass costs. Its bytes lie
    where `BitGenerator.ctypes` says, and in the object around it the normal number that it may hold in reserve. So the
    array's form is asked for only where bytes have changed since it was last asked for.
    """

    _known: tuple[bytes, bytes, Any] = b"", b"", None

    def __init__(self) -> None:
        self.address = _address(np.random.get_bit_generator())
        if self.address is None:
            self.state: Any = np.random.get_state()
            return
        self.raw, self.around = ctypes.string_at(self.address, _MT19937_BYTES), _around(_default())
        if _NumpyState._known[:2] != (self.raw, self.around):
            _NumpyState._known = self.raw, self.around, np.random.get_state()
        self.state = _NumpyState._known[2]

    def is_current(self) -> bool:
        """Whether the generator stands where it did."""
        if self.address is None:
            return repr(self.state) == repr(np.random.get_state())
        return (self.raw, self.around) == (ctypes.string_at(self.address, _MT19937_BYTES), _around(_default()))

    def restore(self) -> None:
        *_, in_reserve, _ = self.state
        if self.address is None or in_reserve:
            np.random.set_state(self.state)
            return
        # A seed takes away what the pass has left in reserve.
        np.random.seed(0)
        ctypes.memmove(self.address, self.raw, _MT19937_BYTES)


def _default() -> Any:
    """The object that NumPy's functions draw from."""
    return getattr(np.random.get_state, "__self__", None)


def _around(generator: Any) -> bytes:
    """What an object holds of its own, but for its count of references."""
    skipped = object.__basicsize__
    return ctypes.string_at(id(generator) + skipped, type(generator).__basicsize__ - skipped)


def _address(generator: Any) -> int | None:
    """Where the bytes of NumPy's default generator lie; None where they are not of the kind that is known here."""
    if type(generator) is not np.random.MT19937 or not _is_laid_out():
        return None
    return generator.ctypes.state_address


@cache
def _is_laid_out() -> bool:
    """Whether the bytes of a Mersenne twister are its 624 words and its place among them, and those around it change
    with its reserve."""
    generator = np.random.MT19937(0)
    words = generator.state["state"]
    expected = words["key"].astype(np.uint32).tobytes() + np.int32(words["pos"]).tobytes()
    drawing = np.random.RandomState(generator)
    before = _around(drawing)
    drawing.standard_normal()
    return (
        isinstance(_default(), np.random.RandomState)
        and ctypes.string_at(np.random.MT19937(0).ctypes.state_address, _MT19937_BYTES) == expected
        and _around(drawing) != before
    )
