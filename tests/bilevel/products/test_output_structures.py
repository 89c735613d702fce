"""Outputs in any structure and upper variables in the loss of them: products in float64 against plain autograd."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import CG, Implicit, Params, Problem, hypergradient, linearize
from bilevel.products import GaussNewton, ReverseOverReverse
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from tests.support.cases import joined, vector
from tests.support.pairs import close, trainer, whole
from tests.support.problems.small_modules import split

SAMPLES, CLASSES = 7, 3
BATCH = {
    "inputs": vector(SAMPLES * 4, 1).reshape(SAMPLES, 4),
    "labels": torch.tensor([0, 2, 1, 1, 0, 2, 2]),
    "index": torch.tensor([8, 3, 0, 5, 6, 1, 2]),
}
LOWER = {"a": vector(20, 2).reshape(4, 5), "b": vector(15, 3).reshape(5, CLASSES), "unused": vector(2, 4)}
UPPER = {
    "weights": vector(9, 5),
    "smoothing": torch.tensor(-1.3, dtype=torch.float64),
    "temperature": torch.tensor(0.4, dtype=torch.float64),
    "unused": vector(2, 6),
}
W = split(vector(joined(LOWER).numel(), 7), LOWER)


def features(y: Params, batch: Any) -> Tensor:
    return torch.tanh(batch["inputs"] @ y["a"])


def logits(x: Params, y: Params, batch: Any) -> Tensor:
    return features(y, batch) @ y["b"]


def sharpened(x: Params, y: Params, batch: Any) -> Tensor:
    return logits(x, y, batch) * x["temperature"].exp()


def cross_entropy(x: Params, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z, batch["labels"])


def weighted(x: Params, z: Tensor, batch: Any) -> Tensor:
    losses = F.cross_entropy(z, batch["labels"], reduction="none")
    return (F.softplus(x["weights"][batch["index"]]) * losses).mean()


def smoothed(x: Params, z: Tensor, batch: Any) -> Tensor:
    share = torch.sigmoid(x["smoothing"])
    targets = (1.0 - share) * F.one_hot(batch["labels"], CLASSES) + share / CLASSES
    return -(targets * z.log_softmax(1)).sum(1).mean()


def contrastive(x: Params, z: Tensor, batch: Any) -> Tensor:
    similar = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T * x["temperature"].exp()
    return (similar.logsumexp(1) - similar.roll(1, dims=0).diagonal()).mean()


@dataclass
class Prediction:
    logits: Tensor
    hidden: list[Tensor]
    name: str = "network"
    attention: Tensor | None = None


Pair = namedtuple("Pair", ["scores", "hidden"])


class Attributed(OrderedDict[str, Any]):
    """A dictionary whose items are attributes too, as some libraries' networks return."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def as_tuple(x: Params, y: Params, batch: Any) -> Any:
    return logits(x, y, batch), features(y, batch)


def of_tuple(x: Params, z: Any, batch: Any) -> Tensor:
    return weighted(x, z[0], batch) + 0.1 * (z[0].sum(1) * z[1].square().mean(1)).mean()


def as_nested(x: Params, y: Params, batch: Any) -> Any:
    scores, mask = logits(x, y, batch), batch["inputs"][:, 0] > 0.0
    return {
        "pair": Pair(scores, [features(y, batch), None]),
        "kept": mask,
        "predicted": scores.detach().argmax(1),
        "scale": 2.0,
        "same": scores,
    }


def of_nested(x: Params, z: Any, batch: Any) -> Tensor:
    assert z["kept"].dtype is torch.bool
    assert z["predicted"].dtype is torch.int64
    assert z["pair"].hidden[1] is None
    mass = z["pair"].hidden[0].square().sum(1) * z["kept"] * (1 + z["predicted"])
    return z["scale"] * weighted(x, z["same"], batch) + (mass * z["pair"].scores.exp().mean(1)).mean()


def as_dataclass(x: Params, y: Params, batch: Any) -> Any:
    return Prediction(sharpened(x, y, batch), [features(y, batch)])


def of_dataclass(x: Params, z: Prediction, batch: Any) -> Tensor:
    return smoothed(x, z.logits, batch) + contrastive(x, z.hidden[0], batch)


