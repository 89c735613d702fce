"""The solution of the lower level as tensors with a graph, whose backward pass makes the implicit solve."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel import distributed, tree
from bilevel.checks import check_kind, check_variables
from bilevel.hypergradients.hypergradient import as_method
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.method import Method
from bilevel.hypergradients.result import AdjointSolve, OnFailure, check_on_failure, report_failure
from bilevel.hypergradients.system import System, adjoint
from bilevel.linear import Solver
from bilevel.lower import check_batches, check_recordable, differentiates, explaining_batches, selected
from bilevel.problem import Problem, modules_of
from bilevel.tree import Params

_OUTSIDE = (
    "lower_solution was called inside activation checkpointing or another saved-tensor hook, which would solve for a "
    "recomputed y in the backward pass and leave the record of the first: call it outside of them, and give its values "
    "to the checkpointed function as arguments"
)


@final
class LowerSolution(dict[str, Tensor]):
    """The lower variables y, by name, with the graph that `lower_solution` gives them.

    Attributes:
        record: an `AdjointSolve` for each backward pass that has come to y, in order: the solution and status of its
            linear system, the stationarity of y, what failed. Empty before the first.
    """

    def __init__(self, lower: Mapping[str, Tensor], record: list[AdjointSolve]) -> None:
        super().__init__(lower)
        self.record = record


def lower_solution(
    problem: Problem,
    upper: Params,
    lower: Params,
    lower_batches: Sequence[Any],
    method: Method | Solver | None = None,
    *,
    on_failure: OnFailure = "warn",
) -> LowerSolution:
    r"""The lower solution y*(x) as tensors, for any loss and any module above.

    The values are those of `lower`, wherever they come from: a loop, SciPy, a closed form. A gradient v that comes to y
    in a backward pass goes on to `upper` by the implicit function theorem,

    .. math:: v \mapsto -\frac{\partial^2 G}{\partial x \partial y} A^{-1} v,

    with A and the cross term of `linearize` at (x, y). So ``loss.backward()`` gives `Implicit`'s hypergradient: a
    loss's own dependence on x is differentiated as always, `Problem.upper_objective` is not used, and `upper` may be
    what another module computes.

    What the backward pass needs is fixed here: batches, random masks, and the modes and buffers of the modules that are
    attributes of the Problem, or lie in lists, tuples and dictionaries among these; a module that the Problem reaches
    otherwise must keep its own. A batch that is written to before the backward pass is noticed (`StaleSystemError`),
    and so are x and y, by torch. `lower` itself is copied and may be trained on.

    Args:
        upper: variables x. Those that require gradients, leaves or not, get them.
        lower: variables y, detached from whatever graph they have.
        lower_batches: as for `hypergradient`.
        method: `Implicit`, or a solver in its place; by default ``Implicit()``. What it does from step to step in a
            trainer (`aggregate`, `warm_start`, how many batches) does not count here.
        on_failure: as for `hypergradient`, in the backward pass. A gradient that is not finite when it comes to y, as
            it may under a `torch.amp.GradScaler`, is no failure of the solve: NaN goes on to x, which the scaler finds.

    Returns:
        A dictionary of the lower variables, with a `LowerSolution.record` of the backward passes. Variables that
        `implicit` leaves out are constants in it; where nothing requires gradients, or under torch.no_grad, all are.
        Several backward passes (``retain_graph=True``) share one linear system and what its solver has learned.

    Over several ranks, with the same x and y on each, every rank must pass back through y. The gradient that reaches x
    is then, on every rank, that of the mean of the ranks' losses, which the mean that DistributedDataParallel takes
    leaves as it is; the loss's own dependence on x stays the rank's, for DistributedDataParallel to average.

    Raises:
        TypeError, ValueError: bad arguments, as for `hypergradient`; a method that solves no linear system.
        RuntimeError: under torch.inference_mode, a torch.func transform or activation checkpointing; and in the
            backward pass where second derivatives are asked for (``create_graph=True``), which there are none of.
    """
    check_recordable("lower_solution")
    _check_surroundings()
    check_kind("problem", problem, Problem, "an instance of a Problem")
    implicit = _as_implicit(method, problem)
    check_on_failure(on_failure)
    tree.check_params("upper", upper)
    check_variables("lower", lower)
    check_batches(lower_batches)
    y = {name: leaf.detach().clone() for name, leaf in lower.items()}
    solution = LowerSolution(y, [])
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in upper.values()):
        names = selected(problem, y, implicit.implicit)
        # A saved tensor carries the system, which goes when autograd lets its buffers go.
        carrier = torch.empty(0).as_subclass(_Carrier)
        with explaining_batches(lower_batches):
            carrier.frozen = _Frozen.at(problem, upper, y, lower_batches, implicit)
        way_back = _WayBack(tuple(upper), names, on_failure, solution.record)
        moving = _Solved.apply(way_back, carrier, [y[name] for name in names], *upper.values())
        solution.update(zip(names, moving, strict=True))
    return solution


def _as_implicit(method: Method | Solver | None, problem: Problem) -> Implicit:
    method = as_method(method, problem)
    if not isinstance(method, Implicit):
        raise TypeError(
            f"method must be Implicit, or a solver such as CG() in its place, got {type(method).__name__}: "
            "lower_solution solves a linear system in its backward pass; take `hypergradient` or a Trainer for others"
        )
    return method


class _NoTransform(torch.autograd.Function):
    """A function of the kind that torch.func transforms refuse, wherever its input comes from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()


