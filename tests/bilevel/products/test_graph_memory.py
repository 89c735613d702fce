"""Bytes of kept graphs against other ways to count them, and budgets that hold."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from bilevel import Params, Problem, functional_call, linearize, tree
from bilevel.nn.functional import curvature_pass
from bilevel.products import ReverseOverReverse
from bilevel.products.graph_memory import graph_bytes
from bilevel.products.hvp import Linearization, Objective


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.LayerNorm(5),
    )


def case(images: int, *, hooks: bool = False) -> tuple[Objective, Params, Tensor]:
    """An objective, its variables and its batch; curvature passes refuse saved-tensor hooks."""
    torch.manual_seed(0)
    net, batch = convolutions(), torch.randn(images, 3, 8, 8)

    def objective(upper: Params, lower: Params) -> Tensor:
        with nullcontext() if hooks else curvature_pass(0):
            return functional_call(net, lower, batch).log_softmax(1).square().mean()

    return objective, {name: p.detach() for name, p in net.named_parameters()}, batch


class _Packed:
    """What a saved-tensor hook leaves in the graph in a tensor's place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_the_visit_finds_what_saved_tensor_hooks_find() -> None:
    """The hooks see every tensor as it is saved; those that are still alive in the end are the graph's."""
    objective, lower, batch = case(16, hooks=True)
    y = tree.as_variables(lower)
    living: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        living.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        gradient = tree.gradients(objective({}, y), y, create_graph=True)
    gc.collect()
    packed = [item.tensor for item in living]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    for tensor in (*gradient.values(), *y.values(), batch):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert len(storages) > 10
    del packed
    assert graph_bytes(gradient.values(), [*y.values(), batch]) == sum(storages.values())


class _Saving(torch.autograd.Function):
    """Keeps 1000 numbers the documented way and 500 as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros(1000, dtype=torch.float64))
        ctx.extra = [torch.zeros(500, dtype=torch.float64)]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + ctx.saved_tensors[0].sum()


def test_custom_functions_views_and_what_lives_anyway() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    out = _Saving.apply(x)
    assert isinstance(out.grad_fn, FunctionCtx)
    assert graph_bytes([out]) == 8 * 1500
    factor = torch.ones(100, dtype=torch.float64)
    # Two views of one storage, which is saved whole and counts once.
    product = (x * factor[:3]) * factor[3:6]
    assert graph_bytes([product]) == 8 * 100
    assert graph_bytes([product], [factor[50:]]) == 0
    assert graph_bytes([product, out]) == 8 * 1600
    assert graph_bytes([torch.ones(3)]) == 0


def allocated(function: Callable[[], object]) -> int:
    """Bytes that tensors allocated while `function` ran and have not given back, as torch's profiler counts them."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
        gc.collect()
    return sum(event.self_cpu_memory_usage for event in profile.events() or [])


def linearizations(memory_budget: float | None, counts: list[int]) -> tuple[list[Linearization], Params]:
    cases = [case(count) for count in counts]
    batches = [batch for _, _, batch in cases]
    provider = ReverseOverReverse(keep_graph=True, memory_budget=memory_budget)
    lower = cases[0][1]
    return provider.linearize_all([objective for objective, _, _ in cases], {}, lower, resident=batches), lower


def sizes(counts: list[int]) -> list[int]:
    all_kept, lower = linearizations(None, counts)
    for linearization in all_kept:
        linearization.hessian(lower)
    found = [linearization.kept_bytes() for linearization in all_kept]
    assert None not in found
    return [size for size in found if size is not None]


COUNTS = [8, 64, 16, 16]


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (lambda s: 0, [False, False, False, False]),
        (lambda s: s[0], [True, False, False, False]),
        (lambda s: s[1] - 1, [True, False, True, True]),
        (lambda s: s[0] + s[1], [True, True, False, False]),
        (lambda s: sum(s) - 1, [True, True, True, False]),
        (lambda s: sum(s), [True, True, True, True]),
    ],
    ids=["nothing", "the first", "all but the largest", "the two first", "one byte short", "everything"],
)
def test_as_many_graphs_are_kept_as_fit(share: Callable[[list[int]], int], kept: list[bool]) -> None:
    known = sizes(COUNTS)
    assert known[0] + known[2] + known[3] < known[1]
    found, lower = linearizations(share(known), COUNTS)
    for linearization in found:
        linearization.hessian(lower)
    assert [linearization.kept_bytes() is not None for linearization in found] == kept


def test_the_budget_holds_by_the_profilers_count() -> None:
    known = sizes(COUNTS)
    found, lower = linearizations(known[1] - 1, COUNTS)

    def products() -> None:
        for linearization in found:
            linearization.hessian(lower)

    # Each linearization also remembers its gradient, with and without a graph.
    gradients = len(COUNTS) * sum(leaf.numel() * leaf.element_size() for leaf in lower.values())
    assert allocated(products) - gradients == known[0] + known[2] + known[3] < known[1]


@pytest.mark.parametrize("batches", [0, 1, 2.5, 4], ids=lambda count: f"room for {count}")
def test_products_are_the_same_whichever_batches_are_kept(batches: float) -> None:
    one = sizes([16])[0]
    found, lower = linearizations(batches * one, [16] * 4)
    plain = [ReverseOverReverse().linearize(case(16)[0], {}, lower) for _ in range(4)]
    for seed in range(3):
        torch.manual_seed(seed)
        vector = {name: torch.randn_like(leaf) for name, leaf in lower.items()}
        for with_budget, without in zip(found, plain, strict=True):
            torch.testing.assert_close(with_budget.hessian(vector), without.hessian(vector), rtol=1e-5, atol=1e-7)
    assert sum(linearization.kept_bytes() is not None for linearization in found) == int(batches)


class _Counted(Problem):
    """One net over several batches of images; counts the passes over each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = convolutions()
        self.passes: dict[int, int] = {}

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        self.passes[id(batch)] = self.passes.get(id(batch), 0) + 1
        return functional_call(self.net, lower, batch).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        raise NotImplementedError


def test_a_system_shares_one_budget_and_is_not_charged_for_its_batches() -> None:
    problem = _Counted()
    lower = {name: p.detach() for name, p in problem.net.named_parameters()}
    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    y = tree.as_variables(lower)
    with curvature_pass(0):
        loss = problem.lower_objective({}, y, batches[0])
    gradient = tree.gradients(loss, y, create_graph=True)
    lived_anyway = [*y.values(), batches[0]]
    one = graph_bytes(gradient.values(), lived_anyway)
    assert one < graph_bytes(gradient.values(), list(y.values()))
    del gradient, loss
    for room, expected in ((2 * one, [1, 1, 4]), (2 * one - 1, [1, 4, 4])):
        problem.passes = {}
        system = linearize(problem, {}, lower, batches, hvp=ReverseOverReverse(keep_graph=True, memory_budget=room))
        for _ in range(4):
            system.operator(lower)
        assert [problem.passes[id(batch)] for batch in batches] == expected


@pytest.mark.parametrize("budget", [-1, float("nan"), float("inf"), True, "4GB"], ids=str)
def test_a_bad_budget_is_refused(budget: Any) -> None:
    with pytest.raises(
        ValueError, match=r"ReverseOverReverse: memory_budget \(bytes\) must be a finite number >= 0, got"
    ):
        ReverseOverReverse(keep_graph=True, memory_budget=budget)


def test_a_budget_without_kept_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_graph=True"):
        ReverseOverReverse(memory_budget=1e9)