def as_attributed(x: Params, y: Params, batch: Any) -> Any:
    return Attributed(logits=logits(x, y, batch), name="network")


def of_attributed(x: Params, z: Any, batch: Any) -> Tensor:
    return weighted(x, z.logits, batch)


def some_of_x_alone(x: Params, y: Params, batch: Any) -> Any:
    """The second depends on x alone, the third on nothing."""
    return [logits(x, y, batch), x["weights"][batch["index"]], batch["inputs"]]


def of_some(x: Params, z: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(z[0], batch["labels"], reduction="none")
    return (z[1].exp() * losses * (1.0 + z[2].square().mean(1))).mean() * x["temperature"].exp()


def spectrum(x: Params, y: Params, batch: Any) -> Any:
    return torch.fft.fft(sharpened(x, y, batch), dim=1)


def of_spectrum(x: Params, z: Tensor, batch: Any) -> Tensor:
    return (z.abs().square() * F.softplus(x["weights"][:CLASSES])).mean() + (z.real * z.imag.exp()).mean()


class Composed(Problem):
    def __init__(self, outputs: Callable[..., Any], loss: Callable[..., Tensor]) -> None:
        self.outputs, self.loss = outputs, loss

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Any:
        return self.outputs(upper, lower, batch)

    def lower_output_loss(self, upper: Params, outputs: Any, batch: Any) -> Tensor:
        return self.loss(upper, outputs, batch)

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.loss(upper, self.outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return cross_entropy(upper, logits(upper, lower, batch), batch)


def objective(problem: Problem) -> Callable[[Params, Params], Tensor]:
    return lambda x, y: problem.lower_objective(x, y, BATCH)


CASES = {
    "weights in the loss": (logits, weighted),
    "smoothing in the loss": (logits, smoothed),
    "x in the outputs": (sharpened, cross_entropy),
    "x in both": (sharpened, contrastive),
    "tuple": (as_tuple, of_tuple),
    "nested": (as_nested, of_nested),
    "dataclass": (as_dataclass, of_dataclass),
    "attributes": (as_attributed, of_attributed),
    "some of x alone": (some_of_x_alone, of_some),
    "complex": (spectrum, of_spectrum),
}
SIZES = [7, 4, 3, 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_micro_batched_products_are_those_of_the_whole_batch(case: str, size: int) -> None:
    problem = Composed(*CASES[case])
    gradient, product, cross = whole(objective(problem), UPPER, LOWER, W)
    system = linearize(problem, UPPER, LOWER, [BATCH], hvp=MicroBatched(size))
    close(system.operator(W), product)
    close(system.cross(W), cross)
    close(system.gradient(), gradient)
    elsewhere = {name: leaf + 0.1 for name, leaf in UPPER.items()}
    close(system.cross(W, elsewhere), whole(objective(problem), elsewhere, LOWER, W)[2])
    value, found = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(UPPER, y, chunk),
        lambda z: problem.lower_output_loss(UPPER, z, BATCH),
        LOWER,
        problem.split_batch(BATCH, size),
    )
    assert value.item() == pytest.approx(problem.lower_objective(UPPER, LOWER, BATCH).item(), rel=1e-12)
    close(found, gradient)


@pytest.mark.parametrize("size", SIZES)
def test_upper_variables_in_neither_part_give_no_cross_term(size: int) -> None:
    problem = Composed(as_tuple, lambda x, z, batch: cross_entropy(x, z[0], batch) + z[1].square().mean())
    system = linearize(problem, UPPER, LOWER, [BATCH], hvp=MicroBatched(size))
    close(system.operator(W), whole(objective(problem), UPPER, LOWER, W)[1])
    assert not joined(system.cross(W)).any()


def dense_gauss_newton(problem: Problem, live: list[int]) -> Tensor:
    """J' H J with the differentiable outputs of the places `live` as one vector, over the lower variables but the
    last."""
    used = {name: LOWER[name] for name in ("a", "b")}

    def leaves_of(outputs: Any) -> list[Tensor]:
        return [leaf for leaf in flat_leaves(outputs) if leaf.is_floating_point()]

    def outputs_of(flat: Tensor) -> Tensor:
        leaves = leaves_of(problem.lower_outputs(UPPER, split(flat, used), BATCH))
        return torch.cat([leaves[k].flatten() for k in live])

    template = problem.lower_outputs(UPPER, LOWER, BATCH)
    leaves = leaves_of(template)

    def loss(z: Tensor) -> Tensor:
        parts = dict(zip(live, z.split([leaves[k].numel() for k in live]), strict=True))
        given = iter([parts[k].reshape(leaf.shape) if k in parts else leaf for k, leaf in enumerate(leaves)])
        return problem.lower_output_loss(UPPER, with_leaves(template, given), BATCH)

    point = joined(used)
    jacobian = torch.autograd.functional.jacobian(outputs_of, point)
    hessian = torch.autograd.functional.hessian(loss, outputs_of(point))
    assert isinstance(jacobian, Tensor)
    assert isinstance(hessian, Tensor)
    return jacobian.T @ hessian @ jacobian


def flat_leaves(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for item in outputs.values():
            yield from flat_leaves(item)
    elif isinstance(outputs, (list, tuple)):
        for item in outputs:
            yield from flat_leaves(item)
    elif isinstance(outputs, Prediction):
        yield from flat_leaves([outputs.logits, outputs.hidden])


def with_leaves(outputs: Any, given: Iterator[Tensor]) -> Any:
    if isinstance(outputs, Tensor):
        return next(given) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {key: with_leaves(item, given) for key, item in outputs.items()}
    if isinstance(outputs, Pair):
        return Pair(*[with_leaves(item, given) for item in outputs])
    if isinstance(outputs, (list, tuple)):
        return [with_leaves(item, given) for item in outputs]
    if isinstance(outputs, Prediction):
        return Prediction(with_leaves(outputs.logits, given), with_leaves(outputs.hidden, given))
    return outputs


@pytest.mark.parametrize(
    ("case", "live"),
    [
        *[("weights in the loss", [0]), ("x in both", [0]), ("tuple", [0, 1]), ("nested", [0, 1, 2])],
        *[("dataclass", [0, 1]), ("some of x alone", [0])],
    ],
)
def test_gauss_newton_equals_the_dense_matrix_and_has_the_exact_cross_term(case: str, live: list[int]) -> None:
    problem = Composed(*CASES[case])
    system = linearize(problem, UPPER, LOWER, [BATCH], hvp=GaussNewton())
    gradient, exact, cross = whole(objective(problem), UPPER, LOWER, W)
    product = system.operator(W)
    assert not product.pop("unused").any()
    along = torch.cat([W["a"].flatten(), W["b"].flatten()])
    torch.testing.assert_close(joined(product), dense_gauss_newton(problem, live) @ along, rtol=1e-10, atol=1e-12)
    other = joined({"a": exact["a"], "b": exact["b"]})
    assert float((joined(product) - other).norm()) > 1e-3 * float(other.norm())
    close(system.cross(W), cross)
    close(system.gradient(), gradient)


def test_gauss_newton_of_complex_outputs_that_are_linear_is_the_hessian() -> None:
    def outputs(x: Params, y: Params, batch: Any) -> Any:
        return {"spectrum": torch.fft.fft(batch["inputs"] @ y["a"], dim=1) * x["temperature"].exp()}

    def loss(x: Params, z: Any, batch: Any) -> Tensor:
        return (z["spectrum"].abs().square() * F.softplus(x["weights"][:5])).mean() + z["spectrum"].imag.exp().mean()

    problem = Composed(outputs, loss)
    _, product, cross = whole(objective(problem), UPPER, LOWER, W)
    for provider in (GaussNewton(), MicroBatched(3)):
        system = linearize(problem, UPPER, LOWER, [BATCH], hvp=provider)
        close(system.operator(W), product)
        close(system.cross(W), cross)


def test_hypergradient_of_sample_weights_is_that_of_the_whole_batch() -> None:
    problem = Composed(as_dataclass, lambda x, z, batch: weighted(x, z.logits, batch))
    exact, found = (
        hypergradient(
            *(problem, UPPER, LOWER),
            Implicit(CG(100, 1e-12), hvp=provider, tikhonov=5.0),
            upper_batch=BATCH,
            lower_batches=[BATCH],
        )
        for provider in (ReverseOverReverse(), MicroBatched(3))
    )
    close(found.grad, exact.grad)
    assert found.grad["weights"].count_nonzero() == SAMPLES


def test_trainer_takes_structures_and_upper_variables_in_the_loss() -> None:
    problem = Composed(as_nested, of_nested)
    lower = {name: leaf.clone() for name, leaf in LOWER.items()}
    trainer(problem, {name: leaf.clone() for name, leaf in UPPER.items()}, lower, BATCH, micro_batch=3).run()
    gradient = whole(objective(problem), UPPER, LOWER, W)[0]
    close({name: LOWER[name] - lower[name] for name in lower}, {name: 0.1 * g for name, g in gradient.items()})


def not_tensors(kind: str) -> Callable[..., Any]:
    def outputs(x: Params, y: Params, batch: Any) -> Any:
        z = logits(x, y, batch)
        return {
            "array": lambda: np.zeros((SAMPLES, 3)),
            "array within": lambda: {"z": z, "more": [np.zeros(SAMPLES)]},
            "none": lambda: None,
            "generator": lambda: (part for part in z),
            "number": lambda: 3.0,
            "integers": lambda: (batch["labels"], 1.0),
            "empty": lambda: {},
            "function": lambda: [z, torch.sum],
        }[kind]()

    return outputs


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("array", "got ndarray in outputs$"),
        ("array within", r"got ndarray in outputs\['more'\]\[0\]$"),
        ("none", "got NoneType without a floating-point tensor"),
        ("generator", "got generator in outputs$"),
        ("number", "got float without"),
        ("integers", "got tuple without"),
        ("empty", "got dict without"),
        ("function", r"got builtin_function_or_method in outputs\[1\]$"),
    ],
)
def test_outputs_that_are_no_tensors_are_refused(kind: str, match: str) -> None:
    problem, match = (
        Composed(not_tensors(kind), lambda x, z, batch: torch.zeros(())),
        f"lower_outputs must return.*{match}",
    )
    with pytest.raises(TypeError, match=match):
        linearize(problem, UPPER, LOWER, [BATCH], hvp=GaussNewton())
    with pytest.raises(TypeError, match=match):
        linearize(problem, UPPER, LOWER, [BATCH], hvp=MicroBatched(3)).operator(W)
    with pytest.raises(TypeError, match=match):
        trainer(problem, UPPER, LOWER, BATCH, micro_batch=3).run()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (lambda x, z: {"mean": z.mean()}, r"got shape \(\) in lower_outputs\[1\]\['mean'\] for a chunk .* \[\[3\]\]"),
        (lambda x, z: x["weights"], r"got shape \(9,\) in lower_outputs\[1\].*let it take variables from `upper`"),
        (lambda x, z: torch.tensor(3), r"got shape \(\) in lower_outputs\[1\]"),
        (lambda x, z: z.T, r"got shape \(3, 1\) in lower_outputs\[1\]"),
        (
            lambda x, z: len(z),
            r"lower_outputs\[1\] is 3 in one chunk of the batch and 1 in another; .* return a tensor",
        ),
        (
            lambda x, z: [z] * len(z),
            r"not those of another, \['\[1\]\[1\]', '\[1\]\[2\]'\]; .*outputs of one structure",
        ),
    ],
)
def test_what_has_no_row_for_each_sample_is_refused_in_chunks_alone(more: Any, match: str) -> None:
    def outputs(x: Params, y: Params, batch: Any) -> Any:
        z = logits(x, y, batch)
        return z, more(x, z)

    problem = Composed(outputs, lambda x, z, batch: weighted(x, z[0], batch))
    with pytest.raises(ValueError, match=match):
        linearize(problem, UPPER, LOWER, [BATCH], hvp=MicroBatched(3)).operator(W)
    with pytest.raises(ValueError, match=match):
        trainer(problem, UPPER, LOWER, BATCH, micro_batch=3).run()
    linearize(problem, UPPER, LOWER, [BATCH], hvp=GaussNewton()).operator(W)
