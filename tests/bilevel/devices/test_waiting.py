"""Hessian products give the device its work without ever waiting for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bilevel import linearize
from bilevel.products import HVPProvider
from tests.support.problems.device_networks import made
from tests.support.problems.small_modules import EXACT


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA an operation that makes the host wait raises; on a CPU there is nobody to wait for."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_a_product_does_not_wait(hvp: HVPProvider, device: torch.device) -> None:
    problem, upper, lower, batch = made("batch norm", device, torch.float32)
    operator = linearize(problem, upper, lower, [batch, batch], hvp=hvp).operator
    operator(lower)
    with no_waiting(device):
        product = operator(lower)
    assert all(leaf.device.type == device.type for leaf in product.values())
