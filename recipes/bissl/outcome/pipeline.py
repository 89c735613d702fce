"""The pipelines of all variants, stage by stage."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from ...experiment.artifacts import Artifact
from ...experiment.workspace import Workspace
from ..settings.arms import BASELINE, EQUAL_TIME, METHOD, arm_of
from ..settings.config import Config
from ..settings.plan import make_plan
from ..training.compute import Computing
from ..training.costs import costs_of
from ..training.datasets import Datasets
from ..training.memory import out_of_memory_explained
from ..training.repeat import Repeat
from ..training.stages import bissl, finetune, head, pretext


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run, each of which takes the artifact of the one before, and what they share.

    Attributes:
        config: the run's configuration.
        data: its images.
        computing: the device, and how to compute on it.
        workspace: where artifacts and events go.
    """

    config: Config
    data: Datasets
    computing: Computing
    workspace: Workspace

    def run(self) -> dict[str, list[Artifact]]:
        """All stages of all variants; the fine-tuned artifacts of each, one for each seed."""
        tested: dict[str, list[Artifact]] = {name: [] for name in self.config.arms}
        made: dict[int, dict[str, Artifact | None]] = {}
        for seed, name, tunings in self.plan():
            weights = made.setdefault(seed, {})
            weights[name] = self.pretrain(self.at(name, seed), weights)
            tested[name] += [self.finetune(self.at(name, tuning), weights[name]) for tuning in tunings]
        return tested

    def plan(self) -> list[tuple[int, str, list[int]]]:
        """(seed, variant, seeds of its fine-tunings), in the order in which they are made."""
        c = self.config
        # The variant of equal time is as long as others took.
        names = sorted(c.arms, key=lambda name: name == EQUAL_TIME)
        if c.pipeline_seeds:
            return [(seed, name, [seed]) for seed in range(c.seed, c.seed + c.pipeline_seeds) for name in names]
        return [(c.seed, name, list(range(c.seed, c.seed + c.seeds))) for name in names]

    def at(self, variant: str, seed: int) -> Repeat:
        """The repeat of a variant that the stages are given."""
        return Repeat.of(self.config, variant, seed)

    def pretrain(self, repeat: Repeat, made: dict[str, Artifact | None]) -> Artifact | None:
        """What is fine-tuned, None for random weights; `made` holds that of the variants before it."""
        arm = arm_of(repeat.variant)
        if arm.start == "random":
            return None
        weights = self.pretext(repeat, self._equal_time(made) if repeat.variant == EQUAL_TIME else None)
        if arm.then == "bissl":
            return self.bissl(repeat, self.head(repeat, weights))
        return self.restart(repeat, weights) if arm.then == "restart" else weights

    def pretext(self, repeat: Repeat, steps: int | None = None) -> Artifact:
        """Self-supervised pre-training, for as long as the variant asks or for `steps`."""
        with self._explained("pretext", repeat):
            return pretext.run(repeat, self.data, self.computing, self.workspace, steps=steps)

    def restart(self, repeat: Repeat, weights: Artifact) -> Artifact:
        """More pre-training, as the lower level makes it."""
        with self._explained("restart", repeat):
            return pretext.restart(repeat, self.data, self.computing, self.workspace, weights)

    def head(self, repeat: Repeat, weights: Artifact) -> Artifact:
        """Warm-up of the downstream head."""
        with self._explained("head", repeat):
            return head.run(repeat, self.data, self.computing, self.workspace, weights)

    def bissl(self, repeat: Repeat, warmed: Artifact) -> Artifact:
        """Bilevel training."""
        with self._explained("bissl", repeat):
            return bissl.run(repeat, self.data, self.computing, self.workspace, warmed)

    def finetune(self, repeat: Repeat, weights: Artifact | None) -> Artifact:
        """Fine-tuning and the test; of random weights where there are none."""
        with self._explained("finetune", repeat):
            return finetune.run(repeat, self.data, self.computing, self.workspace, weights)

    def _explained(self, stage: str, repeat: Repeat) -> AbstractContextManager[None]:
        return out_of_memory_explained(stage, repeat.settings, self.computing.device)

    def _equal_time(self, made: dict[str, Artifact | None]) -> int:
        """Pretext steps of the baseline in the seconds of BiSSL's stages."""
        method, baseline = costs_of(made[METHOD]), costs_of(made[BASELINE])
        # Steps that fit heads to given weights come before, and are as many again.
        planned = make_plan(self.config, BASELINE, len(self.data.pretext), 0).pretext
        fitting = baseline.pretext_steps - planned
        return max(1, round(baseline.pretext_steps * method.seconds / baseline.seconds) - fitting)
