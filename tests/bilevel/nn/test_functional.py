"""Modules in curvature passes: right products, and nothing written."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import CG, Implicit, Params, functional_call, hypergradient, linearize
from bilevel.linear import Dense
from bilevel.nn.functional import _announce_plain_attention, curvature_pass
from bilevel.products import FiniteDifference, HVPProvider
from tests.support.cases import joined, vector
from tests.support.problems.small_modules import (
    EXACT,
    IMAGES,
    Fit,
    StopsGradients,
    check_products,
    check_untouched,
    convolutional,
    convolutional_by_hand,
    dense_hessian,
    double,
    everything,
    parameters,
    split,
    with_history,
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
def test_products_through_batchnorm(hvp: HVPProvider, training: bool) -> None:
    module = with_history(double(convolutional())).train(training)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def loss(p: Params) -> Tensor:
        outputs = convolutional_by_hand(p, IMAGES, training=training, buffers=buffers)
        return outputs.tanh().square().mean() * 3.0

    check_products(Fit(module), loss, IMAGES, hvp)
    assert module.training is training


class Recorder(nn.Module):
    """Writes buffers in forward: a counter, and a moving average that the output depends on."""

    count: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out = torch.tanh(x * self.weight)
        self.average.mul_(0.5).add_(0.5 * out.mean(dim=0).detach())
        return out * (1.0 + self.average)


class InstanceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh().mean(dim=(2, 3))


def modules_that_write() -> list[tuple[nn.Module, Tensor]]:
    return [
        (with_history(double(convolutional())), IMAGES),
        (double(InstanceNormed()), IMAGES),
        (double(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None))), vector(15, 51).reshape(5, 3)),
        (double(Recorder()), vector(15, 51).reshape(5, 3)),
    ]


@pytest.mark.parametrize("index", range(4), ids=["batch norm", "instance norm", "cumulative", "custom buffers"])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
def test_a_hypergradient_writes_nothing_to_a_module(hvp: HVPProvider, index: int) -> None:
    module, batch = modules_that_write()[index]
    buffers = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    before = everything(module)
    generator = torch.get_rng_state()
    lower: Params = dict(module.named_parameters())
    upper = parameters(module)
    kind = StopsGradients if isinstance(module, Recorder) else Fit
    system = linearize(kind(module), upper, lower, [batch, batch + 0.1], hvp=hvp, solver=CG(3))
    seeded = torch.get_rng_state()
    for _ in range(2):
        system.hypergradient(batch, on_failure="ignore")
    check_untouched(module, before)
    assert {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()} == buffers
    assert torch.equal(torch.get_rng_state(), seeded)
    assert not torch.equal(generator, seeded), "linearize draws its masks' seed from the global stream, once"


def test_buffers_update_as_ever_in_a_training_pass() -> None:
    module = double(convolutional())
    twin = copy.deepcopy(module)
    functional_call(module, parameters(module), IMAGES)
    twin(IMAGES)
    assert int(module.get_buffer("1.num_batches_tracked")) == 1
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), twin.buffers(), strict=True))


def test_buffers_given_as_parameters_are_not_written_either() -> None:
    module = double(Recorder())
    batch = vector(15, 51).reshape(5, 3)
    given = {"average": torch.full((3,), 2.0, dtype=torch.float64)}
    with curvature_pass():
        first = functional_call(module, given, batch)
        assert torch.equal(functional_call(module, given, batch), first)
    assert torch.equal(given["average"], torch.full((3,), 2.0, dtype=torch.float64))
    normed = double(convolutional())
    statistics = {name: buffer.clone() for name, buffer in normed.named_buffers()}
    with curvature_pass():
        functional_call(normed, {**parameters(normed), **statistics}, IMAGES)
    assert all(torch.equal(statistics[name], buffer) for name, buffer in normed.named_buffers())


@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_products_through_instance_norm_and_custom_buffers(hvp: HVPProvider) -> None:
    def instance(p: Params) -> Tensor:
        h = F.instance_norm(IMAGES, None, None, p["norm.weight"], p["norm.bias"], use_input_stats=True)
        return h.tanh().mean(dim=(2, 3)).tanh().square().mean() * 3.0

    check_products(Fit(double(InstanceNormed())), instance, IMAGES, hvp)
    batch = vector(15, 51).reshape(5, 3)

    def recorded(p: Params) -> Tensor:
        out = torch.tanh(batch * p["weight"])
        average = 0.5 + 0.5 * out.mean(dim=0).detach()
        return torch.tanh(out * (1.0 + average)).square().mean() * 3.0

    recorder = StopsGradients(double(Recorder()))
    lower = parameters(recorder.module)
    w = vector(3, 0)
    product = linearize(recorder, lower, lower, [batch], hvp=hvp, damping=2.0).operator({"weight": w})["weight"]
    # The detached average is a constant of the gradient, but moves with its value.
    y = lower["weight"].clone().requires_grad_()
    (g,) = torch.autograd.grad(recorded({"weight": y}), y, create_graph=True)
    (reference,) = torch.autograd.grad(g, y, w)
    torch.testing.assert_close(product, reference / 2.5 + w)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
def test_masks_are_the_same_for_all_products_of_a_system(hvp: HVPProvider) -> None:
    module, batch = double(Dropped()), vector(30, 52).reshape(10, 3)
    problem, lower = Fit(module), parameters(module)
    n = joined(lower).numel()
    torch.manual_seed(7)
    system = linearize(problem, lower, lower, [batch, batch], hvp=hvp)

    def product(w: Tensor) -> Tensor:
        return joined(system.operator(split(w, lower)))

    torch.manual_seed(11)
    before = torch.get_rng_state()
    u, v = vector(n, 0), vector(n, 1)
    tolerance = 1e-12 if hvp.exact else 1e-6
    torch.testing.assert_close(product(u + 2.0 * v), product(u) + 2.0 * product(v), rtol=0.0, atol=tolerance)
    torch.manual_seed(12)
    torch.testing.assert_close(product(u), product(u), rtol=0.0, atol=0.0)
    torch.manual_seed(11)
    product(u)
    assert torch.equal(torch.get_rng_state(), before)
    # Two batches with the same data get masks of their own, and so does the next system.
    one = linearize(problem, lower, lower, [batch], hvp=hvp)
    other = linearize(problem, lower, lower, [batch], hvp=hvp)
    difference = joined(one.operator(split(u, lower))) - joined(other.operator(split(u, lower)))
    assert float(difference.abs().max()) > 1e-3


def test_masks_are_those_of_the_seeded_objective() -> None:
    module, batch = double(Dropped()), vector(30, 52).reshape(10, 3)
    problem, lower = Fit(module), parameters(module)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31 - 1, ()))
    torch.manual_seed(3)
    system = linearize(problem, lower, lower, [batch], damping=2.0)

    def loss(p: Params) -> Tensor:
        torch.manual_seed(seed)
        h = F.dropout(torch.tanh(F.linear(batch, p["first.weight"], p["first.bias"])), 0.5, True)
        return torch.tanh(F.linear(h, p["last.weight"], p["last.bias"])).square().mean() * 3.0

    w = vector(joined(lower).numel(), 0)
    reference = dense_hessian(loss, lower) @ w / 2.5 + w
    torch.testing.assert_close(joined(system.operator(split(w, lower))), reference, rtol=0.0, atol=1e-12)


class DroppedElsewhere(nn.Module):
    """Masks from Python's and from NumPy's global generators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.tensor([random.random(), np.random.rand()], dtype=x.dtype)
        return torch.tanh(self.linear(x)) * keep


