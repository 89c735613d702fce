"""How many steps each arm makes: the arithmetic of the pipeline, without training anything."""

import math
from dataclasses import dataclass

from recipes.bissl.config import Config


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of one arm, stage by stage (0 where an arm skips the stage), and its pretext learning rate."""

    pretext: int
    pretext_lr: float
    warmup: int
    head: int
    lower: int
    upper: int
    finetune: int

    @property
    def pretext_steps(self) -> int:
        """Updates on the pretext loss, the lower level's included."""
        return self.pretext + self.lower

    @property
    def label_steps(self) -> int:
        """Updates that see labels, the upper level's included."""
        return self.head + self.upper + self.finetune


def batches_per_epoch(points: int, batch_size: int) -> int:
    """Batches in one pass over `points`; the last one may be smaller, unless it would hold a single point."""
    return points // batch_size if points % batch_size == 1 else math.ceil(points / batch_size)


def make_plan(config: Config, arm: str, pretext_images: int, labelled_images: int) -> Plan:
    """The plan of `arm` ("bissl", "baseline", "scratch") for data of these sizes.

    Without `pretext.baseline_epochs` the baseline makes exactly as many pretext steps as the BiSSL arm, whose lower
    steps count (paper, section 4.1).
    """
    c = config
    epoch = batches_per_epoch(pretext_images, c.pretext.batch_size)
    labelled_epoch = batches_per_epoch(labelled_images, c.downstream.batch_size)
    warm, lower = c.pretext.epochs * epoch, c.bissl.alternations * c.bissl.lower_steps
    finetune = c.finetune.epochs * labelled_epoch
    warmup = round(c.pretext.warmup_epochs * epoch)
    if arm == "scratch":
        return Plan(0, c.pretext.lr, 0, 0, 0, 0, finetune)
    if arm == "baseline":
        steps = warm + lower if c.pretext.baseline_epochs is None else c.pretext.baseline_epochs * epoch
        return Plan(steps, c.pretext.baseline_lr or c.pretext.lr, min(warmup, steps - 1), 0, 0, 0, finetune)
    upper = c.bissl.alternations * c.bissl.upper_steps
    head = c.head.epochs * labelled_epoch
    return Plan(warm, c.pretext.lr, min(warmup, warm - 1), head, lower, upper, finetune)
