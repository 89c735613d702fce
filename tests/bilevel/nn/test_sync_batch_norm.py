"""Synchronised batch normalisation on several processes against torch's BatchNorm on the whole batch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import Implicit, Params, Problem, functional_call, hypergradient, linearize, proximal
from bilevel.distributed import gather, mean_over_ranks, shard, world_size
from bilevel.nn.functional import curvature_pass
from bilevel.nn.sync_batch_norm import SyncBatchNorm, synchronised
from bilevel.products import ForwardOverReverse
from tests.support.cases import joined, vector
from tests.support.problems.small_modules import double, parameters
from tests.support.rank_processes import WORLDS, on_ranks

# Layer and shape of the whole batch; neither 2 nor 4 divides its rows.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (7, 3)),
    "1d, sequences, no weights": (lambda: nn.BatchNorm1d(3, affine=False), (7, 3, 4)),
    "2d, cumulative average": (lambda: nn.BatchNorm2d(3, momentum=None), (7, 3, 2, 4)),
    "2d, evaluated": (lambda: nn.BatchNorm2d(3).eval(), (7, 3, 2, 4)),
    "3d, nothing tracked": (lambda: nn.BatchNorm3d(2, eps=0.1, track_running_stats=False), (5, 2, 2, 1, 3)),
    "ranks without rows": (lambda: nn.BatchNorm2d(3), (1, 3, 3, 3)),
    "a value a rank": (lambda: nn.BatchNorm1d(3), (2, 3)),
}


def double_layer(make: Callable[[], nn.Module]) -> nn.Module:
    layer = double(make())
    return layer if world_size() == 1 else synchronised(layer)


def derivatives(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], orders: int
) -> dict[str, Tensor]:
    """Output and derivatives, in all variables, of a nonlinear function of what `forward` makes of this rank's rows."""
    size, rows = math.prod(shape), shard(shape[0])
    batch, weights = vector(size, 1).reshape(shape) * 2.0 + 0.7, vector(size, 2).reshape(shape)
    x = batch[rows].clone().requires_grad_()
    variables = {"x": x, **dict(layer.named_parameters())}
    output = gather(forward(x))
    found = {"output": output.detach()}
    # The same on all ranks, and so counted once in a mean over them.
    level = (output.sin() * weights).sum()
    for order in range(1, orders + 1):
        slopes = dict(
            zip(variables, torch.autograd.grad(level, list(variables.values()), create_graph=True), strict=True)
        )
        detached = {name: slope.detach() for name, slope in slopes.items()}
        found[f"x, {order}"] = gather(detached.pop("x")) / world_size()
        found |= {f"{name}, {order}": slope for name, slope in mean_over_ranks(detached).items()}
        along = {name: vector(leaf.numel(), order).reshape(leaf.shape) for name, leaf in variables.items()}
        along["x"] = vector(size, 5 + order).reshape(shape)[rows]
        level = torch.stack([(slopes[name] * along[name]).sum() for name in slopes]).sum()
    return found


