"""Micro-batched derivatives against whole-batch ones by plain autograd, in float64."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, Implicit, Params, functional_call, hypergradient, linearize
from bilevel.hypergradients import System
from bilevel.products import ReverseOverReverse
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from recipes.vision.losses import nt_xent
from tests.support.cases import joined, vector
from tests.support.pairs import SAMPLES, Pairs, close, conv_net, trainer, upper_point, views, whole
from tests.support.problems.small_modules import parameters, split

SHIFT = 0.25
SIZES = [1, 3, 7, 20]


class RecordedDropout(nn.Module):
    """Half of the features, by a mask from the default generator that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(2.0 * torch.rand(x.shape).round().to(x))
        return x * self.masks[-1]


class Given(nn.Module):
    """Dropout by masks that are set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks.pop(0)


def check_system(system: System, objective: Any, w: Params) -> None:
    gradient, product, cross = whole(objective, system.upper, system.lower, w)
    close(system.operator(w), {name: product[name] + SHIFT * w[name] for name in w})
    close(system.cross(w), cross)
    close(system.gradient(), gradient)
    elsewhere = {name: leaf + 0.1 for name, leaf in system.upper.items()}
    close(system.cross(w, elsewhere), whole(objective, elsewhere, system.lower, w)[2])


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_whole_batch(size: int) -> None:
    problem, upper, batch = Pairs(conv_net()), upper_point(), views()
    lower = parameters(problem.net) | {"0.bias": vector(4, 9)}
    w = split(vector(joined(lower).numel(), 3), lower)
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(size), tikhonov=SHIFT)
    check_system(system, lambda x, y: problem.lower_objective(x, y, batch), w)
    value, gradient = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(upper, y, chunk),
        lambda z: problem.lower_output_loss(upper, z, batch),
        lower,
        problem.split_batch(batch, size),
    )
    expected = problem.lower_objective(upper, lower, batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not value.requires_grad
    close(gradient, whole(lambda x, y: problem.lower_objective(x, y, batch), upper, lower, w)[0])


def test_frozen_batch_norm_is_exact_and_stays_frozen() -> None:
    norm = nn.BatchNorm2d(4)
    problem, upper, batch = Pairs(conv_net(norm).eval()), upper_point(), views()
    norm.running_mean = vector(4, 11)
    norm.running_var = vector(4, 12).exp()
    before = buffers(problem.net)
    lower = parameters(problem.net)
    w = split(vector(joined(lower).numel(), 3), lower)
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(3), tikhonov=SHIFT)
    check_system(system, lambda x, y: problem.lower_objective(x, y, batch), w)
    assert all(torch.equal(before[name], buffer) for name, buffer in problem.net.named_buffers())


def test_some_lower_variables_held_fixed() -> None:
    problem, upper, batch = Pairs(conv_net()), upper_point(), views()
    lower = parameters(problem.net)
    names = ["1.weight", "4.weight"]
    part = {name: lower[name] for name in names}
    w = split(vector(joined(part).numel(), 3), part)
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(3), implicit=names)
    product = whole(lambda x, y: problem.lower_objective(x, {**lower, **y}, batch), upper, part, w)[1]
    close(system.operator(w), product)


class Apart(Pairs):
    """The upper variables do not reach the lower level."""

    def embed(self, upper: Params, lower: Params, view: Tensor) -> Tensor:
        return functional_call(self.net, lower, view)


def test_an_upper_level_that_the_outputs_do_not_use_has_no_cross_term() -> None:
    dropout = RecordedDropout()
    problem, upper, batch = Apart(conv_net(dropout)), upper_point(), views()
    lower = parameters(problem.net)
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(3))
    assert not joined(system.cross(lower)).any()
    passes = len(dropout.masks)
    assert not joined(system.cross(lower)).any()
    assert len(dropout.masks) == passes


def test_hypergradient_is_that_of_the_whole_batch() -> None:
    problem, upper = Pairs(conv_net()), upper_point()
    lower = parameters(problem.net)
    exact, found = (
        hypergradient(
            *(problem, upper, lower),
            Implicit(CG(100, 1e-12), hvp=provider, tikhonov=50.0),
            upper_batch=views(20),
            lower_batches=[views(0), views(2)],
        )
        for provider in (ReverseOverReverse(), MicroBatched(3))
    )
    close(found.grad, exact.grad)
    assert found.stationarity == pytest.approx(exact.stationarity, rel=1e-9)


def test_masks_are_equal_in_both_passes_and_fixed_within_a_system() -> None:
    dropout, given = RecordedDropout(), Given()
    problem, reference = Pairs(conv_net(dropout)), Pairs(conv_net(given))
    upper, lower, batch = upper_point(), parameters(problem.net), views()
    chunks = problem.split_batch(batch, 3)
    _, gradient = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(upper, y, chunk), lambda z: nt_xent(z[:, 0], z[:, 1]), lower, chunks
    )
    # Three chunks of two views, twice.
    first, second = dropout.masks[:6], dropout.masks[6:]
    assert len(second) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))

    def objective(x: Params, y: Params) -> Tensor:
        given.masks = [torch.cat(first[0::2]), torch.cat(first[1::2])]
        return reference.lower_objective(x, y, batch)

    w = split(vector(joined(lower).numel(), 3), lower)
    close(gradient, whole(objective, upper, lower, w)[0])
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(3), tikhonov=SHIFT)
    dropout.masks.clear()
    system.operator(w)
    first = dropout.masks[:6]
    check_system(system, objective, w)
    assert len(dropout.masks) > 30
    assert all(any(torch.equal(mask, one) for one in first) for mask in dropout.masks)


def test_a_step_advances_the_random_state_whatever_it_draws() -> None:
    dropout = RecordedDropout()
    problem, upper, batch = Pairs(conv_net(dropout)), upper_point(), views()
    for _ in range(2):
        micro_batched_gradient(
            lambda y, chunk: problem.lower_outputs(upper, y, chunk),
            lambda z: nt_xent(z[:, 0], z[:, 1]),
            parameters(problem.net),
            [batch],
        )
    assert torch.equal(dropout.masks[0], dropout.masks[2])
    assert not torch.equal(dropout.masks[0], dropout.masks[4])


class ByHand(nn.Module):
    """BatchNorm in train mode on groups of samples, each by its own statistics, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        groups = []
        for group in x.split(self.size):
            mean = group.mean(dim=(0, 2, 3), keepdim=True)
            variance = (group - mean).square().mean(dim=(0, 2, 3), keepdim=True)
            groups.append((group - mean) / (variance + 1e-5).sqrt())
        return torch.cat(groups) * self.weight[:, None, None] + self.bias[:, None, None]


