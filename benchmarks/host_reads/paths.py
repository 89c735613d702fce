"""Paths of the package on a simulated device: steps, products and solves, and what crosses over in each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.host_reads.device import Crossing, SimulatedDevice
from bilevel import (
    CG,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    Method,
    Neumann,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Trainer,
    Unrolled,
    functional_call,
    linearize,
    proximal,
)
from bilevel.hypergradients import (
    BOME,
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SAMA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    StocBiO,
)
from bilevel.linear import (
    GMRES,
    MINRES,
    AdjointIteration,
    ApproximateInverse,
    Dense,
    Diagonal,
    Escalating,
    FunctionOperator,
    Nystrom,
    NystromPreconditioner,
    Solution,
    Solver,
)
from bilevel.products import (
    Automatic,
    FiniteDifference,
    ForwardOverReverse,
    GaussNewton,
    HVPProvider,
    MicroBatched,
    ReverseOverReverse,
)
from bilevel.training import Blocks, Callback

Put = Callable[[Any], Any]
"""Gives a copy of a structure of tensors, or a module itself, where the path runs."""

STEPS = 3
"""Lower and upper steps an alternation."""


class Net(Problem):
    """A network with dropout and BatchNorm on both levels, its outputs and their loss known apart."""

    regularization_weight = 0.5
    curvature_depends_on_upper = False

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch)

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch[:, :2]).square().mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = functional_call(self.net, lower, batch)
        return outputs.square().mean() + 0.1 * functional_call(self.net, upper, batch).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


@dataclass(frozen=True)
class Setting:
    """The problem where `put` puts it: variables of both levels, and batches."""

    problem: Net
    upper: Params
    lower: Params
    batches: tuple[Tensor, ...]


def setting(put: Put) -> Setting:
    """A fresh problem, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem = Net()
        start = {name: leaf.detach() for name, leaf in problem.net.named_parameters()}
        batches = tuple(put(torch.randn(6, 4)) for _ in range(4))
    upper, lower = put(start), put({name: 1.1 * leaf for name, leaf in start.items()})
    put(problem.net)
    return Setting(problem, upper, lower, batches)


def on_cpu(given: Any) -> Any:
    """Stands for `SimulatedDevice.put` where there is no device."""
    return (
        given if isinstance(given, nn.Module) else tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    )


@dataclass(frozen=True)
class Kind:
    """A method, and the upper steps an alternation that it can make."""

    method: Method
    upper_steps: int = STEPS
    blocks: bool = False


METHODS: Mapping[str, Kind] = {
    "Implicit(CG(3, rtol=None))": Kind(Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2)),
    "Implicit(CG(3, rtol=None, recycle=3))": Kind(Implicit(CG(3, None, recycle=3), damping=2.0, hessian_batches=2)),
    "Implicit(CG(3, rtol=None)), warm start": Kind(
        Implicit(CG(3, None), damping=2.0, hessian_batches=2, warm_start=True)
    ),
    "Implicit(CG(3, rtol=None)), aggregated": Kind(
        Implicit(CG(3, None), damping=2.0, hessian_batches=2, aggregate=True)
    ),
    'Implicit(CG(3, rtol="noise", memory=3, inexact=True)), aggregated': Kind(
        Implicit(CG(3, "noise", memory=3, inexact=True), damping=2.0, hessian_batches=2, aggregate=True)
    ),
    "Implicit(Neumann(3))": Kind(Implicit(Neumann(3), damping=2.0)),
    "Implicit(Identity())": Kind(Implicit(Identity(), damping=2.0)),
    "Unrolled": Kind(Unrolled(), upper_steps=1),
    "Unrolled(steps=2, recompute=True)": Kind(Unrolled(steps=2, recompute=True), upper_steps=1),
    "OneStep": Kind(OneStep()),
    "SAMA": Kind(SAMA()),
    "Penalty": Kind(Penalty(SGDUpdate(0.1), 5.0)),
    "SOBA": Kind(SOBA()),
    "MASOBA": Kind(MASOBA(averaging=0.5)),
    "SABA": Kind(SABA(), blocks=True),
    "SRBA": Kind(SRBA(period=3), blocks=True),
    "FSLA": Kind(FSLA()),
    "MRBO": Kind(MRBO(0.1, terms=2)),
    "SUSTAIN": Kind(SUSTAIN(0.1, terms=2)),
    "AmIGO": Kind(AmIGO(v_steps=2), upper_steps=1),
    "StocBiO": Kind(StocBiO(0.1, terms=2)),
    "TTSA": Kind(TTSA(0.1, terms=2)),
    "F2SA": Kind(F2SA(growth=0.1)),
    "BOME": Kind(BOME(0.1, inner_steps=2)),
}