def _is_batched(cotangent: Tensor) -> bool:
    """Whether this stands for several cotangents at once: autograd batches by tensors without memory of their own."""
    if cotangent.layout is not torch.strided:
        return False
    try:
        cotangent.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return True
    return False


def _check_surroundings() -> None:
    """Raise RuntimeError inside what would differentiate, batch or recompute the solution."""
    try:
        _NoTransform.apply(torch.empty(0))
    except RuntimeError as error:
        raise RuntimeError(
            "lower_solution was called under a torch.func transform (grad, vmap, jacrev, jvp), which cannot see into "
            "its backward pass; take torch.autograd.grad, and a loop in place of vmap"
        ) from error
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise RuntimeError(_OUTSIDE)
        frame = frame.f_back
    with torch.autograd.graph.disable_saved_tensors_hooks(_OUTSIDE):
        pass


@dataclass(frozen=True)
class _Frozen:
    """The linear system, and the modes and buffers that its passes find."""

    system: System
    surroundings: "_Surroundings"

    @classmethod
    @differentiates
    def at(cls, problem: Problem, upper: Params, lower: Params, batches: Sequence[Any], method: Implicit) -> "_Frozen":
        surroundings = _Surroundings.of(problem)
        with surroundings.restored():
            return cls(method.system(problem, tree.detach(upper), tree.detach(lower), batches), surroundings)


@dataclass(frozen=True)
class _Surroundings:
    """Modes and buffers of the modules of a Problem, each layer with its own."""

    layers: list[tuple[nn.Module, bool, dict[str, Tensor]]]

    @classmethod
    def of(cls, problem: Problem) -> "_Surroundings":
        layers = {id(layer): layer for module in modules_of(problem).values() for layer in module.modules()}
        return cls([(layer, layer.training, _buffers(layer, copied=True)) for layer in layers.values()])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, modes and buffers are those of then; afterwards those of before, the same objects."""
        now = [(layer, layer.training, _buffers(layer)) for layer, _, _ in self.layers]
        try:
            self._put(self.layers)
            yield
        finally:
            self._put(now)

    @staticmethod
    def _put(layers: list[tuple[nn.Module, bool, dict[str, Tensor]]]) -> None:
        for layer, training, buffers in layers:
            layer.training = training
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)


def _buffers(layer: nn.Module, *, copied: bool = False) -> dict[str, Tensor]:
    named = layer.named_buffers(recurse=False, remove_duplicate=False)
    return {name: buffer.detach().clone() if copied else buffer for name, buffer in named}


class _Carrier(Tensor):
    """An empty tensor that holds a linear system."""

    frozen: _Frozen


@dataclass(frozen=True)
class _WayBack:
    """What a backward pass has to know beside the linear system, none of it large."""

    upper_names: tuple[str, ...]
    names: tuple[str, ...]
    on_failure: OnFailure
    record: list[AdjointSolve] = field(repr=False)

    @differentiates
    def pull(self, frozen: _Frozen, upper: Params, cotangents: Sequence[Tensor | None]) -> Params:
        """The gradient over the upper variables for one over the implicit lower ones, None standing for zeros."""
        system = frozen.system
        pairs = zip(self.names, cotangents, strict=True)
        v = {n: torch.zeros_like(system.lower[n]) if c is None else c.detach().to_dense() for n, c in pairs}
        v = distributed.mean_over_ranks(v)
        with frozen.surroundings.restored():
            if not tree.all_finite(v):
                self.record.append(_not_finite(system, v))
                return {name: torch.full_like(leaf, math.nan) for name, leaf in upper.items()}
            gradient, _, made = adjoint(system, v, upper, solve=system.solve, on_failure=self.on_failure)
            system.check_response(upper)
        self.record.append(made)
        report_failure(made, self.on_failure)
        return gradient


def _not_finite(system: System, v: Params) -> AdjointSolve:
    """No solve; whoever scales the loss expects to find numbers that are not finite, and is not warned of them."""
    text = "non-finite: the gradient that came to y from above is not finite, and NaN went on to the upper variables"
    return AdjointSolve(system.solve(v), system.stationarity(), system.gradient_noise(), failure=text)


class _Solved(torch.autograd.Function):
    """Gives given values a graph."""

    @staticmethod
    def forward(ctx: Any, way_back: _WayBack, carrier: _Carrier, lower: list[Tensor], *upper: Tensor) -> Any:
        ctx.way_back = way_back
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(carrier, *upper, *lower)
        return tuple(lower)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        # With create_graph=True, in `backward` and in `autograd.grad`, also where that asks for some inputs only.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives through what lower_solution gave, which has first "
                "derivatives only; leave it out"
            )
        if any(c is not None and _is_batched(c) for c in cotangents):
            raise RuntimeError(
                "lower_solution cannot pass back a batch of gradients (is_grads_batched=True, vectorize=True); pass "
                "them one at a time"
            )
        way_back: _WayBack = ctx.way_back
        carrier, *saved = ctx.saved_tensors
        x = saved[: len(way_back.upper_names)]
        upper = {name: leaf.detach() for name, leaf in zip(way_back.upper_names, x, strict=True)}
        gradient = way_back.pull(carrier.frozen, upper, cotangents)
        wanted = zip(way_back.upper_names, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(gradient[name] if needed else None for name, needed in wanted)
