"""The alternating loop: lower steps, adaptation, upper steps."""

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bilevel import interruption, tree
from bilevel.checkpoint import random_state, set_random_state
from bilevel.distributed import check_replicated
from bilevel.hypergradients import Hypergradient, OnFailure, System, Tikhonov, linearize, through_system
from bilevel.interruption import Interrupted
from bilevel.linear import Solution, Solver, Status
from bilevel.lower import training_derivatives, upper_derivatives
from bilevel.problem import Problem
from bilevel.products import HVP, Automatic, as_provider
from bilevel.training.alternation import Alternation, Carried, carry, restored
from bilevel.training.batches import BatchSource, Cycle
from bilevel.training.callbacks import Callback, Record, solve_record
from bilevel.training.level import Level, LRSchedule, NonFiniteError
from bilevel.training.schedule import AlternatingSchedule
from bilevel.training.trainer_arguments import check_adaptation, check_aggregate, check_optimizers, check_options
from bilevel.tree import Params


class Trainer:
    """Alternates between the levels of a bilevel problem (BiSSL, Algorithm 1, for any `Problem`).

    In each alternation: `lower_steps` steps on ``L + lambda r``; if the schedule says so, the adaptation of the upper
    variables; then `upper_steps` hypergradient steps, all with the system of the first `hessian_batches` lower batches
    of this alternation. Optimizers, schedules and data streams live as long as the trainer. Variables change in
    place.

    Args:
        upper, lower: leaf tensors; each optimizer must hold exactly the tensors of its level.
        lower_data, upper_data: a `BatchSource`, or a sequence of batches that is cycled through.
        solver, hvp, damping, tikhonov: as for `linearize`.
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
        nonfinite_skips: how many steps may be left out in the whole run because their loss or gradient is not finite:
            nothing changes in them, nor does the learning rate's schedule. One more, by default the first, raises
            `NonFiniteError`. `bilevel.training.inspection.Inspect` saves what such a step was made of.
        max_grad_norm: a level's whole gradient is scaled down to this Euclidean norm where it is longer.
        adaptation_pairs: upper name -> lower name it adapts to; needed if the schedule adapts.
        on_failure: as for `hypergradient`; "warn" warns once a run, and `solves` counts by status either way.
        callbacks: called in order.

    Inside ``with bilevel.interruption.Interruption()``, SIGTERM, SIGUSR1 and Ctrl-C end `run` after the step that is
    being made, a hypergradient step after the product: it is undone. `Checkpointing` then saves.

    Attributes:
        skipped: steps left out, by level.
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
        tikhonov: Tikhonov = 0.0,
        aggregate: bool = False,
        hessian_batches: int = 1,
        lower_scheduler: LRSchedule | None = None,
        upper_scheduler: LRSchedule | None = None,
        micro_batch: int | None = None,
        nonfinite_skips: int = 0,
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
        options = {"solver": solver, "hvp": as_provider(hvp), "damping": damping, "tikhonov": tikhonov}
        self.system_options: dict[str, Any] = options
        self.hessian_batches, self.max_grad_norm, self.aggregate = hessian_batches, max_grad_norm, aggregate
        self.micro_batch, self.nonfinite_skips = micro_batch, nonfinite_skips
        self.adaptation_pairs = dict(adaptation_pairs or {})
        self.callbacks = tuple(callbacks)
        self.alternation = 0
        self.steps = {"lower": 0, "upper": 0}
        self.skipped: Counter[str] = Counter()
        self.solves: Counter[str] = Counter()
        self._on_failure: OnFailure = on_failure
        self._now: Alternation | None = None
        levels = {"upper": upper, "lower": lower}
        check_optimizers(levels, self.optimizers)
        check_options(hessian_batches, micro_batch, nonfinite_skips, max_grad_norm, on_failure)
        if aggregate:
            check_aggregate(problem, upper_optimizer.param_groups)
        check_adaptation(schedule, self.adaptation_pairs, levels)

    @property
    def levels(self) -> dict[str, Level]:
        """Variables, optimizer and schedule, by level."""
        return {
            name: Level(name, variables, self.optimizers[name], self.schedulers[name])
            for name, variables in (("upper", self.upper), ("lower", self.lower))
        }

    @property
    def failures(self) -> Counter[str]:
        """Of `solves`, those that did not do what was asked, by the name of their `Status`."""
        return Counter({name: count for name, count in self.solves.items() if not Status[name].ok})

    def run(self) -> None:
        """Make the alternations that are left.

        Raises:
            NonFiniteError: a loss or gradient was not finite, after `nonfinite_skips` others.
            Interrupted: a signal asked for it; the callbacks have been told.
            ValueError: ranks have other variables.
        """
        check_replicated("upper", self.upper)
        check_replicated("lower", self.lower)
        with interruption.deferred():
            for callback in self.callbacks:
                callback.on_run_start(self)
            try:
                while self.alternation < self.schedule.alternations:
                    interruption.check()
                    self.alternate()
            except Interrupted:
                for callback in self.callbacks:
                    callback.on_interrupt(self)
                raise
            finally:
                for callback in self.callbacks:
                    callback.on_run_end(self)

    def alternate(self) -> None:
        """One alternation, or the rest of one that was interrupted."""
        began = time.perf_counter()
        if self._now is None:
            self._now = self._begin()
        now = self._now
        self._lower_stage(now)
        if self.schedule.adapts(self.alternation + 1) and not now.adapted:
            self._adapt()
            now.adapted = True
            interruption.check()
        self._upper_stage(now)
        self._now = None
        self.alternation += 1
        self._emit({"event": "alternation", "step": self.alternation, "seconds": time.perf_counter() - began})
        for callback in self.callbacks:
            callback.on_alternation_end(self)

    def _begin(self) -> Alternation:
        start = self.problem.reset_lower(self.upper)
        if start is not None:
            self.levels["lower"].restart(start)
        began = copy.deepcopy(self.data["lower"].state_dict())
        self.data["lower"].begin_stage(self._lower_batches)
        return Alternation(began)

    @property
    def _stored_batches(self) -> int:
        return self.hessian_batches if self.schedule.upper_steps else 0

    @property
    def _lower_batches(self) -> int:
        return max(self.schedule.lower_steps, self._stored_batches)

    def _lower_stage(self, now: Alternation) -> None:
        data = self.data["lower"]
        while now.lower < self.schedule.lower_steps:
            batch = data.next()
            if len(now.stored) < self._stored_batches:
                now.stored.append(batch)
            self._lower_step(batch)
            now.lower += 1
            interruption.check()
        while len(now.stored) < self._stored_batches:
            now.stored.append(data.next())

    def _lower_step(self, batch: Any) -> None:
        # A forward pass may write what the problem keeps, such as running statistics.
        kept = copy.deepcopy(self.problem.state_dict()) if self.nonfinite_skips else None
        loss, gradient = training_derivatives(self.problem, self.upper, self.lower, batch, self.micro_batch)
        record = self._update("lower", gradient, float(loss))
        if "skipped" not in record:
            self.problem.after_lower_step(self.upper, self.lower, self.steps["lower"])
        elif kept is not None:
            self.problem.load_state_dict(kept)
        self._emit(record)

    def _upper_stage(self, now: Alternation) -> None:
        steps = self.schedule.upper_steps
        if self._resumes_before_solves and now.upper == 0 and interruption.may_come():
            now.fallback = self.state_dict()
        while now.upper < steps:
            with now.undone_if_interrupted(self.data["upper"]):
                self._next_upper_step(now)
            now.upper += 1
            if now.upper < steps:
                interruption.check()

    @property
    def _resumes_before_solves(self) -> bool:
        """Whether a system may answer several right-hand sides, by a solver that learns from each."""
        several = self.schedule.upper_steps > 1 and not (self.aggregate or self.problem.curvature_depends_on_upper)
        solver = self.system_options["solver"]
        return several and solver is not None and solver.learns

    def _next_upper_step(self, now: Alternation) -> None:
        data, steps = self.data["upper"], self.schedule.upper_steps
        if now.upper == 0:
            data.begin_stage(steps)
        system = now.built(
            lambda: linearize(self.problem, self.upper, self.lower, now.stored, **self.system_options),
            always=self.problem.curvature_depends_on_upper,
        )
        batch = data.next()
        if self.aggregate and now.upper + 1 < steps:
            now.carried = self._direct_step(system, batch, now.carried)
        else:
            self._upper_step(system, batch, now.carried)
            now.solved = True

    def _direct_step(self, system: System, batch: Any, carried: Carried | None) -> Carried | None:
        """A step along dF/dx alone; the sum of the right-hand sides so far, each by its learning rate."""
        loss, direct, v = upper_derivatives(self.problem, self.upper, self.lower, system.implicit, batch)
        rate = self.levels["upper"].rate
        record = self._update("upper", direct, float(loss))
        self._finish_upper_step(batch, {**record, "status": None})
        return carried if "skipped" in record else carry(carried, v, rate)

    def _upper_step(self, system: System, batch: Any, carried: Carried | None) -> None:
        """A hypergradient step; `carried` right-hand sides are solved for with its own."""
        rate, shares = self.levels["upper"].rate, 1.0
        if carried is not None:
            if rate == 0.0 and carried.rates > 0.0:
                raise ValueError(
                    f"upper_scheduler: the learning rate is 0 in upper step {self.steps['upper'] + 1}, which takes the "
                    "implicit part of its whole alternation; end above 0, or leave aggregate out"
                )
            shares += carried.rates / rate if rate > 0.0 else 0.0

        def solve(v: Params) -> Solution:
            return system.solve(v if carried is None else carried.whole(v, rate), watch=interruption.check)

        result = through_system(system, self.upper, self.lower, batch, solve=solve, on_failure=self._on_failure)
        record = self._update("upper", result.grad, float(result.loss), shares=shares)
        self._finish_upper_step(batch, {**record, **self._diagnose(result)})

    def _finish_upper_step(self, batch: Any, record: Record) -> None:
        if "skipped" not in record:
            self.problem.after_upper_step(self.upper, self.lower, batch, self.steps["upper"])
        self._emit(record)

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
        norm = float(tree.norm(gradient))
        # Both are of means over the ranks: what is not finite on one is so on all.
        if not (abs(loss) < float("inf") and norm < float("inf")):
            return self._skip(level, loss, norm)
        rate, limit = self.levels[level].rate, self.max_grad_norm
        self.levels[level].descend(gradient, norm, None if limit is None else shares * limit)
        self.steps[level] += 1
        return {"event": level, "step": self.steps[level], "loss": loss, "lr": rate, "grad_norm": norm}

    def _skip(self, level: str, loss: float, norm: float) -> Record:
        """Count a step that is not finite as made, with nothing changed; its event."""
        step, rate = self.steps[level] + 1, self.levels[level].rate
        record = {"event": level, "step": step, "loss": loss, "lr": rate, "grad_norm": norm, "skipped": True}
        notes = [note for callback in self.callbacks if (note := callback.on_nonfinite(self, record)) is not None]
        if self.skipped.total() >= self.nonfinite_skips:
            raise NonFiniteError(
                f"{level} step {step} (alternation {self.alternation + 1}): loss {loss}, gradient norm {norm}; "
                f"{'; '.join(['no variable was changed', *notes])}. Lower the learning rate, or check the data of this "
                "batch"
            )
        self.skipped[level] += 1
        self.steps[level] = step
        return record

    @torch.no_grad()
    def _adapt(self) -> None:
        for upper_name, lower_name in self.adaptation_pairs.items():
            self.upper[upper_name].lerp_(self.lower[lower_name], self.schedule.adaptation_strength)
        self._emit({"event": "adaptation", "step": self.steps["lower"], "strength": self.schedule.adaptation_strength})

    def _emit(self, record: Record) -> None:
        record = {
            "alternation": max(self.alternation, 1) if record["event"] == "alternation" else self.alternation + 1,
            **record,
        }
        for callback in self.callbacks:
            callback.on_event(self, record)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; taken between two steps.

        Where the solver learns from one right-hand side for later ones (`Solver.learns`), the state between two upper
        steps would not do: inside ``with Interruption()`` it is then the state before the alternation's first one.
        """
        if self._now is not None and self._now.fallback is not None and self._now.solved:
            return self._now.fallback
        hvp = self.system_options["hvp"]
        return {
            "alternation": self.alternation,
            "steps": dict(self.steps),
            "solves": dict(self.solves),
            "skipped": dict(self.skipped),
            "under_way": None if self._now is None else copy.deepcopy(self._now.state_dict()),
            "levels": {name: level.state_dict() for name, level in self.levels.items()},
            "data": {level: source.state_dict() for level, source in self.data.items()},
            "hvp": hvp.state_dict() if isinstance(hvp, Automatic) else None,
            "problem": self.problem.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "random": random_state(),
        }

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
        for name, level in self.levels.items():
            level.load_state_dict(state["levels"][name])
        # Batches that the alternation has kept are drawn again before the data go on.
        self._now = None
        if state["under_way"] is not None:
            self._now = restored(state["under_way"], self.data["lower"], self._lower_batches, self.lower)
        for name, source in self.data.items():
            source.load_state_dict(state["data"][name])
        if isinstance(hvp := self.system_options["hvp"], Automatic) and (chosen := state["hvp"]) is not None:
            hvp.load_state_dict(chosen)
        self.problem.load_state_dict(state["problem"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.alternation, self.steps = state["alternation"], dict(state["steps"])
        self.solves, self.skipped = Counter(state["solves"]), Counter(state["skipped"])
        set_random_state(state["random"])
