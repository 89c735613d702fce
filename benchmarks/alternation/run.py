"""Alternations of BiSSL against the plain training that they contain: time, products, memory and error.

The system is pinned: a small ResNet after 150 SimCLR steps on photographs at 32x32, N_L = 20 lower steps of 96 images
(192 views), N_U = 8 upper steps of 48, K = 5 stored batches, c = 10.001, gamma = 0.01; three alternations from there,
each on images of its own. Batches are ready before the clock starts, on both sides.

    python benchmarks/alternation/run.py --images folder:PATH --threads 2 --json benchmarks/results/alternation.json

- ``ratio``: seconds of the alternations over those of as many times 20 pretext and 8 downstream steps of the same
  sizes, repeat by repeat; median and quartiles. It includes what is done once a run: second derivatives are examined.
- ``error``: relative distance of an alternation's summed implicit update (each solve by its learning rate) from
  converged float64 solves of the same system for the same right-hand sides. The first alternation's point is the same
  for all settings; of the later ones there are figures where one solve an alternation remembers those before.
  ``solve_error``: the median over the single solves of the first alternation, where there is more than one.
- ``noise_floor``: relative distance between the converged summed updates of two disjoint sets of K batches, in the
  alternations of ``default``.
- ``aggregation``: how far the weights end up from those of separate solves, all solved to 1e-5, where only aggregation
  makes the difference, by gamma, momentum and norm limit.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from benchmarks.alternation.setup import GAMMA, LAMBDA, QUICK, Setup, Sizes, make_setup
from benchmarks.measuring import environment, interleaved, parser, peak_memory, show, use_threads, write_json
from bilevel import CG, AlternatingSchedule, Identity, Implicit, Level, Params, Trainer, linearize
from bilevel.linear import LinearOperator, Solution, Solver
from bilevel.products import HVPProvider, ReverseOverReverse
from bilevel.tree import axpy, norm, sub, zeros_like
from recipes.vision.optimizers import LARS

LOWER_RATE, UPPER_RATE = 0.5, 0.01
AGGREGATED = ((0.0, 0.0, None), (0.01, 0.0, None), (0.1, 0.0, None), (0.01, 0.9, None), (0.01, 0.9, 10.0))
"""(gamma, momentum, norm limit) at which aggregation's bias is measured."""


@final
class Recorder(Solver):
    """Another solver, remembering each right-hand side and solution."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.solved: list[tuple[Params, Solution]] = []

    def prepare(self, operator: LinearOperator | Callable[[Params], Params]) -> Any:
        return self.solver.prepare(operator)

    def memory_of(self, state: Any) -> dict[str, Any]:
        return self.solver.memory_of(state)

    def remember(self, state: Any, memory: Mapping[str, Any]) -> None:
        self.solver.remember(state, memory)

    def solve(
        self,
        operator: LinearOperator | Callable[[Params], Params],
        b: Params,
        *,
        x0: Params | None = None,
        x0_product: Params | None = None,
        state: Any = None,
    ) -> Solution:
        solution = self.solver.solve(operator, b, x0=x0, x0_product=x0_product, state=state)
        self.solved.append((b, solution))
        return solution

    def _solve(self, operator: LinearOperator, b: Params, x0: Params | None, state: Any) -> Solution:
        raise NotImplementedError("solve is overridden")


@dataclass(frozen=True)
class Setting:
    """How the upper level is computed, and for how many alternations; None takes the setup's size."""

    solver: Solver
    hvp: HVPProvider
    aggregate: bool = False
    hessian_batches: int | None = None
    gamma: float = GAMMA
    momentum: float = 0.9
    max_grad_norm: float | None = 10.0
    lower_steps: int | None = None
    upper_steps: int | None = None
    alternations: int | None = None


REFERENCE = CG(80, 1e-4, recycle=80)
KEPT = ReverseOverReverse(keep_graph=True)
SETTINGS = {
    # What it carries on from one alternation to the next is nothing, and it takes as long as all others together.
    "paper": Setting(CG(5, None, layerwise=True), ReverseOverReverse(), alternations=1),
    "global_cg": Setting(CG(10, 3e-2, memory=12, inexact=True), KEPT),
    "default": Setting(CG(10, "noise", memory=6, inexact=True), KEPT, aggregate=True),
    "two_batches": Setting(CG(10, "noise", memory=6, inexact=True), KEPT, aggregate=True, hessian_batches=2),
    "whole_products": Setting(CG(10, "noise"), KEPT, aggregate=True),
    "identity": Setting(Identity(), ReverseOverReverse()),
}


