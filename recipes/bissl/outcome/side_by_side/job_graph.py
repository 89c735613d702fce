"""The stages of a run as jobs, and which of them must be done before which."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ....experiment.side_by_side.pool import Job
from ...settings.arms import BASELINE, EQUAL_TIME, METHOD, arm_of
from ...settings.plan import make_plan
from ..pipeline import Pipeline

STAGES = ("projector", "pretext", "restart", "head", "bissl", "finetune")
"""In the order in which a variant's events stand."""


@dataclass(frozen=True)
class Task:
    """One job.

    Attributes:
        goal: the stage to make, "weights" being what is fine-tuned; those before it are found or made as well.
        seed: of the stages before fine-tuning, and `tuning` of fine-tuning itself.
    """

    goal: Literal["pretext", "head", "weights", "finetune"]
    variant: str
    seed: int
    tuning: int | None = None

    def name(self) -> str:
        """In messages."""
        then = {"bissl": "bilevel stage", "restart": "restart", "nothing": "pre-training"}[arm_of(self.variant).then]
        named = {"pretext": "pre-training", "head": "head warm-up", "weights": then, "finetune": "fine-tuning"}
        what = named[self.goal]
        return f"{what}, {self.variant}, seed {self.seed if self.tuning is None else self.tuning}"

    def make(self, pipeline: Pipeline) -> None:
        """Make it, in the pipeline's store."""
        repeat = pipeline.at(self.variant, self.seed)
        if self.goal == "pretext":
            pipeline.pretext(repeat)
        elif self.goal == "head":
            pipeline.head(repeat, pipeline.pretext(repeat))
        else:
            before = (METHOD, BASELINE) if self.variant == EQUAL_TIME else ()
            made = {name: pipeline.pretrain(pipeline.at(name, self.seed), {}) for name in before}
            weights = pipeline.pretrain(repeat, made)
            if self.tuning is not None:
                pipeline.finetune(pipeline.at(self.variant, self.tuning), weights)


def jobs_of(pipeline: Pipeline) -> list[Job]:
    """The jobs of a run in the order of `Pipeline.run`, those that several variants share once."""
    jobs: list[Job] = []
    places: dict[tuple[Any, ...], int] = {}
    weights: dict[tuple[str, int], int] = {}
    """Place of the job that makes what is fine-tuned, by variant and seed."""

    def place(key: tuple[Any, ...], task: Task, *after: int) -> int:
        if key not in places:
            places[key] = len(jobs)
            jobs.append(Job(task.name(), task, after))
        return places[key]

    for seed, variant, tunings in pipeline.plan():
        arm, own = arm_of(variant), (variant, seed)
        if variant == EQUAL_TIME:
            before = weights[METHOD, seed], weights[BASELINE, seed]
            weights[own] = place(own, Task("weights", variant, seed), *before)
        elif arm.start != "random":
            weights[own] = place(_pretext(pipeline, variant, seed), Task("pretext", variant, seed))
            if arm.then == "bissl":
                weights[own] = place(("head", seed), Task("head", variant, seed), weights[own])
            if arm.then != "nothing":
                weights[own] = place(own, Task("weights", variant, seed), weights[own])
        after = (weights[own],) if own in weights else ()
        for tuning in tunings:
            place((*own, tuning), Task("finetune", variant, seed, tuning), *after)
    return jobs


def _pretext(pipeline: Pipeline, variant: str, seed: int) -> tuple[Any, ...]:
    """What tells a variant's stage 1 from those of others at the same seed."""
    plan = make_plan(pipeline.config, variant, len(pipeline.data.pretext), 0)
    return "pretext", seed, plan.pretext, plan.pretext_lr, plan.warmup


def place_of(pipeline: Pipeline, event: Mapping[str, Any]) -> tuple[int, ...]:
    """Where an event of a run stands among those of other stages, if they are made one after the other."""
    c = pipeline.config
    order = [name for _, name, _ in pipeline.plan()]
    variant = order.index(event["variant"]) if event["variant"] in order else len(order)
    stage = STAGES.index(event["stage"]) if event["stage"] in STAGES else len(STAGES)
    seed = event["seed"]
    return (seed, variant, stage) if c.pipeline_seeds else (variant, stage, seed)
