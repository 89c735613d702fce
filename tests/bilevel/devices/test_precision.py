"""Products and hypergradients on a device in float64, float32 and TF32, against float64 on the CPU.

What is allowed is what rounding to the format changes in that computation, measured (`tests.support.rounding`).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from bilevel import CG, Implicit, Params, hypergradient
from bilevel.nn import curvature_pass
from bilevel.products import FiniteDifference, HVPProvider, ReverseOverReverse
from tests.support.problems.device_networks import NETWORKS, made
from tests.support.problems.small_modules import EXACT
from tests.support.rounding import (
    FLOAT32,
    FLOAT64,
    FORMATS,
    Format,
    arithmetic,
    distance,
    float64_limit,
    rounding_limit,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CPU = torch.device("cpu")
EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS)
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS, ids=str)
Record = Callable[[str, object], None]


def product(network: str, hvp: HVPProvider, device: torch.device, dtype: torch.dtype, **options: Any) -> Params:
    """Of the Hessian alone: a regularizer's identity would hide its errors."""
    problem, upper, lower, batch = made(network, device, dtype, **options)
    with curvature_pass():
        return hvp.linearize(lambda x, y: problem.lower_objective(x, y, batch), upper, lower).hessian(lower)


def gradient(network: str, hvp: HVPProvider, device: torch.device, dtype: torch.dtype, **options: Any) -> Params:
    problem, upper, lower, batch = made(network, device, dtype, **options)
    method = Implicit(CG(3, rtol=None), hvp=hvp)
    return hypergradient(problem, upper, lower, method, upper_batch=batch, lower_batches=[batch]).grad


COMPUTED = {"product": product, "hypergradient": gradient}
EVERY_RESULT = pytest.mark.parametrize("what", COMPUTED)


@cache
def on_the_cpu(what: str, network: str) -> Params:
    return COMPUTED[what](network, ReverseOverReverse(), CPU, torch.float64)


@cache
def allowed(what: str, network: str, form: Format) -> float:
    if form is FLOAT64:
        return float64_limit(allowed(what, network, FLOAT32))
    return rounding_limit(partial(COMPUTED[what], network, ReverseOverReverse(), CPU, torch.float64), form)


def check(found: Params, what: str, network: str, form: Format, record_property: Record) -> None:
    error, limit = distance(found, on_the_cpu(what, network)), allowed(what, network, form)
    record_property("error", error)
    record_property("limit", limit)
    assert error <= limit
    # A term that is missing or wrong is of the size of the result, and is noticed.
    assert limit < 0.3


@EVERY_RESULT
@EVERY_NETWORK
@EVERY_FORMAT
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_second_derivatives_are_those_of_float64_on_the_cpu(
    what: str, network: str, form: Format, hvp: HVPProvider, device: torch.device, record_property: Record
) -> None:
    with arithmetic(device, form):
        found = COMPUTED[what](network, hvp, device, form.dtype)
    assert {(leaf.device.type, leaf.dtype) for leaf in found.values()} == {(device.type, form.dtype)}
    check(found, what, network, form, record_property)


@EVERY_RESULT
@EVERY_FORMAT
@pytest.mark.parametrize("network", ["batch norm", "weight norm"])
def test_they_are_the_same_with_channels_last(
    what: str, network: str, form: Format, device: torch.device, record_property: Record
) -> None:
    with arithmetic(device, form):
        found = COMPUTED[what](network, ReverseOverReverse(), device, form.dtype, layout=torch.channels_last)
    check(found, what, network, form, record_property)


@pytest.mark.parametrize("network", ["weight norm", "LSTM", "attention"])
def test_differences_of_gradients_are_as_close_as_on_the_cpu(network: str, device: torch.device) -> None:
    exact = on_the_cpu("product", network)
    here, there = (
        distance(product(network, FiniteDifference(), place, torch.float64), exact) for place in (CPU, device)
    )
    # Their error is that of the step, which both choose alike; what differs is rounding, divided by it.
    assert there <= 2.0 * here + 1e-8