def test_train_mode_batch_norm_takes_the_statistics_of_each_chunk() -> None:
    norm = nn.BatchNorm2d(4, momentum=0.5)
    problem, upper, batch = Pairs(conv_net(norm)), upper_point(), views()
    lower = parameters(problem.net)
    w = split(vector(joined(lower).numel(), 3), lower)
    chunked, joint = Pairs(conv_net(ByHand(3))), Pairs(conv_net(ByHand(SAMPLES)))
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(3), tikhonov=SHIFT)
    before = buffers(problem.net)
    check_system(system, lambda x, y: chunked.lower_objective(x, y, batch), w)
    assert all(torch.equal(before[name], buffer) for name, buffer in problem.net.named_buffers())
    _, gradient = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(upper, y, chunk),
        lambda z: nt_xent(z[:, 0], z[:, 1]),
        lower,
        problem.split_batch(batch, 3),
    )
    expected = whole(lambda x, y: chunked.lower_objective(x, y, batch), upper, lower, w)[0]
    other = whole(lambda x, y: joint.lower_objective(x, y, batch), upper, lower, w)[0]
    close(gradient, expected)
    assert float((joined(gradient) - joined(other)).norm()) > 1e-3 * float(joined(other).norm())
    # Three chunks of two views: six updates, not twelve.
    mean = torch.zeros(4, dtype=torch.float64)
    for chunk in problem.split_batch(batch, 3):
        for view in chunk:
            features = torch.nn.functional.conv2d(view * upper["pixels"].exp(), lower["0.weight"], lower["0.bias"])
            mean = 0.5 * mean + 0.5 * features.mean(dim=(0, 2, 3))
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 6
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=0.0)


class Regularized(Pairs):
    regularization_weight = 0.3

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return lower["0.weight"].square().sum() * upper["unused"].sum()


def test_trainer_makes_the_same_lower_step() -> None:
    problem, upper, batch = Regularized(conv_net()), upper_point(), views()
    lower = parameters(problem.net)
    start = {name: leaf.clone() for name, leaf in lower.items()}
    trainer(problem, upper, lower, batch, micro_batch=2).run()

    def objective(x: Params, y: Params) -> Tensor:
        return problem.lower_objective(x, y, batch) + 0.3 * problem.regularizer(x, y)

    gradient = whole(objective, upper, start, start)[0]
    close({name: start[name] - lower[name] for name in lower}, {name: 0.1 * g for name, g in gradient.items()})


class Held:
    """A tensor that autograd saved, counted for as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(samples: int, size: int) -> int:
    """The most bytes that graphs hold at one time during one micro-batched gradient."""
    problem, upper, batch = Pairs(conv_net()), upper_point(), views(samples=samples)
    now = peak = 0

    def change(count: int) -> None:
        nonlocal now, peak
        now += count
        peak = max(peak, now)

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        change(tensor.nbytes)
        weakref.finalize(held, change, -tensor.nbytes)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        micro_batched_gradient(
            lambda y, chunk: problem.lower_outputs(upper, y, chunk),
            lambda z: z.square().mean(),
            parameters(problem.net),
            problem.split_batch(batch, size),
        )
    return peak


def test_a_gradients_graphs_grow_with_the_chunk_and_not_with_the_batch() -> None:
    small, large_batch, large_chunk = peak_saved_bytes(16, 4), peak_saved_bytes(64, 4), peak_saved_bytes(64, 64)
    assert small <= large_batch < 1.5 * small
    assert large_chunk > 5 * large_batch
