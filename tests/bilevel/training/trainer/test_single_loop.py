"""Single loops in a trainer: what a step does to both levels, to the data, buffers and masks, and what is refused."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    AlternatingSchedule,
    BatchStack,
    Level,
    Params,
    Problem,
    SolverError,
    SolverWarning,
    Trainer,
    check_hypergradient,
    functional_call,
    hypergradient,
)
from bilevel.hypergradients import (
    BOME,
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    Method,
    StocBiO,
)
from bilevel.hypergradients.single_loop.partitions import SagaTable
from bilevel.linear import Dense
from bilevel.lower import Draw
from bilevel.training import Blocks, Callback, NonFiniteError, power_decay
from tests.support.cases import joined, vector
from tests.support.methods import METHODS
from tests.support.problems.sampled_quadratic import PROBLEM, Drive, blocks, draw, variables

LOOPS = {name: kind.method for name, kind in METHODS.items() if kind.method.moves_lower}
SAMPLED = {name: kind.method for name, kind in METHODS.items() if kind.method.lower_draws}
EACH = pytest.mark.parametrize("method", LOOPS.values(), ids=LOOPS.keys())


class Heard(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.records.append(record)


def made(
    method: Method,
    *,
    problem: Problem = PROBLEM,
    steps: tuple[int, int, int] = (2, 0, 3),
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    decay: float | None = None,
    data: tuple[Any, Any] | None = None,
    level: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    upper, lower = variables()
    optimizers = [optimizer(params.values(), lr=lr) for params, lr in ((upper, 0.05), (lower, 0.1))]
    schedules: list[Any] = [None if decay is None else power_decay(own, decay) for own in optimizers]
    sources = (blocks("upper"), blocks("lower")) if data is None else data
    return Trainer(
        problem,
        Level(upper, optimizers[0], sources[0], scheduler=schedules[0], **(level or {})),
        Level(lower, optimizers[1], sources[1], scheduler=schedules[1], **(level or {})),
        AlternatingSchedule(*steps),
        method,
        **options,
    )


@EACH
def test_a_trainers_steps_are_those_that_were_made_by_hand(method: Method) -> None:
    heard = Heard()
    trainer = made(method, callbacks=[heard])
    torch.manual_seed(1)
    trainer.run()
    run = Drive(method)
    torch.manual_seed(1)
    for _ in range(6):
        samples, seed = [], int(torch.randint(2**30, ()))
        for level, count in (("lower", method.lower_draws), ("upper", method.upper_draws)):
            source = run.partitions[level]
            drawn = []
            for _ in range(count):
                source.next()
                assert source.last_block is not None
                drawn.append(replace(draw(source, source.last_block), seed=seed))
                seed += 1
            samples.append(drawn)
        run.advance(run.propose(*samples))
    assert torch.allclose(joined(trainer.upper.params), run.x, rtol=1e-11)
    assert torch.allclose(joined(trainer.lower.params), run.y, rtol=1e-11)
    assert trainer.steps == {"upper": 6, "lower": 6} == trainer.planned
    upper = [record for record in heard.records if record["event"] == "upper"]
    assert [record["step"] for record in upper] == [1, 2, 3, 4, 5, 6]
    assert {record["lower_lr"] for record in upper} == {0.1}
    assert all(record["lower_grad_norm"] > 0.0 for record in upper)
    assert all(record["stationarity"] is None for record in upper), "its directions are no hypergradients"


def test_norm_limits_optimizers_and_schedules_are_each_levels_own() -> None:
    first, plain = Heard(), variables()
    trainer = made(SOBA(), steps=(1, 0, 1), level={"max_grad_norm": 1e-3}, decay=0.5, callbacks=[first])
    trainer.run()
    for level, lr, before in ((trainer.upper, 0.05, plain[0]), (trainer.lower, 0.1, plain[1])):
        moved = joined(level.params) - joined(before)
        assert float(moved.norm()) == pytest.approx(lr * 1e-3, rel=1e-9)
        assert level.rate == pytest.approx(lr / 2**0.5)
    assert first.records[0]["lr"] == 0.05
    adam = made(SOBA(v_ratio=2.0), steps=(1, 0, 1), optimizer=torch.optim.Adam)
    adam.run()
    for level, lr, before in ((adam.upper, 0.05, plain[0]), (adam.lower, 0.1, plain[1])):
        # Adam's first step is a rate's length in every entry.
        moved = (joined(level.params) - joined(before)).abs()
        assert torch.allclose(moved, torch.full_like(moved, lr), rtol=1e-5)


def test_the_rate_of_v_goes_by_the_lower_level() -> None:
    """v after two steps, whose rates are the schedule's."""
    trainer = made(SOBA(v_ratio=0.5), steps=(1, 0, 1), decay=1.0)
    other = made(SOBA(v_ratio=1.0), steps=(1, 0, 1), decay=1.0)
    trainer.run()
    other.run()
    half, whole = (one.state_dict()["method"]["state"]["v"] for one in (trainer, other))
    assert torch.allclose(joined(half), 0.5 * joined(whole), rtol=1e-12)


