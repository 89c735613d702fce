"""The alternating loop: lower steps, adaptation, upper steps."""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.automatic import HVP, Automatic, as_provider
from bilevel.batches import BatchSource, Cycle
from bilevel.callbacks import Callback, Record, solve_record
from bilevel.checkpoint import random_state, set_random_state
from bilevel.hypergradient import Hypergradient, OnFailure, through_system
from bilevel.lower_objectives import check_scalar
from bilevel.microbatch import check_size, micro_batched_gradient
from bilevel.objectives import upper_derivatives
from bilevel.problem import Problem
from bilevel.schedule import AlternatingSchedule
from bilevel.solution import Solution, Status
from bilevel.solvers import Solver
from bilevel.system import Shift, System, linearize
from bilevel.tree import Params


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; raised before the optimizer's step, so that no variable has changed."""


class LRSchedule(Protocol):
    """A learning-rate schedule, stepped once after every optimizer step (any of torch.optim.lr_scheduler)."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Carried:
    """Right-hand sides of earlier steps, each by its learning rate, and the sum of these."""

    right: Params
    rates: float


class Trainer:
    """Alternates between the levels of a bilevel problem (BiSSL, Algorithm 1, for any `Problem`).

    In each alternation: `lower_steps` steps on ``L + lambda r``; if the schedule says so, the adaptation of the upper
    variables; then `upper_steps` hypergradient steps, all with the system of the first `hessian_batches` lower batches
    of this alternation. Optimizers, schedules and data streams live as long as the trainer. Variables change in
    place.

    Args:
        upper, lower: leaf tensors; each optimizer must hold exactly the tensors of its level.
        lower_data, upper_data: a `BatchSource`, or a sequence of batches that is cycled through.
        solver, hvp, damping, shift: as for `linearize`.
        aggregate: solve once an alternation, for the sum of its upper steps' right-hand sides (each by its learning
            rate), instead of once a step: all but the last step go along dF/dx alone, and the last one takes the whole
            implicit part. Needs ``curvature_depends_on_upper = False``. The summed update is that of separate solves
            where dF/dx does not depend on the upper variables that the implicit part moves, the optimizer is SGD and
            no norm limit binds; otherwise the implicit part is seen up to upper_steps - 1 steps later: a bias of the
            order of gamma in BiSSL, and with momentum a displacement that comes later (the same in total at a constant
            rate). The norm limit of the last step is wider by the sum of the rates over its own.
        hessian_batches: K, how many lower batches make the system's mean.
        lower_scheduler, upper_scheduler: learning-rate schedules.
        micro_batch: samples a chunk of a lower step, whose memory is then a chunk's (`micro_batched_gradient`; the
            Problem must define `lower_outputs` and `lower_output_loss`). None passes the batch at once. The upper
            steps' solves are chunked by ``hvp=MicroBatched(...)``.
        max_grad_norm: a level's whole gradient is scaled down to this Euclidean norm where it is longer.
        adaptation_pairs: upper name -> lower name it adapts to; needed if the schedule adapts.
        on_failure: as for `hypergradient`; "warn" warns once a run, and `solves` counts by status either way.
        callbacks: called in order.

    Attributes:
        solves: how many linear systems were solved, by the name of the `Status` that they ended with.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        problem: Problem,
        upper: Params,
        lower: Params,
        *,
        lower_optimizer: torch.optim.Optimizer,
        upper_optimizer: torch.optim.Optimizer,
        lower_data: BatchSource | Sequence[Any],
        upper_data: BatchSource | Sequence[Any],
        schedule: AlternatingSchedule,
        solver: Solver | None = None,
        hvp: HVP | None = None,
        damping: float = 0.0,
        shift: Shift = 0.0,
        aggregate: bool = False,
        hessian_batches: int = 1,
        lower_scheduler: LRSchedule | None = None,
        upper_scheduler: LRSchedule | None = None,
        micro_batch: int | None = None,
        max_grad_norm: float | None = None,
        adaptation_pairs: Mapping[str, str] | None = None,
        on_failure: OnFailure = "warn",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.problem, self.upper, self.lower, self.schedule = problem, upper, lower, schedule
        self.optimizers = {"lower": lower_optimizer, "upper": upper_optimizer}
        self.schedulers = {"lower": lower_scheduler, "upper": upper_scheduler}
        self.data = {
            "lower": lower_data if isinstance(lower_data, BatchSource) else Cycle(lower_data),
            "upper": upper_data if isinstance(upper_data, BatchSource) else Cycle(upper_data),
        }
        options = {"solver": solver, "hvp": as_provider(hvp), "damping": damping, "shift": shift}
        self.system_options: dict[str, Any] = options
        self.hessian_batches, self.max_grad_norm, self.aggregate = hessian_batches, max_grad_norm, aggregate
        self.micro_batch = micro_batch
        self.adaptation_pairs = dict(adaptation_pairs or {})
        self.callbacks = tuple(callbacks)
        self.alternation = 0
        self.steps = {"lower": 0, "upper": 0}
        self.solves: Counter[str] = Counter()
        self._on_failure: OnFailure = on_failure
        self._check()

    @property
    def failures(self) -> Counter[str]:
        """Of `solves`, those that did not do what was asked, by the name of their `Status`."""
        return Counter({name: count for name, count in self.solves.items() if not Status[name].ok})

    def run(self) -> None:
        """Make the alternations that are left."""
        for callback in self.callbacks:
            callback.on_run_start(self)
        try:
            while self.alternation < self.schedule.alternations:
                self.alternate()
        finally:
            for callback in self.callbacks:
                callback.on_run_end(self)

    def alternate(self) -> None:
        """One alternation."""
        began = time.perf_counter()
        number = self.alternation + 1
        self._reset_lower()
        stored = self._lower_stage()
        if self.schedule.adapts(number):
            self._adapt()
        self._upper_stage(stored)
        self.alternation = number
        self._emit({"event": "alternation", "step": number, "seconds": time.perf_counter() - began})
        for callback in self.callbacks:
            callback.on_alternation_end(self)

    def _lower_stage(self) -> list[Any]:
        data, stored = self.data["lower"], []
        wanted = self.hessian_batches if self.schedule.upper_steps else 0
        data.begin_stage(max(self.schedule.lower_steps, wanted))
        for _ in range(self.schedule.lower_steps):
            batch = data.next()
            if len(stored) < wanted:
                stored.append(batch)
            self._lower_step(batch)
        while len(stored) < wanted:
            stored.append(data.next())
        return stored

    def _lower_step(self, batch: Any) -> None:
        x, y = tree.detach(self.upper), tree.as_variables(self.lower)
        if self.micro_batch is None:
            loss = check_scalar("lower_objective", self.problem.lower_objective(x, y, batch))
            gradient = tree.gradients(loss, y)
        else:
            loss, gradient = self._micro_batched(x, batch, self.micro_batch)
        penalty = self.problem.regularizer(x, y)
        if penalty is not None:
            gradient = tree.axpy(self.problem.regularization_weight, tree.gradients(penalty, y), gradient)
        gradient = distributed.mean_over_ranks(gradient)
        record = self._update("lower", gradient, float(loss.detach()))
        self.problem.after_lower_step(self.upper, self.lower, self.steps["lower"])
        self._emit(record)

    def _micro_batched(self, upper: Params, batch: Any, size: int) -> tuple[Tensor, Params]:
        return micro_batched_gradient(
            lambda lower, chunk: self.problem.lower_outputs(upper, lower, chunk),
            lambda z: check_scalar("lower_output_loss", self.problem.lower_output_loss(z, batch)),
            self.lower,
            self.problem.split_batch(batch, size),
        )

    def _upper_stage(self, stored: list[Any]) -> None:
        data, steps = self.data["upper"], self.schedule.upper_steps
        data.begin_stage(steps)
        system: System | None = None
        carried: _Carried | None = None
        for number in range(1, steps + 1):
            if system is None or self.problem.curvature_depends_on_upper:
                system = linearize(self.problem, self.upper, self.lower, stored, **self.system_options)
            batch = data.next()
            if self.aggregate and number < steps:
                carried = self._direct_step(system, batch, carried)
            else:
                self._upper_step(system, batch, carried)

    def _direct_step(self, system: System, batch: Any, carried: "_Carried | None") -> "_Carried":
        """A step along dF/dx alone; the sum of the right-hand sides so far, each by its learning rate."""
        loss, direct, v = upper_derivatives(self.problem, self.upper, self.lower, system.implicit, batch)
        rate = self._rate("upper")
        record = self._update("upper", direct, float(loss))
        self.problem.after_upper_step(self.upper, self.lower, batch, self.steps["upper"])
        self._emit({**record, "status": None})
        if carried is None:
            return _Carried(tree.scale(rate, v), rate)
        return _Carried(tree.axpy(rate, v, carried.right), carried.rates + rate)

    def _upper_step(self, system: System, batch: Any, carried: "_Carried | None") -> None:
        """A hypergradient step; `carried` right-hand sides are solved for with its own."""
        rate, shares = self._rate("upper"), 1.0
        if carried is not None:
            if rate == 0.0 and carried.rates > 0.0:
                raise ValueError(
                    f"upper_scheduler: the learning rate is 0 in upper step {self.steps['upper'] + 1}, which takes the "
                    "implicit part of its whole alternation; end above 0, or leave aggregate out"
                )
            shares += carried.rates / rate if rate > 0.0 else 0.0

        def solve(v: Params) -> Solution:
            return system.solve(v if carried is None or rate == 0.0 else tree.axpy(1.0 / rate, carried.right, v))

        result = through_system(system, self.upper, self.lower, batch, solve=solve, on_failure=self._on_failure)
        record = self._update("upper", result.grad, float(result.loss), shares=shares)
        self.problem.after_upper_step(self.upper, self.lower, batch, self.steps["upper"])
        self._emit({**record, **self._diagnose(result)})

    def _rate(self, level: str) -> float:
        return float(self.optimizers[level].param_groups[0]["lr"])

    def _diagnose(self, result: Hypergradient) -> Record:
        solution = result.solution
        assert solution is not None
        self.solves[solution.status.name] += 1
        if not solution.status.ok:
            self._on_failure = "ignore" if self._on_failure == "warn" else self._on_failure
        return solve_record(result, solution)

    def _update(self, level: str, gradient: Params, loss: float, *, shares: float = 1.0) -> Record:
        """Apply one optimizer step, after checking that every number is finite; the event's record.

        A gradient that stands for those of several steps has as many `shares` in the norm limit.
        """
        variables = self.lower if level == "lower" else self.upper
        optimizer, scheduler = self.optimizers[level], self.schedulers[level]
        norm = float(tree.norm(gradient))
        if distributed.agree(not (abs(loss) < float("inf") and norm < float("inf"))):
            raise NonFiniteError(
                f"{level} step {self.steps[level] + 1} (alternation {self.alternation + 1}): loss {loss}, gradient "
                f"norm {norm}; no variable was changed. Lower the learning rate, or check the data of this batch"
            )
        if self.max_grad_norm is not None and norm > shares * self.max_grad_norm:
            gradient = tree.scale(shares * self.max_grad_norm / norm, gradient)
        for name, variable in variables.items():
            variable.grad = gradient[name]
        rate = self._rate(level)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scheduler is not None:
            scheduler.step()
        self.steps[level] += 1
        return {"event": level, "step": self.steps[level], "loss": loss, "lr": rate, "grad_norm": norm}

    @torch.no_grad()
    def _adapt(self) -> None:
        for upper_name, lower_name in self.adaptation_pairs.items():
            self.upper[upper_name].lerp_(self.lower[lower_name], self.schedule.adaptation_strength)
        self._emit({"event": "adaptation", "step": self.steps["lower"], "strength": self.schedule.adaptation_strength})

    @torch.no_grad()
    def _reset_lower(self) -> None:
        start = self.problem.reset_lower(self.upper)
        if start is None:
            return
        for name, value in start.items():
            self.lower[name].copy_(value)
        self.optimizers["lower"].state.clear()

    def _emit(self, record: Record) -> None:
        record = {
            "alternation": max(self.alternation, 1) if record["event"] == "alternation" else self.alternation + 1,
            **record,
        }
        for callback in self.callbacks:
            callback.on_event(self, record)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; taken between two alternations."""
        hvp = self.system_options["hvp"]
        return {
            "alternation": self.alternation,
            "steps": dict(self.steps),
            "solves": dict(self.solves),
            "upper": {name: leaf.detach().clone() for name, leaf in self.upper.items()},
            "lower": {name: leaf.detach().clone() for name, leaf in self.lower.items()},
            "optimizers": {
                level: copy.deepcopy(optimizer.state_dict()) for level, optimizer in self.optimizers.items()
            },
            "schedulers": {level: s.state_dict() for level, s in self.schedulers.items() if s is not None},
            "data": {level: source.state_dict() for level, source in self.data.items()},
            "hvp": hvp.state_dict() if isinstance(hvp, Automatic) else None,
            "problem": self.problem.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "random": random_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer that was made with the same arguments.

        Raises:
            ValueError: the state has other variables or another number of callbacks than this trainer.
        """
        if len(state["callbacks"]) != len(self.callbacks):
            raise ValueError(
                f"callbacks: the state is of {len(state['callbacks'])}, this trainer has {len(self.callbacks)}; resume "
                "with the same callbacks in the same order"
            )
        for level, variables in (("upper", self.upper), ("lower", self.lower)):
            saved = state[level]
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in variables.items()}:
                raise ValueError(f"{level}: the state's variables have other names or shapes than this trainer's")
            for name, leaf in variables.items():
                leaf.copy_(saved[name])
            self.optimizers[level].load_state_dict(copy.deepcopy(state["optimizers"][level]))
            scheduler = self.schedulers[level]
            if scheduler is not None:
                scheduler.load_state_dict(state["schedulers"][level])
            self.data[level].load_state_dict(state["data"][level])
        if isinstance(hvp := self.system_options["hvp"], Automatic) and (chosen := state["hvp"]) is not None:
            hvp.load_state_dict(chosen)
        self.problem.load_state_dict(state["problem"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.alternation, self.steps = state["alternation"], dict(state["steps"])
        self.solves = Counter(state["solves"])
        set_random_state(state["random"])

    def _check(self) -> None:
        for level, variables in (("upper", self.upper), ("lower", self.lower)):
            tree.check_params(level, variables)
            held = {id(p) for group in self.optimizers[level].param_groups for p in group["params"]}
            missing = [name for name, leaf in variables.items() if id(leaf) not in held]
            if missing or len(held) != len(variables):
                raise ValueError(
                    f"{level}_optimizer must hold exactly the {len(variables)} tensors of `{level}`; it holds "
                    f"{len(held)} and misses {missing[:3]}. Build it from list({level}.values())"
                )
        if any(group.get("weight_decay", 0.0) for group in self.optimizers["lower"].param_groups):
            warnings.warn(
                "the lower optimizer's weight decay is not part of the lower objective: stationarity will not reach 0, "
                "and the hypergradient is that of the objective without it",
                stacklevel=3,
            )
        if (
            isinstance(self.hessian_batches, bool)
            or not isinstance(self.hessian_batches, int)
            or self.hessian_batches < 1
        ):
            raise ValueError(f"hessian_batches must be a whole number of at least 1, got {self.hessian_batches!r}")
        if self.micro_batch is not None:
            check_size("micro_batch", self.micro_batch)
        if self.aggregate and self.problem.curvature_depends_on_upper:
            raise ValueError(
                "aggregate=True: one solve serves several upper steps only where the curvature does not depend on the "
                "upper variables; set curvature_depends_on_upper = False in the Problem if that is so, or leave "
                "aggregate out"
            )
        if self.aggregate and len({group["lr"] for group in self.optimizers["upper"].param_groups}) > 1:
            raise ValueError(
                "aggregate=True: the upper optimizer's parameter groups have different learning rates, but the steps "
                "of an alternation are summed by one; give all groups one rate, or leave aggregate out"
            )
        if self._on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {self._on_failure!r}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}")
        if self.schedule.adaptation_every is not None and not self.adaptation_pairs:
            raise ValueError("the schedule adapts but adaptation_pairs is empty; pass {'upper name': 'lower name'}")
        for upper_name, lower_name in self.adaptation_pairs.items():
            if upper_name not in self.upper or lower_name not in self.lower:
                raise ValueError(f"adaptation_pairs: no upper {upper_name!r} or no lower {lower_name!r}")
            if self.upper[upper_name].shape != self.lower[lower_name].shape:
                raise ValueError(f"adaptation_pairs: {upper_name!r} and {lower_name!r} differ in shape")
