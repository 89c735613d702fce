"""What a trainer promises holds of every method: resume after any step, skips, signals, several ranks."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Trainer,
    Unrolled,
)
from bilevel.checkpoint import load_checkpoint
from bilevel.distributed import shard
from bilevel.hypergradients import SAMA, AdamUpdate, Method, MethodState, Proposal, UpperStep
from bilevel.interruption import Interrupted, Interruption
from bilevel.lower import upper_derivatives
from bilevel.training import Blocks, Callback, Inspect, NonFiniteError, SingleLevelTrainer
from bilevel.tree import tensors_in
from tests.bilevel.training.trainer.test_resume import metrics
from tests.support.cases import vector
from tests.support.methods import METHODS, Kind
from tests.support.problems.small_net import Bell, Net, net_trainer
from tests.support.rank_processes import on_ranks

EVERY = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS.keys())
LOOPS = {name: kind for name, kind in METHODS.items() if kind.method.moves_lower}
SINGLE_LOOP = pytest.mark.parametrize("kind", LOOPS.values(), ids=LOOPS.keys())
OTHERS = {name: kind for name, kind in METHODS.items() if name not in LOOPS}
INDEPENDENT = ("aggregated", "recycled", "remembering", "inexact, remembering")
"""Kinds for curvature that does not depend on the upper variables."""
ALTERNATING = pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS.keys())


def made(folder: Path, kind: Kind, *extra: Callback, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    trainer = net_trainer(
        folder,
        *extra,
        method=kind.method,
        lower_steps=kind.lower_steps,
        upper_steps=kind.upper_steps,
        adapts=kind.adapts,
        blocks=kind.blocks,
        **options,
    )
    torch.manual_seed(10)
    return trainer


def everything(trainer: Trainer) -> dict[str, Any]:
    """The state, but for what belongs to one process's clock and files."""
    state = trainer.state_dict()
    return {name: state[name] for name in ("progress", "steps", "skipped", "solves", "method", "levels", "kept")}


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """To the bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other or (one != one and other != other), where


@EVERY
def test_stopped_by_a_signal_anywhere_and_resumed_it_ends_like_an_undisturbed_run(tmp_path: Path, kind: Kind) -> None:
    whole = made(tmp_path / "whole", kind)
    whole.run()
    end = torch.get_rng_state()
    for first in (2, 4, 5, 7, 11):
        folder = tmp_path / str(first)
        for number in (first, 9):
            trainer = made(folder, kind)
            Bell(trainer.problem, number)  # type: ignore[arg-type]
            trainer.resume(folder / "checkpoints")
            with Interruption(), pytest.raises(Interrupted, match="SIGTERM"):
                trainer.run()
        torch.manual_seed(12345)
        last = made(folder, kind)
        assert last.resume(folder / "checkpoints")
        last.run()
        assert_same(everything(last), everything(whole), f"stopped at {first}")
        assert metrics(folder) == metrics(tmp_path / "whole")
        assert torch.equal(torch.get_rng_state(), end)


class Kept(Callback):
    """The trainer's state after every event."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.states.append(everything(trainer))


