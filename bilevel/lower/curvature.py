"""Whether second derivatives of a problem's lower level are those of its gradients: examined once for a problem."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.checks import warn_outside
from bilevel.lower.likeness import likeness
from bilevel.lower.objectives import LowerObjectives
from bilevel.lower.per_problem import PerProblem
from bilevel.lower.staleness import BufferWatch
from bilevel.nn import DoublePrecision, as_double
from bilevel.problem import Problem, modules_of
from bilevel.products import (
    LOST,
    Automatic,
    CurvatureErrors,
    HVPProvider,
    Objective,
    ReverseOverReverse,
    curvature_errors,
    suspicious_operations,
)
from bilevel.tree import Params

_ROWS = 8
_LARGE_LEVEL, _LARGE_BATCH = 1_000_000, 100_000
"""With more numbers in the lower variables, products are compared only where something is suspicious; with more in a
batch that cannot be cut, never."""

_asked: ContextVar[list["Examination"] | None] = ContextVar("bilevel_examinations", default=None)

_REMEDY = (
    "If it is meant so (a stop-gradient), set check_curvature = False in the Problem; `check_hypergradient` says what "
    "the hypergradient is worth"
)


@final
@dataclass(frozen=True)
class Examination:
    """What is known about the second derivatives of one lower objective.

    Attributes:
        suspects: operations that may lose curvature, by name, with whether their backward pass can only be a surrogate.
        errors: of L, and of r where there is one; empty where products were not compared with differences.
        doubt: why the comparison decides nothing, empty where it does or was not made.
    """

    suspects: Mapping[str, bool] = field(default_factory=dict)
    errors: tuple[CurvatureErrors, ...] = ()
    doubt: str = ""

    @property
    def compared(self) -> bool:
        """Whether the comparison was made, or tried."""
        return bool(self.errors or self.doubt)

    def lost(self, *, hessian: bool = True) -> str | None:
        """In words what is lost of d2G/dydy (where `hessian` is of interest) and d2G/dxdy, None where nothing is."""
        of_y = max((e.hessian for e in self.errors), default=0.0) if hessian else 0.0
        of_x = max((e.cross for e in self.errors), default=0.0)
        if max(of_y, of_x) <= LOST:
            return None
        parts = {"d2G/dydy": of_y, "d2G/dxdy": of_x}
        wrong = " and ".join(f"{name} by {error:.1e}" for name, error in parts.items() if error > LOST)
        return (
            f"lost curvature: on a few samples in float64, products with {wrong} (relative) differ from what gradients "
            f"say: {self._cause()}. {_REMEDY}"
        )

    def undecided(self) -> str | None:
        """In words what is suspicious and could not be compared, None where that is nothing."""
        if not self.suspects or not self.doubt:
            return None
        return (
            f"curvature not checked: {', '.join(self.suspects)} in the lower objective may cut off second derivatives, "
            f"and products could not be compared with differences of gradients in float64 ({self.doubt}). Compare the "
            "hypergradient by `check_hypergradient`, make the objective run in float64, or set check_curvature = False "
            "in the Problem if the operation is known to differentiate twice"
        )

    def _cause(self) -> str:
        detached = "a detach, no_grad, .data or .item() cuts variables out of the objective: leave them in it"
        if not self.suspects:
            return f"probably {detached}"
        lossy, surrogates = (", ".join(n for n, own in self.suspects.items() if own == kind) for kind in (False, True))
        meant = (
            "is meant not to be the derivative (straight-through rounding, gradient reversal), and products are those "
            "of the surrogate: right with check_curvature = False in the Problem where that is what you want"
        )
        causes = []
        if lossy:
            causes.append(
                f"the backward pass of {lossy} is no differentiable function of what it saved (attributes of ctx, "
                "once_differentiable and numpy cut it off, save_for_backward and torch's operations do not): mend it, "
                "or take Implicit(hvp=FiniteDifference())"
            )
        causes.append(f"the backward pass of {surrogates} {meant}" if surrogates else f"it {meant}")
        return ". Or ".join([*causes, detached])


# By the class, whose code the objective is: what is known of a problem holds for others of the same makings.
_KINDS = 100
_sound_kinds = WeakKeyDictionary[type[Problem], set[Hashable]]()


def _sound(problem: Problem) -> set[Hashable]:
    return _sound_kinds.setdefault(type(problem), set())


_examined = PerProblem[dict[Hashable, Examination]](dict)


def examine_curvature(
    problem: Problem, upper: Params, lower: Params, batch: Any, names: Sequence[str], provider: HVPProvider
) -> Examination:
    """What is known about the provider's second derivatives over the lower variables `names`.

    For each Problem and structure of its variables once, a gradient's graph is gone through; where something in it is
    suspicious and where the lower level is not large, products are compared with differences of gradients in float64
    (`curvature_errors`), on at most 8 samples of `batch`. Where nothing is suspicious and a Problem of the same class
    was found sound, whose attributes, variables and batches were alike but for the numbers in tensors, they are not.
    Nothing is drawn from the default generators. What is suspicious and cannot be compared is warned of.
    """
    if not problem.check_curvature:
        return Examination()
    if isinstance(provider, Automatic):
        provider = provider.chosen or provider
    shapes = tuple((name, leaf.shape, leaf.dtype) for level in (upper, lower) for name, leaf in level.items())
    key, asked = (shapes, tuple(names), type(provider)), _asked.get()
    examined = _examined.of(problem)
    known = examined.get(key)
    if known is None or (asked is not None and not known.compared):
        subject = _Subject(problem, upper, lower, batch, names, provider)
        known = subject.examine(thoroughly=asked is not None)
        examined[key] = known
        undecided = known.undecided()
        if undecided is not None and asked is None:
            warn_outside(undecided)
    if asked is not None:
        asked.append(known)
    return known


@contextmanager
def thorough_examinations() -> Iterator[list[Examination]]:
    """Inside, products are compared with differences of gradients in any case; gives what comes of it."""
    found: list[Examination] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@dataclass(frozen=True)
class _Subject:
    """What is examined."""

    problem: Problem
    upper: Params
    lower: Params
    batch: Any
    names: Sequence[str]
    provider: HVPProvider

    def examine(self, *, thoroughly: bool) -> Examination:
        always = thoroughly or tree.size(self.lower) <= _LARGE_LEVEL
        # Differences of gradients need no second derivative: nothing is suspicious of them.
        if not (always or self.provider.exact):
            return Examination()
        rows, found = self._gone_through(self._rows())
        if not (always or found.suspects):
            return found
        kind = None if thoroughly or found.suspects or rows is None else self._kind(rows[0])
        if not distributed.agree(kind is None or kind not in _sound(self.problem)):
            return found
        if rows is None:
            return replace(found, doubt=f"the batch is large and cannot be cut to {_ROWS} samples that it runs on")
        compared = self._compared(rows[0], found)
        if kind is not None and compared.errors and not compared.doubt and compared.lost() is None:
            known = _sound(self.problem)
            if len(known) >= _KINDS:
                known.clear()
            known.add(kind)
        return compared

    def _kind(self, rows: Any) -> Hashable | None:
        """What problems have in common of which it is enough to compare the products of one."""
        return likeness(type(self.provider), self.upper, self.lower, list(self.names), rows, vars(self.problem))

    def _rows(self) -> tuple[Any] | None:
        """The first samples of the batch, or all of a small one; None where there is neither."""
        try:
            return (self.problem.split_batch(self.batch, _ROWS)[0],)
        except Exception:  # Whatever a batch is that cannot be cut.
            small = sum(tensor.numel() for tensor in tree.tensors_in(self.batch)) <= _LARGE_BATCH
            return (self.batch,) if small else None

    def _gone_through(self, rows: tuple[Any] | None) -> tuple[tuple[Any] | None, Examination]:
        """The rows, where the objective runs on them, and the suspects in its gradient's graph.

        It comes before all passes in float64, so that what modules make on their first one and keep is of the
        variables' own precision.
        """
        try:
            graph = [] if rows is None else self._graph(rows[0])
        except Exception:  # Whatever an objective does not like about few rows; on all of them it may.
            rows, graph = None, []
        if distributed.agree(rows is None):
            rows, graph = None, self._graph(self.batch) if self.provider.exact else []
        return rows, Examination(suspicious_operations(graph) if self.provider.exact else {})

    def _compared(self, batch: Any, found: Examination) -> Examination:
        for leaf in self.lower.values():
            if tree.widest(leaf.device) != torch.float64:
                return replace(found, doubt=f"the device {leaf.device} has none")
        subject = replace(self, upper=_as_double(self.upper), lower=_as_double(self.lower))
        doubt, errors = "", list[CurvatureErrors]()
        with in_double_precision(self.problem):
            try:
                subject._graph(batch)
            except Exception as error:
                doubt = _first_line(error)
            if distributed.agree(bool(doubt)):
                return replace(found, doubt=doubt or "it fails on another rank")
            try:
                for provider, objective in subject._objectives(batch):
                    errors.append(curvature_errors(provider, objective, subject.upper, subject._point()))
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, distributed.CollectiveError):
                    raise
                # Products that cannot be made are no products that are wrong: who asks for them meets the error.
                return Examination(doubt=_first_line(error))
        doubt = next((e.doubt for e in errors if e.doubt), "")
        return replace(found, errors=tuple(errors), doubt=doubt)

    def _graph(self, batch: Any) -> list[Tensor]:
        """G and its gradient, with the graph where products come from it."""
        x, y = tree.as_variables(self.upper), tree.as_variables(self._point())
        graph = []
        with torch.enable_grad():
            for _, objective in self._objectives(batch):
                value = objective(x, y)
                graph += [value, *tree.gradients(value, y, create_graph=self.provider.exact).values()]
        return graph

    def _objectives(self, batch: Any) -> list[tuple[HVPProvider, Objective]]:
        """L, and r where there is one, each with what makes its products."""
        made = LowerObjectives(self.problem, self.lower, 0, BufferWatch())
        make = made.composed if self.provider.needs_outputs else made.whole
        loss = [(self.provider, make(batch, 0))]
        if made.regularizer(tree.detach(self.upper), self._point()) is None:
            return loss
        return [*loss, (ReverseOverReverse(), made.penalty)]

    def _point(self) -> Params:
        return {name: self.lower[name].detach() for name in self.names}


@contextmanager
def in_double_precision(problem: Problem) -> Iterator[None]:
    """Inside, the problem's objectives compute in float64 from float64 variables (`DoublePrecision`), and what its
    modules make of that precision and keep is gone afterwards."""
    with _unchanged_attributes(problem), DoublePrecision():
        yield


@contextmanager
def _unchanged_attributes(problem: Problem) -> Iterator[None]:
    """What is written inside into attributes of the problem and its modules, and dictionaries among these, is undone:
    tables made in float64, such as those of a micro-batch's length."""
    modules = [layer for module in modules_of(problem).values() for layer in module.modules()]
    holders = [vars(holder) for holder in (problem, *modules)]
    holders += [value for holder in holders for value in holder.values() if type(value) in (dict, OrderedDict)]
    before = [(holder, dict(holder)) for holder in holders]
    try:
        yield
    finally:
        for holder, entries in before:
            if holder.keys() != entries.keys() or any(holder[key] is not value for key, value in entries.items()):
                holder.clear()
                holder.update(entries)


def _as_double(variables: Params) -> Params:
    return {name: as_double(leaf.detach()) for name, leaf in variables.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
