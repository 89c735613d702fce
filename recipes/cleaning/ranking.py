"""What the folds of one repeat say together: scores of every sample, and how well they rank where truth is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from ..experiment.artifacts import Artifact
from ..vision.confident_learning import confident_learning
from ..vision.label_rankings import Mask, Ranked, Ranking
from .data import Sets
from .fold import MODELS, folds_of

METHOD, OUT_OF_FOLD = "weighted fit", "out-of-fold loss"
RANKINGS = {METHOD: "weighted", OUT_OF_FOLD: "all labels", "trusted part alone": "trusted alone"}
"""Rankings by the loss of the given label under a model of `MODELS` that has not seen the sample."""
WEIGHTS, CONFIDENT = "weights alone", "confident learning"


@dataclass(frozen=True)
class Repeat:
    """One repeat, all folds together.

    Attributes:
        sets: its samples.
        rankings: by name, `METHOD` first.
        predicted: int64 [N], what the weighted model that has not seen a sample takes it for.
        weights: float32 [N], the mean weight of a sample over the folds that learned it.
        accuracy: of each model of `MODELS`, on trusted pictures and, where the truth is known, on samples; both unseen.
    """

    sets: Sets
    rankings: dict[str, Ranking]
    predicted: Tensor
    weights: Tensor
    accuracy: dict[str, dict[str, float]]

    @property
    def wrong(self) -> Mask | None:
        """bool [N], which given labels are wrong; None where nobody knows."""
        return None if self.sets.right is None else (self.sets.right != self.sets.given).numpy()


def ranked(repeats: Sequence[Repeat]) -> list[Ranked]:
    """The rankings of each repeat, and which labels are wrong."""
    return [(repeat.rankings, repeat.wrong) for repeat in repeats]


def gathered(made: Sequence[Artifact], sets: Sets, seed: int, false_alarms: float) -> Repeat:
    """The repeat whose folds left these artifacts.

    A ranking calls those suspicious whose loss is above that of all but a share `false_alarms` of trusted pictures,
    under models that have seen neither.
    """
    said = [artifact.tensors() for artifact in made]
    here, there = folds_of(sets, len(made), seed)
    held = {name: _together([one[f"fold.held {name}"] for one in said], here) for name in MODELS}
    trusted = {name: _together([one[f"fold.trusted {name}"] for one in said], there) for name in MODELS}
    weights = torch.zeros(len(sets.given))
    for fold, one in enumerate(said):
        weights[here != fold] += one["fold.weights"] / (len(made) - 1)
    rankings = {}
    for title, name in RANKINGS.items():
        losses = nll_loss(held[name], sets.given, reduction="none")
        limit = torch.quantile(nll_loss(trusted[name], sets.labels, reduction="none"), 1.0 - false_alarms)
        rankings[title] = Ranking(losses.double().numpy(), (losses > limit).numpy())
    rankings[WEIGHTS] = Ranking(-weights.double().numpy(), (weights < 1.0).numpy())
    found = confident_learning(sets.given.numpy(), held[RANKINGS[OUT_OF_FOLD]].double().softmax(1).numpy())
    if found is not None:
        rankings[CONFIDENT] = Ranking(*found)
    return Repeat(sets, rankings, held[MODELS[0]].argmax(1), weights, _accuracies(held, trusted, sets))


def _together(parts: Sequence[Tensor], fold: Tensor) -> Tensor:
    """The rows of all folds, each in its place."""
    whole = torch.zeros(len(fold), parts[0].shape[1])
    for number, part in enumerate(parts):
        whole[fold == number] = part
    return whole


def _accuracies(held: Mapping[str, Tensor], trusted: Mapping[str, Tensor], sets: Sets) -> dict[str, dict[str, float]]:
    found = {}
    for name in MODELS:
        found[name] = {"trusted": float((trusted[name].argmax(1) == sets.labels).double().mean())}
        if sets.right is not None:
            found[name]["samples"] = float((held[name].argmax(1) == sets.right).double().mean())
    return found