class _Watch(Callback):
    """The crossings of each step since the event before it, by the kind of step."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.seen = device, len(device.crossings)
        self.steps: list[tuple[str, list[Crossing]]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.steps.append((record["event"], self.device.crossings[self.seen :]))
        self.seen = len(self.device.crossings)


def train(kind: Kind, put: Put, callbacks: Sequence[Callback] = ()) -> Params:
    """The upper variables after three alternations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made, rows = setting(put), torch.randn(12, 4)

        def data() -> Any:
            if not kind.blocks:
                return list(made.batches)
            return Blocks(12, 6, lambda indices: put(rows[indices]), seed=0, sweep_size=6)

        lower_steps = 0 if kind.method.moves_lower else STEPS
        upper, lower = (
            Level(variables, torch.optim.SGD(variables.values(), lr=0.05, momentum=0.9), data(), max_grad_norm=1.0)
            for variables in (made.upper, made.lower)
        )
        schedule = AlternatingSchedule(3, lower_steps, kind.upper_steps)
        Trainer(made.problem, upper, lower, schedule, kind.method, callbacks=callbacks, on_failure="ignore").run()
        return made.upper


def steps(kind: Kind) -> tuple[dict[str, list[Crossing]], Params]:
    """What crosses over in the steps of the last of three alternations: in a lower one, and in the first and the last
    upper one; and the upper variables after these."""
    with SimulatedDevice() as device:
        watch = _Watch(device)
        trained = train(kind, device.put, [watch])
    ends = [index for index, (event, _) in enumerate(watch.steps) if event == "alternation"]
    last = watch.steps[ends[-2] + 1 : ends[-1]]
    upper = [crossings for event, crossings in last if event == "upper"]
    lower = [crossings for event, crossings in last if event == "lower"]
    return {**({"lower": lower[-1]} if lower else {}), "first upper": upper[0], "upper": upper[-1]}, trained


PROVIDERS: Mapping[str, Callable[[], HVPProvider]] = {
    "ReverseOverReverse": ReverseOverReverse,
    "ReverseOverReverse(keep_graph=True)": lambda: ReverseOverReverse(keep_graph=True),
    "ReverseOverReverse(keep_graph=True, memory_budget=1e9)": lambda: ReverseOverReverse(True, 1e9),
    "ForwardOverReverse": ForwardOverReverse,
    "FiniteDifference": FiniteDifference,
    "FiniteDifference(central=False)": lambda: FiniteDifference(central=False),
    "GaussNewton": GaussNewton,
    "MicroBatched": lambda: MicroBatched(3),
    "Automatic, once it has chosen": Automatic,
}


def product(provider: HVPProvider) -> dict[str, list[Crossing]]:
    """What crosses over in `linearize`, in a product with A from two batches, in a cross term and in a gradient."""
    with SimulatedDevice() as device:
        made = setting(device.put)
        arguments = made.problem, made.upper, made.lower, made.batches[:2]
        options: dict[str, Any] = {"hvp": provider, "damping": 2.0}
        # What is done once for a problem is not counted.
        linearize(*arguments, **options).operator(made.lower)
        found: dict[str, list[Crossing]] = {}
        with device.watched() as found["linearize"]:
            system = linearize(*arguments, **options)
        with device.watched() as found["first product"]:
            system.operator(made.lower)
        with device.watched() as found["product"]:
            system.operator(made.lower)
        system.cross(made.lower)
        with device.watched() as found["cross term"]:
            system.cross(made.lower)
        with device.watched() as found["gradient"]:
            system.gradient()
    return found