@dataclass(frozen=True)
class Stage:
    """A trainer at the pinned point, some alternations long, and what it has done.

    Attributes:
        solved: right-hand sides and solutions of each alternation.
        ends: the lower variables at each alternation's solves.
    """

    trainer: Trainer
    recorder: Recorder
    solved: list[list[tuple[Params, Solution]]] = field(default_factory=list)
    ends: list[Params] = field(default_factory=list)

    @property
    def carries(self) -> bool:
        """Whether one alternation's solves leave something for the next one's."""
        return isinstance(self.recorder.solver, CG) and self.recorder.solver.memory > 0

    def run(self) -> None:
        for _ in range(self.trainer.schedule.alternations):
            self.recorder.solved = []
            self.trainer.advance()
            self.solved.append(self.recorder.solved)
            self.ends.append(
                {name: leaf.detach().clone() for name, leaf in self.trainer.levels["lower"].params.items()}
            )


def prepare(setup: Setup, setting: Setting) -> Stage:
    """A fresh trainer at the pinned weights."""
    problem = copy.deepcopy(setup.problem)
    problem.gamma = setting.gamma
    sizes = setup.sizes
    upper, lower = problem.variables()
    recorder = Recorder(setting.solver)
    trainer = Trainer(
        problem,
        Level(
            upper,
            torch.optim.SGD(list(upper.values()), lr=UPPER_RATE, momentum=setting.momentum),
            setup.upper_batches,
            max_grad_norm=setting.max_grad_norm,
        ),
        Level(
            lower,
            LARS(list(lower.values()), lr=LOWER_RATE, weight_decay=0.0),
            setup.lower_batches,
            max_grad_norm=setting.max_grad_norm,
        ),
        AlternatingSchedule(
            setting.alternations or sizes.alternations,
            setting.lower_steps or sizes.lower_steps,
            setting.upper_steps or sizes.upper_steps,
        ),
        Implicit(
            recorder,
            hvp=setting.hvp,
            damping=sizes.c - problem.regularization_weight,
            hessian_batches=setting.hessian_batches or sizes.hessian_batches,
            aggregate=setting.aggregate,
        ),
    )
    return Stage(trainer, recorder)


def plain_training(setup: Setup, alternations: int | None = None) -> None:
    """The pretext and downstream steps that alternations, all of the setup's by default, stand beside."""
    count = setup.sizes.alternations if alternations is None else alternations
    problem = copy.deepcopy(setup.problem)
    upper, lower = problem.variables()
    pretext = LARS(list(lower.values()), lr=LOWER_RATE, weight_decay=0.0)
    for batch in setup.lower_batches[: count * setup.sizes.lower_steps]:
        pretext.zero_grad()
        problem.pretext.loss(problem.lower_backbone, dict(problem.heads.items()), batch).backward()
        pretext.step()
    downstream = torch.optim.SGD(list(upper.values()), lr=UPPER_RATE, momentum=0.9)
    for images, targets in setup.upper_batches[: count * setup.sizes.upper_steps]:
        downstream.zero_grad()
        outputs = problem.downstream.forward(problem.upper_backbone, problem.head, images)
        problem.downstream.loss(outputs, targets).backward()
        downstream.step()


