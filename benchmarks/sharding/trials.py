"""What torch's sharded parameters do with a second derivative: trials on a small net, each on all ranks.

The oracle is one process in float64. Where a trial fails, its message is torch's or bilevel's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bilevel import tree
from bilevel.sharded import whole
from bilevel.tree import Params

RIGHT = 1e-10
"""The largest difference from the oracle that counts as right."""

Placements = tuple[Placement, ...]
SHARDED: Placements = (Shard(0),)
REPLICATED: Placements = (Replicate(),)


@final
@dataclass(frozen=True)
class Trial:
    """What came of one trial: `answer` is "right", "wrong", "error" (torch's) or "refused" (by name, by bilevel)."""

    part: str
    what: str
    answer: str
    error: float | None = None
    message: str = ""


def net() -> nn.Sequential:
    """In float64, the same on every rank and in every trial."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).mean()


def called(module: nn.Module, variables: Params, x: Tensor) -> Tensor:
    return torch.func.functional_call(module, variables, (x,))


@final
class Case:
    """Data, a vector v and, from one process, the loss's gradient g and Hessian H.

    Attributes:
        mesh: all ranks in a row.
        rows: those of the batch that belong to this rank.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, ranks = mesh, mesh.size()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.y = normal(4 * ranks, 4), normal(4 * ranks, 2)
        self.rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        self.values: Params = {name: p.detach() for name, p in net().named_parameters()}
        self.vector: Params = {name: normal(*leaf.shape) for name, leaf in self.values.items()}
        self.gradient, self.product = self.derivatives(self.values, self.vector)
        eye = torch.eye(tree.size(self.values), dtype=torch.float64)
        columns = [self.derivatives(self.values, tree.unflatten(row, self.values))[1] for row in eye]
        self.hessian = torch.stack([tree.flatten(column) for column in columns])

    def derivatives(self, values: Params, vector: Params) -> tuple[Params, Params]:
        """The gradient and the Hessian's product with a vector in one process."""
        y = tree.as_variables(values)
        gradient = tree.gradients(loss_of(called(net(), y, self.x), self.y), y, create_graph=True)
        return tree.detach(gradient), tree.pullback(gradient, vector, [y])[0]

    def cut(self, tensors: Params, placements: dict[str, Placements] | Placements) -> Params:
        """As DTensors."""
        of = placements if isinstance(placements, dict) else dict.fromkeys(tensors, placements)
        return {name: distribute_tensor(leaf, self.mesh, of[name]) for name, leaf in tensors.items()}

    def data(self, placements: Placements) -> tuple[Tensor, Tensor]:
        return distribute_tensor(self.x, self.mesh, placements), distribute_tensor(self.y, self.mesh, placements)


TENSOR_PARALLEL: dict[str, Placements] = {
    "0.weight": SHARDED,
    "0.bias": SHARDED,
    "2.weight": (Shard(1),),
    "2.bias": REPLICATED,
}
"""Columnwise and then rowwise, as ColwiseParallel and RowwiseParallel place them."""


def distance(found: Params, right: Params) -> float:
    """The largest difference of an entry, of whole tensors."""
    return max(float((whole(found[name].detach()) - leaf).abs().max()) for name, leaf in right.items())


def twice(loss: Tensor, variables: Params, vector: Params, *, zeros: bool = False) -> Params:
    """The Hessian's product by a double backward, of a gradient that is made whole nowhere.

    Args:
        zeros: take zeros for what is in no graph (materialize_grads), as most code that differentiates does; otherwise
            torch raises.
    """
    leaves = list(variables.values())
    options: dict[str, Any] = {"allow_unused": zeros, "materialize_grads": zeros}
    gradient = torch.autograd.grad(loss, leaves, create_graph=True, **options)
    live = [(g, vector[name]) for name, g in zip(variables, gradient, strict=True) if g.requires_grad or not zeros]
    if not live:
        return tree.zeros_like(variables)
    outputs, along = zip(*live, strict=True)
    products = torch.autograd.grad(outputs, leaves, grad_outputs=along, **options)
    return dict(zip(variables, products, strict=True))


def attempt(part: str, what: str, run: Callable[[], float]) -> Trial:
    """The trial's outcome; `run` gives a difference from the oracle."""
    try:
        error = run()
    except Exception as raised:  # Whatever it is that torch says.
        words = " ".join(str(raised).split())[:300]
        trial = Trial(part, what, "error", message=f"{type(raised).__name__}: {words}")
    else:
        trial = Trial(part, what, "right" if error <= RIGHT else "wrong", error)
    dist.barrier()
    return trial


def attempt_refused(part: str, what: str, run: Callable[[], Any], names: Sequence[str] = ("DTensor",)) -> Trial:
    """As `attempt`, of what bilevel is to refuse in a sentence that says one of `names`."""

    def ran() -> float:
        run()
        return float("inf")

    trial = attempt(part, what, ran)
    by_name = trial.message.startswith(("TypeError", "ValueError", "SolverError")) and any(
        name in trial.message for name in names
    )
    return replace(trial, answer="refused") if by_name else trial


def fully_sharded(case: Case) -> list[Trial]:
    """(a) A module of FSDP2, whose parameters are DTensors that it gathers by itself."""
    x, y = case.x[case.rows], case.y[case.rows]

    def made(**options: Any) -> tuple[nn.Module, Params]:
        module = net()
        fully_shard(module, mesh=case.mesh, **options)
        return module, dict(module.named_parameters())

    def by_backward() -> float:
        module, own = made()
        loss_of(module(x), y).backward()
        return distance({n: p.grad for n, p in own.items() if p.grad is not None}, case.gradient)

    def by_grad(zeros: bool) -> float:
        module, own = made()
        found = twice(loss_of(module(x), y), own, case.cut(case.vector, SHARDED), zeros=zeros)
        return distance(found, case.product)

    def by_gathered() -> float:
        module, _ = made(reshard_after_forward=False)
        loss = loss_of(module(x), y)
        return distance(twice(loss, dict(module.named_parameters()), case.vector), case.product)

    def by_grads_of_backward() -> float:
        module, own = made()
        loss_of(module(x), y).backward(create_graph=True)
        grads = [p.grad for p in own.values() if p.grad is not None]
        along = list(case.cut(case.vector, SHARDED).values())
        found = torch.autograd.grad(grads, list(own.values()), grad_outputs=along)
        return distance(dict(zip(own, found, strict=True)), case.product)

    def with_values(after_a_call: bool) -> float:
        module, _ = made()
        if after_a_call:
            module(x)
        others = tree.scale(2.0, case.values)
        return distance({"y": called(module, case.cut(others, SHARDED), x)}, {"y": called(net(), others, x)})

    runs: dict[str, Callable[[], float]] = {
        "first derivatives, by loss.backward()": by_backward,
        "torch.autograd.grad by its parameters with create_graph, then a second time": lambda: by_grad(False),
        "the same with allow_unused and materialize_grads": lambda: by_grad(True),
        "the same by the gathered parameters (reshard_after_forward=False)": by_gathered,
        "loss.backward(create_graph=True), then torch.autograd.grad of the .grad": by_grads_of_backward,
        "torch.func.functional_call with other values, before any other call": lambda: with_values(False),
        "torch.func.functional_call with other values, after a call": lambda: with_values(True),
    }
    return [attempt("a", f"fully_shard: {what}", run) for what, run in runs.items()]


def distributed_tensors(case: Case) -> list[Trial]:
    """(b) DTensor parameters."""

    def placed(placements: dict[str, Placements] | Placements, batch: Placements) -> float:
        variables, (x, y) = tree.as_variables(case.cut(case.values, placements)), case.data(batch)
        found = twice(loss_of(called(net(), variables, x), y), variables, case.cut(case.vector, placements))
        return distance(found, case.product)

    def parallelized(zeros: bool) -> float:
        module = parallelize_module(net(), case.mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        variables = tree.as_variables(dict(module.named_parameters()))
        loss = loss_of(called(module, variables, case.x), case.y)
        return distance(twice(loss, variables, case.cut(case.vector, TENSOR_PARALLEL), zeros=zeros), case.product)

    def gathered(zeros: bool) -> float:
        variables = tree.as_variables(case.cut(case.values, SHARDED))
        found = twice(gathered_loss(case, variables), variables, case.cut(case.vector, SHARDED), zeros=zeros)
        return distance(found, case.product)

    unused = " with allow_unused and materialize_grads"
    runs: dict[str, Callable[[], float]] = {
        "distribute_tensor: Shard(0), the batch Shard(0)": lambda: placed(SHARDED, SHARDED),
        "distribute_tensor: Shard(0), the batch replicated": lambda: placed(SHARDED, REPLICATED),
        "distribute_tensor: columnwise and rowwise": lambda: placed(TENSOR_PARALLEL, REPLICATED),
        "parallelize_module: ColwiseParallel, RowwiseParallel": lambda: parallelized(False),
        "parallelize_module: the same" + unused: lambda: parallelized(True),
        "Shard(0), gathered by redistribute().to_local(), own rows": lambda: gathered(False),
        "Shard(0), gathered: the same" + unused: lambda: gathered(True),
    }
    return [attempt("b", what, run) for what, run in runs.items()]


def gathered_loss(case: Case, variables: Params) -> Tensor:
    """This rank's share of the loss, by variables that are gathered for it: what FSDP does, in differentiable
    operations of torch."""
    everything = {}
    for name, leaf in variables.items():
        assert isinstance(leaf, DTensor)
        everything[name] = leaf.redistribute(placements=REPLICATED).to_local(grad_placements=(Partial(),))
    return loss_of(called(net(), everything, case.x[case.rows]), case.y[case.rows]) / case.mesh.size()