def poison(trainer: Trainer, objective: str, when: Callable[[], bool]) -> None:
    """Let an objective be NaN, with all its derivatives, when it is said."""
    plain = getattr(trainer.problem, objective)

    def poisoned(upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return plain(upper, lower, batch) * (math.nan if when() else 1.0)

    setattr(trainer.problem, objective, poisoned)


@EVERY
def test_an_upper_step_that_is_not_finite_is_left_out_whole(tmp_path: Path, kind: Kind) -> None:
    heard = Kept()
    folder = tmp_path / "run"
    trainer = made(folder, kind, heard, Inspect(tmp_path / "inspect"), nonfinite_skips=1)
    poison(trainer, "upper_objective", lambda: trainer.steps["upper"] == kind.upper_steps - 1)
    trainer.run()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = [index for index, event in enumerate(events) if event.get("skipped")]
    assert [(events[index]["event"], events[index]["step"]) for index in skipped] == [("upper", kind.upper_steps)]
    before, after = heard.states[skipped[0] - 1], heard.states[skipped[0]]
    for part in ("levels", "method", "kept"):
        assert_same(after[part], before[part], part)
    assert trainer.skipped == {"upper": 1}
    assert all(bool(torch.isfinite(leaf).all()) for leaf in trainer.upper.params.values())
    assert all(bool(torch.isfinite(leaf).all()) for leaf in trainer.lower.params.values())
    assert [path.name for path in (tmp_path / "inspect").iterdir()] == [f"upper-step-{kind.upper_steps}.pt"]
    # Without a skip to spend it ends there, and nothing has changed.
    strict = made(tmp_path / "strict", kind)
    poison(strict, "upper_objective", lambda: strict.steps["upper"] == kind.upper_steps - 1)
    with pytest.raises(NonFiniteError, match=rf"upper step {kind.upper_steps} \(alternation 1\)"):
        strict.run()
    assert_same(everything(strict)["levels"], before["levels"])


@ALTERNATING
def test_a_lower_step_that_is_not_finite_is_left_out_whole(tmp_path: Path, kind: Kind) -> None:
    heard = Kept()
    trainer = made(tmp_path / "run", kind, heard, nonfinite_skips=1)
    plain, calls = trainer.problem.lower_objective, [0]

    def poisoned(upper: Params, lower: Params, batch: Tensor) -> Tensor:
        calls[0] += 1
        return plain(upper, lower, batch) * (math.nan if calls[0] == 3 else 1.0)

    trainer.problem.lower_objective = poisoned  # type: ignore[method-assign]
    trainer.run()
    # The third lower step of the first alternation, so that replayed steps lack one.
    for part in ("levels", "method", "kept"):
        assert_same(heard.states[2][part], heard.states[1][part], part)
    assert trainer.skipped == {"lower": 1}
    assert all(bool(torch.isfinite(leaf).all()) for leaf in trainer.upper.params.values())


@EVERY
def test_events_have_one_schema(tmp_path: Path, kind: Kind) -> None:
    made(tmp_path / "run", kind).run()
    made(tmp_path / "other", replace(METHODS["implicit"], upper_steps=kind.upper_steps, adapts=kind.adapts)).run()
    ours, theirs = ({line["event"]: set(line) for line in metrics(tmp_path / name)} for name in ("run", "other"))
    if kind.method.moves_lower:
        # A step of both levels has the lower one's numbers beside its own, and there are no steps of that one alone.
        theirs["upper"] |= {"lower_lr", "lower_grad_norm"}
        del theirs["lower"]
    assert ours == theirs


class Weighted(Problem):
    """Least squares with a learned weight a row, whose rows are shared out among the ranks."""

    regularization_weight = 0.3
    curvature_depends_on_upper = True

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        errors = batch[:, :3] @ lower["w"] - batch[:, 3]
        return 0.5 * ((upper["s"] * batch[:, :2]).sum(dim=1).sigmoid() * errors.square()).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return 0.5 * (batch[:, :3] @ lower["w"] - batch[:, 3]).square().mean() + 0.01 * upper["s"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * lower["w"].square().sum()


class Independent(Weighted):
    """The curvature does not depend on the upper variables, for methods that need that."""

    curvature_depends_on_upper = False

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return 0.5 * (batch[:, :3] @ lower["w"] - batch[:, 3] - batch[:, :2] @ upper["s"]).square().mean()


def shared_out(rows: Tensor, indices: Tensor) -> Tensor:
    """This rank's rows of a block."""
    return rows[indices][shard(len(indices))]


def trained() -> dict[str, list[float]]:
    """Where every method leads, and what it carries, on this rank's rows."""
    torch.manual_seed(0)
    rows = vector(64, 70).reshape(16, 4)
    found: dict[str, list[float]] = {}
    for name, kind in METHODS.items():
        upper = {"s": vector(2, 71).requires_grad_()}
        lower = {"w": vector(3, 72).requires_grad_()}
        problem = Independent() if name in INDEPENDENT else Weighted()
        data: list[Any] = [[rows[8:][shard(8)]], [rows[:8][shard(8)]] * 2]
        if kind.blocks:
            data = [Blocks(8, 4, partial(shared_out, half), seed=1) for half in (rows[8:], rows[:8])]
        trainer = Trainer(
            problem,
            Level(upper, torch.optim.SGD(upper.values(), lr=0.5), data[0]),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.3, momentum=0.5), data[1]),
            AlternatingSchedule(3, 0 if kind.method.moves_lower else 4, kind.upper_steps),
            kind.method,
            on_failure="ignore",
        )
        trainer.run()
        found[name] = [*upper["s"].tolist(), *lower["w"].tolist()]
        if kind.method.lower_draws:
            for tensor in tensors_in(trainer.state_dict()["method"]["state"]):
                found[name] += tensor.reshape(-1).tolist()
    return found


def test_several_ranks_train_like_one_process(tmp_path: Path) -> None:
    alone = trained()
    for world, results in on_ranks(trained, tmp_path).items():
        for result in results:
            assert result == results[0], "ranks are equal to the bit"
            for name, values in alone.items():
                # The length of a random series goes by the generator, from which ranks draw seeds of their own passes.
                if name not in ("SUSTAIN", "TTSA"):
                    assert result[name] == pytest.approx(values, rel=1e-9, abs=1e-12), (world, name)
    moved = [abs(values[0] - float(vector(2, 71)[0])) for values in alone.values()]
    assert min(moved) > 1e-3, "every method moves the upper level"


