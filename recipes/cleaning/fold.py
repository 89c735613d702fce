"""The stage of one fold: weights learned without it, and what models that have not seen it say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import CG, SOBA, AlternatingSchedule, BatchStack, Implicit, Level, Params, Trainer
from bilevel.products import GaussNewton, ReverseOverReverse
from bilevel.training import derive_seed

from ..experiment.artifacts import Artifact, make_key
from ..experiment.stage import Attempt, CachedStage, Tensors
from ..experiment.stage_training import Seconds, run_training
from ..experiment.workspace import Workspace
from ..vision.frozen.classifier import Classifier
from ..vision.optimizers import NormalizedSGD
from ..vision.sources.splits import folds as spread
from ..vision.sources.splits import stream
from .data import Sets
from .problem import Batch, WeightedSamples, sample_weights
from .settings import Config, LearningConfig

STAGE = "fold"
MANY = 100_000
"""Samples above which `learning.method` auto takes the single loop."""
MODELS = ("weighted", "all labels", "trusted alone", "kept")
"""Each fitted without the fold: by the learned weights, by all labels alike, to none of them, to those that are kept;
and all of them to the trusted part."""


@dataclass(frozen=True)
class Part:
    """What one fold leaves to learn from, and what it holds out: features and labels of samples and trusted ones, and
    the classifier that is fitted to them.
    """

    samples: Batch
    trusted: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    held_trusted: tuple[Tensor, Tensor]
    model: Classifier

    @classmethod
    def of(cls, features: Tensor, sets: Sets, config: Config, seed: int, fold: int, device: torch.device) -> "Part":
        """Fold number `fold` of a repeat; each class is spread evenly over the folds."""

        def picked(rows: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            return features[rows[chosen]].to(device), labels[chosen].to(device)

        here, there = (one == fold for one in folds_of(sets, config.folds, seed))
        samples, trusted = (sets.rows, sets.given), (sets.trusted, sets.labels)
        places = torch.arange(int((~here).sum()), device=device)
        learned = (*picked(*samples, ~here), places)
        model = Classifier(features.shape[1], sets.classes, config.learning.hidden, derive_seed(seed, fold))
        return cls(learned, picked(*trusted, ~there), picked(*samples, here), picked(*trusted, there), model)

    def fitted(self, ridge: float, weights: Tensor | None = None) -> Params:
        """The model of the samples by their `weights` (None: the trusted part alone) and of the trusted part."""
        z, t = self.trusted
        if weights is not None:
            z, t = torch.cat([self.samples[0], z]), torch.cat([self.samples[1], t])
        ones = torch.ones(len(self.trusted[1]), device=z.device)
        return self.model.solved(z, t, ones if weights is None else torch.cat([weights, ones]), ridge)


def folds_of(sets: Sets, folds: int, seed: int) -> tuple[Tensor, Tensor]:
    """The fold of each sample and of each trusted picture, int64 [N] and [M]."""
    return spread(sets.given, folds, stream(seed, 1)), spread(sets.labels, folds, stream(seed, 2))


def run(
    config: Config,
    features: Artifact,
    sets: Sets,
    seed: int,
    fold: int,
    device: torch.device,
    workspace: Workspace,
) -> Artifact:
    """What models that have not seen the fold say of it.

    Tensors, as "fold.NAME": "weights" [n] of the samples of the other folds; for each model of `MODELS` "held NAME"
    [m, C], log-probabilities of the held samples, and "trusted NAME" [k, C], of the held trusted ones.
    """
    section = config.learning

    def fit(attempt: Attempt) -> tuple[Mapping[str, nn.Module], dict[str, Any]]:
        timer = Seconds()
        part = Part.of(features.tensors()["all.features"], sets, config, seed, fold, device)
        ridge = section.ridge or part.model.chosen_ridge(part.samples[:2], part.trusted)
        weights, solves = _learned(config, part, ridge, seed, fold, attempt, workspace)
        models = {
            "weighted": part.fitted(ridge, weights),
            "all labels": part.fitted(ridge, torch.ones_like(weights)),
            "trusted alone": part.fitted(ridge),
        }
        models["kept"] = part.fitted(ridge, _kept(part, models["weighted"], config.false_alarms))
        said = {"weights": weights}
        for name, model in models.items():
            said[f"held {name}"] = part.model.scores(model, part.held[0]).log_softmax(1)
            said[f"trusted {name}"] = part.model.scores(model, part.held_trusted[0]).log_softmax(1)
        facts = {
            "seconds": features.info["seconds"] + timer.total(),
            "seed": seed,
            "fold": fold,
            "ridge": ridge,
            "solves": solves,
        }
        return {"fold": Tensors({name: tensor.cpu() for name, tensor in said.items()})}, facts

    decisive = section.model_dump(exclude={"checkpoint_every"})
    labels = [sets.rows.tolist(), sets.given.tolist(), sets.trusted.tolist(), sets.labels.tolist()]
    key = make_key(STAGE, seed, features, fold, config.folds, config.false_alarms, decisive, labels)
    return CachedStage(workspace.store, STAGE, key).run(fit)


def _kept(part: Part, model: Params, false_alarms: float) -> Tensor:
    """1.0 for samples whose loss is not above that of most trusted ones, else 0.0; the model was fitted to all of them,
    and nothing here has seen the fold.
    """
    limit = torch.quantile(part.model.losses(model, *part.trusted), 1.0 - false_alarms)
    return (part.model.losses(model, *part.samples[:2]) <= limit).float()


def _learned(
    config: Config, part: Part, ridge: float, seed: int, fold: int, attempt: Attempt, workspace: Workspace
) -> tuple[Tensor, dict[str, int]]:
    """The weights of the samples, and how many solves ended how."""
    section, count = config.learning, len(part.samples[1])
    upper = {"logits": torch.zeros(count, device=part.samples[0].device, requires_grad=True)}
    # Weights of 1, where both methods start.
    began = part.model.solved(*part.samples[:2], sample_weights(upper).detach(), ridge)
    below = torch.optim.SGD(began.values(), lr=1.0 / (part.model.steepest(began, *part.samples[:2], 2.0) + ridge))
    lower = {name: leaf.requires_grad_() for name, leaf in began.items()}
    if section.method == "soba" or (section.method == "auto" and count > MANY):
        problem, method = WeightedSamples(part.model, ridge), SOBA()
        data = _stack(part.samples, section, derive_seed(seed, fold))
        schedule = AlternatingSchedule(section.epochs, lower_steps=0, upper_steps=len(data))
        above = Level(upper, torch.optim.Adam(upper.values(), lr=section.soba_lr), [part.trusted])
    else:
        problem, data = WeightedSamples(part.model, ridge, part.samples), [part.samples]
        # Exact products of a network may have negative curvature.
        hvp = GaussNewton() if part.model.hidden else ReverseOverReverse(keep_graph=True)
        method = Implicit(CG(section.cg_iterations, rtol=1e-2), hvp=hvp)
        schedule = AlternatingSchedule(section.alternations, lower_steps=0, upper_steps=1)
        above = Level(upper, NormalizedSGD(upper.values(), section.lr), [part.trusted])
    events = workspace.events({"stage": STAGE, "variant": f"fold {fold}", "seed": seed}, config.model_dump(mode="json"))
    trainer, _ = run_training(
        lambda callbacks: Trainer(problem, above, Level(lower, below, data), schedule, method, callbacks=callbacks),
        f"weights, seed {seed}, fold {fold + 1} of {config.folds}",
        events=events,
        attempt=attempt,
        workspace=workspace,
        checkpoint_every=section.checkpoint_every,
    )
    return sample_weights(upper).detach(), dict(trainer.solves)


def _stack(samples: Batch, section: LearningConfig, seed: int) -> BatchStack:
    def load(indices: Tensor, _: int) -> Batch:
        chosen = indices.to(samples[0].device)
        return samples[0][chosen], samples[1][chosen], samples[2][chosen]

    return BatchStack(len(samples[1]), min(section.batch_size, len(samples[1])), load, seed=seed)
