"""One alternation under way: what its later steps need of its earlier ones."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bilevel import interruption, tree
from bilevel.checkpoint import random_state, set_random_state
from bilevel.hypergradients import System
from bilevel.interruption import Interrupted
from bilevel.training.batches import BatchSource
from bilevel.tree import Params


@dataclass(frozen=True)
class Carried:
    """Right-hand sides of earlier steps, each by its learning rate, and the sum of these."""

    right: Params
    rates: float

    def whole(self, v: Params, rate: float) -> Params:
        """The right-hand side v of a step at this learning rate with the earlier ones added, in its units."""
        return v if rate == 0.0 else tree.axpy(1.0 / rate, self.right, v)


def carry(carried: Carried | None, v: Params, rate: float) -> Carried:
    """`carried` with a further right-hand side."""
    if carried is None:
        return Carried(tree.scale(rate, v), rate)
    return Carried(tree.axpy(rate, v, carried.right), carried.rates + rate)


@dataclass
class Alternation:
    """How far an alternation is.

    Attributes:
        began: where the lower data stood before its first batch; `stored` is drawn again from there.
        stored: batches of the system, the alternation's first.
        lower, upper: steps made.
        adapted: whether the adaptation is made.
        carried: as `Carried`, None where no step has left any.
        system: the last one that was built.
        random: random state before it was built.
        solved: whether it has answered a right-hand side, which its solver may have learnt from.
        fallback: the trainer's state before the first upper step, where a state in between would not do.
    """

    began: dict[str, Any]
    stored: list[Any] = field(default_factory=list)
    lower: int = 0
    adapted: bool = False
    upper: int = 0
    carried: Carried | None = None
    system: System | None = None
    random: dict[str, Any] | None = None
    solved: bool = False
    fallback: dict[str, Any] | None = None

    def built(self, build: Callable[[], System], *, always: bool) -> System:
        """The system, built where there is none or `always`; a second time with the random draws of the first."""
        if self.system is None or always:
            state, again = random_state(), None if always else self.random
            if again is not None:
                set_random_state(again)
            self.system, self.random = build(), again or state
            if again is not None:
                set_random_state(state)
        return self.system

    @contextmanager
    def undone_if_interrupted(self, source: BatchSource) -> Iterator[None]:
        """Make an upper step that is interrupted leave no trace here, in its data and in the random state."""
        if not interruption.may_come():
            yield
            return
        system, random = self.system, self.random
        data, state = copy.deepcopy(source.state_dict()), random_state()
        try:
            yield
        except Interrupted:
            self.system, self.random = system, random
            source.load_state_dict(data)
            set_random_state(state)
            raise

    def state_dict(self) -> dict[str, Any]:
        """All but the batches and the system, which are made again."""
        carried = self.carried
        return {
            "began": self.began,
            "stored": len(self.stored),
            "lower": self.lower,
            "adapted": self.adapted,
            "upper": self.upper,
            "carried": None if carried is None else (_copied(carried.right), carried.rates),
            "random": self.random,
        }


def restored(state: Mapping[str, Any], source: BatchSource, steps: int, like: Params) -> Alternation:
    """The alternation of a `state_dict`; `source` is left after the stored batches.

    Args:
        steps: batches that the lower stage announces.
        like: lower variables, whose devices the tensors go to.
    """
    source.load_state_dict(state["began"])
    source.begin_stage(steps)
    carried = state["carried"]
    if carried is not None:
        carried = Carried({name: leaf.to(like[name].device) for name, leaf in carried[0].items()}, carried[1])
    return Alternation(
        state["began"],
        [source.next() for _ in range(state["stored"])],
        state["lower"],
        state["adapted"],
        state["upper"],
        carried,
        random=state["random"],
    )


def _copied(x: Params) -> Params:
    return {name: leaf.detach().clone() for name, leaf in x.items()}
