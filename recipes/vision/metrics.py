"""Metrics of a whole set: top-k accuracy, 11-point mAP, MAE, R2, nearest neighbours; and the loop that evaluates."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.tree import tensors_in

State = tuple[Any, ...]
"""What a metric has seen of a set: tensors as a rule."""


@dataclass(frozen=True)
class Metric:
    """A measure of a whole set, collected batch by batch.

    Attributes:
        accumulate: ``accumulate(state, outputs, targets) -> state``; the state is None before the first batch and a
            tuple afterwards.
        compute: ``compute(state)``, the value over everything accumulated, in percent where it is a rate.
        higher_is_better: How two values compare.
    """

    accumulate: Callable[[State | None, Tensor, Tensor], State]
    compute: Callable[[State], float]
    higher_is_better: bool = True


def top_k(k: int) -> Metric:
    """Percentage of examples whose class is among the k highest scores.

    Outputs are ``[N, classes]`` scores, targets ``[N]`` class indices. Equal scores rank as `torch.topk` ranks them,
    and an example with a NaN among its scores counts as wrong. Accumulating raises ValueError when there are fewer than
    k classes or the shapes do not fit; computing does when there were no examples.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")

    def accumulate(state: State | None, outputs: Tensor, targets: Tensor) -> State:
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"top-{k} accuracy needs outputs [N, classes] and targets [N], got {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}"
            )
        if k > outputs.shape[1]:
            raise ValueError(f"top-{k} accuracy needs at least {k} classes, got {outputs.shape[1]}; choose a smaller k")
        found = (outputs.topk(k, dim=1).indices == targets[:, None]).any(dim=1)
        correct = (found & ~outputs.isnan().any(dim=1)).sum()
        count = torch.full_like(correct, len(targets))
        return (correct, count) if state is None else (state[0] + correct, state[1] + count)

    def compute(state: State) -> float:
        correct, count = torch.stack(state).tolist()
        if count == 0:
            raise ValueError(f"top-{k} accuracy of an empty set is undefined; accumulate at least one example")
        return 100.0 * correct / count

    return Metric(accumulate, compute)


def map11() -> Metric:
    """11-point mean average precision of a multi-label set, in percent.

    Outputs are ``[N, classes]`` scores, targets the same shape with 1 where a class is present, 0 elsewhere. For a
    class with P > 0 positives, rank the whole set by score; tp(n) counts the positives among the first n::

        AP = 1/11 sum_{i=0..10}  max { tp(n) / n  :  n with 10 tp(n) >= i P }

    and the result is the mean of AP over the classes that have positives. Recall is compared in integers, since
    accumulated tenths miss thresholds that are met exactly. Equal scores keep the order of the set; a NaN score counts
    as a wrong answer ranked first. Accumulating raises ValueError when the shapes differ; computing does when no class
    has a positive.

    Source: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (2010), section 4.2.
    """
    return Metric(_accumulate_scores, _mean_average_precision)