def test_unrolled_replays_the_steps_that_were_made(tmp_path: Path) -> None:
    """Dropout, BatchNorm, momentum, a norm limit, a decaying rate and a moving target: replays end where steps did."""
    for recompute in (False, True):
        trainer = made(tmp_path / str(recompute), Kind(Unrolled(recompute=recompute), 1, adapts=False))
        trainer._on_failure = "raise"
        trainer.run()
        assert trainer.progress == trainer.total


def test_a_hook_that_moves_the_lower_variables_is_named(tmp_path: Path) -> None:
    class Moving(Net):
        def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
            with torch.no_grad():
                for leaf in lower.values():
                    leaf.mul_(0.9)

    trainer = made(tmp_path / "run", Kind(Unrolled(), 1, adapts=False))
    trainer.problem.after_lower_step = Moving().after_lower_step  # type: ignore[method-assign]
    trainer._on_failure = "raise"
    with pytest.raises(RuntimeError, match="not replayed: a lower step that moved the variables"):
        trainer.run()


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        (Unrolled(), {"upper_steps": 2}, "Unrolled: the schedule has upper_steps=2"),
        (Unrolled(), {"adapts": True}, "Unrolled: the schedule adapts upper variables between the levels"),
        (Unrolled(steps=5), {}, "Unrolled: steps=5 cannot be replayed of lower_steps=3"),
        (Unrolled(SGDUpdate(0.1)), {}, "Unrolled: update and state are for `hypergradient`"),
        (Unrolled(started_from={"0.weight": "0.weight"}, steps=2), {}, "started_from needs the derivative through all"),
        (Unrolled(started_from={"0.weight": "none"}), {}, "started_from: no implicit lower variable .* or no upper"),
    ],
)
def test_what_unrolled_cannot_replay_is_refused_at_construction(
    tmp_path: Path, method: Method, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        net_trainer(tmp_path, method=method, **{"upper_steps": 1, "adapts": False, **changes})


@pytest.mark.parametrize("name", ["unrolled", "sama"])
def test_an_optimizer_that_cannot_be_read_is_refused_at_construction(name: str) -> None:
    kind, params = METHODS[name], {"w": vector(3, 1)}
    upper = {"s": vector(2, 2)}
    groups = [{"params": [params["w"]], "lr": 0.1}]
    for optimizer, error, match in (
        (torch.optim.Adafactor(params.values()), TypeError, "Adafactor cannot be differentiated through"),
        (torch.optim.SGD(groups, lr=0.1, dampening=0.5, momentum=0.9), ValueError, "dampening=0.5"),
    ):
        with pytest.raises(error, match=match):
            Trainer(
                Weighted(),
                Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [vector(24, 3).reshape(6, 4)]),
                Level(params, optimizer, [vector(24, 4).reshape(6, 4)]),
                AlternatingSchedule(1, 2, kind.upper_steps),
                kind.method,
            )


class Direct(Method):
    """A method of one's own: the direct part alone, and how many steps it has made."""

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        loss, direct, _ = upper_derivatives(step.problem, step.upper, step.lower, tuple(step.lower), step.upper_batch)
        return Proposal(direct, loss, {"made": state.get("made", 0) + 1})


def test_a_method_of_ones_own_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", Kind(Direct()))
    whole.run()
    broken = made(tmp_path / "broken", Kind(Direct()))
    Bell(broken.problem, 7)  # type: ignore[arg-type]
    broken.resume(tmp_path / "broken" / "checkpoints")
    with Interruption(), pytest.raises(Interrupted):
        broken.run()
    again = made(tmp_path / "broken", Kind(Direct()))
    assert again.resume(tmp_path / "broken" / "checkpoints")
    again.run()
    assert_same(everything(again), everything(whole))
    assert everything(whole)["method"] == {"name": "Direct", "state": {"made": 12}}


