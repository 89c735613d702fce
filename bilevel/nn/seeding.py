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
        if mark.on_gpu:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        mark.restore()


@final
class GeneratorMark:
    """Where the default generators of torch (CPU and CUDA), NumPy and Python stand."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_initialized()
        self._python, self._numpy, self._torch = random.getstate(), _NumpyState(), torch.default_generator.get_state()
        self._gpus = torch.cuda.get_rng_state_all() if self.on_gpu else []

    def moved(self) -> bool:
        """Whether any of them has been drawn from, or seeded, since."""
        now = GeneratorMark()
        return not (
            torch.equal(self._torch, now._torch)
            and self._python == now._python
            and self._numpy.equals(now._numpy)
            and len(self._gpus) == len(now._gpus)
            and all(map(torch.equal, self._gpus, now._gpus))
        )

    def restore(self) -> None:
        """Put them back to where they stood."""
        random.setstate(self._python)
        self._numpy.restore()
        torch.default_generator.set_state(self._torch)
        if self.on_gpu:
            torch.cuda.set_rng_state_all(self._gpus)


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
        self.raw, around = ctypes.string_at(self.address, _MT19937_BYTES), _around(_default())
        if _NumpyState._known[:2] != (self.raw, around):
            _NumpyState._known = self.raw, around, np.random.get_state()
        self.state = _NumpyState._known[2]

    def equals(self, other: "_NumpyState") -> bool:
        mine, theirs = self.state, other.state
        if self.address is None or other.address is None:
            return repr(mine) == repr(theirs)
        return mine is theirs or (mine[2:] == theirs[2:] and np.array_equal(mine[1], theirs[1]))

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
