"""Every path runs on the simulated device, gives what it gives on the CPU, and reads as often as the page says."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import bilevel.hypergradients
import bilevel.linear
import bilevel.products
from benchmarks.host_reads import paths, vision
from benchmarks.host_reads.device import Crossing, DeviceTensor, SimulatedDevice
from benchmarks.host_reads.run import PARTS, counted, evaluation, main, tables
from benchmarks.pages import insert
from bilevel import linearize
from bilevel.hypergradients import Method
from bilevel.linear import Solver
from bilevel.products import HVPProvider
from tests.support.paths import ROOT

KEPT, PAGE = ROOT / "benchmarks" / "results" / "host_reads.json", ROOT / "docs" / "cost.md"
FIGURES = json.loads(KEPT.read_text(encoding="utf-8"))

MODEL = "Nystrom(4, rtol=None)"
"""A direct solve, whose refinement depends on how good it is."""


def subclasses(room: Any, base: type) -> set[str]:
    """Names of a room's public, concrete subclasses."""
    named = {name: getattr(room, name) for name in room.__all__}
    kinds = {name: kind for name, kind in named.items() if isinstance(kind, type) and issubclass(kind, base)}
    return {name for name, kind in kinds.items() if not kind.__abstractmethods__}  # type: ignore[attr-defined]


def test_every_method_solver_and_provider_is_a_path() -> None:
    methods = {type(kind.method).__name__ for kind in paths.METHODS.values()}
    assert methods == subclasses(bilevel.hypergradients, Method)
    solvers = {type(solver).__name__ for solver in paths.FIXED.values()}
    assert solvers == subclasses(bilevel.linear, Solver)
    providers = {type(make()).__name__ for make in paths.PROVIDERS.values()}
    assert providers == subclasses(bilevel.products, HVPProvider)


def assert_quiet(crossings: Sequence[Crossing]) -> None:
    """No read, no copy, and no tensor of the CPU."""
    assert not crossings, f"a device path crosses over: {', '.join(map(str, crossings))}"


@pytest.mark.parametrize("name", paths.PROVIDERS)
def test_nothing_crosses_over_in_a_product(name: str) -> None:
    found = paths.product(paths.PROVIDERS[name]())
    for part in ("first product", "product", "cross term"):
        assert_quiet(found[part])
    assert counted(found) == FIGURES["products"][name]


@pytest.mark.parametrize("name", paths.FIXED)
def test_nothing_crosses_over_between_the_products_of_a_fixed_budget(name: str) -> None:
    found = paths.solved(paths.FIXED[name])
    between = found["between products"]
    if name == MODEL:
        assert {crossing.place.rpartition(":")[0] for crossing in between} == {"bilevel/linear/account.py"}
        assert len(between) == 2
    else:
        assert_quiet(between)
    assert counted(found) == FIGURES["solves"][name]


@pytest.mark.parametrize("name", paths.ADAPTIVE)
def test_a_solver_that_adapts_reads_once_an_iteration(name: str) -> None:
    found = paths.solved(paths.ADAPTIVE[name])
    # Nystrom's model is one product, and two reads say whether it serves.
    assert len(found["between products"]) <= 7
    assert counted(found) == FIGURES["solves"][name]