def test_power_decay() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=2.0)
    schedule = power_decay(optimizer, 0.4)
    for t in range(4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 / (t + 1) ** 0.4)
        optimizer.step()
        schedule.step()
    with pytest.raises(ValueError, match=r"power_decay: exponent must be a finite number >= 0, got -0.5"):
        power_decay(optimizer, -0.5)


@EACH
def test_reset_lower_clears_what_is_carried(method: Method) -> None:
    class Resetting(type(PROBLEM)):
        def reset_lower(self, upper: Params) -> Params:
            return variables(30)[1]

    trainer = made(method, problem=Resetting(), steps=(2, 0, 3))
    torch.manual_seed(1)
    trainer.run()
    # The second alternation alone, from the same upper variables and data.
    once = made(method, problem=Resetting(), steps=(1, 0, 3))
    torch.manual_seed(1)
    once.run()
    again = made(method, problem=Resetting(), steps=(2, 0, 3))
    state = once.state_dict()
    state["method"]["state"] = {}
    again.load_state_dict(state)
    again.run()
    assert torch.equal(joined(trainer.lower.params), joined(again.lower.params))
    assert torch.equal(joined(trainer.upper.params), joined(again.upper.params))


@EACH
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_batch_of_nans_changes_nothing(method: Method, level: str) -> None:
    trainer = made(method, steps=(1, 0, 4), nonfinite_skips=1)
    objective = f"{level}_objective"
    problem = type(PROBLEM)()
    plain, seen = getattr(problem, objective), list[Any]()

    def poisoned(upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return plain(upper, lower, batch) * (math.nan if trainer.steps["upper"] == 2 else 1.0)

    class Watching(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            state = trainer.state_dict()
            seen.append((record.get("skipped", False), [state["levels"], state["method"]["state"]]))

    setattr(problem, objective, poisoned)
    trainer.problem, trainer.callbacks = problem, (Watching(),)
    trainer.run()
    assert [skipped for skipped, _ in seen] == [False, False, True, False, False]
    assert repr(seen[2][1]) == repr(seen[1][1])
    assert repr(seen[3][1]) != repr(seen[1][1])
    assert trainer.skipped == {"upper": 1}
    strict = made(method, problem=problem, steps=(1, 0, 4))
    trainer = strict
    with pytest.raises(NonFiniteError, match=r"upper step 3 \(alternation 1\)"):
        strict.run()


class Normed(Problem):
    """A network with BatchNorm and dropout, whose forward passes are counted."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))
        self.net.double()
        self.masks: list[Tensor] = []
        self.net[3].register_forward_hook(lambda module, args, output: self.masks.append((output == 0.0).detach()))

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (functional_call(self.net, lower, batch) * upper["x"].exp()).square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return joined(lower).square().sum()

    regularization_weight = 0.1

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch, training=False).square().mean() + upper["x"].square().sum()


def network(method: Method, dropout: float = 0.0, **options: Any) -> Trainer:
    problem = Normed(dropout)
    lower = {name: p.detach().clone() for name, p in problem.net.named_parameters()}
    upper = {"x": torch.zeros((), dtype=torch.float64)}
    rows = vector(36, 3).reshape(12, 3)
    data = [Blocks(12, 4, lambda indices: rows[indices], seed=k, sweep_size=4) for k in range(2)]
    torch.manual_seed(4)
    return Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.05), data[0]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.05), data[1]),
        AlternatingSchedule(2, 0 if method.moves_lower else 1, 2),
        method,
        **options,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", SAMPLED.values(), ids=SAMPLED.keys())
def test_running_statistics_move_once_a_lower_step(method: Method, dropout: float) -> None:
    trainer = network(method, dropout)
    norm = trainer.problem.net[1]  # type: ignore[attr-defined]
    counts = []

    class Counting(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            counts.append((int(norm.num_batches_tracked), trainer.steps["lower"]))

    trainer.callbacks = (Counting(),)
    trainer.run()
    assert counts
    assert all(batches == steps for batches, steps in counts), counts
    assert counts[-1][1] == (4 if method.moves_lower else 2)


def test_they_move_by_the_first_lower_pass() -> None:
    trainer = network(SOBA())
    net = trainer.problem.net  # type: ignore[attr-defined]
    rows = trainer.lower.data.block(trainer.lower.data._order[0])  # type: ignore[attr-defined]
    hidden = torch.nn.functional.linear(rows, trainer.lower.params["0.weight"], trainer.lower.params["0.bias"])
    wanted = 0.1 * hidden.mean(0)
    trainer.schedule = AlternatingSchedule(1, 0, 1)
    trainer.run()
    assert torch.allclose(net[1].running_mean, wanted, rtol=1e-12)


@pytest.mark.parametrize("method", [FSLA(), F2SA(), BOME(0.1)], ids=["FSLA", "F2SA", "BOME"])
def test_both_points_of_a_sample_meet_the_same_masks(method: Method) -> None:
    trainer = network(method, 0.4)
    problem = trainer.problem
    masks: list[list[Tensor]] = []

    class Collecting(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            # Evaluations of the upper objective have no zeros.
            masks.append([mask for mask in problem.masks if bool(mask.any())])  # type: ignore[attr-defined]
            problem.masks.clear()  # type: ignore[attr-defined]

    trainer.callbacks = (Collecting(),)
    trainer.run()
    of_steps = [step for step in masks if step][1:]
    assert len(of_steps) == 3
    for step in of_steps:
        assert len(step) >= 2
        assert all(torch.equal(mask, step[0]) for mask in step)
    assert not torch.equal(of_steps[0][0], of_steps[1][0])


@pytest.mark.parametrize("method", [SOBA(), BOME(0.1), SUSTAIN(0.1), AmIGO(), TTSA(0.1)])
def test_lost_curvature_is_told_once_where_second_derivatives_are_taken(method: Method) -> None:
    class Cut(type(PROBLEM)):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return super().lower_objective(upper, lower, batch) + (
                joined(lower).detach().square() @ joined(lower).exp()
            )

        def reset_lower(self, upper: Params) -> Params:
            return variables(30)[1]

    steps = (2, 0, 2) if method.moves_lower else (2, 1, 2)
    if isinstance(method, BOME):
        made(method, problem=Cut(), steps=steps, on_failure="raise").run()
        return
    with pytest.raises(SolverError, match=r"lost curvature: .*d2G/dydy"):
        made(method, problem=Cut(), steps=steps, on_failure="raise").run()
    with pytest.warns(SolverWarning, match="lost curvature") as caught:
        made(method, problem=Cut(), steps=steps).run()
    assert len(caught) == 1
    made(method, problem=Cut(), steps=steps, on_failure="ignore").run()


ANEW = tuple(BatchStack(6, 2, lambda indices, seed: indices.clamp(max=4), seed=k) for k in range(2))


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        (SOBA(), {"steps": (1, 2, 3)}, "schedule: lower_steps=2, but SOBA moves the lower variables in its upper"),
        (BOME(0.1), {"steps": (1, 1, 3)}, "schedule: lower_steps=1, but BOME moves the lower variables"),
        (SABA(), {"data": ANEW}, "lower: SABA needs data that are cut into fixed blocks"),
        (SRBA(), {"data": (ANEW[0], blocks("lower"))}, "upper: SRBA needs data that are cut into fixed blocks"),
        (SABA(table_bytes=1000), {}, "SABA: table_bytes=1,000, but tables for 4 lower and 3 upper blocks"),
    ],
)
def test_what_a_method_cannot_serve_is_refused_when_the_trainer_is_made(
    method: Method, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        made(method, **options)


def test_the_tables_bytes_are_those_that_are_counted() -> None:
    """4 rows of dG/dy, d2G/dydy v, d2G/dxdy v and 3 of dF/dx, dF/dy, in float64, twice."""
    wanted = 2 * 8 * (4 * (7 + 5 + 4) + 3 * (4 + 5))
    with pytest.raises(ValueError, match=f"take {wanted:,}; make larger blocks, raise table_bytes, or take SRBA"):
        made(SABA(table_bytes=wanted - 1))
    trainer = made(SABA(table_bytes=wanted))
    trainer.run()
    state = trainer.state_dict()["method"]["state"]
    assert 2 * sum(state[level]["rows"].nbytes for level in ("lower", "upper")) == wanted


def test_micro_batches_are_refused() -> None:
    class Outputs(type(PROBLEM)):
        def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return joined(lower).expand(len(batch), -1)

        def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
            return outputs.square().mean()

    upper, lower = variables()
    with pytest.raises(ValueError, match="lower: FSLA takes a batch at once; leave micro_batch out"):
        Trainer(
            Outputs(),
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), blocks("upper")),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.1), blocks("lower"), micro_batch=2),
            AlternatingSchedule(1, 0, 1),
            FSLA(),
        )


ONCE = {"upper_batch": torch.arange(5), "lower_batches": [torch.arange(7)]}


@pytest.mark.parametrize("name", LOOPS)
def test_a_single_loop_gives_no_single_hypergradient(name: str) -> None:
    upper, lower = variables()
    match = f"{name} moves both levels together, .* use it in a Trainer"
    with pytest.raises(ValueError, match=match):
        hypergradient(PROBLEM, upper, lower, LOOPS[name], **ONCE)
    with pytest.raises(ValueError, match=match):
        check_hypergradient(
            PROBLEM, upper, lower, LOOPS[name], lower_solver=lambda *given: pytest.fail("no solve"), **ONCE
        )


def test_amigo_says_why_it_needs_a_trainer() -> None:
    with pytest.raises(ValueError, match=r"AmIGO: v goes by the lower optimizer's learning rate .* in a Trainer"):
        hypergradient(PROBLEM, *variables(), AmIGO(), **ONCE)


def test_sampled_series_give_hypergradients_outside_of_a_trainer() -> None:
    upper, lower = variables()
    exact = joined(hypergradient(PROBLEM, upper, lower, Dense(), **ONCE).grad)
    found = hypergradient(PROBLEM, upper, lower, StocBiO(0.4, terms=150), **ONCE)
    assert torch.allclose(joined(found.grad), exact, rtol=1e-8)
    assert torch.allclose(joined(found.direct) + joined(found.implicit), joined(found.grad), rtol=1e-12)
    assert found.failure is None
    torch.manual_seed(1)
    several = [joined(hypergradient(PROBLEM, upper, lower, TTSA(0.4, terms=2), **ONCE).grad) for _ in range(20)]
    kinds = {tuple(round(float(value), 9) for value in one) for one in several}
    assert len(kinds) == 3, "one for each length"
    mean = torch.tensor(sorted(kinds), dtype=torch.float64).mean(0)
    truncated = joined(hypergradient(PROBLEM, upper, lower, StocBiO(0.4, terms=2), **ONCE).grad)
    assert torch.allclose(mean, truncated, atol=1e-7)


def test_a_hypergradient_that_is_not_finite_is_a_failure() -> None:
    upper, lower = variables()
    lower["b"].fill_(math.inf)
    with pytest.warns(SolverWarning, match="non-finite: the sampled hypergradient is not finite"):
        hypergradient(PROBLEM, upper, lower, StocBiO(0.1), **ONCE)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SOBA(v_ratio=0.0), "SOBA: v_ratio must be a positive number, got 0.0"),
        (lambda: SRBA(v_ratio=math.nan), "SRBA: v_ratio must be a positive number"),
        (lambda: MASOBA(averaging=0.0), "MASOBA: averaging must be"),
        (lambda: MASOBA(averaging=1.5), "MASOBA: averaging must be"),
        (lambda: SABA(table_bytes=0), "SABA: table_bytes must be a whole number of at least 1, got 0"),
        (lambda: SRBA(period=0), "SRBA: period must be a whole number of at least 1, got 0"),
        (lambda: FSLA(momentum=0.0), "FSLA: momentum must be"),
        (lambda: FSLA(decay=-1.0), "FSLA: decay must be"),
        (lambda: MRBO(0.0), "MRBO: step_size must be a positive number, got 0.0"),
        (lambda: MRBO(0.1, terms=0), "MRBO: terms must be a whole number of at least 1, got 0"),
        (lambda: SUSTAIN(0.1, momentum=2.0), "SUSTAIN: momentum must be"),
        (lambda: SUSTAIN(0.1, decay=-1.0), "SUSTAIN: decay must be"),
        (lambda: AmIGO(v_steps=0), "AmIGO: v_steps must be a whole number of at least 1, got 0"),
        (lambda: StocBiO(-1.0), "StocBiO: step_size must be a positive number, got -1.0"),
        (lambda: StocBiO(0.1, terms=1.5), "StocBiO: terms must be a whole number"),  # type: ignore[arg-type]
        (lambda: TTSA(0.0), "TTSA: step_size must be a positive number, got 0.0"),
        (lambda: TTSA(0.1, terms=0), "TTSA: terms must be"),
        (lambda: F2SA(penalty=0.0), "F2SA: penalty must be a positive number, got 0.0"),
        (lambda: F2SA(growth=-1.0), "F2SA: growth must be"),
        (lambda: BOME(0.0), "BOME: inner_rate must be a positive number, got 0.0"),
        (lambda: BOME(0.1, inner_steps=0), "BOME: inner_steps must be"),
        (lambda: BOME(0.1, control=0.0), "BOME: control must be a positive number, got 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make: Callable[[], Method], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["StocBiO", "TTSA", "MRBO", "SUSTAIN", "BOME"])
def test_methods_that_carry_no_v_take_no_rate_for_it(name: str) -> None:
    kinds: dict[str, Any] = {"StocBiO": StocBiO, "TTSA": TTSA, "MRBO": MRBO, "SUSTAIN": SUSTAIN, "BOME": BOME}
    with pytest.raises(TypeError, match="v_ratio"):
        kinds[name](0.1, v_ratio=1.0)


def test_an_objective_may_take_derivatives_of_its_own() -> None:
    """As physics-informed losses do; also in the pass that looks for random numbers."""

    class Slope(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            place = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad((lower["y"] * place).sin().sum(), place, create_graph=True)
            return (slope - upper["x"]).square().mean()

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (
                (torch.autograd.grad(lower["y"].square().sum(), lower["y"], create_graph=True)[0] - 1.0).square().sum()
            )

    upper, lower = ({name: torch.full((1,), 0.5, dtype=torch.float64)} for name in "xy")
    above, below = (
        Level(params, torch.optim.SGD(params.values(), lr=0.1), [torch.linspace(0.0, 1.0, 5, dtype=torch.float64)])
        for params in (upper, lower)
    )
    Trainer(Slope(), above, below, AlternatingSchedule(1, 0, 1), SOBA()).run()
    y = torch.tensor(0.5, dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    wanted = (2.0 * (y * (y * t).cos() - 0.5) * ((y * t).cos() - y * t * (y * t).sin())).mean()
    torch.testing.assert_close(lower["y"][0], y - 0.1 * wanted)


def test_the_tables_mean_is_that_of_its_rows_in_few_bits() -> None:
    """Steps as by SABA's tables in bfloat16, where the mean over 64 blocks moves by less than its own rounding."""
    table = Blocks(64, 1, lambda indices: indices, seed=0)
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(64, 10, generator=generator)
    state: dict[str, Any] = {}
    for number in range(64 * 20):
        block = number % 64
        sample = Draw(None, block, block)
        new = centre[block] + 0.1 * torch.randn(10, generator=generator)
        now = SagaTable(state or None, table, [{"y": new.bfloat16()}])
        assert now.estimate(sample)[0]["y"].dtype == torch.bfloat16
        state = now.following()
        now.write(sample)
    assert state["rows"].dtype == torch.bfloat16
    torch.testing.assert_close(state["mean"].double(), state["rows"].double().mean(0), rtol=0.0, atol=1e-5)


def test_mixed_precisions_are_counted_as_the_tables_keep_them() -> None:
    """A row has the wider dtype of y, v and x."""

    class Mixed(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return ((lower["y"].double() - upper["x"]) * batch).square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"].double() * batch).square().sum()

    upper, lower = {"x": torch.zeros(3, dtype=torch.float64)}, {"y": torch.zeros(3, dtype=torch.float32)}
    above, below = (
        Level(params, torch.optim.SGD(params.values(), lr=0.1), [torch.ones(3, dtype=torch.float64)] * 2)
        for params in (upper, lower)
    )
    wanted = 2 * 8 * (2 * 9 + 2 * 6)
    with pytest.raises(ValueError, match=f"take {wanted:,};"):
        Trainer(Mixed(), above, below, AlternatingSchedule(1, 0, 2), SABA(table_bytes=wanted - 1))
    trainer = Trainer(Mixed(), above, below, AlternatingSchedule(1, 0, 2), SABA(table_bytes=wanted))
    trainer.run()
    state = trainer.state_dict()["method"]["state"]
    assert 2 * sum(state[level]["rows"].nbytes for level in ("lower", "upper")) == wanted


@pytest.mark.parametrize("method", [SOBA(), SABA(), SRBA(period=2)], ids=["SOBA", "SABA", "SRBA"])
def test_a_block_meets_other_masks_whenever_it_is_drawn(method: Method) -> None:
    """Dropout averages over masks, and one for each block, for good, would be another network."""
    trainer = network(method, 0.4)
    assert isinstance(trainer.problem, Normed)
    for _ in range(4):
        trainer.advance()
    # Each of the 3 blocks was drawn at least twice, and there is the pass that looks for random numbers.
    met = {tuple(mask.flatten().tolist()) for mask in trainer.problem.masks if mask.any()}
    assert len(met) >= 1 + 8


def test_an_adaptive_lower_optimizer_is_warned_of_unless_v_has_a_ratio_of_its_own() -> None:
    upper, lower = {"x": torch.zeros(1)}, {"y": torch.zeros(1)}

    class Square(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"] - upper["x"] - batch).square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return lower["y"].square().sum()

    def trainer(method: SOBA, kind: Any) -> Trainer:
        levels = (
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [torch.ones(1)]),
            Level(lower, kind(lower.values(), lr=1e-3), [torch.ones(1)]),
        )
        return Trainer(Square(), levels[0], levels[1], AlternatingSchedule(1, 0, 1), method)

    with pytest.warns(UserWarning, match=r"SOBA: v makes plain steps of v_ratio=1 times .* \(0\.001\), which for Adam"):
        trainer(SOBA(), torch.optim.Adam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(SOBA(v_ratio=200.0), torch.optim.Adam)
        trainer(SOBA(), torch.optim.SGD)


def test_a_step_that_is_not_finite_names_the_rates_of_both_levels() -> None:
    upper, lower = {"x": torch.zeros(1)}, {"y": torch.ones(1)}

    class Steep(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"] ** 4 + upper["x"] * lower["y"]).sum()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"] ** 2 + upper["x"] ** 2).sum()

    levels = (
        Level(upper, torch.optim.SGD(upper.values(), lr=1e-4), [torch.ones(1)]),
        Level(lower, torch.optim.SGD(lower.values(), lr=50.0), [torch.ones(1)]),
    )
    with pytest.raises(NonFiniteError, match=r"Lower one of the learning rates \(upper 0.0001, lower 50\)"):
        Trainer(Steep(), levels[0], levels[1], AlternatingSchedule(1, 0, 100), SOBA()).run()
