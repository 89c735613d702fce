"""What a fold leaves to learn from and what it holds out, and whose scores come together where."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from recipes.cleaning.data import Sets
from recipes.cleaning.fold import MODELS, Part, folds_of
from recipes.cleaning.ranking import METHOD, OUT_OF_FOLD, WEIGHTS, gathered
from recipes.cleaning.settings import Config
from recipes.experiment.artifacts import Artifact

FOLDS, SEED, CPU = 3, 4, torch.device("cpu")


def drawn() -> tuple[Tensor, Sets]:
    """Features that are a picture's own row, and 40 samples and 12 trusted pictures of two classes."""
    labels = torch.arange(52) % 2
    order = torch.randperm(52, generator=torch.Generator().manual_seed(0))
    rows, trusted = order[:40].sort().values, order[40:].sort().values
    given = labels[rows].clone()
    given[::7] = 1 - given[::7]
    return torch.arange(52.0)[:, None], Sets(rows, given, labels[rows], trusted, labels[trusted])


def test_a_fold_learns_from_all_but_what_it_holds_out() -> None:
    features, sets = drawn()
    held, held_trusted = [], []
    for fold in range(FOLDS):
        part = Part.of(features, sets, Config(folds=FOLDS), SEED, fold, CPU)
        for learned, out, rows in (
            (part.samples[:2], part.held, sets.rows),
            (part.trusted, part.held_trusted, sets.trusted),
        ):
            assert sorted([*learned[0].flatten().tolist(), *out[0].flatten().tolist()]) == rows.tolist()
        assert part.samples[2].tolist() == list(range(len(part.samples[1])))
        held += part.held[0].flatten().tolist()
        held_trusted += part.held_trusted[0].flatten().tolist()
        # Labels go with their pictures.
        found = dict(zip(part.held[0].flatten().tolist(), part.held[1].tolist(), strict=True))
        assert found.items() <= dict(zip(sets.rows.tolist(), sets.given.tolist(), strict=True)).items()
    assert (sorted(held), sorted(held_trusted)) == (sets.rows.tolist(), sets.trusted.tolist())


class Said:
    """What one fold leaves, as `gathered` reads it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors


def test_scores_are_of_the_fold_that_holds_a_sample_and_weights_of_the_others() -> None:
    _, sets = drawn()
    here, there = folds_of(sets, FOLDS, SEED)
    # The chance of class 1 that every model gives to a sample, or trusted picture, of that place; weights by fold.
    chances, of_trusted = torch.linspace(0.05, 0.95, 40), torch.linspace(0.1, 0.9, 12)
    made = []
    for fold in range(FOLDS):
        tensors = {"fold.weights": torch.full((int((here != fold).sum()),), fold / 2)}
        for name in MODELS:
            for kind, chance, places in (("held", chances, here), ("trusted", of_trusted, there)):
                chosen = chance[places == fold]
                tensors[f"fold.{kind} {name}"] = torch.stack([1 - chosen, chosen], 1).log()
        made.append(cast(Artifact, cast(Any, Said(tensors))))
    found = gathered(made, sets, SEED, 0.25)
    expected = -torch.where(sets.given == 1, chances, 1 - chances).log()
    limit = (-torch.where(sets.labels == 1, of_trusted, 1 - of_trusted).log()).quantile(0.75)
    for name in (METHOD, OUT_OF_FOLD):
        assert found.rankings[name].scores == pytest.approx(expected.numpy(), rel=1e-5)
        assert found.rankings[name].suspicious.tolist() == (expected > limit).tolist()
    weights = torch.stack([torch.full((40,), fold / 2) * (here != fold) for fold in range(FOLDS)]).sum(0) / (FOLDS - 1)
    assert found.weights.tolist() == pytest.approx(weights.tolist())
    assert found.rankings[WEIGHTS].suspicious.tolist() == (weights < 1.0).tolist()
    assert found.predicted.tolist() == (chances > 0.5).long().tolist()
    assert found.wrong is not None
    assert found.wrong.tolist() == [place % 7 == 0 for place in range(40)]
    assert found.accuracy["kept"]["trusted"] == float(((of_trusted > 0.5) == (sets.labels == 1)).double().mean())
