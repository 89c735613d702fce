"""Stage 3: alternating bilevel training (Algorithm 1)."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bilevel import AlternatingSchedule, Checkpointing, Implicit, Level, ProgressBar, Trainer, interruption
from bilevel.products import MicroBatched
from bilevel.training import Callback, Diagnostics, Inspect, derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....experiment.events import StageEvents
from ....experiment.folder.folder_lease import leased
from ....experiment.folder.run_folder import INSPECT
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ..context import LOWER_DATA, Context
from ..loop import Seconds, discard_checkpoints
from ..problem import BACKBONE, BiSSLProblem

STAGE = "bissl"


def run(context: Context, artifact: Artifact) -> Artifact:
    """Train theta_P, phi_P (lower) and theta_D, phi_D (upper) from a head artifact; returns all four."""
    config = context.config
    key = make_key(
        STAGE,
        context.seed,
        artifact,
        config.data.model_dump(exclude={"root", "download"}),
        config.pretext.step_settings(),
        config.downstream.model_dump(exclude={"eval_batch_size"}),
        config.bissl.model_dump(exclude={"checkpoint_every"}),
        config.compute.model_dump(exclude={"data_device"}),
    )
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    torch.manual_seed(derive_seed(context.seed, STAGE))
    problem = _problem(context, artifact)
    seconds, events = Seconds(), context.writer(STAGE)
    directory = context.store.directory(STAGE, key)
    with interruption.deferred(), leased(directory, "artifacts") as check_lease:
        trainer = _trainer(context, problem, directory, (events, seconds, _Leased(check_lease)))
        if trainer.resume(directory):
            steps = f"{trainer.steps['lower']} lower and {trainer.steps['upper']} upper steps"
            context.console.print(f"BiSSL, seed {context.seed}: continues after {steps}", markup=False, highlight=False)
        trainer.run()
    info = {
        "pretext_steps": artifact.info["pretext_steps"] + trainer.steps["lower"],
        "label_steps": artifact.info["label_steps"] + trainer.steps["upper"],
        "seconds": artifact.info["seconds"] + seconds.total(),
        "seed": context.seed,
        "variant": context.arm,
        "solves": dict(trainer.solves),
    }
    modules = {
        "backbone": problem.lower_backbone,
        "heads": problem.heads,
        "upper_backbone": problem.upper_backbone,
        "head": problem.head,
    }
    result = context.store.save(STAGE, key, modules, info)
    discard_checkpoints(directory)
    return result


class _Leased(Callback):
    """Stops where another process has taken the stage over."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.check()


def _problem(context: Context, artifact: Artifact) -> BiSSLProblem:
    config = context.config
    pretext, downstream = config.pretext_task(), config.downstream_task(context.data.downstream.train.classes)
    name, size = config.model.backbone, config.data.image_size
    lower, upper = build_backbone(name, image_size=size), build_backbone(name, image_size=size)
    heads, head = pretext.build(lower), downstream.build(upper)
    modules = {"backbone": lower, "heads": heads, "upper_backbone": upper, "head": head}
    artifact.load_into(modules)
    for module in modules.values():
        context.computing.place(module).train()
    return BiSSLProblem(
        pretext,
        downstream,
        lower,
        upper,
        heads,
        head,
        regularization_weight=config.bissl.regularization_weight,
        gamma=config.bissl.gamma,
        implicit_head=config.bissl.implicit_head,
        first_order=context.computing.first_order,
        join_buffers=context.computing.join_buffers,
    )


def _trainer(
    context: Context, problem: BiSSLProblem, directory: Path, callbacks: tuple[StageEvents, Seconds, _Leased]
) -> Trainer:
    config, c = context.config, context.config.bissl
    upper, lower = problem.variables()
    lower_data = context.pretext_stack(problem.pretext, LOWER_DATA, c.pretext_fraction)
    upper_data = context.labelled_stack(problem.downstream, f"{STAGE} upper")
    lower_optimizer = problem.pretext.optimizer(lower.values(), c.lower_lr, config.pretext.weight_decay)  # type: ignore[arg-type]
    upper_optimizer = torch.optim.SGD(
        list(upper.values()), lr=c.upper_lr, momentum=0.9, weight_decay=c.upper_weight_decay
    )
    lower_total, upper_total = c.alternations * c.lower_steps, c.alternations * c.upper_steps
    warmup = min(round(c.lower_warmup_epochs * len(lower_data)), lower_total - 1)
    with warnings.catch_warnings():
        # The paper's weight decay of 1e-6 stays outside the lower objective by choice; the report's notes say so.
        warnings.filterwarnings("ignore", message="the lower optimizer's weight decay")
        return Trainer(
            problem,
            Level(
                upper,
                upper_optimizer,
                upper_data,
                scheduler=schedule(upper_optimizer, total_steps=upper_total),
                max_grad_norm=c.max_grad_norm,
            ),
            Level(
                lower,
                lower_optimizer,
                lower_data,
                scheduler=schedule(
                    lower_optimizer, total_steps=lower_total, warmup_steps=warmup, floor=config.pretext.lr_floor
                ),
                max_grad_norm=c.max_grad_norm,
                micro_batch=config.compute.micro_batch,
            ),
            AlternatingSchedule(
                c.alternations,
                c.lower_steps,
                c.upper_steps,
                c.adaptation_every,
                c.adaptation_strength,
                adaptation_pairs={name: name for name in lower if name.startswith(BACKBONE)},
            ),
            Implicit(
                c.make_solver(),
                hvp=c.make_hvp() if config.compute.micro_batch is None else MicroBatched(config.compute.micro_batch),
                damping=c.damping,
                tikhonov={name: c.head_tikhonov for name in lower if not name.startswith(BACKBONE)}
                if c.implicit_head
                else 0.0,
                hessian_batches=c.hessian_batches,
                aggregate=c.aggregate,
            ),
            callbacks=(
                *callbacks,
                ProgressBar(context.console, f"BiSSL, seed {context.seed}"),
                Diagnostics(context.console, every=None),
                Inspect(context.metrics_path.parent / INSPECT, prefix=f"{STAGE}-{context.arm}-seed-{context.seed}-"),
                Checkpointing(directory, every=c.checkpoint_every),
            ),
            nonfinite_skips=config.nonfinite_skips,
        )
