"""The default random generators: whether something has drawn from them."""

import random
from typing import Any, final

import numpy as np
import torch


@final
class GeneratorMark:
    """Where the default generators of torch (CPU and CUDA), NumPy and Python stand."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state(legacy=True)
        self._torch = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def moved(self) -> bool:
        """Whether any of them has been drawn from, or seeded, since."""
        now = GeneratorMark()
        return not (
            torch.equal(self._torch, now._torch)
            and self._python == now._python
            and _same(self._numpy, now._numpy)
            and len(self._cuda) == len(now._cuda)
            and all(map(torch.equal, self._cuda, now._cuda))
        )

    def restore(self) -> None:
        """Put them back to where they stood."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _same(one: Any, other: Any) -> bool:
    return one[2:] == other[2:] and np.array_equal(one[1], other[1])
