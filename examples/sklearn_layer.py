"""Features for scikit-learn's LogisticRegression, learned through its solution.

    python examples/sklearn_layer.py [--quick]

Lower level: LogisticRegression on a network's features of some labelled images, solved by scikit-learn, which knows
nothing of torch. Above it, in plain torch: the cross-entropy of that classifier on the other labelled images, passed
back through the classifier to the network and to the penalty. Rivals: the classifier on raw pixels, and the network
with a linear layer in its place. Data: scikit-learn's digits, 200 of them labelled.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import CG, Problem, lower_solution
from bilevel.hypergradients import LowerSolution

LABELLED, WIDTH, RATE = 200, 16, 2e-3
RAW, END_TO_END, LEARNED = "classifier on raw pixels", "network end to end", "classifier on learned features"


class Classifier(Problem):
    """The objective that LogisticRegression minimizes with C = exp(-log_weight); the features are upper variables."""

    def lower_objective(self, upper: dict[str, Tensor], lower: dict[str, Tensor], batch: Tensor) -> Tensor:
        loss = cross_entropy(scores(upper["features"], lower), batch)
        return loss + 0.5 * upper["log_weight"].exp() * lower["w"].square().sum() / len(batch)


def scores(features: Tensor, y: dict[str, Tensor]) -> Tensor:
    return features @ y["w"].T + y["b"]


def classifier(features: Tensor, labels: Tensor, log_weight: Tensor) -> LowerSolution:
    """scikit-learn's solution, with a graph to the features and the penalty."""
    model = LogisticRegression(C=float((-log_weight.detach()).exp()), tol=1e-6, max_iter=5000)
    model.fit(features.detach().double().numpy(), labels.numpy())
    lower = {"w": torch.from_numpy(model.coef_).to(features), "b": torch.from_numpy(model.intercept_).to(features)}
    upper = {"features": features, "log_weight": log_weight}
    return lower_solution(Classifier(), upper, lower, [labels], CG(100, rtol=1e-3), on_failure="raise")


def network(*last: nn.Module) -> nn.Module:
    torch.manual_seed(100)
    hidden = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(512, WIDTH), nn.Tanh(), *last)


def through_classifier(X: Tensor, t: Tensor, steps: int, seed: int) -> tuple[nn.Module, Tensor, float]:
    """Each step fits the classifier to half of the images and asks it for the others; the largest lower gradient."""
    features, log_weight = network(), torch.zeros((), requires_grad=True)
    optimizer, generator = torch.optim.Adam([*features.parameters(), log_weight], lr=RATE), torch.Generator()
    generator.manual_seed(seed)
    largest = 0.0
    for _ in range(steps):
        order, half = torch.randperm(len(t), generator=generator), len(t) // 2
        z, labels = features(X[order]), t[order]
        y = classifier(z[:half], labels[:half], log_weight)
        optimizer.zero_grad()
        cross_entropy(scores(z[half:], y), labels[half:]).backward()
        optimizer.step()
        largest = max(largest, y.record[0].stationarity)
    return features, log_weight.detach(), largest


def end_to_end(X: Tensor, t: Tensor, steps: int) -> nn.Module:
    """The same network with a linear layer, on all labelled images in every step."""
    whole = network(nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(whole.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(whole(X), t).backward()
        optimizer.step()
    return whole


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 split and 20 steps instead of 3 and 100")
    splits, steps = (1, 20) if parser.parse_args(arguments).quick else (3, 100)
    pixels, digits = map(torch.from_numpy, load_digits(return_X_y=True))
    found: dict[str, list[float]] = {}
    largest = 0.0
    for seed in range(100, 100 + splits):
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        images, labels = pixels[order].float().view(-1, 1, 8, 8) / 16, digits[order]
        X, t, test = images[:LABELLED], labels[:LABELLED], (images[LABELLED:], labels[LABELLED:])

        def accuracy(outputs: Tensor, t: Tensor = test[1]) -> float:
            return 100.0 * float((outputs.argmax(dim=1) == t).double().mean())

        features, log_weight, gradient = through_classifier(X, t, steps, seed)
        whole, largest = end_to_end(X, t, 3 * steps), max(largest, gradient)
        with torch.no_grad():
            raw = scores(test[0].flatten(1), classifier(X.flatten(1), t, torch.tensor(0.0)))
            learned = scores(features(test[0]), classifier(features(X), t, log_weight))
            rows = {RAW: raw, END_TO_END: whole(test[0]), LEARNED: learned}
        for name, outputs in rows.items():
            found.setdefault(name, []).append(accuracy(outputs))
    result = {name: sum(values) / splits for name, values in found.items()}
    print("trained                          test accuracy")
    print("\n".join(f"{name:<33}{value:>12.1f}%" for name, value in result.items()))
    print(f"{splits} splits, {LABELLED} labelled images; the largest lower gradient was {largest:.0e}.")
    return result | {"lower_gradient": largest}


if __name__ == "__main__":
    main()
