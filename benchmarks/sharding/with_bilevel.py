"""Trials of bilevel's own arithmetic, solvers and entries on variables whose leaves are DTensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks.sharding.trials import (
    REPLICATED,
    SHARDED,
    Case,
    Trial,
    attempt,
    attempt_refused,
    called,
    distance,
    loss_of,
    net,
)
from bilevel import (
    CG,
    GMRES,
    MINRES,
    Identity,
    Implicit,
    Level,
    Neumann,
    Params,
    Problem,
    functional_call,
    hypergradient,
    linearize,
    tree,
)
from bilevel.linear import AdjointIteration, Dense, Diagonal, Nystrom, Solver
from bilevel.sharded import whole

SOLVERS: dict[str, Solver] = {
    "CG(60, 1e-13)": CG(60, 1e-13),
    "CG(4, None)": CG(4, None),
    "CG(5, None, layerwise=True)": CG(5, None, layerwise=True),
    "CG(60, 1e-13, recycle=3)": CG(60, 1e-13, recycle=3),
    "MINRES(60, 1e-13)": MINRES(60, 1e-13),
    "GMRES(60, rtol=1e-13)": GMRES(60, rtol=1e-13),
    "Neumann(8)": Neumann(8),
    "AdjointIteration(8)": AdjointIteration(8),
    "Identity()": Identity(),
}
WHOLE_VECTORS: dict[str, Solver] = {
    "CG(60, 1e-13, preconditioner=Diagonal())": CG(60, 1e-13, preconditioner=Diagonal()),
    "Dense()": Dense(),
    "Nystrom(3)": Nystrom(3),
}
"""Solvers that need vectors in one piece."""


Call = Callable[[nn.Module, Params, Tensor], Tensor]


class Near(Problem):
    """Below the loss with variables near the upper ones, above the loss with other targets."""

    def __init__(self, module: nn.Module, weight: float = 1.0, call: Call = functional_call) -> None:
        self.module, self.regularization_weight, self.call = module, weight, call

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(self.call(self.module, lower, batch[0]), batch[1])

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(self.call(self.module, lower, batch[0]), batch[1] + 1.0)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * torch.stack([(leaf - upper[name]).square().sum() for name, leaf in lower.items()]).sum()


def arithmetic(case: Case) -> list[Trial]:
    """(c) Trees: the same of DTensors and of plain tensors."""
    x, y = case.values, case.vector
    operations: dict[str, Callable[[Params, Params], Params]] = {
        "zeros_like": lambda x, y: tree.zeros_like(x),
        "add, sub, scale": lambda x, y: tree.add(tree.scale(0.3, x), tree.sub(y, x)),
        "axpy with a number": lambda x, y: tree.axpy(0.3, x, y),
        "axpy with an inner product": lambda x, y: tree.axpy(tree.dot(x, y), x, y),
        "axpy with an inner product a leaf": lambda x, y: tree.axpy(tree.leaf_dots(x, y), x, y),
        "where": lambda x, y: tree.where(tree.norm(x) < tree.norm(y), x, y),
        "dot": lambda x, y: {"dot": tree.dot(x, y)},
        "leaf_dots": tree.leaf_dots,
        "norm": lambda x, y: {"norm": tree.norm(x)},
        "power_of_two": lambda x, y: {"power": torch.tensor(tree.power_of_two(x))},
    }

    def same(operation: Callable[[Params, Params], Params]) -> float:
        return distance(operation(case.cut(x, SHARDED), case.cut(y, SHARDED)), operation(x, y))

    def finite() -> float:
        # The last row, which the first rank does not have.
        broken = {name: leaf.clone() for name, leaf in x.items()}
        broken["0.weight"][-1, -1] = torch.nan
        of = (tree.all_finite(case.cut(x, SHARDED)), tree.all_finite(case.cut(broken, SHARDED)))
        return 0.0 if of == (True, False) else 1.0

    def flattened() -> Any:
        return tree.flatten(case.cut(x, SHARDED))

    return [
        *(attempt("c", f"tree: {what}", lambda f=operation: same(f)) for what, operation in operations.items()),
        attempt("c", "tree: all_finite with a NaN on one rank", finite),
        attempt_refused("c", "tree: flatten", flattened),
    ]


def regularized(case: Case) -> tuple[float, Callable[[Params], Params], Callable[[Params], Params]]:
    """c and A = I + H / c, of DTensors by a double backward and of plain tensors; c is twice the length of H."""
    c = 2.0 * float(torch.linalg.matrix_norm(case.hessian, 2))
    y = tree.as_variables(case.cut(case.values, SHARDED))
    x, targets = case.data(SHARDED)
    gradient = torch.autograd.grad(loss_of(called(net(), y, x), targets), list(y.values()), create_graph=True)

    def of_shards(vector: Params) -> Params:
        along = list(vector.values())
        products = torch.autograd.grad(gradient, list(y.values()), grad_outputs=along, retain_graph=True)
        return tree.axpy(1.0 / c, dict(zip(y, products, strict=True)), vector)

    def of_wholes(vector: Params) -> Params:
        product = tree.unflatten(case.hessian @ tree.flatten(vector), vector)
        return tree.axpy(1.0 / c, product, vector)

    return c, of_shards, of_wholes


def solves(case: Case) -> list[Trial]:
    """(c) Solvers on DTensors, with products by a double backward, against themselves on plain tensors."""
    _, of_shards, of_wholes = regularized(case)
    b = case.vector

    def same(solver: Solver) -> float:
        found, right = solver.solve(of_shards, case.cut(b, SHARDED)), solver.solve(of_wholes, b)
        if found.status is not right.status:
            raise ValueError(f"the status is {found.status}, in one process {right.status}")
        return distance(found.value, right.value)

    def given(solver: Solver) -> Any:
        return solver.solve(of_shards, case.cut(b, SHARDED))

    return [
        *(attempt("c", f"solve: {name}", lambda s=solver: same(s)) for name, solver in SOLVERS.items()),
        *(attempt_refused("c", f"solve: {name}", lambda s=solver: given(s)) for name, solver in WHOLE_VECTORS.items()),
    ]


def by_hand(case: Case) -> Trial:
    """(c) A hypergradient of DTensors, A^-1 dF/dy with BiSSL's A, put together from a solver and torch."""
    c, of_shards, _ = regularized(case)

    def run() -> float:
        y = tree.as_variables(case.cut(case.values, SHARDED))
        x, targets = case.data(SHARDED)
        loss = loss_of(called(net(), y, x), targets + 1.0)
        v = dict(zip(y, torch.autograd.grad(loss, list(y.values())), strict=True))
        found = CG(60, 1e-13).solve(of_shards, v).value
        batch, plain = (case.x, case.y), case.values
        right = hypergradient(
            *(Near(net(), c), plain, plain, Implicit(CG(60, 1e-13))), upper_batch=batch, lower_batches=[batch]
        )
        return distance(found, right.grad)

    return attempt("c", "a hypergradient from CG().solve and a double backward", run)


