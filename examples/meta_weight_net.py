"""Meta-Weight-Net (Shu et al. 2019): a small network that gives a training example its weight by the example's loss.

    python examples/meta_weight_net.py [--quick]

Three in ten of 1,000 training labels are wrong. Lower level: a convolutional network of timm on mini-batches, the loss
of an example weighted by an MLP of that loss. Upper level: the cross-entropy on 150 trusted images, over the MLP. Each
upper step differentiates through one lower step, as in the paper. Upper steps begin after 40 lower ones: while all
examples still help, great losses earn great weights. The same training without upper steps, from the same start, is the
comparison. Data: scikit-learn's digits, enlarged to 16x16. Needs the extra `timm` beside `demo`.
"""

import argparse

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from bilevel import AlternatingSchedule, Level, OneStep, Params, Problem, Trainer, functional_call

Batch = tuple[Tensor, Tensor]
WRONG, TRAINING, TRUSTED, WARM_UP = 0.3, 1000, 150, 40


class MetaWeightNet(Problem):
    # As in the paper, a weight is a number to the lower level: the network is not to raise a loss to be rid of it.
    check_curvature = False

    def __init__(self) -> None:
        self.network = timm.create_model("test_resnet", pretrained=False, in_chans=1, num_classes=10)
        last = nn.Linear(32, 1)
        nn.init.zeros_(last.weight)  # All weights start at one half.
        nn.init.zeros_(last.bias)
        self.weighting = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), last, nn.Sigmoid())

    def losses(self, lower: Params, batch: Batch, training: bool) -> Tensor:
        logits = functional_call(self.network, lower, (batch[0],), training=training)
        return cross_entropy(logits, batch[1], reduction="none")

    def weights(self, upper: Params, losses: Tensor) -> Tensor:
        return functional_call(self.weighting, upper, (losses.detach().unsqueeze(1),)).squeeze(1)

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        losses = self.losses(lower, batch, training=True)
        weights = self.weights(upper, losses)
        return (weights * losses).sum() / weights.sum()  # The common scale is no learning rate.

    def upper_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.losses(lower, batch, training=False).mean()


def load(seed: int) -> tuple[Batch, Batch, Batch, Tensor]:
    """Training images with wrong labels among them, trusted ones, 647 test images; which labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    X, t = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(t), generator=generator)
    X, t = interpolate(X[order].float().view(-1, 1, 8, 8) / 16, size=16, mode="bilinear"), t[order]
    wrong = torch.rand(TRAINING, generator=generator) < WRONG
    shift = torch.randint(1, 10, (TRAINING,), generator=generator)
    noisy = torch.where(wrong, (t[:TRAINING] + shift) % 10, t[:TRAINING])
    end = TRAINING + TRUSTED
    return (X[:TRAINING], noisy), (X[TRAINING:end], t[TRAINING:end]), (X[end:], t[end:]), wrong


def train(seed: int, alternations: int, upper_steps: int) -> dict[str, float]:
    """How labels are ranked, and test accuracy, after the warm-up and so many alternations of one lower step."""
    training, trusted, test, wrong = load(seed)
    torch.manual_seed(seed)
    problem = MetaWeightNet()
    x: Params = dict(problem.weighting.named_parameters())
    y: Params = dict(problem.network.named_parameters())
    above, below = (DataLoader(TensorDataset(*data), 100, shuffle=True, drop_last=True) for data in (trusted, training))
    upper = Level(x, torch.optim.Adam(x.values(), lr=0.01), above)
    lower = Level(y, torch.optim.SGD(y.values(), lr=0.05, momentum=0.9), below)
    method = OneStep()  # Its exact products take the detached losses for constants.
    for length, steps in ((WARM_UP, 0), (alternations, upper_steps)):
        Trainer(problem, upper, lower, AlternatingSchedule(length, 1, steps), method, on_failure="raise").run()
    with torch.no_grad():
        losses = problem.losses(y, training, training=False)
        weights = problem.weights(x, losses)
        right = functional_call(problem.network, y, (test[0],), training=False).argmax(1) == test[1]
    return {
        "auc_of_weights": float(roc_auc_score(~wrong, weights)),
        "auc_of_losses": float(roc_auc_score(wrong, losses)),
        "ratio": float(weights[~wrong].mean() / weights[wrong].mean()),
        "accuracy": 100.0 * float(right.double().mean()),
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, list[float]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 seed of 30 alternations instead of 3 of 80")
    seeds, alternations = (1, 30) if parser.parse_args(arguments).quick else (3, 80)
    result: dict[str, dict[str, list[float]]] = {}
    print("weights   labels ranked by   area under the ROC curve   test accuracy")
    for name, score, upper_steps in (("equal", "losses", 0), ("learned", "weights", 1)):
        runs = [train(100 + seed, alternations, upper_steps) for seed in range(seeds)]
        row = result[name] = {key: [run[key] for run in runs] for key in runs[0]}
        areas, accuracies = row[f"auc_of_{score}"], row["accuracy"]
        area = f"{np.mean(areas):.3f} +- {np.std(areas):.3f}"
        print(f"{name:<10}{score:<16}{area:>27}{np.mean(accuracies):>9.1f}% +- {np.std(accuracies):.1f}")
    learned = result["learned"]
    print(f"Learned weights, by seed: area {', '.join(f'{area:.3f}' for area in learned['auc_of_weights'])}.")
    print(f"A right label weighs at least {min(learned['ratio']):.0f} times a wrong one, on average.")
    return result


if __name__ == "__main__":
    main()
