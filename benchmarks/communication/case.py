"""BiSSL on small networks, for counting and timing what its steps exchange."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.communication.model import Messages, Schedule, Sizes, channels
from bilevel import CG, AlternatingSchedule, Implicit, Level, Trainer, interruption, linearize
from bilevel.distributed import rank, world_size
from bilevel.training import Callback, SingleLevelTrainer, gradient_of
from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.base import DownstreamTask, PretextTask
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.compute import Computing, JoinBuffers
from recipes.bissl.training.global_loss import pretext_loss
from recipes.bissl.training.problem import BACKBONE, BiSSLProblem
from recipes.vision.networks.backbones import build_backbone

PIXELS = 16
SHORT = Schedule(lower_steps=2, upper_steps=2, hessian_batches=2, iterations=2)
DAMPING = 1000.0
"""So that any network's solve goes well: its products cost what they always do."""


@contextmanager
def recorded() -> Iterator[list[tuple[str, int, float]]]:
    """Every collective that is called within: its kind, bytes as in `Messages`, and seconds, waiting included."""
    found: list[tuple[str, int, float]] = []
    kinds = {"all_reduce": "all-reduce", "all_gather": "all-gather", "broadcast": "broadcast"}
    originals = {name: getattr(dist, name) for name in kinds}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(first: Any, *others: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = originals[name](first, *others, **options)
            parts = first if isinstance(first, list) else [first]
            found.append((kinds[name], sum(part.nbytes for part in parts), time.perf_counter() - began))
            return result

        return call

    for name in kinds:
        setattr(dist, name, wrapped(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def counted(calls: Sequence[tuple[str, int, float]]) -> Messages:
    return Counter((kind, size) for kind, size, _ in calls)


class Case:
    """BiSSL on small networks and random images, each rank holding its part of the batches."""

    def __init__(self, batch: int, labelled: int, batch_norm: str) -> None:
        torch.manual_seed(0)
        computing = Computing(ComputeConfig.model_validate({"batch_norm": batch_norm}), torch.device("cpu"))
        task, downstream = tasks()
        lower, upper = build_backbone("resnet-tiny"), build_backbone("resnet-tiny")
        heads, head = task.build(lower), downstream.build(upper)
        for module in (lower, upper, heads, head):
            computing.place(module).train()
        self.problem = BiSSLProblem(task, downstream, lower, upper, heads, head, join_buffers=computing.join_buffers)
        self.sizes = sizes_of("resnet-tiny", world_size(), batch, labelled, batch_norm)
        drawn = torch.Generator().manual_seed(rank())
        shape = (batch // world_size(), 3, PIXELS, PIXELS)
        self.batches = [tuple(torch.randn(2, *shape, generator=drawn)) for _ in range(SHORT.hessian_batches)]
        count = labelled // world_size()
        labels = torch.randint(len(downstream.classes), (count,), generator=drawn)
        self.labelled = torch.randn(count, *shape[1:], generator=drawn), labels
        variables = self.problem.variables()[1]
        level = Level(variables, torch.optim.SGD(list(variables.values()), lr=1e-3), self.batches[:1])
        self.pretext = SingleLevelTrainer(
            gradient_of(lambda batch: pretext_loss(task, lower, dict(heads.items()), batch), variables),
            level,
            steps=1,
            callbacks=[JoinBuffers(computing, lower, heads)],
        )

    def pretext_step(self) -> None:
        """As the pretext stage makes it."""
        self.pretext.advance()
        interruption.check()

    def product(self) -> Callable[[], object]:
        """A product with A."""
        upper, lower = self.problem.variables()
        built = linearize(self.problem, upper, lower, self.batches, damping=DAMPING)
        direction = {name: torch.ones_like(leaf) for name, leaf in lower.items() if name.startswith(BACKBONE)}
        return lambda: built.operator(direction)

    def alternation(self) -> dict[str, Messages]:
        """Of one alternation: its lower steps and its upper ones, each from one event to the next."""
        upper, lower = self.problem.variables()
        with recorded() as calls:
            events = _Events(calls)
            trainer = Trainer(
                self.problem,
                Level(upper, torch.optim.SGD(upper.values(), lr=1e-3), [self.labelled]),
                Level(lower, torch.optim.SGD(lower.values(), lr=1e-3), self.batches),
                AlternatingSchedule(1, SHORT.lower_steps, SHORT.upper_steps),
                Implicit(
                    CG(SHORT.iterations, None, SHORT.layerwise), damping=DAMPING, hessian_batches=SHORT.hessian_batches
                ),
                callbacks=[events],
                on_failure="raise",
            )
            trainer.run()
        return {"lower step": events.found["lower"], "upper step": events.found["upper"], "alternation": counted(calls)}


class _Events(Callback):
    """What was exchanged since the event before, by the event's kind; the last one of each is kept."""

    def __init__(self, calls: list[tuple[str, int, float]]) -> None:
        self.calls, self.before = calls, 0
        self.found: dict[str, Messages] = {}

    def on_run_start(self, trainer: Any) -> None:
        # What a run exchanges once is of no alternation.
        self.calls.clear()

    def on_event(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.found[record["event"]] = counted(self.calls[self.before :])
        self.before = len(self.calls)


def tasks() -> tuple[PretextTask, DownstreamTask]:
    """The paper's pretext task, and a classification with ten classes."""
    classes = tuple(map(str, range(10)))
    options = {"image_size": PIXELS}
    return SimCLR.model_validate(options), Classification.model_validate({**options, "classes": classes})


def sizes_of(backbone: str, ranks: int, batch: int, labelled: int, batch_norm: str) -> Sizes:
    """Of a backbone with the heads of `tasks`."""
    (task, downstream), network = tasks(), build_backbone(backbone)
    heads, head = task.build(network), downstream.build(network)
    norms, local = (channels(network), channels(heads)), batch_norm == "local"
    *_, last = (layer for layer in heads.modules() if isinstance(layer, nn.Linear))
    return Sizes(
        ranks=ranks,
        batch=batch,
        labelled=labelled,
        embedding=2 * last.out_features,
        classes=len(downstream.classes),
        backbone=_count(network),
        heads=_count(heads),
        head=_count(head),
        backbone_norms=() if local else norms[0],
        head_norms=() if local else norms[1],
        joined=2 * sum(map(sum, norms)) if local else 0,
        joined_upper=2 * sum(norms[0]) if local else 0,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
