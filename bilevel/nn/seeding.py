"""Random masks of one pass: the default generators seeded for its length, and put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch

from bilevel.distributed import rank, world_size


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
        self._torch, self._python = TorchMark(), random.getstate()
        self._numpy: Any = np.random.get_state(legacy=False)

    def moved(self) -> bool:
        """Whether any of them has been drawn from, or seeded, since."""
        now: Any = np.random.get_state(legacy=False)
        return self._torch.moved() or self._python != random.getstate() or not _same(self._numpy, now)

    def restore(self) -> None:
        """Put them back to where they stood."""
        self._torch.restore()
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return np.array_equal(one, other)
