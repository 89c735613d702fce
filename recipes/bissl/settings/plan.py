"""How many steps each arm makes: the arithmetic of the pipeline, without training anything."""

import math
from dataclasses import dataclass

from .arms import EQUAL_LABELS, WARMUP_LR, arm_of
from .config import Config


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of one arm, stage by stage (0 where an arm skips the stage), and its pretext learning rate;
    `warmup` and `lower_warmup` are those of `pretext` and `lower` in which the learning rate rises."""

    pretext: int
    pretext_lr: float
    warmup: int
    head: int
    lower: int
    lower_warmup: int
    upper: int
    finetune: int
    projector: int = 0
    """Steps before `pretext` that fit heads to given weights (model.init_backbone), where the file lacks them."""

    @property
    def pretext_steps(self) -> int:
        """Updates on the pretext loss, those of heads alone and the lower level's included."""
        return self.projector + self.pretext + self.lower

    @property
    def label_steps(self) -> int:
        """Updates that see labels, the upper level's included."""
        return self.head + self.upper + self.finetune


def batches_per_epoch(points: int, batch_size: int) -> int:
    """Batches in one pass over `points`; the last one may be smaller, unless it would hold a single point."""
    return points // batch_size if points % batch_size == 1 else math.ceil(points / batch_size)


def make_plan(config: Config, arm: str, pretext_images: int, labelled_images: int) -> Plan:
    """The plan of `arm` for data of these sizes; that of `EQUAL_TIME` is the baseline's, which it goes beyond.

    Without `pretext.baseline_epochs` the baseline makes exactly as many pretext steps as the BiSSL arm, whose lower
    steps count (paper, section 4.1).
    """
    kind, c = arm_of(arm), config
    epoch = batches_per_epoch(pretext_images, c.pretext.batch_size)
    warm, lower = c.pretext.epochs * epoch, c.bissl.alternations * c.bissl.lower_steps
    tuning = finetune_steps(config, arm, labelled_images)
    warmup = round(c.pretext.warmup_epochs * epoch)
    fitting = c.model.projector_epochs * epoch if c.model.init_backbone else 0
    if kind.start == "random":
        return Plan(0, c.pretext.lr, 0, 0, 0, 0, 0, tuning)
    if kind.start == "baseline":
        steps = warm + lower if c.pretext.baseline_epochs is None else c.pretext.baseline_epochs * epoch
        rate = c.pretext.lr if arm == WARMUP_LR else c.pretext.baseline_lr or c.pretext.lr
        return Plan(steps, rate, min(warmup, max(steps - 1, 0)), 0, 0, 0, 0, tuning, fitting)
    head, upper = _labelled_stages(config, labelled_images) if kind.then == "bissl" else (0, 0)
    rising = lower_warmup(c, batches_per_epoch(round(c.bissl.pretext_fraction * pretext_images), c.pretext.batch_size))
    warmup = min(warmup, max(warm - 1, 0))
    return Plan(warm, c.pretext.lr, warmup, head, lower, rising, upper, tuning, fitting)


def lower_warmup(config: Config, epoch: int) -> int:
    """Steps in which the lower level's learning rate rises, where a pass over its images takes `epoch` of them."""
    c = config.bissl
    steps = round(c.lower_warmup_epochs * epoch) if c.lower_warmup_steps is None else c.lower_warmup_steps
    return min(steps, c.alternations * c.lower_steps - 1)


def finetune_steps(config: Config, arm: str, labelled_images: int) -> int:
    """Steps of the arm's fine-tuning, always whole epochs."""
    epoch = batches_per_epoch(labelled_images, config.downstream.batch_size)
    steps = config.finetune.epochs * epoch
    if arm != EQUAL_LABELS:
        return steps
    return math.ceil((steps + sum(_labelled_stages(config, labelled_images))) / max(epoch, 1)) * epoch


def _labelled_stages(config: Config, labelled_images: int) -> tuple[int, int]:
    """Steps of the head's warm-up and of the upper level."""
    epoch = batches_per_epoch(labelled_images, config.downstream.batch_size)
    return config.head.epochs * epoch, config.bissl.alternations * config.bissl.upper_steps
