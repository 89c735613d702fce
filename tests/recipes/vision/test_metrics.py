from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error as sklearn_mae
from sklearn.metrics import r2_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from recipes.vision.metrics import Metric, evaluate, knn_accuracy, map11, mean_absolute_error, r_squared, top_k

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def over(metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, *, size: int = 7) -> float:
    """The metric of a set seen in batches, the last of them smaller."""
    state = None
    for scores, truth in zip(outputs.split(size), targets.split(size), strict=True):
        state = metric.accumulate(state, scores, truth)
    assert state is not None
    return metric.compute(state)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_agrees_with_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    scores, truth = rng.normal(size=(40, 6)), rng.integers(0, 6, size=40)
    expected = 100 * top_k_accuracy_score(truth, scores, k=k, labels=range(6))
    value = over(top_k(k), torch.from_numpy(scores), torch.from_numpy(truth))
    assert value == pytest.approx(float(expected))
    assert top_k(k).higher_is_better


def test_top_k_counts_a_nan_as_wrong() -> None:
    scores = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.0, 1.0], [float("nan"), float("nan")]])
    assert over(top_k(1), scores, torch.tensor([0, 0, 1, 0])) == 50.0
    assert over(top_k(2), scores, torch.tensor([0, 0, 1, 0])) == 50.0


def test_top_k_refuses() -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_k(0)
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        top_k(4).accumulate(None, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets \[N\]"):
        top_k(1).accumulate(None, torch.zeros(2, 3), torch.zeros(2, 3))
    empty = top_k(1).accumulate(None, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="empty set"):
        top_k(1).compute(empty)


def naive_map11(scores: np.ndarray, present: np.ndarray) -> float:
    """The definition in exact arithmetic, class by class and rank by rank."""
    classes = []
    for c in range(scores.shape[1]):
        total = int(present[:, c].sum())
        if total == 0:
            continue
        ranking = sorted(range(len(scores)), key=lambda i: -scores[i, c])
        points, found = [], 0
        for n, i in enumerate(ranking, start=1):
            found += int(present[i, c])
            points.append((Fraction(found, total), Fraction(found, n)))
        best = [max(p for r, p in points if r >= Fraction(t, 10)) for t in range(11)]
        classes.append(sum(best) / 11)
    return float(100 * sum(classes) / len(classes))


def test_map11_of_a_ranking_worked_by_hand() -> None:
    # Ten positives, each after the third behind a negative: recall meets every threshold exactly.
    hits = [1, 1, 1] + [0, 1] * 7
    scores = torch.arange(len(hits), 0, -1, dtype=torch.float32)[:, None]
    targets = torch.tensor(hits)[:, None]
    # Thresholds 0 to 0.3 have precision 1; the k-th positive beyond has 3 + k hits at rank 3 + 2k, falling with k.
    expected = (4 + sum((3 + k) / (3 + 2 * k) for k in range(1, 8))) / 11
    assert over(map11(), scores, targets) == pytest.approx(100 * expected, rel=1e-12)


def test_map11_takes_the_best_precision_at_or_beyond_a_recall() -> None:
    # Ranking: negative, positive, positive. Precision 0, 1/2, 2/3; the maximum over recall >= t is 2/3 throughout.
    value = over(map11(), torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[0], [1], [1]]))
    assert value == pytest.approx(200 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_map11_agrees_with_exact_arithmetic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct scores, so that ties are common; the last class has no positive.
    scores = rng.integers(0, 8, size=(60, 4)).astype(float)
    present = rng.random((60, 4)) < [0.5, 0.17, 0.05, 0.0]
    present[0, :3] = True
    value = over(map11(), torch.from_numpy(scores), torch.from_numpy(present).float())
    assert value == pytest.approx(naive_map11(scores, present), rel=1e-12)


def test_map11_is_of_the_whole_set_not_a_mean_over_batches() -> None:
    rng = np.random.default_rng(0)
    scores, present = torch.from_numpy(rng.normal(size=(50, 3))), torch.from_numpy(rng.random((50, 3)) < 0.3)
    assert over(map11(), scores, present, size=4) == over(map11(), scores, present, size=50)


def test_map11_does_not_reward_nan() -> None:
    targets = torch.tensor([[1], [0], [1]])
    assert over(map11(), torch.full((3, 1), float("nan")), targets) == 0.0
    # The NaN is a wrong answer at rank 1; the other positive comes second of two: recall 1/2 with precision 1/2.
    value = over(map11(), torch.tensor([[float("nan")], [0.0], [1.0]]), targets)
    assert value == pytest.approx(100 * 6 * 0.5 / 11)


def test_map11_refuses() -> None:
    with pytest.raises(ValueError, match="multi-hot"):
        map11().accumulate(None, torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="no class has a positive"):
        over(map11(), torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("shift", [0.0, 1e6])
@pytest.mark.parametrize("size", [3, 40])
def test_regression_metrics_agree_with_scikit_learn(size: int, shift: float) -> None:
    rng = np.random.default_rng(2)
    true = rng.normal(size=(40, 3)) * [1.0, 20.0, 0.1] + shift
    found = true + rng.normal(size=(40, 3)) * [0.5, 30.0, 0.02]
    outputs, targets = torch.from_numpy(found), torch.from_numpy(true)
    value = over(mean_absolute_error(), outputs, targets, size=size)
    assert value == pytest.approx(sklearn_mae(true, found), rel=1e-9)
    # A far-off target has a negative share in the mean; a mean over batches of three would be another number.
    assert np.min(r2_score(true, found, multioutput="raw_values")) < 0
    assert over(r_squared(), outputs, targets, size=size) == pytest.approx(r2_score(true, found), rel=1e-6)
    assert not mean_absolute_error().higher_is_better
    assert r_squared().higher_is_better


def test_r_squared_leaves_out_constant_targets() -> None:
    # 0.1 has no exact mean in binary: its spread about a computed one would not be 0.
    targets = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]], dtype=torch.float64)
    outputs = targets + torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    assert over(r_squared(), outputs, targets, size=2) == pytest.approx(1 - 0.25 / 2, rel=1e-12)
    assert np.isnan(over(r_squared(), outputs[:, :1], targets[:, :1]))
    assert over(mean_absolute_error(), outputs[:, :1], targets[:, :1]) == pytest.approx(1 / 3)