@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
def test_masks_of_other_generators_are_frozen_and_their_states_restored(hvp: HVPProvider) -> None:
    module, batch = double(DroppedElsewhere()), vector(30, 52).reshape(10, 3)
    problem, lower = Fit(module), parameters(module)
    u = split(vector(joined(lower).numel(), 0), lower)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    system = linearize(problem, lower, lower, [batch], hvp=hvp)
    first, second = joined(system.operator(u)), joined(system.operator(u))
    assert torch.equal(first, second)
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    other = joined(linearize(problem, lower, lower, [batch], hvp=hvp).operator(u))
    assert float((other - first).abs().max()) > 1e-6


class Attentive(nn.Module):
    """Multi-head attention as torch's module writes it, weights not asked for: the fused kernels' path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(query, key, value)


def test_the_switch_of_attentions_kernel_is_said_once_a_process(caplog: pytest.LogCaptureFixture) -> None:
    _announce_plain_attention.cache_clear()
    attention, plain = double(Attentive()), nn.Linear(4, 4).double()
    with caplog.at_level("INFO", logger="bilevel"):
        functional_call(attention, parameters(attention), TOKENS)
        with curvature_pass():
            functional_call(plain, parameters(plain), TOKENS)
        assert not caplog.records
        for _ in range(2):
            with curvature_pass():
                functional_call(attention, parameters(attention), TOKENS)
    ((name, level, message),) = caplog.record_tuples
    assert (name, level) == ("bilevel", 20)
    assert "fused kernels have no second derivative" in message


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


TOKENS = vector(2 * 3 * 4, 53).reshape(2, 3, 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
def test_products_through_attention(hvp: HVPProvider, training: bool) -> None:
    def scaled(p: Params) -> Tensor:
        parts = F.linear(TOKENS, p["project.weight"], p["project.bias"]).chunk(3, dim=-1)
        return attention_by_hand(*parts).tanh().square().mean() * 3.0

    def multihead(p: Params) -> Tensor:
        projected = F.linear(TOKENS, p["attention.in_proj_weight"], p["attention.in_proj_bias"])
        parts = [part.reshape(2, 3, 2, 2).transpose(1, 2) for part in projected.chunk(3, dim=-1)]
        mixed = attention_by_hand(*parts).transpose(1, 2).reshape(2, 3, 4)
        out = F.linear(mixed, p["attention.out_proj.weight"], p["attention.out_proj.bias"])
        return out.tanh().square().mean() * 3.0

    check_products(Fit(double(Scaled()).train(training)), scaled, TOKENS, hvp)
    check_products(Fit(double(Attentive()).train(training)), multihead, TOKENS, hvp)


@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_a_regularizer_may_call_modules_too(hvp: HVPProvider) -> None:
    class Distilled(Fit):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return joined(lower).square().sum()

        def regularizer(self, upper: Params, lower: Params) -> Tensor:
            teacher, student = (functional_call(self.module, p, IMAGES) for p in (upper, lower))
            return (teacher - student).square().mean()

    module = with_history(double(convolutional()))
    before = everything(module)
    lower = parameters(module)
    upper = {name: leaf + 0.1 for name, leaf in lower.items()}

    def penalty(p: Params) -> Tensor:
        outputs = (convolutional_by_hand(q, IMAGES, training=True, buffers={}) for q in (upper, p))
        return (next(outputs) - next(outputs)).square().mean()

    system = linearize(Distilled(module), upper, lower, [IMAGES], hvp=hvp)
    w = vector(joined(lower).numel(), 0)
    reference = 2.0 * w / 0.5 + dense_hessian(penalty, lower) @ w
    torch.testing.assert_close(joined(system.operator(split(w, lower))), reference, rtol=0.0, atol=1e-10)
    result = system.hypergradient(IMAGES, on_failure="ignore")
    assert joined(result.implicit).any()
    check_untouched(module, before)


def test_a_whole_hypergradient_through_batchnorm_equals_the_dense_one() -> None:
    module = with_history(double(convolutional()))
    lower = parameters(module)
    upper = {name: leaf + 0.1 for name, leaf in lower.items()}

    def outputs(p: Params) -> Tensor:
        return convolutional_by_hand(p, IMAGES, training=True, buffers={})

    hessian = dense_hessian(lambda p: outputs(p).tanh().square().mean() * 3.0, lower)
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outputs(y).sin().mean(), list(y.values()))])
    expected = torch.linalg.solve(torch.eye(len(v), dtype=torch.float64) + hessian / 100.5, v)
    for hvp in EXACT:
        for solver in (CG(100, rtol=1e-12), Dense()):
            result = hypergradient(
                Fit(module),
                upper,
                lower,
                Implicit(solver, hvp=hvp, damping=100.0),
                upper_batch=IMAGES,
                lower_batches=[IMAGES],
            )
            assert float((joined(result.grad) - expected).norm() / expected.norm()) <= 1e-8
