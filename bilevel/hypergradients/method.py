"""The abstract method: how an upper step gets its direction from what the lower level has done."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.checks import same_structure
from bilevel.hypergradients.result import Hypergradient, OnFailure
from bilevel.hypergradients.updates.update import State, Update
from bilevel.lower import Draw, Partition, ResidualProblem
from bilevel.problem import Problem
from bilevel.tree import Params

MethodState = dict[str, Any]
"""What a method carries from one upper step to the next: tensors, numbers, strings and None under names, in nested
dictionaries. It is the same on all ranks; the trainer owns it, saves it and restores it."""


@dataclass(frozen=True)
class LowerStep:
    """A step that the lower level has made, as it stood before it.

    Attributes:
        lower: y, all lower variables.
        update, state: the optimizer's step and its state, as `from_optimizer` reads them.
        batch: of the step.
        seed: of the step's random masks.
        max_grad_norm: the gradient was scaled down to this Euclidean norm; None where there is no limit.
        problem: the Problem's `state_dict`, empty where it keeps none.
        autocast: type of device -> dtype of the autocast around the step; None where nothing of the step was cast.
    """

    lower: Params
    update: Update
    state: State
    batch: Any
    seed: int
    max_grad_norm: float | None
    problem: Mapping[str, Any]
    autocast: Mapping[str, torch.dtype] | None = None


@dataclass(frozen=True)
class UpperStep:
    """What a method sees of the upper step that it shall find a direction for. It writes to nothing of it.

    Attributes:
        problem, upper, lower: the problem and its variables x and y as they are.
        upper_batch: the batch of F.
        lower_batches: as many of the alternation's lower batches as `Method.stored_batches` asks for.
        lower_steps: as many of the last lower steps as `Method.replayed_steps` asks for, in order; None where nobody
            recorded any (`hypergradient` outside a trainer).
        lower_update: gives the live lower optimizer's next step and its state; None where there is no optimizer.
        lower_rate, upper_rate: learning rates of the levels' optimizers; None where there are none.
        position, count: which step of its stage this is, from 0, and how many the stage has.
        number: which step of the whole run it is, from 1.
        watch: to be called before every expensive part; it raises `bilevel.interruption.Interrupted` where the run is
            asked to stop, which undoes the step.
        on_failure: what will be done about a failure; with "ignore" nothing is spent on advice that nobody sees.
        lower_draws, upper_draws: samples for this step alone, as many as the method's `lower_draws` and `upper_draws`
            say, the first upper one being `upper_batch`.
        lower_blocks, upper_blocks: the partition that a level's samples are blocks of; None where its data have none.
    """

    problem: Problem
    upper: Params
    lower: Params
    upper_batch: Any
    lower_batches: tuple[Any, ...]
    lower_steps: tuple[LowerStep, ...] | None = None
    lower_update: Callable[[], tuple[Update, State]] | None = None
    lower_rate: float | None = None
    upper_rate: float | None = None
    position: int = 0
    count: int = 1
    number: int = 1
    watch: Callable[[], None] = lambda: None
    on_failure: OnFailure = "ignore"
    lower_draws: tuple[Draw, ...] = ()
    upper_draws: tuple[Draw, ...] = ()
    lower_blocks: Partition | None = None
    upper_blocks: Partition | None = None


@dataclass(frozen=True)
class Proposal:
    """What a method makes of an upper step; nothing of it counts before every number is finite on every rank.

    Attributes:
        gradient: what the upper optimizer goes along, over the upper variables.
        loss: F, 0-d and detached.
        state: what the method carries on once the step is made; it takes the place of the former state.
        result: the hypergradient, None where the step goes along something else: the direct part alone, an estimate
            that is carried from step to step.
        norm_limit_scale: how many steps' gradients this one stands for: the norm limit is wider by this factor.
        lower_gradient: what the lower optimizer goes along, over the lower variables; for a method that moves them.
        checked: tensors that must be finite beside loss and gradients; None takes all of the state.
        commit: called once the step is made, for tensors of the state that are written in place, such as tables.
        record: numbers for the step's event.
    """

    gradient: Params
    loss: Tensor
    state: MethodState = field(default_factory=dict)
    result: Hypergradient | None = None
    norm_limit_scale: float = 1.0
    lower_gradient: Params | None = None
    checked: tuple[Tensor, ...] | None = None
    commit: Callable[[], None] = lambda: None
    record: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a trainer is made of, for a method to refuse what it cannot do.

    Attributes:
        upper_steps, lower_steps: an alternation's.
        micro_batch: samples a chunk of a lower step, None where a batch is passed at once.
        adapts: whether the schedule moves upper variables between the levels.
        lower_blocks, upper_blocks: the partition of a level's data; None where these have none.
    """

    problem: Problem
    upper: Params
    lower: Params
    upper_optimizer: torch.optim.Optimizer
    lower_optimizer: torch.optim.Optimizer
    upper_steps: int
    lower_steps: int
    micro_batch: int | None
    adapts: bool
    lower_blocks: Partition | None = None
    upper_blocks: Partition | None = None