def test_regression_metrics_do_not_hide_nan() -> None:
    outputs, targets = torch.tensor([[float("nan")], [1.0]]), torch.tensor([[0.0], [1.0]])
    for metric in (mean_absolute_error(), r_squared()):
        assert np.isnan(over(metric, outputs, targets))


def test_regression_metrics_refuse() -> None:
    for metric in (mean_absolute_error(), r_squared()):
        with pytest.raises(ValueError, match=r"one shape \[N, T\], got \(3, 1\) and \(3,\)"):
            metric.accumulate(None, torch.zeros(3, 1), torch.zeros(3))
        with pytest.raises(ValueError, match="empty set"):
            metric.compute(metric.accumulate(None, torch.zeros(0, 2), torch.zeros(0, 2)))


def features(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 5))
    train_labels, test_labels = rng.integers(0, 4, 80), rng.integers(0, 4, 1500)
    train, test = (centres[labels] + rng.normal(size=(len(labels), 5)) for labels in (train_labels, test_labels))
    return train, train_labels, test, test_labels


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("neighbours", [1, 6, 80])
def test_knn_agrees_with_scikit_learn(neighbours: int, temperature: float | None) -> None:
    train, train_labels, test, test_labels = features()
    weights: Any = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    reference = KNeighborsClassifier(neighbours, metric="cosine", weights=weights)
    expected = 100 * reference.fit(train, train_labels).score(test, test_labels)
    value = knn_accuracy(*(torch.from_numpy(x) for x in features()), neighbours=neighbours, temperature=temperature)
    assert 20 < expected < 100
    assert value == pytest.approx(float(expected), rel=1e-12)


def test_knn_weights_do_not_overflow() -> None:
    # One near neighbour outweighs two far ones at a temperature whose exponential is infinite in single precision.
    train = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5]])
    labels = torch.tensor([1, 0, 0])
    options = {"neighbours": 3, "temperature": 0.005}
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), **options) == 100.0
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), neighbours=3) == 0.0


def test_knn_of_a_class_that_training_lacks_is_wrong() -> None:
    train, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, torch.eye(2), torch.tensor([0, 7]), neighbours=1) == 50.0


def test_knn_refuses() -> None:
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="neighbours"):
        knn_accuracy(train, labels, train, labels, neighbours=4)
    with pytest.raises(ValueError, match="neighbours"):
        knn_accuracy(train, labels, train[:0], labels[:0], neighbours=1)
    with pytest.raises(ValueError, match="temperature"):
        knn_accuracy(train, labels, train, labels, neighbours=1, temperature=0.0)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        knn_accuracy(train, labels, train[:, :2], labels, neighbours=1)
    with pytest.raises(ValueError, match="labels"):
        knn_accuracy(train, labels[:2], train, labels, neighbours=1)


def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(11, 4, generator=generator), torch.randint(0, 4, (11,), generator=generator)
    return list(zip(inputs.split(4), targets.split(4), strict=True))


def test_evaluate_weights_batches_by_their_examples() -> None:
    weight = torch.eye(4).mul(3).requires_grad_()
    graphs = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        scores = x @ weight
        graphs.append(scores.requires_grad)
        return scores

    metrics = {"top1": top_k(1), "top2": top_k(2)}
    values = evaluate(forward, batches(), metrics, torch.nn.functional.cross_entropy)
    inputs, targets = (torch.cat(part).double().numpy() for part in zip(*batches(), strict=True))
    scores = 3 * inputs
    truth = targets.astype(int)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert values == {
        "top1": pytest.approx(100 * (scores.argmax(axis=1) == truth).mean()),
        "top2": pytest.approx(100 * top_k_accuracy_score(truth, scores, k=2, labels=range(4))),
        "loss": pytest.approx(-log_p[np.arange(11), truth].mean(), rel=1e-6),
    }
    assert graphs == [False] * 3


def test_evaluate_without_a_loss_reports_metrics_only() -> None:
    assert set(evaluate(lambda x: x, batches(), {"top1": top_k(1)})) == {"top1"}


def test_evaluate_refuses() -> None:
    with pytest.raises(ValueError, match="empty"):
        evaluate(lambda x: x, [], {"top1": top_k(1)})
    with pytest.raises(ValueError, match="another name"):
        evaluate(lambda x: x, batches(), {"loss": top_k(1)}, torch.nn.functional.cross_entropy)
