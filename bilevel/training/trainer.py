"""Alternating training: lower steps, adaptation, upper steps by any method."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch

from bilevel import interruption, tree
from bilevel.checkpoint import set_random_state
from bilevel.checks import check_kind
from bilevel.hypergradients import (
    Hypergradient,
    LowerStep,
    Method,
    MethodState,
    OnFailure,
    Setup,
    UpperStep,
    as_method,
    check_on_failure,
    check_proposal,
    check_serves,
    from_optimizer,
    report_failure,
    unwritten,
)
from bilevel.linear import Solver, Status
from bilevel.lower import autocasts, batch_by_batch, differentiates, training_derivatives
from bilevel.nn import noting_casts
from bilevel.problem import Problem
from bilevel.training.alternation import Alternation, restored
from bilevel.training.buffers import WrittenBuffers
from bilevel.training.callbacks import Callback, upper_record
from bilevel.training.engine import Training
from bilevel.training.level import Level, check_pair
from bilevel.training.lower_kinds import check_lower_kind, finish_step
from bilevel.training.schedule import AlternatingSchedule


@final
class Trainer(Training):
    """Alternates between the levels of a bilevel problem (BiSSL, Algorithm 1, for any `Problem` and `Method`).

    In each alternation: `lower_steps` steps on ``L + lambda r`` (along y - T or S for fixed points and roots, with the
    proximal map after each for a `bilevel.lower.ProximalProblem`); if the schedule says so, the adaptation of the upper
    variables; then `upper_steps` steps along what the method proposes. Optimizers, schedules and data live as long as
    the trainer. Variables change in place.

    Args:
        problem: the objectives.
        upper, lower: variables, optimizer and data of each level.
        schedule: how the levels take turns.
        method: gives the hypergradients: `Implicit` (the default), `Unrolled`, `OneStep`, `SAMA`, `Penalty`, one of the
            stochastic methods such as `SOBA`, or one of your own; a solver stands for ``Implicit(solver)``.
        callbacks: called in order.
        nonfinite_skips: how many steps may be left out in the whole run because their loss or gradient is not finite:
            nothing changes in them, neither the method's state nor the learning rate's schedule. One more, by default
            the first, raises `NonFiniteError`. `bilevel.training.Inspect` saves what such a step was made of.
        on_failure: as for `hypergradient`; "warn" warns once a run, and `solves` counts by status either way. A step
            that is not finite is one for `nonfinite_skips`, whatever is said here.

    Inside ``with bilevel.interruption.Interruption()``, SIGTERM, SIGUSR1 and Ctrl-C end `run` after the step that is
    being made, an upper step before the method's next product or pass: it is undone. `Checkpointing` then saves.

    Attributes:
        upper, lower: as given; ``levels`` holds both by name.
        progress: alternations made.
        steps, skipped: steps made and steps left out, by level.
        solves: how many linear systems were solved, by the name of the `Status` that they ended with.

    Raises:
        TypeError, ValueError: arguments that do not fit together, or that the method cannot serve.
    """

    def __init__(
        self,
        problem: Problem,
        upper: Level,
        lower: Level,
        schedule: AlternatingSchedule,
        method: Method | Solver | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        nonfinite_skips: int = 0,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__({"upper": upper, "lower": lower}, callbacks, nonfinite_skips)
        check_kind("problem", problem, Problem, "an instance of a Problem")
        check_kind("schedule", schedule, AlternatingSchedule, "an AlternatingSchedule")
        check_on_failure(on_failure)
        self.problem, self.schedule, self.method = problem, schedule, as_method(method, problem)
        self.upper, self.lower = upper, lower
        self._on_failure: OnFailure = on_failure
        self._warned, self._flagged = False, 0
        self._method_state: MethodState = {}
        self._now: Alternation | None = None
        self._buffers = WrittenBuffers()
        schedule.check_pairs(upper.params, lower.params)
        check_serves(self.method, problem)
        check_lower_kind(problem, lower)
        check_pair(problem, upper, lower)
        self._setup = Setup(
            problem,
            upper.params,
            lower.params,
            upper.optimizer,
            lower.optimizer,
            schedule.upper_steps,
            schedule.lower_steps,
            lower.micro_batch,
            schedule.adaptation_every is not None,
            lower.data.blocks,
            upper.data.blocks,
        )
        if schedule.upper_steps:
            self.method.check(self._setup)

    @property
    def total(self) -> int:
        """Alternations of the whole run."""
        return self.schedule.alternations

    @property
    def planned(self) -> dict[str, int]:
        upper, lower = self.schedule.upper_steps, self.schedule.lower_steps
        made = {"upper": upper, "lower": lower + upper * self.method.moves_lower}
        return {name: self.total * steps for name, steps in made.items()}

    @property
    def failures(self) -> Counter[str]:
        """Of `solves`, those that did not do what was asked, by the name of their `Status`; and "FLAGGED", upper steps
        whose hypergradient has a failure that is no solve's (lost curvature, a y that is no fixed point)."""
        failed = {name: count for name, count in self.solves.items() if not Status[name].ok}
        return Counter({**failed, "FLAGGED": self._flagged} if self._flagged else failed)

    def _advance(self) -> None:
        began, waited = time.perf_counter(), self.waited
        now = self._now = self._now or self._begin()
        self._lower_stage(now)
        if self.schedule.adapts(self.progress + 1) and not now.adapted:
            self._adapt()
            now.adapted = True
            interruption.check()
        self._upper_stage(now)
        self._now = None
        self.progress += 1
        seconds = time.perf_counter() - began
        share = (self.waited - waited) / seconds
        self.emit({"event": "alternation", "step": self.progress, "seconds": seconds, "waiting": share})

    def _begin(self) -> Alternation:
        start = self.problem.reset_lower(self.upper.params)
        if start is not None:
            self.lower.restart(start)
            self._method_state = self.method.restarted(self._method_state)
        began = copy.deepcopy(self.lower.data.state_dict())
        self.lower.data.begin_stage(self._lower_batches)
        return Alternation(began)

    @property
    def _stored_batches(self) -> int:
        return self.method.stored_batches if self.schedule.upper_steps else 0

    @property
    def _lower_batches(self) -> int:
        steps, stored = self.schedule.lower_steps, self._stored_batches
        drawn = self.schedule.upper_steps * self.method.lower_draws
        return drawn + (steps + stored if self.method.fresh_batches else max(steps, stored))

    def _lower_stage(self, now: Alternation) -> None:
        while now.lower < self.schedule.lower_steps:
            self._lower_step(now, self._next_lower_batch(now))
            now.lower += 1
            interruption.check()
        if self.method.fresh_batches and now.stored_from is None:
            now.stored_from = copy.deepcopy(self.lower.data.state_dict())
        while len(now.stored) < self._stored_batches:
            self._next_lower_batch(now)

    def _next_lower_batch(self, now: Alternation) -> Any:
        batch = self.lower.next_batch()
        now.drawn += 1
        waits = self.method.fresh_batches and now.stored_from is None
        if len(now.stored) < self._stored_batches and not waits:
            now.stored.append(batch)
        return batch

    def _lower_step(self, now: Alternation, batch: Any) -> None:
        # A forward pass may write what the problem keeps, such as running statistics.
        kept = copy.deepcopy(self.problem.state_dict()) if self.nonfinite_skips else None
        upper, lower = self.upper.params, self.lower
        made = self._before_lower_step(batch) if self._is_replayed(now) else None
        casts, around = set[str](), autocasts()
        with self._buffers.noted(), noting_casts(casts):
            loss, gradient = training_derivatives(
                self.problem,
                upper,
                lower.params,
                batch,
                micro_batch=lower.micro_batch,
                seed=None if made is None else made.seed,
            )
        finish = finish_step(self.problem, upper, lower)
        record = self.apply("lower", "lower", loss, gradient, undo=lambda: self._put_back(kept))
        if "skipped" not in record:
            finish()
            self.problem.after_lower_step(upper, lower.params, self.steps["lower"])
            if made is not None:
                now.recorded.append((now.drawn - 1, replace(made, autocast=around) if casts or around else made))
        self.emit(record)

    def _put_back(self, kept: Mapping[str, Any] | None) -> None:
        if kept is not None:
            self.problem.load_state_dict(kept)

    def _is_replayed(self, now: Alternation) -> bool:
        """Whether the method asks for the lower step that is about to be made."""
        wanted = self.method.replayed_steps if self.schedule.upper_steps else 0
        return wanted is None or now.lower >= self.schedule.lower_steps - wanted

    def _before_lower_step(self, batch: Any) -> LowerStep:
        level = self.lower
        update, state = from_optimizer(level.optimizer, level.params)
        variables = {name: leaf.detach().clone() for name, leaf in level.params.items()}
        problem = copy.deepcopy(self.problem.state_dict())
        seed = int(torch.randint(2**31 - 1, ()))
        return LowerStep(variables, update, state, batch, seed, level.max_grad_norm, problem)

    def _upper_stage(self, now: Alternation) -> None:
        steps, data = self.schedule.upper_steps, [self.upper.data]
        if self.method.lower_draws:
            data.append(self.lower.data)
        if now.upper == 0 and steps and interruption.may_come() and self.method.starts_anew(self._setup):
            now.fallback = self.state_dict()
        writes = self.method.moves_lower and (self.nonfinite_skips > 0 or interruption.may_come())
        while now.upper < steps:
            # The first pass of a lower step may write what the problem keeps, such as running statistics.
            kept = copy.deepcopy(self.problem.state_dict()) if writes else None
            undo = partial(self._put_back, kept)
            with now.undone_if_interrupted(data, undo):
                self._upper_step(now, undo)
            now.upper += 1
            if now.upper < steps:
                interruption.check()

    @differentiates
    def _upper_step(self, now: Alternation, undo: Callable[[], None]) -> None:
        upper, lower, method = self.upper, self.lower, self.method
        if now.upper == 0:
            upper.data.begin_stage(self.schedule.upper_steps * method.upper_draws)
        with unwritten(upper.params, lower.params), batch_by_batch(), self._buffers.noted():
            prepared = None
            if method.prepares:
                prepared = now.prepare(
                    lambda: method.prepare(self._view(now), self._method_state),
                    always=self.problem.curvature_depends_on_upper,
                )
            view = self._view(now, **self._draws())
            proposal = method.propose(view, self._method_state, prepared)
        proposal = check_proposal(method, proposal, upper.params, lower.params)
        now.proposed = now.proposed or proposal.result is not None
        also = proposal.checked
        if also is None:
            also = [tensor for tensor in tree.tensors_in(proposal.state) if tensor.is_floating_point()]
        record = self.apply(
            "upper",
            "upper",
            proposal.loss,
            proposal.gradient,
            others={} if proposal.lower_gradient is None else {"lower": proposal.lower_gradient},
            limit_scale=proposal.norm_limit_scale,
            also=also,
            before=lambda: self._report(proposal.result),
            undo=undo,
            reason=proposal.result and proposal.result.failure,
        )
        if "skipped" not in record:
            proposal.commit()
            self._method_state = proposal.state
            if method.moves_lower:
                self.problem.after_lower_step(upper.params, lower.params, self.steps["lower"])
            self.problem.after_upper_step(upper.params, lower.params, view.upper_batch, self.steps["upper"])
        self.emit({**record, **upper_record(proposal.result), **proposal.record})

    def _draws(self) -> dict[str, Any]:
        """Of an `UpperStep`, the upper batch, and samples of its own where the method draws such."""
        method = self.method
        if not method.lower_draws:
            return {"upper_batch": self.upper.next_batch()}
        seed = int(torch.randint(2**30, ()))
        lower = tuple([self.lower.draw(seed + k) for k in range(method.lower_draws)])
        upper = tuple([self.upper.draw(seed + method.lower_draws + k) for k in range(method.upper_draws)])
        return {"upper_batch": upper[0].batch, "lower_draws": lower, "upper_draws": upper}

    def _view(self, now: Alternation, upper_batch: Any = None, **draws: Any) -> UpperStep:
        upper, lower = self.upper, self.lower
        return UpperStep(
            self.problem,
            upper.params,
            lower.params,
            upper_batch,
            tuple(now.stored),
            **draws,
            lower_blocks=lower.data.blocks,
            upper_blocks=upper.data.blocks,
            lower_steps=tuple(step for _, step in now.recorded),
            lower_update=lambda: from_optimizer(lower.optimizer, lower.params),
            lower_rate=lower.rate,
            upper_rate=upper.rate,
            position=now.upper,
            count=self.schedule.upper_steps,
            number=self.steps["upper"] + 1,
            watch=interruption.check,
            on_failure="ignore" if self._warned else self._on_failure,
        )

    def _report(self, result: Hypergradient | None) -> None:
        """Count a solve by its status, and a failure that is not its own; warn of a failure once a run."""
        if result is not None and result.solution is not None:
            self.solves[result.solution.status.name] += 1
        if result is not None:
            self._flagged += result.failure is not None and (result.solution is None or result.solution.status.ok)
            report_failure(replace(result, failure=None) if self._warned else result, self._on_failure)
            self._warned = self._warned or (self._on_failure == "warn" and result.failure is not None)

    @torch.no_grad()
    def _adapt(self) -> None:
        upper, lower = self.upper.params, self.lower.params
        for upper_name, lower_name in (self.schedule.adaptation_pairs or {}).items():
            upper[upper_name].lerp_(lower[lower_name], self.schedule.adaptation_strength)
        self.emit({"event": "adaptation", "step": self.steps["lower"], "strength": self.schedule.adaptation_strength})

    def place(self, name: str) -> str:
        """In words, the step of a level that is being made."""
        return f"{super().place(name)} (alternation {self.progress + 1})"

    def emit(self, record: dict[str, Any]) -> None:
        """Tell the callbacks of an event, and in which alternation it happened."""
        number = self.progress if record["event"] == "alternation" else self.progress + 1
        super().emit({"alternation": number, **record})

    def kept(self) -> dict[str, Any]:
        state = self.problem.state_dict()
        self._buffers.warn_of_lost(self.problem, state)
        return state

    def load_kept(self, kept: Mapping[str, Any]) -> None:
        self.problem.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; taken between two steps.

        Where the method learns from one upper step for later ones (`Method.starts_anew`), the state between two of them
        would not do: inside ``with Interruption()`` it is then the state before the alternation's first one.
        """
        if self._now is not None and self._now.fallback is not None and self._now.proposed:
            return self._now.fallback
        return {
            **super().state_dict(),
            "solves": dict(self.solves),
            "flagged": self._flagged,
            "stages": [self.schedule.lower_steps, self.schedule.upper_steps],
            "method": {"name": type(self.method).__name__, "state": copy.deepcopy(self._method_state)},
            "under_way": None if self._now is None else self._now.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        super().check_state(state)
        saved, own = state["method"]["name"], type(self.method).__name__
        if saved != own:
            raise ValueError(
                f"method: the state is of {saved}, this training goes by {own}; resume with the same method"
            )
        then, now = tuple(state["stages"]), (self.schedule.lower_steps, self.schedule.upper_steps)
        if then != now:
            raise ValueError(
                f"schedule: the state is of {then[0]} lower and {then[1]} upper steps an alternation, this training "
                f"has {now[0]} and {now[1]}; resume with the same schedule (more alternations may be asked for)"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._now = None
        if state["under_way"] is not None:
            # Batches that the alternation has kept are drawn again before the data go on.
            lower = self.lower
            self._now = restored(state["under_way"], lower, self._lower_batches)
            lower.data.load_state_dict(state["data"]["lower"])
        self.solves, self._flagged = Counter(state["solves"]), state["flagged"]
        self._method_state = copy.deepcopy(state["method"]["state"])
        set_random_state(state["random"])