def _accumulate_scores(state: State | None, outputs: Tensor, targets: Tensor) -> State:
    """Scores and targets of the whole set, which a ranking cannot do without."""
    if outputs.ndim != 2 or outputs.shape != targets.shape:
        raise ValueError(
            "11-point mAP needs outputs and multi-hot targets of one shape [N, classes], got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        )
    scores, present = outputs.detach().cpu(), targets.detach().cpu() > 0
    return (scores, present) if state is None else (torch.cat([state[0], scores]), torch.cat([state[1], present]))


def _mean_average_precision(state: State) -> float:
    scores, present = state
    positives = present.sum(dim=0)
    if not positives.any():
        raise ValueError("11-point mAP is undefined: no class has a positive example in the set")
    # Sorting in descending order puts NaN first.
    order = scores.argsort(dim=0, descending=True, stable=True)
    hit = (present & ~scores.isnan()).gather(0, order)
    tp = hit.cumsum(dim=0)
    precision = tp.double() / torch.arange(1, len(tp) + 1)[:, None]
    best = [torch.where(10 * tp >= i * positives, precision, 0.0).amax(dim=0) for i in range(11)]
    average_precision = torch.stack(best).mean(dim=0)
    return 100.0 * average_precision[positives > 0].mean().item()


def mean_absolute_error() -> Metric:
    """Mean of |output - target| over all examples and targets, in the unit of the targets; lower is better.

    Outputs and targets are ``[N, T]``. Accumulating raises ValueError when the shapes differ; computing does when there
    were no examples.
    """
    return Metric(_accumulate_values, _mean_absolute_error, higher_is_better=False)


def r_squared() -> Metric:
    """Coefficient of determination over the whole set, the mean over the targets; at most 1.

    Outputs and targets are ``[N, T]``. For target t with mean m_t over the set::

        R2_t = 1 - sum_i (y_it - o_it)^2 / sum_i (y_it - m_t)^2

    A target that is constant over the set has none and is left out of the mean; where every target is constant the
    value is NaN. Accumulating raises ValueError when the shapes differ; computing does when there were no examples.
    """
    return Metric(_accumulate_values, _coefficient_of_determination)


def _accumulate_values(state: State | None, outputs: Tensor, targets: Tensor) -> State:
    """Outputs and targets of the whole set, whose squares cancel too well to be summed batch by batch."""
    if outputs.ndim != 2 or outputs.shape != targets.shape:
        raise ValueError(
            f"metrics of regression need outputs and targets of one shape [N, T], got {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    found, true = outputs.detach().cpu().double(), targets.detach().cpu().double()
    return (found, true) if state is None else (torch.cat([state[0], found]), torch.cat([state[1], true]))


def _mean_absolute_error(state: State) -> float:
    found, true = _not_empty(state)
    return (found - true).abs().mean().item()


def _coefficient_of_determination(state: State) -> float:
    found, true = _not_empty(state)
    varies = (true != true[0]).any(dim=0)
    if not varies.any():
        return math.nan
    residual = (true - found)[:, varies].square().sum(dim=0)
    total = (true - true.mean(dim=0))[:, varies].square().sum(dim=0)
    return (1 - residual / total).mean().item()


def _not_empty(state: State) -> State:
    if state[0].numel() == 0:
        raise ValueError("metrics of an empty set are undefined; accumulate at least one example")
    return state


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float | None = None,
) -> float:
    """Percentage of test examples that their nearest training examples vote into the right class.

    Nearest is by cosine similarity s. A neighbour's vote counts 1 without `temperature` (a majority vote) and
    ``exp(s / temperature)`` with it. Equal votes go to the smaller class index.

    Args:
        train_features: ``[M, d]``.
        train_labels: ``[M]`` class indices from 0.
        test_features: ``[N, d]``.
        test_labels: ``[N]``.
        neighbours: How many vote, at most M.
        temperature: Above 0, or None.

    Raises:
        ValueError: Shapes do not fit, a set is empty, or an option is outside its range.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4.
    """
    shapes = (train_features.shape[:1], test_features.shape[:1], train_features.shape[1:])
    if (train_labels.shape, test_labels.shape, test_features.shape[1:]) != shapes or train_features.ndim != 2:
        raise ValueError(
            f"features must be [M, d] and [N, d] with labels [M] and [N], got {tuple(train_features.shape)}, "
            f"{tuple(test_features.shape)}, {tuple(train_labels.shape)} and {tuple(test_labels.shape)}"
        )
    if len(test_labels) == 0 or not 1 <= neighbours <= len(train_labels):
        raise ValueError(
            f"neighbours must be between 1 and the number of training examples ({len(train_labels)}) and there must be "
            f"test examples, got neighbours={neighbours} and {len(test_labels)} test examples"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0 or None, got {temperature!r}")
    bank = torch.nn.functional.normalize(train_features.detach(), dim=1)
    queries = torch.nn.functional.normalize(test_features.detach(), dim=1)
    classes = int(train_labels.max()) + 1
    correct = 0
    # In chunks, so that the similarity matrix never exceeds 1024 rows.
    for query, truth in zip(queries.split(1024), test_labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(neighbours, dim=1)
        # Relative to the nearest neighbour, which no exponential can overflow.
        vote = torch.ones_like(s) if temperature is None else ((s - s[:, :1]) / temperature).exp()
        votes = vote.new_zeros(len(query), classes).scatter_add(1, train_labels[nearest], vote)
        correct += int((votes.argmax(dim=1) == truth).sum())
    return 100.0 * correct / len(test_labels)


@torch.no_grad()
def evaluate(
    forward: Callable[[Any], Any],
    batches: Iterable[tuple[Any, Any]],
    metrics: Mapping[str, Metric],
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> dict[str, float]:
    """Values of `metrics`, and of the mean loss, over all the examples of `batches`.

    Nothing is averaged over batches, so their size and number do not matter: metrics see the whole set, and the loss of
    a batch counts by its number of examples. Putting the model in evaluation mode is the caller's.

    Args:
        forward: The model, from inputs to outputs.
        batches: Pairs of what `forward` takes, and targets, a tensor ``[N, ...]`` or a structure of such, on the
            model's device.
        metrics: By name.
        loss: ``loss(outputs, targets) -> 0-d``, a mean over the examples; its value is returned as "loss".

    Raises:
        ValueError: There are no batches, or a metric is named "loss" beside a loss.
    """
    if loss is not None and "loss" in metrics:
        raise ValueError('metrics has an entry "loss", the name of the mean loss; give the metric another name')
    states: dict[str, State | None] = dict.fromkeys(metrics)
    losses: list[Tensor] = []
    sizes: list[int] = []
    for inputs, targets in batches:
        outputs = forward(inputs)
        states = {name: metrics[name].accumulate(state, outputs, targets) for name, state in states.items()}
        sizes.append(len(next(tensors_in(targets))))
        if loss is not None:
            losses.append(loss(outputs, targets))
    if not sizes:
        raise ValueError("batches is empty; nothing was evaluated")
    values = {name: metrics[name].compute(state) for name, state in states.items() if state is not None}
    if losses:
        values["loss"] = (torch.stack(losses).cpu().double() @ torch.tensor(sizes).double()).item() / sum(sizes)
    return values
