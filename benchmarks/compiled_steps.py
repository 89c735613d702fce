"""Steps of SOBA in a `Trainer` with and without ``compile=True``, in turn within one run.

    python benchmarks/compiled_steps.py --threads 1 --json FILE

The problems are those of `small_steps.py` on batches of 1 and of 64 samples, and a network of two hidden layers of 64.
A figure is a step of the whole trainer, both optimizers included; ``ratio`` is without over with, repeat by repeat;
``compilation`` the seconds that the first two steps take, of which the second compiles.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measuring import environment, interleaved, parser, show, use_threads, write_json
from benchmarks.small_steps import Case, logistic, quadratic
from bilevel import AlternatingSchedule, Level, Params, Problem, Trainer
from bilevel.hypergradients import SOBA

STEPS, REPEATS = 50, 15


@dataclass(frozen=True)
class Subject:
    """A problem, where its variables begin, and its batches."""

    name: str
    problem: Problem
    upper: Params
    lower: Params
    lower_batches: Sequence[Any]
    upper_batches: Sequence[Any]


class Weighted(Problem):
    """A network's cross-entropy with a learned weight for every sample."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, labels, numbers = batch
        losses = cross_entropy(torch.func.functional_call(self.net, lower, inputs), labels, reduction="none")
        return (upper["weights"][numbers].sigmoid() * losses).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        return cross_entropy(torch.func.functional_call(self.net, lower, batch[0]), batch[1])


def network() -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    batch = torch.randn(64, 64), torch.randint(10, (64,)), torch.arange(64)
    lower = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    return Subject("network, 64 samples", Weighted(net), {"weights": torch.zeros(64)}, lower, [batch], [batch])


def small(case: Case, samples: int) -> Subject:
    def cut(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        if samples == 1:
            return list(batches)
        return [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]

    name = f"{case.name}, {samples} sample{'s' if samples > 1 else ''}"
    return Subject(name, case.problem, {"x": case.x}, {"y": case.y}, cut(case.lower), cut(case.upper))


def trainer(subject: Subject, method: SOBA, steps: int, alternations: int) -> Trainer:
    upper, lower = ({n: leaf.clone() for n, leaf in part.items()} for part in (subject.upper, subject.lower))
    return Trainer(
        subject.problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=1e-4), subject.upper_batches),
        Level(lower, torch.optim.SGD(lower.values(), lr=1e-4), subject.lower_batches),
        AlternatingSchedule(alternations, 0, steps),
        method,
    )


def measure(*, backend: bool | str = True, quick: bool = False) -> dict[str, Any]:
    """Milliseconds of a step without and with, and their ratio, by problem."""
    steps, repeats = (2, 2) if quick else (STEPS, REPEATS)
    subjects = [small(case(), samples) for case in (quadratic, logistic) for samples in (1, 64)]
    found = {}
    for subject in [*subjects, network()]:
        torch.compiler.reset()
        plain, compiled = (trainer(subject, SOBA(compile=choice), steps, 2 * repeats) for choice in (False, backend))
        began = time.perf_counter()
        trainer(subject, SOBA(compile=backend), 2, 1).run()
        spent = time.perf_counter() - began
        times = interleaved({"plain": plain.advance, "compiled": compiled.advance}, repeats)
        found[subject.name] = {
            **{f"{name}_milliseconds": 1e3 * timing.median / steps for name, timing in times.items()},
            "ratio": times["plain"].over(times["compiled"]).record(),
            "compilation": spent,
        }
    return {"environment": environment(), "steps": steps, "repeats": repeats, "problems": found}


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """One a problem: milliseconds of a step, the ratio with its quartiles, seconds."""
    return [
        [
            name,
            f"{row['plain_milliseconds']:.2f} ms",
            f"{row['compiled_milliseconds']:.2f} ms",
            f"{row['ratio']['median']:.2f} ({row['ratio']['q1']:.2f} to {row['ratio']['q3']:.2f})",
            f"{row['compilation']:.0f} s",
        ]
        for name, row in figures["problems"].items()
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    use_threads(options.threads)
    figures = measure(backend="eager" if options.quick else True, quick=options.quick)
    write_json(options.json, figures)
    show("One step of SOBA in a Trainer", ["problem", "plain", "compiled", "ratio", "compilation"], rows(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