def check_proposal(method: "Method", proposal: object, upper: Params, lower: Params) -> Proposal:
    """The proposal, if it is one that the levels' optimizers can follow.

    Raises:
        TypeError, ValueError: naming the method and what it must propose.
    """
    name = type(method).__name__
    if not isinstance(proposal, Proposal):
        raise TypeError(f"{name}: propose must return a Proposal, got {type(proposal).__name__}")
    wanted = {"gradient": ("upper", proposal.gradient, upper)}
    if proposal.lower_gradient is not None and method.moves_lower:
        wanted["lower_gradient"] = ("lower", proposal.lower_gradient, lower)
    elif (proposal.lower_gradient is not None) != method.moves_lower:
        raise ValueError(
            f"{name}: a Proposal has a lower_gradient where the method's moves_lower is True, and only there; "
            f"moves_lower is {method.moves_lower}"
        )
    for argument, (level, gradient, variables) in wanted.items():
        if not same_structure(gradient, variables):
            raise ValueError(
                f"{name}: the {argument} of a Proposal must have the names and shapes of the {level} variables "
                f"{list(variables)}, got {list(gradient)}"
            )
    if proposal.loss.dim() != 0:
        raise ValueError(f"{name}: the loss of a Proposal must be 0-d, got shape {tuple(proposal.loss.shape)}")
    return proposal


def check_serves(method: "Method", problem: Problem) -> None:
    """Raise ValueError where the lower level is no smooth minimum, and the method is for these alone."""
    if isinstance(problem, ResidualProblem) and not method.serves_residuals:
        raise ValueError(
            f"{type(method).__name__} differentiates the smooth minimum of a lower objective, and the lower level of "
            f"{type(problem).__name__} is a fixed point, a proximal problem or a root; take "
            "Implicit(GMRES()), which serves them all"
        )


def check_stands_alone(method: "Method") -> None:
    """Raise ValueError where a step of the method gives no hypergradient by itself."""
    if method.moves_lower:
        raise ValueError(
            f"{type(method).__name__} moves both levels together, along directions that are no hypergradient; use it "
            "in a Trainer, and another method, such as Implicit(), for a single hypergradient"
        )


@contextmanager
def unwritten(upper: Params, lower: Params) -> Iterator[None]:
    """Raises where a variable is written to inside.

    Raises:
        RuntimeError: naming the variable.
    """
    levels = {"upper": upper, "lower": lower}
    named = [(f"{level}[{name!r}]", leaf) for level, params in levels.items() for name, leaf in params.items()]
    before = [tensor._version for _, tensor in named]
    yield
    written = [name for (name, tensor), version in zip(named, before, strict=True) if tensor._version != version]
    if written:
        raise RuntimeError(
            f"{written[0]} was written to while its hypergradient was taken, which changes no variable: some operation "
            "of an objective writes in place (functional.embedding with max_norm, add_, copy_); let it work on a clone"
        )


class Method(ABC):
    """A way to compute hypergradients, as a value: it holds options, and what changes is in its state.

    A subclass is final and defines `propose`. `hypergradient`, `check_hypergradient` and `Trainer` take it. In a
    trainer, for each upper step: `prepare` makes what serves a whole stage (a linear system), `propose` the direction
    and the next state, which becomes the method's own only after the step is made. What `prepare` returns is never
    saved: it is made again after a resume, with the random draws of the first time.
    """

    damping: float = 0.0
    """What the method adds to `Problem.regularization_weight`; `check_hypergradient` re-solves the damped problem."""

    serves_residuals: bool = False
    """Whether the method serves lower levels that are no smooth minimum (`bilevel.lower.ResidualProblem`: fixed points,
    proximal problems, roots). Others are refused with such a problem, in `hypergradient` and in a trainer."""

    fresh_batches: bool = False
    """Whether `UpperStep.lower_batches` are drawn after the alternation's lower steps, from the same data, instead of
    being the first ones that these take."""

    moves_lower: bool = False
    """Whether an upper step moves the lower variables too, along `Proposal.lower_gradient` by the lower optimizer: a
    single loop, whose schedule has no lower steps."""

    @property
    def stored_batches(self) -> int:
        """How many lower batches of an alternation `UpperStep.lower_batches` shall hold."""
        return 1

    @property
    def lower_draws(self) -> int:
        """How many lower batches each upper step draws for itself, `UpperStep.lower_draws`."""
        return 0

    @property
    def upper_draws(self) -> int:
        """How many upper batches each upper step draws, at least one."""
        return 1

    @property
    def replayed_steps(self) -> int | None:
        """How many of the last lower steps `UpperStep.lower_steps` shall hold; 0: none, None: all of the alternation.

        A trainer records them, with one random seed for each, where this is not 0.
        """
        return 0

    def check(self, setup: Setup) -> None:
        """Refuse a trainer that the method cannot serve.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return None

    def starts_anew(self, setup: Setup) -> bool:
        """Whether a stage that was stopped between two upper steps must be resumed from its first one, because what
        `prepare` makes learns from one upper step for the next."""
        return False

    def prepare(self, step: UpperStep, state: MethodState) -> Any:
        """What serves all upper steps of a stage, made before the first one; before each of them where
        `Problem.curvature_depends_on_upper`.

        It is made again where a stage is resumed between two upper steps, from `step` and `state` as they are then:
        what it reads of them must not change within a stage, or `starts_anew` must say True.
        """
        return None

    @property
    def prepares(self) -> bool:
        """Whether `prepare` makes something."""
        return type(self).prepare is not Method.prepare

    @abstractmethod
    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        """The direction of one upper step, the same on all ranks.

        Args:
            step: where it is taken.
            state: what the last `Proposal` left, {} before the first one; it is not written to.
            prepared: what `prepare` returned for this stage.
        """

    def restarted(self, state: MethodState) -> MethodState:
        """The state after `Problem.reset_lower` gave the lower level new values."""
        return {}
