"""Before stage 1, where the backbone's weights were made elsewhere: pretext heads that fit it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import Level
from bilevel.training import Callback, SingleLevelTrainer, derive_seed, gradient_of

from ....experiment.artifacts import Artifact, make_key
from ....experiment.stage import Attempt, CachedStage
from ....experiment.stage_training import run_training
from ....experiment.workspace import Workspace
from ....vision.networks.backbones import build_backbone
from ....vision.networks.foreign_weights import load_backbone
from ....vision.networks.weight_files import ForeignWeights
from ....vision.optimizers import schedule
from ...settings.arms import arm_of
from ...tasks.base import PretextTask
from ..compute import JoinBuffers
from ..costs import Costs
from ..datasets import resolution
from ..global_loss import pretext_loss
from ..image_batches import PRETEXT_IMAGES, Batches
from ..keep_record import KeepRecord
from ..problem import trainable
from ..repeat import Repeat

STAGE = "projector"


def run(repeat: Repeat, batches: Batches, workspace: Workspace, weights: ForeignWeights, steps: int) -> Artifact:
    """Fit fresh heads to a backbone of the given weights, which keeps every weight and buffer, in `steps` steps.

    The backbone is in eval mode; heads before it (a masked autoencoder's token) get gradients through it. The optimizer
    is the task's, with the pretext stage's learning rate, warmed up over a tenth of the steps and then decayed by a
    cosine. All variants share the result, and the events are in the name of the first one, whichever makes it.
    """
    settings = repeat.settings
    first = next(name for name in settings.arms if arm_of(name).start != "random")
    repeat = dataclasses.replace(repeat, variant=first)

    def fit(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        torch.manual_seed(derive_seed(repeat.seed, STAGE))
        task = settings.pretext_task()
        backbone = build_backbone(settings.model.backbone, image_size=settings.data.image_size)
        load_backbone(weights, backbone, settings.model.backbone)
        heads = task.build(backbone)
        costs = _fit(repeat, batches, workspace, task, backbone, heads, steps, attempt)
        task.after_fitting(backbone, heads)
        images = batches.data.facts(None, pretext=True, labelled=False)
        facts = {**costs.facts(), "seed": repeat.seed, **images}
        return {"backbone": backbone, "heads": heads}, facts

    key = make_key(
        STAGE,
        repeat.seed,
        None,
        settings.data.model_dump(include=PRETEXT_IMAGES) | resolution(batches.data.pretext),
        batches.data.identity.pretext,
        settings.model.model_dump(include={"backbone"}),
        settings.pretext.step_settings(),
        [weights.sha256, steps, settings.pretext.lr],
        settings.compute.decisive("micro_batch"),
    )
    return CachedStage(workspace.store, STAGE, key).run(fit)


class _AfterStep(Callback):
    """What the task does after every step."""

    def __init__(self, task: PretextTask, backbone: nn.Module, heads: nn.ModuleDict) -> None:
        self.task, self.backbone, self.heads = task, backbone, heads

    def on_progress(self, trainer: Any) -> None:
        self.task.after_step(self.backbone, self.heads, trainer.progress)


def _fit(
    repeat: Repeat,
    batches: Batches,
    workspace: Workspace,
    task: PretextTask,
    backbone: nn.Module,
    heads: nn.ModuleDict,
    steps: int,
    attempt: Attempt,
) -> Costs:
    """Train `heads`; what it took."""
    section, computing = repeat.settings.pretext, batches.computing
    computing.place(backbone).eval()
    computing.place(heads).train()
    variables = trainable(heads)
    optimizer = task.optimizer(list(variables.values()), section.lr, section.weight_decay)  # type: ignore[arg-type]
    scheduler = schedule(optimizer, total_steps=steps, warmup_steps=steps // 10)
    stack = batches.pretext(task, STAGE, steps)
    constants = {name: parameter.detach() for name, parameter in backbone.named_parameters()}

    def frozen(x: Tensor, feature_map: bool = False) -> Tensor:
        return functional_call(backbone, constants, (x,), {"feature_map": feature_map})

    loss = computing.first_order(lambda batch: pretext_loss(task, frozen, dict(heads.items()), batch))
    trainer, seconds = run_training(
        lambda callbacks: SingleLevelTrainer(
            gradient_of(loss, variables),
            Level(variables, optimizer, stack, scheduler=scheduler),
            steps,
            parts={"backbone": backbone, "heads": heads},
            callbacks=callbacks,
            nonfinite_skips=repeat.settings.nonfinite_skips,
        ),
        f"{STAGE}, seed {repeat.seed}",
        events=repeat.events(STAGE, workspace),
        attempt=attempt,
        workspace=workspace,
        checkpoint_every=section.checkpoint_every * len(stack),
        callbacks=(
            *(JoinBuffers(computing, backbone, heads), _AfterStep(task, backbone, heads)),
            KeepRecord(batches.data.identity),
        ),
    )
    return Costs(pretext_steps=steps, seconds=seconds, skipped_pretext_steps=trainer.skipped.total())