def double(tree: Any) -> Any:
    """Floating-point tensors of a nested batch in float64."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: double(value) for key, value in tree.items()}
    return type(tree)(double(item) for item in tree)


class Reference:
    """A^-1 b at the end of an alternation, in float64, to a residual of 1e-4; what was solved helps what comes.

    Args:
        number: of the alternation.
        other: on the K batches that come after those of the alternation's system, instead of on these.
    """

    def __init__(self, setup: Setup, stage: Stage, number: int, *, other: bool = False) -> None:
        problem: Any = copy.deepcopy(stage.trainer.problem)
        for module in (problem.lower_backbone, problem.upper_backbone, problem.heads, problem.head):
            module.double()
        upper, lower = problem.variables()
        with torch.no_grad():
            for name, leaf in lower.items():
                leaf.copy_(stage.ends[number][name])
        count = setup.sizes.hessian_batches
        first = number * stage.trainer.schedule.lower_steps + (count if other else 0)
        batches = double(setup.lower_batches[first : first + count])
        self.system = linearize(
            problem, upper, lower, batches, solver=REFERENCE, hvp=KEPT, damping=setup.sizes.c - LAMBDA
        )

    def solve(self, b: Params) -> Params:
        solution = self.system.solve(double(b))
        if not solution.status.ok:
            raise RuntimeError(f"the reference solve failed: {solution.status.value}")
        return solution.value


@torch.no_grad()
def distance(x: Params, reference: Params) -> float:
    """||x - reference|| / ||reference||, in float64."""
    return float(norm(sub(double(x), double(reference))) / norm(double(reference)))


def total(parts: list[Params]) -> Params:
    result = zeros_like(parts[0])
    for part in parts:
        result = axpy(1.0, part, result)
    return result


def exact_solutions(reference: Reference, right: Sequence[Params]) -> list[Params]:
    return [reference.solve(b) for b in right]


def measure_error(setup: Setup, stage: Stage, first: Reference) -> dict[str, Any]:
    """The record of one setting but for its time; the first alternation, and the later ones where a solve remembers."""
    errors, median = [], None
    followed = stage.carries and len(stage.solved[0]) == 1
    for number, solved in enumerate(stage.solved if followed else stage.solved[:1]):
        # One system in float64 at a time beside the first: it takes gigabytes.
        exact = exact_solutions(Reference(setup, stage, number) if number else first, [b for b, _ in solved])
        errors.append(distance(total([s.value for _, s in solved]), total(exact)))
        if number == 0 and len(solved) > 1:
            median = statistics.median(distance(s.value, x) for (_, s), x in zip(solved, exact, strict=True))
    batches = stage.trainer.method.stored_batches
    every = [s for solved in stage.solved for _, s in solved]
    return {
        "error": errors,
        "solve_error": median,
        "hvps": [round(batches * sum(s.num_hvps for _, s in solved)) for solved in stage.solved],
        "noise": next((s.noise for s in every if s.noise is not None), None),
        "cosine": min(s.cosine for s in every),
        "relative_change": max(s.relative_change for s in every),
    }


def noise_floors(setup: Setup, stage: Stage, first: Reference) -> list[float]:
    """Distance of the summed update between two disjoint sets of K batches, an alternation."""
    floors = []
    for number, solved in enumerate(stage.solved):
        right = [total([b for b, _ in solved])]
        (here,) = exact_solutions(Reference(setup, stage, number) if number else first, right)
        (there,) = exact_solutions(Reference(setup, stage, number, other=True), right)
        floors.append(distance(there, here))
    return floors


def aggregation_bias(setup: Setup, *, quick: bool) -> list[dict[str, Any]]:
    """How far aggregation alone moves the upper weights' change over one alternation."""
    rows = []
    start, _ = setup.problem.variables()
    for gamma, momentum, limit in AGGREGATED[:1] if quick else AGGREGATED:
        ends = []
        for aggregate in (False, True):
            solver = CG(80, 1e-5, recycle=80)
            options = {"gamma": gamma, "momentum": momentum, "max_grad_norm": limit}
            setting = Setting(solver, KEPT, aggregate, hessian_batches=1, lower_steps=1, alternations=1, **options)
            stage = prepare(setup, setting)
            stage.run()
            moved = stage.trainer.levels["upper"].params
            ends.append({name: leaf.detach() - start[name] for name, leaf in moved.items()})
        backbone = [{n: t for n, t in end.items() if n.startswith("backbone.")} for end in ends]
        row = {"gamma": gamma, "momentum": momentum, "max_grad_norm": limit}
        rows.append({**row, "bias": distance(backbone[1], backbone[0]), "length_ratio": _lengths(*backbone)})
    return rows


@torch.no_grad()
def _lengths(separate: Params, aggregated: Params) -> float:
    return float(norm(aggregated) / norm(separate))