@pytest.mark.parametrize("name", [*paths.FIXED, *paths.ADAPTIVE])
def test_a_solve_on_the_device_is_that_of_the_cpu(name: str) -> None:
    solver = {**paths.FIXED, **paths.ADAPTIVE}[name]
    expected = list(paths.solve(solver, paths.on_cpu))
    with SimulatedDevice() as device:
        found = list(paths.solve(solver, device.put))
    for here, there in zip(found, expected, strict=True):
        assert (here.status, here.iterations, here.num_hvps) == (there.status, there.iterations, there.num_hvps)
        assert here.residual_norms == pytest.approx(there.residual_norms, rel=1e-6, abs=1e-12, nan_ok=True)
        for leaf, same in zip(here.value.values(), there.value.values(), strict=True):
            assert isinstance(leaf, DeviceTensor)
            torch.testing.assert_close(leaf.numbers, same, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", paths.METHODS)
def test_steps_on_the_device_are_those_of_the_cpu_and_read_as_often_as_the_page_says(name: str) -> None:
    found, trained = paths.steps(paths.METHODS[name])
    assert counted(found) == FIGURES["steps"][name]
    for leaf, same in zip(trained.values(), paths.train(paths.METHODS[name], paths.on_cpu).values(), strict=True):
        assert isinstance(leaf, DeviceTensor)
        # float32, with other kernels for the double backward of a BatchNorm.
        torch.testing.assert_close(leaf.numbers, same.detach(), rtol=1e-3, atol=1e-5)


def in_float32(put: paths.Put) -> paths.Put:
    """What is put is in float32 before."""
    return lambda given: put(tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, given))


@pytest.mark.parametrize("name", [*paths.FIXED, *paths.ADAPTIVE])
def test_a_solve_needs_no_float64_on_the_device(name: str) -> None:
    solver = {**paths.FIXED, **paths.ADAPTIVE}[name]
    with SimulatedDevice(float64=False) as device:
        found = list(paths.solve(solver, in_float32(device.put)))
    for here, there in zip(found, paths.solve(solver, in_float32(paths.on_cpu)), strict=True):
        for leaf, same in zip(here.value.values(), there.value.values(), strict=True):
            assert isinstance(leaf, DeviceTensor)
            torch.testing.assert_close(leaf.numbers, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", paths.PROVIDERS)
def test_a_product_needs_no_float64_on_the_device(name: str) -> None:
    def made(put: paths.Put, provider: HVPProvider) -> list[Tensor]:
        point = paths.setting(put)
        # Of dropout.
        torch.manual_seed(2)
        options: dict[str, Any] = {"hvp": provider, "damping": 2.0}
        system = linearize(point.problem, point.upper, point.lower, point.batches[:2], **options)
        return [*system.operator(point.lower).values(), *system.cross(point.lower).values()]

    with SimulatedDevice(float64=False) as device:
        found = made(device.put, paths.PROVIDERS[name]())
    for leaf, same in zip(found, made(paths.on_cpu, paths.PROVIDERS[name]()), strict=True):
        assert isinstance(leaf, DeviceTensor)
        # Differences of gradients in float32 have about a third of its digits.
        torch.testing.assert_close(leaf.numbers, same, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", paths.METHODS)
def test_steps_need_no_float64_on_the_device(name: str) -> None:
    kind = paths.METHODS[name]
    with SimulatedDevice(float64=False) as device:
        trained = paths.train(kind, device.put)
    for leaf, same in zip(trained.values(), paths.train(kind, paths.on_cpu).values(), strict=True):
        assert isinstance(leaf, DeviceTensor)
        torch.testing.assert_close(leaf.numbers, same.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", vision.PATHS)
def test_nothing_waits_in_the_parts_of_the_recipe(name: str) -> None:
    found = vision.PATHS[name]()
    if name in vision.TASKS:
        for crossings in found.values():
            assert_quiet(crossings)
    assert counted(found) == FIGURES["recipe"][name]


@pytest.mark.parametrize("name", vision.METRICS)
def test_evaluations_read_as_often_as_the_page_says(name: str) -> None:
    assert evaluation(name) == FIGURES["evaluation"][name]


def test_the_page_has_every_row_and_agrees_with_the_counts_kept() -> None:
    assert {part: list(counts) for part, counts in FIGURES.items()} == {n: list(part.rows) for n, part in PARTS.items()}
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, tables(FIGURES)) == page


def test_the_command_writes_counts_and_page(tmp_path: Any) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in tables(FIGURES)), encoding="utf-8")
    assert main(["--from", str(KEPT), "--json", str(kept), "--docs", str(page)]) == 0
    assert json.loads(kept.read_text(encoding="utf-8")) == FIGURES
    assert page.read_text(encoding="utf-8").count("\n| --- |") == len(FIGURES)
