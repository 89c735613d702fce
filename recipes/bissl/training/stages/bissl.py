"""Stage 3: alternating bilevel training (Algorithm 1)."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bilevel import AlternatingSchedule, Implicit, Level, Params, Trainer
from bilevel.products import MicroBatched
from bilevel.training import Callback, Diagnostics, derive_seed

from ....experiment.artifacts import Artifact, make_key
from ....experiment.stage import Attempt, CachedStage
from ....experiment.stage_training import run_training
from ....experiment.workspace import Workspace
from ....vision.networks.backbones import build_backbone
from ....vision.optimizers import schedule
from ...settings.config import Config
from ...settings.plan import lower_warmup
from ...settings.sections import HOW_READ
from ..compute import Computing
from ..costs import Costs, costs_of
from ..datasets import Datasets, resolution
from ..image_batches import LOWER_DATA, Batches
from ..keep_record import KeepRecord
from ..problem import BACKBONE, BiSSLProblem
from ..repeat import Repeat

STAGE = "bissl"


def run(repeat: Repeat, data: Datasets, computing: Computing, workspace: Workspace, parent: Artifact) -> Artifact:
    """Train theta_P, phi_P (lower) and theta_D, phi_D (upper) from a head artifact; the result holds all four."""
    before = costs_of(parent)

    def fit(attempt: Attempt) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        torch.manual_seed(derive_seed(repeat.seed, STAGE))
        problem = make_problem(repeat.settings, data.downstream.train.classes, parent, computing)
        batches = Batches(repeat, data, computing)
        trainer, seconds = run_training(
            lambda callbacks: make_trainer(repeat.settings, problem, batches, callbacks),
            f"BiSSL, seed {repeat.seed}",
            events=repeat.events(STAGE, workspace),
            attempt=attempt,
            workspace=workspace,
            checkpoint_every=repeat.settings.bissl.checkpoint_every,
            callbacks=(Diagnostics(workspace.console, every=None), KeepRecord(data.identity)),
        )
        costs = before + Costs(
            *(trainer.steps["lower"], trainer.steps["upper"], seconds),
            *(trainer.skipped["lower"], trainer.skipped["upper"]),
        )
        images = data.facts(parent, pretext=True, labelled=True)
        return problem.modules(), {**costs.facts(), **repeat.facts(), **images, "solves": dict(trainer.solves)}

    return CachedStage(workspace.store, STAGE, _key(repeat, parent, data)).run(fit)


def make_problem(settings: Config, classes: tuple[str, ...], parent: Artifact, computing: Computing) -> BiSSLProblem:
    """The bilevel problem on the device, with the weights of the head artifact `parent`."""
    pretext, downstream = settings.pretext_task(), settings.downstream_task(classes)
    name, size = settings.model.backbone, settings.data.image_size
    lower, upper = build_backbone(name, image_size=size), build_backbone(name, image_size=size)
    heads, head = pretext.build(lower), downstream.build(upper)
    problem = BiSSLProblem(
        pretext,
        downstream,
        lower,
        upper,
        heads,
        head,
        regularization_weight=settings.bissl.regularization_weight,
        gamma=settings.bissl.gamma,
        implicit_head=settings.bissl.implicit_head,
        first_order=computing.first_order,
        join_buffers=computing.join_buffers,
    )
    modules = problem.modules()
    parent.load_into(modules)
    for module in modules.values():
        computing.place(module).train()
    return problem


def make_trainer(
    settings: Config, problem: BiSSLProblem, batches: Batches, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """The trainer of the section `bissl`."""
    c, chunk = settings.bissl, settings.compute.micro_batch
    upper, lower = problem.variables()
    method = make_method(settings, lower)
    stored = method.stored_batches if c.upper_steps else 0
    # Batches are stored for the Hessian also where no lower step is made on them.
    each = c.lower_steps + stored if method.fresh_batches else max(c.lower_steps, stored)
    lower_data = batches.pretext(problem.pretext, LOWER_DATA, c.alternations * each, c.pretext_fraction)
    upper_data = batches.labelled(problem.downstream, f"{STAGE} upper", c.alternations * c.upper_steps)
    lower_optimizer = problem.pretext.optimizer(lower.values(), c.lower_lr, settings.pretext.weight_decay)  # type: ignore[arg-type]
    upper_optimizer = torch.optim.SGD(
        list(upper.values()), lr=c.upper_lr, momentum=0.9, weight_decay=c.upper_weight_decay
    )
    lower_total, upper_total = c.alternations * c.lower_steps, c.alternations * c.upper_steps
    warmup, floor = lower_warmup(settings, len(lower_data)), settings.pretext.lr_floor
    lower_schedule = schedule(lower_optimizer, total_steps=lower_total, warmup_steps=warmup, floor=floor)
    upper_schedule = schedule(upper_optimizer, total_steps=upper_total, floor=c.upper_lr_floor)
    limit = c.max_grad_norm
    with warnings.catch_warnings():
        # The paper's weight decay of 1e-6 stays outside the lower objective by choice; the report's notes say so.
        warnings.filterwarnings("ignore", message="the lower optimizer's weight decay")
        return Trainer(
            problem,
            Level(upper, upper_optimizer, upper_data, scheduler=upper_schedule, max_grad_norm=limit),
            Level(lower, lower_optimizer, lower_data, scheduler=lower_schedule, max_grad_norm=limit, micro_batch=chunk),
            AlternatingSchedule(
                c.alternations,
                c.lower_steps,
                c.upper_steps,
                c.adaptation_every,
                c.adaptation_strength,
                adaptation_pairs={name: name for name in lower if name.startswith(BACKBONE)},
            ),
            method,
            callbacks=callbacks,
            nonfinite_skips=settings.nonfinite_skips,
        )


def make_method(settings: Config, lower: Params) -> Implicit:
    """The hypergradient's method of the section `bissl`, for these lower variables."""
    c, chunk = settings.bissl, settings.compute.micro_batch
    return Implicit(
        c.make_solver(),
        hvp=c.make_hvp() if chunk is None else MicroBatched(chunk),
        damping=c.damping,
        # The head's block has no lambda I of its own, and null vectors (weights before a norm are
        # scale-invariant).
        tikhonov={name: c.head_tikhonov for name in lower if not name.startswith(BACKBONE)} if c.implicit_head else 0.0,
        hessian_batches=c.hessian_batches,
        fresh_batches=c.fresh_hessian_batches,
        aggregate=c.aggregate,
    )


def _key(repeat: Repeat, parent: Artifact, data: Datasets) -> str:
    settings = repeat.settings
    return make_key(
        STAGE,
        repeat.seed,
        parent,
        settings.data.model_dump(exclude=HOW_READ)
        | resolution(data.pretext, data.downstream.train, data.downstream.val),
        [data.identity.pretext, data.identity.labelled],
        settings.pretext.step_settings(),
        settings.downstream.model_dump(exclude={"eval_batch_size"}),
        settings.bissl.model_dump(exclude={"checkpoint_every"}),
        settings.compute.decisive(),
    )