FIXED: Mapping[str, Solver] = {
    "CG(6, rtol=None)": CG(6, None),
    "CG(6, rtol=None, layerwise=True)": CG(6, None, layerwise=True),
    "CG(6, rtol=None, preconditioner=Diagonal())": CG(6, None, preconditioner=Diagonal()),
    "CG(6, rtol=None, preconditioner=NystromPreconditioner(3))": CG(6, None, preconditioner=NystromPreconditioner(3)),
    "CG(6, rtol=None, recycle=6)": CG(6, None, recycle=6),
    "Neumann(6)": Neumann(6),
    "Neumann(6, scale=0.2)": Neumann(6, scale=0.2),
    "MINRES(6, rtol=None)": MINRES(6, None),
    "GMRES(6, rtol=None)": GMRES(6, rtol=None),
    "AdjointIteration(6, rtol=None)": AdjointIteration(6, None),
    "Nystrom(4, rtol=None)": Nystrom(4, rtol=None),
    "Escalating(CG(6, rtol=None))": Escalating(CG(6, None)),
    "Dense": Dense(),
    "Identity": Identity(),
    "ApproximateInverse": ApproximateInverse(lambda b: {name: 0.5 * leaf for name, leaf in b.items()}),
}
"""Solvers with a fixed budget of products."""

ADAPTIVE: Mapping[str, Solver] = {
    "CG(6, rtol=1e-9)": CG(6, 1e-9),
    "CG(6, rtol=None, memory=6)": CG(6, None, memory=6),
    "Neumann(6, rtol=1e-9)": Neumann(6, 1e-9),
    "MINRES(6, rtol=1e-9)": MINRES(6, 1e-9),
    "GMRES(6, rtol=1e-9)": GMRES(6, rtol=1e-9),
    "AdjointIteration(6, rtol=1e-9)": AdjointIteration(6, 1e-9),
    "Nystrom(4, rtol=1e-9)": Nystrom(4, rtol=1e-9),
}
"""Solvers that stop where their residual says so, or learn from each iteration."""


def solve(solver: Solver, put: Put, *, watch: Callable[[], None] = lambda: None) -> Iterator[Solution]:
    """Two right-hand sides of one system in two leaves; `watch` is called before and after each product."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    # All eigenvalues are in (0, 2), so that the iteration with I - A contracts too.
    matrix = put(0.1 * torch.eye(30, dtype=torch.float64) + rows @ rows.T / 160)

    def multiply(vector: Params) -> Params:
        watch()
        image = matrix @ torch.cat([vector["a"].reshape(-1), vector["b"]])
        watch()
        return {"a": image[:12].reshape(3, 4), "b": image[12:]}

    operator = FunctionOperator(multiply)
    state = solver.prepare(operator)
    for _ in range(2):
        shapes = {"a": (3, 4), "b": (18,)}
        b = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        yield solver.solve(operator, put(b), state=state)


def solved(solver: Solver) -> dict[str, list[Crossing]]:
    """What crosses over in the solve of a first right-hand side, in that of a second one, and in the latter from the
    beginning of its first product to the end of its last iteration's."""
    with SimulatedDevice() as device:
        marks: list[int] = []
        solves = solve(solver, device.put, watch=lambda: marks.append(len(device.crossings)))
        found: dict[str, list[Crossing]] = {}
        with device.watched() as found["first"]:
            next(solves)
        marks.clear()
        with device.watched() as found["later"]:
            solution = next(solves)
        last = 2 * solution.iterations - 1
        found["between products"] = device.crossings[marks[0] : marks[min(last, len(marks) - 1)]] if marks else []
        return found