def test_a_checkpoint_holds_the_methods_state(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", METHODS["warm"])
    trainer.run()
    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    start = found[1]["method"]["state"]["start"]
    assert start.keys() == trainer.lower.params.keys()
    assert any(float(leaf.norm()) > 0.0 for leaf in start.values())
    state = copy.deepcopy(found[1])
    again = made(tmp_path / "again", METHODS["warm"])
    again.load_state_dict(state)
    assert_same(everything(again)["method"], found[1]["method"])


def test_a_restart_of_the_lower_level_forgets_the_start(tmp_path: Path) -> None:
    starts: list[bool] = []

    class Watching(Implicit):  # type: ignore[misc]
        def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
            starts.append("start" in state)
            return super().propose(step, state, prepared)

    kind = Kind(Watching(CG(2, rtol=None), damping=2.0, warm_start=True), upper_steps=2)
    trainer = made(tmp_path / "run", kind)
    trainer.problem.reset_lower = lambda upper: dict(upper)  # type: ignore[method-assign]
    trainer.run()
    assert starts == [False, True] * 4


def test_a_state_that_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    """F and dF/dx are finite and dF/dy is not, in a step that only adds to what waits for the solve."""
    trainer = made(tmp_path / "run", METHODS["aggregated"], nonfinite_skips=1, on_failure="raise")
    plain, batches = trainer.problem.upper_objective, list[Tensor]()

    def poisoned(upper: Params, lower: Params, batch: Tensor) -> Tensor:
        if not any(batch is seen for seen in batches):
            batches.append(batch)
        value = plain(upper, lower, batch)
        leaf = next(iter(lower.values()))
        # The root's slope at 0 is infinite, its value 0.
        return value + (leaf - leaf.detach()).abs().sqrt().sum() if batch is batches[0] else value

    trainer.problem.upper_objective = poisoned  # type: ignore[method-assign]
    trainer.run()
    assert trainer.skipped == {"upper": 1}
    assert all(status in ("BUDGET", "CONVERGED") for status in trainer.solves)
    assert all(bool(torch.isfinite(leaf).all()) for leaf in trainer.upper.params.values())


@pytest.mark.parametrize(
    ("proposal", "error", "match"),
    [
        (None, TypeError, "Odd: propose must return a Proposal, got NoneType"),
        (Proposal({}, torch.zeros(())), ValueError, "Odd: the gradient of a Proposal must have the names and shapes"),
    ],
)
def test_what_no_optimizer_can_follow_is_refused_by_the_methods_name(
    tmp_path: Path, proposal: Any, error: type[Exception], match: str
) -> None:
    class Odd(Method):
        def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
            return proposal

    trainer = made(tmp_path / "run", Kind(Odd()))
    before = {name: leaf.clone() for name, leaf in trainer.upper.params.items()}
    with pytest.raises(error, match=match):
        trainer.run()
    assert_same(trainer.upper.params, before)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (Implicit(implicit=["nope"]), "implicit names \\['nope'\\]"),
        (Implicit(tikhonov={"nope": 1.0}), "tikhonov names \\['nope'\\]"),
        (OneStep(implicit=["nope"]), "implicit names \\['nope'\\]"),
        (SAMA(implicit=["nope"]), "implicit names \\['nope'\\]"),
        (SAMA(AdamUpdate(0.1), {}), "state lacks"),
        (Penalty(SGDUpdate(0.1), 1.0, implicit=["nope"]), "implicit names \\['nope'\\]"),
        (Penalty(SGDUpdate(0.1), 1.0, {"nope": torch.ones(1)}), "penalized must have the names and shapes of lower"),
    ],
)
def test_names_that_are_not_there_are_refused_at_construction(tmp_path: Path, method: Method, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        net_trainer(tmp_path, method=method)


def test_a_start_for_a_solver_that_takes_none_is_refused() -> None:
    with pytest.raises(ValueError, match="warm_start=True, but Identity has no use for a start"):
        Implicit(Identity(), warm_start=True)


def test_names_given_by_a_generator_serve_every_step(tmp_path: Path) -> None:
    names = (name for name in ("0.weight", "4.bias"))
    trainer = made(tmp_path / "run", Kind(Implicit(CG(2, rtol=None), damping=2.0, implicit=names)))
    trainer.run()
    assert trainer.solves == {"BUDGET": 12}


def test_a_restart_with_other_variables_is_refused(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", METHODS["implicit"])
    trainer.problem.reset_lower = lambda upper: {"4.bias": torch.ones(1)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Problem.reset_lower gave '4.bias' of shape \(1,\)"):
        trainer.run()


def test_the_state_of_another_training_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    trainer, other = made(tmp_path / "run", METHODS["penalty"]), made(tmp_path / "other", METHODS["implicit"])
    before = other.state_dict()
    with pytest.raises(ValueError, match="method: the state is of Penalty, this training goes by Implicit"):
        other.load_state_dict(trainer.state_dict())
    other.upper.scheduler = None
    with pytest.raises(ValueError, match="upper: scheduler: the state has LambdaLR, this level none"):
        other.load_state_dict(before)
    single = SingleLevelTrainer(lambda batch: (torch.zeros(()), {}), other.lower, 1)
    with pytest.raises(
        ValueError, match=r"the state is of a training of \['upper', 'lower'\], this one is of \['train'\]"
    ):
        single.load_state_dict(before)
    assert_same(other.state_dict()["levels"]["lower"], before["levels"]["lower"])
