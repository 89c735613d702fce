"""A pass's own random numbers, and the generators as they were after it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.nn import curvature_pass
from bilevel.nn.seeding import seeded


def draws() -> tuple[Any, ...]:
    return (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn(), random.gauss(0, 1))


@pytest.fixture(autouse=True)
def generators() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def nothing() -> None:
    pass


def one_normal() -> None:
    """Leaves another one in reserve."""
    np.random.randn()


def two_normals() -> None:
    np.random.randn(2)


def one_word() -> None:
    np.random.bytes(4)


BEFORE = (nothing, one_normal, two_normals, one_word)


@pytest.mark.parametrize("inside", BEFORE)
@pytest.mark.parametrize("before", BEFORE)
def test_generators_go_on_as_if_there_had_been_no_pass(before: Callable[[], None], inside: Callable[[], None]) -> None:
    def stream(passes: int) -> list[Any]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        found = []
        for _ in range(3):
            before()
            for _ in range(passes):
                with seeded(7):
                    draws()
                    inside()
            found.append((np.random.randn(), torch.rand(()).item(), random.random()))
        return found

    assert stream(2) == stream(1) == stream(0)


def test_equal_seeds_draw_equal_numbers_whatever_came_before() -> None:
    with seeded(3):
        first = draws()
    draws()
    one_normal()
    with seeded(3):
        assert draws() == first
    with seeded(4):
        assert draws() != first


def test_generators_are_put_back_after_an_error() -> None:
    expected = np.random.RandomState(1).randn(2)

    def fail() -> None:
        draws()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), curvature_pass(2):
        fail()
    assert np.array_equal(np.random.randn(2), expected)
