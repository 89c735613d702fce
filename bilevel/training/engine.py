"""The engine of every training: steps whose numbers are finite, signals, callbacks, and what a checkpoint holds."""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bilevel import interruption, tree
from bilevel.checkpoint import load_checkpoint, lost_generators, random_state, save_checkpoint, set_random_state
from bilevel.checks import check_count, check_kind, check_trained
from bilevel.distributed import check_replicated, rank
from bilevel.interruption import Interrupted
from bilevel.lower import check_recordable
from bilevel.training.callbacks import Callback, Record
from bilevel.training.level import Level
from bilevel.tree import Params

LAST_STEPS = 10
"""A training of which this many steps of a level, or all where they are fewer, were left out last has not ended."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; raised before the optimizer's step, so that no variable has changed.

    Also raised at the end of a training whose last steps were all left out for that, or whose last step has made a
    variable infinite.

    Buffers that the pass writes, such as running statistics, are put back only where `nonfinite_skips` is above 0.
    """


class Training(ABC):
    """What `Trainer` and `SingleLevelTrainer` have in common: it makes units of work until all are made, applies their
    steps, and tells its callbacks. A unit is an alternation or a single step.

    Attributes:
        levels: by name.
        steps: made so far, by level.
        skipped: steps left out, by level; `skipped_last` counts those of them since the last step that was not.
        solves: linear systems solved, by the name of the `Status` that they ended with.
        progress: units made.
        continues: whether it goes by a state that was saved: by `resume`, which saves one where there is none, or by
            `load_state_dict`.
    """

    def __init__(self, levels: Mapping[str, Level], callbacks: Sequence[Callback], nonfinite_skips: int) -> None:
        for name, level in levels.items():
            check_kind(name, level, Level, "a Level, such as Level(params, optimizer, data)")
        check_kind("callbacks", callbacks, (list, tuple), "a list of callbacks, such as [ProgressBar()]")
        for index, callback in enumerate(callbacks):
            check_kind(f"callbacks[{index}]", callback, Callback, "a Callback")
        check_count("nonfinite_skips", nonfinite_skips, least=0)
        self.levels, self.callbacks, self.nonfinite_skips = dict(levels), tuple(callbacks), nonfinite_skips
        self.steps = dict.fromkeys(self.levels, 0)
        self.skipped: Counter[str] = Counter()
        self.skipped_last: Counter[str] = Counter()
        self.solves: Counter[str] = Counter()
        self.progress, self.continues = 0, False
        self._run_began = time.perf_counter(), 0.0

    @property
    @abstractmethod
    def total(self) -> int:
        """Units of the whole training."""

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for batches, at all levels."""
        return sum(level.waited for level in self.levels.values())

    @property
    def waiting(self) -> float:
        """The share of the time since `run` began in which this process waited for batches, in [0, 1]."""
        began, waited = self._run_began
        elapsed = time.perf_counter() - began
        return (self.waited - waited) / elapsed if elapsed > 0 else 0.0

    def advance(self) -> None:
        """Make one unit, or the rest of one that was interrupted; gradients are recorded under torch.no_grad too.

        Raises:
            RuntimeError: under torch.inference_mode.
            ValueError: variables of a level are frozen by now (requires_grad=False beside others that require
                gradients).
        """
        check_recordable(f"{type(self).__name__}.advance")
        self._check_trained()
        with torch.enable_grad():
            self._advance()

    def _check_trained(self) -> None:
        for name, level in self.levels.items():
            check_trained(name, level.params)

    @abstractmethod
    def _advance(self) -> None:
        """The unit itself."""

    @property
    @abstractmethod
    def planned(self) -> dict[str, int]:
        """Steps of the whole training, by level."""

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond the levels' variables: buffers, momentum targets."""

    def run(self) -> None:
        """Make the units that are left.

        Raises:
            NonFiniteError: a loss or gradient was not finite, after `nonfinite_skips` others; or those of the last
                `LAST_STEPS` steps of a level, or of all where it has fewer, were not; or a variable is not in the end.
            Interrupted: a signal asked for it; the callbacks have been told.
            RuntimeError: under torch.inference_mode.
            ValueError: ranks have other variables, a level's schedule ends before its steps do, or variables are frozen
                by now, as for `advance`.
        """
        check_recordable(f"{type(self).__name__}.run")
        self._check_trained()
        for name, level in self.levels.items():
            check_replicated(name, level.params)
            try:
                level.check_planned(self.planned[name] - self.steps[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self._run_began = time.perf_counter(), self.waited
        with interruption.deferred():
            try:
                for callback in self.callbacks:
                    callback.on_run_start(self)
                while self.progress < self.total:
                    interruption.check()
                    self.advance()
                    for callback in self.callbacks:
                        callback.on_progress(self)
                self._check_end()
            except Interrupted:
                for callback in self.callbacks:
                    callback.on_interrupt(self)
                raise
            finally:
                for level in self.levels.values():
                    level.data.close()
                for callback in self.callbacks:
                    callback.on_run_end(self)

    def _check_end(self) -> None:
        """Refuse to end as if all were well."""
        for name, planned in self.planned.items():
            if planned and self.skipped_last[name] >= min(LAST_STEPS, planned):
                raise NonFiniteError(
                    f"{name}: the last {self.skipped_last[name]} of {self.steps[name]} steps were left out, as their "
                    f"loss or gradient was not finite ({self.skipped[name]} in all); what was trained is not of use. "
                    "Lower the learning rate, or check the data and the weights that it began with"
                )
            params = self.levels[name].params
            if not tree.all_finite(params):
                variable = next(key for key, leaf in params.items() if not tree.all_finite({key: leaf}))
                raise NonFiniteError(
                    f"{name}: {variable} is not finite after the last of {self.steps[name]} steps; lower the learning "
                    "rate"
                )

    def resume(self, directory: str | Path) -> bool:
        """Continue from the newest checkpoint in `directory`; whether there was one.

        Without one the present state is saved as the checkpoint before the first unit, so that a training that is
        interrupted early goes on from the same variables and random state.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
            ValueError: the checkpoint is of another training.
        """
        found = load_checkpoint(directory)
        if found is None:
            for callback in self.callbacks:
                callback.on_new_run(self)
            save_checkpoint(directory, self.progress, self.state_dict())
            self.continues = True
            return False
        self.load_state_dict(found[1])
        return True

    def apply(
        self,
        event: str,
        name: str,
        loss: Tensor,
        gradient: Params,
        *,
        others: Mapping[str, Params] = MappingProxyType({}),
        limit_scale: float = 1.0,
        also: Iterable[Tensor] = (),
        before: Callable[[], None] = lambda: None,
        undo: Callable[[], None] = lambda: None,
        reason: str | None = None,
    ) -> Record:
        """One optimizer step of a level, after checking that every number is finite; the event's record.

        Loss and gradient are means over the ranks, so that what is not finite on one is so on all. One read of the
        device: it waits for all that was queued, and before it the data prepare the level's next batch.

        Args:
            event: its name.
            name: of the level.
            others: gradients of further levels that move in the same step, by name; they are made or left out together.
            limit_scale: how many steps' gradients this one stands for, in the norm limit.
            also: tensors that must be finite too.
            before: called when all is finite, before anything changes.
            undo: called when something is not, before the callbacks hear of it.
            reason: in words, what may have gone wrong.
        """
        level, size = self.levels[name], tree.norm(gradient)
        dtype = torch.promote_types(loss.dtype, size.dtype)
        # Zero times a number is NaN where that is not finite.
        zeros = [torch.linalg.vector_norm(tensor.detach() * 0.0) for tensor in also]
        sizes = [size, *(tree.norm(others[other]) for other in others)]
        numbers = [number.detach().to(size.device, dtype) for number in (loss, *sizes, *zeros)]
        level.data.prepare()
        value, norm, *rest = torch.stack(numbers).tolist()
        norms, all_sound = rest[: len(others)], all(number == 0.0 for number in rest[len(others) :])
        record = {"event": event, "step": self.steps[name] + 1, "loss": value, "lr": level.rate, "grad_norm": norm}
        for other, its_norm in zip(others, norms, strict=True):
            record |= {f"{other}_lr": self.levels[other].rate, f"{other}_grad_norm": its_norm}
        if all_sound and all(math.isfinite(number) for number in (value, norm, *norms)):
            before()
            level.descend(gradient, norm, limit_scale=limit_scale)
            for other, its_norm in zip(others, norms, strict=True):
                self.levels[other].descend(others[other], its_norm, limit_scale=limit_scale)
            self.skipped_last[name] = 0
        else:
            undo()
            reasons = [reason] if reason else []
            record = self._skip(name, record, reasons if all_sound else [*reasons, "the method's state is not finite"])
        for moved in (name, *others):
            self.steps[moved] += 1
        return record

    def _skip(self, name: str, record: Record, reasons: Sequence[str]) -> Record:
        """Count a step that is not finite as left out, with nothing changed; its event."""
        record = {**record, "skipped": True}
        notes = [note for callback in self.callbacks if (note := callback.on_nonfinite(self, name, record)) is not None]
        if self.skipped.total() >= self.nonfinite_skips:
            raise NonFiniteError(
                f"{self.place(name)}: loss {record['loss']}, gradient norm {record['grad_norm']}; "
                f"{'; '.join([*reasons, 'no variable was changed', *notes])}. {_lower_rates(name, record)}, or check "
                "the data of this batch"
            )
        self.skipped[name] += 1
        self.skipped_last[name] += 1
        return record

    def place(self, name: str) -> str:
        """In words, the step of a level that is being made."""
        return f"{name} step {self.steps[name] + 1}"

    def emit(self, record: Record) -> None:
        """Tell the callbacks of an event."""
        for callback in self.callbacks:
            callback.on_event(self, record)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; taken between two steps."""
        return {
            "progress": self.progress,
            "steps": dict(self.steps),
            "skipped": dict(self.skipped),
            "skipped_last": dict(self.skipped_last),
            "levels": {name: level.state_dict() for name, level in self.levels.items()},
            "data": {name: level.data.state_dict() for name, level in self.levels.items()},
            "kept": self.kept(),
            "callbacks": [{"kind": type(c).__name__, "state": c.state_dict()} for c in self.callbacks],
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a training that was made with the same arguments. A UserWarning says which
        CUDA generators have no place where the number of devices is another one.

        Raises:
            ValueError: the state is of another training; nothing was changed.
        """
        self.check_state(state)
        for name, level in self.levels.items():
            level.load_state_dict(state["levels"][name])
            level.data.load_state_dict(state["data"][name])
        self.load_kept(state["kept"])
        for callback, saved in self._pairs(state)[0]:
            callback.load_state_dict(saved)
        self.continues = True
        self.progress, self.steps = state["progress"], dict(state["steps"])
        self.skipped, self.skipped_last = Counter(state["skipped"]), Counter(state["skipped_last"])
        lost = lost_generators(state["random"])
        if lost is not None and rank() == 0:
            warnings.warn(lost, stacklevel=2)
        set_random_state(state["random"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another training, before anything is written.

        Raises:
            ValueError: naming what differs.
        """
        if state["levels"].keys() != self.levels.keys():
            raise ValueError(
                f"the state is of a training of {list(state['levels'])}, this one is of {list(self.levels)}; name the "
                "checkpoints of this training"
            )
        for name, level in self.levels.items():
            try:
                level.check_state(state["levels"][name])
                level.data.check_state(state["data"][name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        missing = self._pairs(state)[1]
        if missing:
            raise ValueError(
                f"callbacks: the state has one of {', '.join(missing)} that this training lacks; resume with "
                "the callbacks that kept something then"
            )

    def _pairs(self, state: Mapping[str, Any]) -> tuple[list[tuple[Callback, Any]], list[str]]:
        """Callbacks with their saved states, by kind and order; kinds of saved states that no callback takes.

        A callback that the state does not know begins anew, and one that keeps nothing may go.
        """
        left, pairs = list(state["callbacks"]), []
        for callback in self.callbacks:
            place = next((i for i, saved in enumerate(left) if saved["kind"] == type(callback).__name__), None)
            if place is not None:
                pairs.append((callback, left.pop(place)["state"]))
        return pairs, [saved["kind"] for saved in left if saved["state"]]

    @abstractmethod
    def load_kept(self, kept: Mapping[str, Any]) -> None:
        """Inverse of `kept`."""


def _lower_rates(name: str, record: Record) -> str:
    """What to lower, with the rates of all levels that the step was to move."""
    others = {field.removesuffix("_lr"): rate for field, rate in record.items() if field.endswith("_lr")}
    if not others:
        return f"Lower the learning rate ({record['lr']:g})"
    rates = [f"{name} {record['lr']:g}", *(f"{other} {rate:g}" for other, rate in others.items())]
    return f"Lower one of the learning rates ({', '.join(rates)})"