def entries(case: Case) -> list[Trial]:
    """(c) What takes variables, and what it says to DTensors."""
    batch, plain, cut = (case.x, case.y), case.values, case.cut(case.values, SHARDED)
    problem = Near(net())
    variables = {name: leaf.clone().requires_grad_() for name, leaf in cut.items()}
    optimizer = torch.optim.SGD(list(variables.values()), 0.1)
    runs: dict[str, Callable[[], Any]] = {
        "hypergradient: lower variables": lambda: _hypergradient(problem, plain, cut, batch),
        "hypergradient: upper variables": lambda: _hypergradient(problem, cut, plain, batch),
        "linearize: lower variables": lambda: linearize(problem, plain, cut, [batch]),
        "linearize: upper variables": lambda: linearize(problem, cut, plain, [batch]),
        "System.solve: the right-hand side": lambda: linearize(problem, plain, plain, [batch]).solve(cut),
        "Level: params": lambda: Level(variables, optimizer, [batch]),
    }
    return [attempt_refused("c", f"{what} that are DTensors", run) for what, run in runs.items()]


def shards_itself(case: Case) -> Trial:
    """(c) Variables that are whole, in an objective that makes them DTensors for itself; what cannot be differentiated
    twice then must not pass for a result."""

    def call(module: nn.Module, lower: Params, x: Tensor) -> Tensor:
        rows = distribute_tensor(x, case.mesh, SHARDED)
        cut: dict[str, Tensor] = {name: DTensor.from_local(leaf, case.mesh, REPLICATED) for name, leaf in lower.items()}
        return whole(torch.func.functional_call(module, cut, (rows,)))

    def run() -> Any:
        return _hypergradient(Near(net(), call=call), case.values, case.values, (case.x, case.y))

    what = "hypergradient: an objective that makes DTensors of its variables (from_local)"
    return attempt_refused("c", what, run, ["lost curvature"])


def modules(case: Case) -> list[Trial]:
    """(c) Objectives that call a sharded or wrapped module with variables that are whole."""
    batch, plain = (case.x, case.y), case.values

    def sharded(**options: Any) -> nn.Module:
        module = net()
        fully_shard(module, mesh=case.mesh, **options)
        return module

    def gathered() -> nn.Module:
        module = sharded(reshard_after_forward=False)
        module(case.x)
        return module

    made: dict[str, Callable[[], nn.Module]] = {
        "fully_shard": sharded,
        "fully_shard, its parameters gathered": gathered,
        "parallelize_module": lambda: parallelize_module(net(), case.mesh, {"0": ColwiseParallel()}),
        "DistributedDataParallel": lambda: DistributedDataParallel(net()),
    }
    calls: dict[str, Call] = {
        "bilevel.functional_call": lambda module, y, x: functional_call(module, y, x),
        "torch.func.functional_call": lambda module, y, x: torch.func.functional_call(module, y, (x,)),
        "a direct call": lambda module, y, x: module(x),
    }
    names = ("DTensor", "FSDP", "DistributedDataParallel", "reaches none", "Params")
    return [
        attempt_refused(
            "c",
            f"hypergradient of a module of {kind}: {call}",
            lambda make=make, how=how: _hypergradient(Near(make(), call=how), plain, plain, batch),
            names,
        )
        for kind, make in made.items()
        for call, how in calls.items()
    ]


def _hypergradient(problem: Problem, upper: Params, lower: Params, batch: Any) -> Any:
    return hypergradient(
        *(problem, upper, lower, Implicit(CG(60, 1e-13))),
        upper_batch=batch,
        lower_batches=[batch],
        on_failure="raise",
    )