def two_passes(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Output, running statistics, gradients and a Hessian product."""
    layer = double_layer(make)
    layer(vector(math.prod(shape), 3).reshape(shape)[shard(shape[0])] - 1.0)
    found = derivatives(layer, layer, shape, 2)
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def third_derivatives() -> dict[str, Tensor]:
    """Torch's layer has none, so that one process takes the definition."""
    layer = double_layer(lambda: nn.BatchNorm1d(3))

    def definition(x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + 1e-5).sqrt() * layer.weight + layer.bias  # type: ignore[operator]

    return derivatives(layer, definition if world_size() == 1 else layer, (7, 3), 3)


class Fit(Problem):
    """Squashed outputs of all samples."""

    regularization_weight = 0.5

    def __init__(self) -> None:
        self.module = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
        if world_size() > 1:
            synchronised(self.module)

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return torch.tanh(gather(functional_call(self.module, lower, batch))).square().mean() * 3.0

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return gather(functional_call(self.module, lower, batch)).sin().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


BATCHES = [vector(21, 11).reshape(7, 3), vector(27, 12).reshape(9, 3) + 1.0]


def in_a_hypergradient() -> dict[str, Tensor]:
    problem = Fit()
    upper, lower = parameters(problem.module), parameters(problem.module)
    batches = [batch[shard(len(batch))] for batch in BATCHES]
    found = {}
    system = linearize(problem, upper, lower, batches)
    found["product"] = joined(system.operator({name: leaf.cos() for name, leaf in lower.items()}))
    result = hypergradient(problem, upper, lower, Implicit(damping=3.0), upper_batch=batches[0], lower_batches=batches)
    found["hypergradient"] = joined(result.grad)
    found |= {f"{name}, untouched": buffer.clone() for name, buffer in problem.module.named_buffers()}
    functional_call(problem.module, lower, batches[1])
    return found | {f"{name}, trained": buffer.clone() for name, buffer in problem.module.named_buffers()}


def lower_precision() -> dict[str, Tensor]:
    """Float32 values far from 0, and bfloat16 ones."""
    found = {}
    far = (vector(9 * 3 * 16, 21).reshape(9, 3, 4, 4) + 1e4).float()
    layer = nn.BatchNorm2d(3, momentum=1.0)
    found["far"] = gather((synchronised(layer) if world_size() > 1 else layer.double())(on(far)).detach())
    found["far, variance"] = layer.running_var.clone()  # type: ignore[union-attr]
    coarse = (vector(9 * 3, 22).reshape(9, 3) * 3.0).bfloat16()
    layer = synchronised(nn.BatchNorm1d(3)) if world_size() > 1 else nn.BatchNorm1d(3)
    x = on(coarse).bfloat16().requires_grad_()
    output = layer(x if world_size() > 1 else x.float())
    slope = torch.autograd.grad((gather(output).float() ** 3).sum(), x)[0]
    return found | {"coarse": gather(output.detach()), "coarse, slope": gather(slope) / world_size()}


def on(batch: Tensor) -> Tensor:
    """This rank's rows; the reference has all of them in double precision."""
    return batch[shard(len(batch))] if world_size() > 1 else batch.double()


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals() -> dict[str, str]:
    layer = synchronised(nn.BatchNorm1d(3))
    torchs, x = nn.SyncBatchNorm(3), torch.ones(2, 3)
    problem = Fit()
    lower, rows = parameters(problem.module), BATCHES[0][shard(7)]
    system = linearize(problem, lower, lower, [rows], hvp=ForwardOverReverse())
    with curvature_pass():
        found = {"torch's": refused(lambda: functional_call(torchs, {}, x)), "ours": refused(lambda: layer(x))}
        found["torch's, evaluated"] = refused(lambda: functional_call(torchs.eval(), {}, x))
    return found | {
        "one value": refused(lambda: layer(torch.ones(1, 3)[shard(1)])),
        "no value": refused(lambda: layer(torch.ones(0, 3))),
        "channels": refused(lambda: layer(torch.ones(2, 1))),
        "dimensions": refused(lambda: layer(torch.ones(3))),
        "forward mode": refused(lambda: system.operator(lower)),
    }


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {name: two_passes(*case) for name, case in CASES.items()}
    if world_size() > 1:
        image = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
        output = synchronised(nn.BatchNorm2d(3))(image)
        found["strides"] = list(output.stride()), list(image.stride())
        found["refusals"] = refusals()
    found["third derivatives"] = third_derivatives()
    return found | {"in a hypergradient": in_a_hypergradient(), "lower precision": lower_precision()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return on_ranks(everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return everything()


@pytest.mark.parametrize("name", [*CASES, "third derivatives", "in a hypergradient"])
@pytest.mark.parametrize("world", WORLDS)
def test_several_ranks_equal_the_whole_batch(
    world: int, name: str, ranks: dict[int, list[dict[str, Any]]], reference: dict[str, Any]
) -> None:
    first = ranks[world][0][name]
    assert first.keys() == reference[name].keys()
    for key, expected in reference[name].items():
        torch.testing.assert_close(
            first[key],
            expected,
            rtol=1e-11,
            atol=1e-12 * float(1 + expected.abs().max()),
            msg=lambda m, k=key: f"{k}: {m}",
        )
        assert all(torch.equal(other[name][key], first[key]) for other in ranks[world]), key


@pytest.mark.parametrize("world", WORLDS)
def test_low_precision(world: int, ranks: dict[int, list[dict[str, Any]]], reference: dict[str, Any]) -> None:
    found, expected = ranks[world][0]["lower precision"], reference["lower precision"]
    # Means have an error of 1e4 times 6e-8; a mean of squares would have lost the variance altogether.
    torch.testing.assert_close(found["far"].double(), expected["far"], rtol=0, atol=2e-3)
    torch.testing.assert_close(found["far, variance"].double(), expected["far, variance"].double(), rtol=1e-3, atol=0)
    assert found["coarse"].dtype == found["coarse, slope"].dtype == torch.bfloat16
    for name in ("coarse", "coarse, slope"):
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].float(), expected[name].float(), rtol=0.01, atol=0.01 * scale)


@pytest.mark.parametrize("world", WORLDS)
def test_strides_and_refusals(world: int, ranks: dict[int, list[dict[str, Any]]]) -> None:
    for rank in ranks[world]:
        assert rank["strides"][0] == rank["strides"][1]
        messages = rank["refusals"]
        assert "no double backward" in messages["torch's"]
        assert "bilevel.nn.synchronised(module)" in messages["torch's"]
        assert messages["ours"] == messages["torch's, evaluated"] == "not refused"
        assert messages["one value"].startswith("ValueError: Expected more than 1 value per channel when training")
        assert "1 values on all ranks" in messages["one value"]
        assert "0 values on all ranks" in messages["no value"]
        assert messages["channels"] == "ValueError: SyncBatchNorm: expected 3 channels, got shape (2, 1)"
        assert messages["dimensions"].startswith("ValueError: expected at least 2D input")
        assert "use hvp=ReverseOverReverse()" in messages["forward mode"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_one_process_is_batchnorm_to_the_bit(name: str, training: bool) -> None:
    make, shape = CASES[name]
    plain = double(make()).train(training)
    ours = synchronised(copy.deepcopy(plain))
    for seed in (1, 2):
        x = vector(math.prod(shape), seed).reshape(shape).requires_grad_()
        expected, found = plain(x), ours(x)
        assert torch.equal(found, expected)
        slopes = [
            torch.autograd.grad(y.sin().sum(), [x, *m.parameters()]) for y, m in ((expected, plain), (found, ours))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))


class OwnNorm(nn.BatchNorm2d):
    pass


def one_more(layer: nn.Module, args: Any, output: Any) -> Tensor:
    return output + 1.0


def test_synchronised_keeps_all_but_the_kind_of_layer() -> None:
    shared = nn.BatchNorm1d(3, eps=0.1, momentum=0.3)
    others = [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), OwnNorm(3)]
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval(), nn.BatchNorm3d(3, affine=False))
    module = nn.ModuleList([shared, inner, shared, *others])
    shared.weight.requires_grad_(False)
    shared.register_forward_hook(one_more)
    tensors = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    kinds, expected = [type(layer) for layer in others], shared(torch.eye(3))
    assert synchronised(module) is module
    assert {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()} == tensors
    assert [type(layer) for layer in module[3:]] == kinds
    assert [type(layer) for layer in (module[0], module[2], inner[1], inner[2])] == [SyncBatchNorm] * 4
    assert type(inner[0]) is nn.Conv2d
    assert [layer.training for layer in inner] == [True, False, True]
    assert not shared.weight.requires_grad
    assert (shared.eps, shared.momentum, inner[2].affine) == (0.1, 0.3, False)
    assert torch.equal(shared(torch.eye(3)), expected)
    copied = copy.deepcopy(module)
    assert copied[0] is copied[2]
    assert not copied[0].weight.requires_grad


def test_a_layer_alone_is_synchronised_and_state_dicts_fit_both_ways() -> None:
    plain = double(nn.BatchNorm2d(3))
    plain(vector(48, 1).reshape(1, 3, 4, 4))
    ours = SyncBatchNorm(3, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    x = vector(48, 2).reshape(1, 3, 4, 4)
    assert torch.equal(ours(x), plain(x))
    other = nn.BatchNorm2d(3).double()
    other.load_state_dict(ours.state_dict())
    alone = synchronised(other)
    assert alone is other
    assert isinstance(alone, SyncBatchNorm)
    assert torch.equal(alone(x), plain(x))
