"""One alternation under way: what its later steps need of its earlier ones."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bilevel import interruption
from bilevel.checkpoint import random_state, set_random_state
from bilevel.hypergradients import LowerStep, restored_update, saved_update
from bilevel.interruption import Interrupted
from bilevel.training.data.batches import BatchSource
from bilevel.training.level import Level
from bilevel.tree import Params


@dataclass
class Alternation:
    """How far an alternation is.

    Attributes:
        began: where the lower data stood before its first batch; batches that are kept are drawn again from there.
        drawn: lower batches so far.
        stored: lower batches of it, for the method: its first ones, or the first ones after `stored_from`.
        stored_from: where the lower data stood after the lower steps, if the method stores what comes then.
        recorded: its last lower steps, for the method, each with the number of its batch, from 0.
        lower, upper: steps made.
        adapted: whether the adaptation is made.
        prepared, is_prepared: what the method has made for the stage, and whether it has.
        random: random state before that.
        proposed: whether the method has made a step from it.
        fallback: the trainer's state before the first upper step, where a state in between would not do.
    """

    began: dict[str, Any]
    drawn: int = 0
    stored: list[Any] = field(default_factory=list)
    stored_from: dict[str, Any] | None = None
    recorded: list[tuple[int, LowerStep]] = field(default_factory=list)
    lower: int = 0
    adapted: bool = False
    upper: int = 0
    prepared: Any = None
    is_prepared: bool = False
    random: dict[str, Any] | None = None
    proposed: bool = False
    fallback: dict[str, Any] | None = None

    def prepare(self, make: Callable[[], Any], *, always: bool) -> Any:
        """What `make` makes, where it is not made yet or `always`; a second time with the random draws of the first."""
        if always:
            self.prepared, self.is_prepared = make(), True
        elif not self.is_prepared:
            state, again = random_state(), self.random
            if again is not None:
                set_random_state(again)
            self.prepared, self.random = make(), again or state
            self.is_prepared = True
            if again is not None:
                set_random_state(state)
        return self.prepared

    @contextmanager
    def undone_if_interrupted(self, sources: Sequence[BatchSource], undo: Callable[[], None]) -> Iterator[None]:
        """Make an upper step that is interrupted leave no trace here, in the data that it draws from, in the random
        state and in what `undo` puts back."""
        if not interruption.may_come():
            yield
            return
        before = self.prepared, self.is_prepared, self.random
        data, state = [copy.deepcopy(source.state_dict()) for source in sources], random_state()
        try:
            yield
        except Interrupted:
            self.prepared, self.is_prepared, self.random = before
            for source, kept in zip(sources, data, strict=True):
                source.load_state_dict(kept)
            set_random_state(state)
            undo()
            raise

    def state_dict(self) -> dict[str, Any]:
        """All but the batches and what the method has prepared, which are made again."""
        return {
            "began": copy.deepcopy(self.began),
            "drawn": self.drawn,
            "stored": len(self.stored),
            "stored_from": copy.deepcopy(self.stored_from),
            "recorded": [{"place": place, **_saved(step)} for place, step in self.recorded],
            "lower": self.lower,
            "adapted": self.adapted,
            "upper": self.upper,
            "random": copy.deepcopy(self.random),
        }


def restored(state: Mapping[str, Any], level: Level, steps: int) -> Alternation:
    """The alternation of a `state_dict`; the lower level's data are left after the batches that were drawn.

    Args:
        steps: batches that the lower stage announces.
    """
    level.data.load_state_dict(state["began"])
    level.data.begin_stage(steps)
    last = max((saved["place"] for saved in state["recorded"]), default=-1)
    are_first = state["stored_from"] is None
    batches = [level.next_batch() for _ in range(max(state["stored"] if are_first else 0, last + 1))]
    recorded = [(saved["place"], _loaded(saved, batches[saved["place"]], level)) for saved in state["recorded"]]
    if not are_first:
        level.data.load_state_dict(state["stored_from"])
        batches = [level.next_batch() for _ in range(state["stored"])]
    return Alternation(
        state["began"],
        state["drawn"],
        batches[: state["stored"]],
        state["stored_from"],
        recorded,
        state["lower"],
        state["adapted"],
        state["upper"],
        random=state["random"],
    )


def _saved(step: LowerStep) -> dict[str, Any]:
    return {
        "lower": _copied(step.lower),
        "update": saved_update(step.update),
        "state": {slot: _copied(values) for slot, values in step.state.items()},
        "seed": step.seed,
        "max_grad_norm": step.max_grad_norm,
        "problem": copy.deepcopy(dict(step.problem)),
        "autocast": None if step.autocast is None else dict(step.autocast),
    }


def _loaded(saved: Mapping[str, Any], batch: Any, level: Level) -> LowerStep:
    return LowerStep(
        _placed(saved["lower"], level),
        restored_update(saved["update"], level.optimizer),
        {slot: _placed(values, level) for slot, values in saved["state"].items()},
        batch,
        saved["seed"],
        saved["max_grad_norm"],
        saved["problem"],
        saved["autocast"],
    )


def _copied(x: Params) -> Params:
    return {name: leaf.detach().clone() for name, leaf in x.items()}


def _placed(x: Params, level: Level) -> Params:
    """On the devices of the variables of the same names; what belongs to none stays, such as a count of steps."""
    return {name: leaf.to(level.params[name].device) if name in level.params else leaf for name, leaf in x.items()}
