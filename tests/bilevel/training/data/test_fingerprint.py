"""A batch is known again by its fingerprint, and another one is told from it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel.training.data.fingerprint import SAMPLED, fingerprint


@dataclass
class Labelled:
    inputs: Tensor
    name: str


class Plain:
    def __init__(self, inputs: Tensor) -> None:
        self.inputs, self.itself, self.other = inputs, self, object()


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, Any] = {
    "tensor": lambda seed: numbers(seed, 3, 4),
    "strided": lambda seed: numbers(seed, 3, 4).T[::2],
    "half": lambda seed: numbers(seed, 5).bfloat16(),
    "integers": lambda seed: torch.tensor([seed, 2]),
    "flags": lambda seed: torch.tensor([bool(seed), True]),
    "conjugated": lambda seed: torch.complex(numbers(seed, 3), numbers(seed, 3)).conj(),
    "0-d": lambda seed: torch.tensor(float(seed)),
    "sparse": lambda seed: numbers(seed, 3, 4).to_sparse(),
    "nested": lambda seed: torch.nested.nested_tensor([numbers(seed, 2), numbers(seed, 3)], layout=torch.jagged),
    "array": lambda seed: numbers(seed, 3).numpy(),
    "array of strings": lambda seed: np.array([f"{seed}", "b"]),
    "array of objects": lambda seed: np.array([seed, "b"], dtype=object),
    "dict": lambda seed: {"x": numbers(seed, 3), "n": 1},
    "lists": lambda seed: [[1, (seed, "a")], None],
    "text": lambda seed: {"text": [f"{seed}", "b"]},
    "dataclass": lambda seed: Labelled(numbers(0, 3), str(seed)),
    "attributes": lambda seed: Plain(numbers(seed, 2)),
    "keys": lambda seed: {str(seed): 1},
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_the_same_content_and_no_other_has_the_same_fingerprint(make: Any) -> None:
    assert fingerprint(make(0)) == fingerprint(make(0)) != fingerprint(make(1))


def test_shape_and_dtype_count() -> None:
    x = torch.zeros(4)
    assert len({fingerprint(each) for each in (x, x.view(2, 2), x.int(), x[:3], [x], x.numpy())}) == 6


@pytest.mark.parametrize("width", [32, 127, 224])
def test_of_a_large_batch_no_column_is_left_out(width: int) -> None:
    x = torch.zeros(10 * SAMPLED // width + 1, width)
    assert len(x.reshape(-1)) > 5 * SAMPLED
    prints = {fingerprint(x)}
    for column in range(width):
        other = x.clone()
        other[:, column] = 1.0
        prints.add(fingerprint(other))
    assert len(prints) == width + 1