def measure(setup: Setup, repeats: int, names: list[str], *, quick: bool) -> dict[str, Any]:
    """All figures."""
    made: dict[str, Stage] = {}

    def alternate(name: str) -> Callable[[], None]:
        def run() -> None:
            made[name] = prepare(setup, SETTINGS[name])
            made[name].run()

        return run

    short = [name for name in names if SETTINGS[name].alternations is not None]
    functions = {"plain": lambda: plain_training(setup), **{n: alternate(n) for n in names if n not in short}}
    times = interleaved(functions, repeats, warm_up=min(1, repeats - 1))
    for name in short:
        once = {"plain": lambda count=SETTINGS[name].alternations: plain_training(setup, count), name: alternate(name)}
        few = interleaved(once, max(1, repeats // 3), warm_up=0)
        times[name] = few[name].over(few["plain"])
    # The lower steps of the first alternation are the same in all settings, and so are the weights and the batches.
    first, overhead = Reference(setup, made[names[0]], 0), {}
    for name in names:
        ratio = times[name] if name in short else times[name].over(times["plain"])
        # The peak of an upper step does not depend on how many there are.
        one = replace(SETTINGS[name], lower_steps=1, upper_steps=2, alternations=1)
        memory = peak_memory(prepare(setup, one).run, setup.device)
        overhead[name] = {"ratio": ratio.median, "quartiles": [ratio.q1, ratio.q3], "repeats": len(ratio.samples)}
        overhead[name] |= measure_error(setup, made[name], first) | {"peak_memory_mib": memory / 2**20}
    plain_memory = peak_memory(lambda: plain_training(setup, 1), setup.device) / 2**20
    return {
        "overhead": overhead,
        "noise_floor": noise_floors(setup, made["default" if "default" in names else names[-1]], first),
        "plain": {"seconds": times["plain"].record(), "peak_memory_mib": plain_memory},
        "aggregation": aggregation_bias(setup, quick=quick),
    }


def report(figures: dict[str, Any]) -> None:
    """The tables."""
    rows = [
        [
            name,
            f"{f['ratio']:.2f} ({f['quartiles'][0]:.2f} to {f['quartiles'][1]:.2f}, n={f['repeats']})",
            ", ".join(f"{error:.1e}" for error in f["error"]),
            "" if f["solve_error"] is None else f"{f['solve_error']:.1e}",
            ", ".join(str(count) for count in f["hvps"]),
            f"{f['peak_memory_mib']:.0f}",
        ]
        for name, f in figures["overhead"].items()
    ]
    header = ["setting", "x plain training", "errors", "median solve", "single-batch HVPs", "peak MiB"]
    floors = ", ".join(f"{floor:.1e}" for floor in figures["noise_floor"])
    show(f"Alternations, from the first one; noise floors {floors}", header, rows)
    rows = [
        [str(r["gamma"]), str(r["momentum"]), str(r["max_grad_norm"]), f"{r['bias']:.1e}", f"{r['length_ratio']:.2f}"]
        for r in figures["aggregation"]
    ]
    show("Aggregated against separate solves", ["gamma", "momentum", "norm limit", "distance", "length"], rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", default="photographs", help='"folder:PATH" of class folders, or "photographs"')
    options.add_argument("--repeats", type=int, default=5, help="interleaved repeats")
    options.add_argument("--lower-batch", type=int, default=96, help="images of a lower batch (two views each)")
    options.add_argument("--upper-batch", type=int, default=48, help="images of an upper batch")
    options.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="which to run")
    arguments = options.parse_args()
    use_threads(arguments.threads)
    whole = Sizes(lower_batch=arguments.lower_batch, upper_batch=arguments.upper_batch)
    setup = make_setup(arguments.images, arguments.device, QUICK if arguments.quick else whole)
    repeats = 1 if arguments.quick else arguments.repeats
    figures = measure(setup, repeats, arguments.settings, quick=arguments.quick)
    report(figures)
    machine = environment(arguments.device)
    kept = {"quick": arguments.quick, "environment": machine, "setup": setup.describe(), **figures}
    write_json(arguments.json, kept)


if __name__ == "__main__":
    main()
