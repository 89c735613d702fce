import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.vision.optimizers import LARS, NormalizedSGD, constant, schedule, warmup_cosine

SHAPES = {"matrix": (3, 4), "kernel": (2, 3, 2, 2), "zero": (2, 2), "bias": (4,), "scalar": ()}


def setting(steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(3)
    start = {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    start["zero"] = np.zeros(SHAPES["zero"])
    gradients = [{name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()} for _ in range(steps)]
    return start, gradients


def by_hand(
    start: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    rates: list[float],
    *,
    momentum: float,
    decay: float,
    eta: float,
    exclude: bool,
) -> dict[str, np.ndarray]:
    result = {}
    for name, value in start.items():
        p, m = value.copy(), np.zeros_like(value)
        for gradient, rate in zip(gradients, rates, strict=True):
            d = gradient[name]
            if p.ndim > 1 or not exclude:
                d = d + decay * p
                lengths = math.sqrt((p * p).sum()), math.sqrt((d * d).sum())
                if lengths[0] > 0 and lengths[1] > 0:
                    d = d * (eta * lengths[0] / lengths[1])
            m = momentum * m + d
            p = p - rate * m
        result[name] = p
    return result


def tensors(start: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}


def assign(parameters: dict[str, torch.nn.Parameter], gradients: dict[str, np.ndarray]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor(gradients[name])


@pytest.mark.parametrize("exclude", [True, False])
def test_lars_is_its_definition(exclude: bool) -> None:
    start, gradients = setting(6)
    rates = [0.0, 0.5, 1.0, 4.8, 0.3, 0.1]
    parameters = tensors(start)
    optimizer = LARS(
        parameters.values(), lr=9.0, momentum=0.8, weight_decay=0.05, trust_coefficient=0.02, exclude_1d=exclude
    )
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        assign(parameters, gradient)
        optimizer.step()
    expected = by_hand(start, gradients, rates, momentum=0.8, decay=0.05, eta=0.02, exclude=exclude)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclude", [True, False])
def test_lars_on_all_tensors_at_once_is_the_step_of_each_to_the_bit(dtype: torch.dtype, exclude: bool) -> None:
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (8,), (16, 8, 1, 1), (), (33, 17), (2, 2)]
    start = [torch.randn(shape, dtype=dtype) for shape in shapes]
    start[2], start[5] = start[2].to(memory_format=torch.channels_last), torch.zeros(2, 2, dtype=dtype)
    params = [p.clone().requires_grad_() for p in start]
    optimizer = LARS(params, lr=0.3, momentum=0.9, weight_decay=0.01, exclude_1d=exclude)
    momenta = [torch.zeros_like(p) for p in start]
    for _ in range(4):
        for p, value, m in zip(params, start, momenta, strict=True):
            p.grad = torch.randn(p.shape, dtype=dtype)
            d = p.grad
            if p.ndim > 1 or not exclude:
                d = p.grad + 0.01 * value
                if value.norm() > 0:
                    d = d * (0.001 * value.norm() / d.norm())
            m.mul_(0.9).add_(d)
            value.add_(m, alpha=-0.3)
        optimizer.step()
    for p, value in zip(params, start, strict=True):
        assert torch.equal(p.detach(), value)


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lars_is_as_many_operations_for_any_number_of_tensors_and_reads_none(device: str) -> None:
    counts = []
    for count in (2, 20):
        params = [torch.ones(3, 3, device=device, requires_grad=True) for _ in range(count)]
        biases = [torch.ones(3, device=device, requires_grad=True) for _ in range(count)]
        optimizer = LARS([*params, *biases], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            for p in (*params, *biases):
                p.grad = torch.ones_like(p)
            with Operations() as ran:
                optimizer.step()
        assert "_local_scalar_dense" not in ran.names
        counts.append(len(ran.names))
    assert counts[0] == counts[1]


def test_lars_takes_several_dtypes_and_devices() -> None:
    params = [
        torch.ones(2, 2, requires_grad=True),
        torch.ones(2, 2, device="meta", requires_grad=True),
        torch.ones(2, 2, dtype=torch.float64, requires_grad=True),
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    LARS(params, lr=1.0, momentum=0.0, trust_coefficient=0.5).step()
    for p in (params[0], params[2]):
        assert torch.equal(p.detach(), torch.full_like(p, 0.5))


def test_lars_with_a_zero_gradient_and_no_decay_stays() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    LARS([p], lr=1.0).step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_lars_leaves_gradients_and_parameters_without_gradient_alone() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    used.grad = torch.full((2, 2), 3.0)
    LARS([used, unused], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(used.grad, torch.full((2, 2), 3.0))
    assert torch.equal(unused.detach(), torch.ones(2, 2))


def test_lars_returns_the_loss_of_a_closure() -> None:
    p = torch.nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = LARS([p], lr=1.0, momentum=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16.0
    # ||p|| = 4 and d = 2 p, so the step is 0.001 * ||p|| / ||d|| * d = 0.001 p.
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 2.0 * 0.999))


def test_lars_groups_have_their_own_options() -> None:
    fast, slow = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    for p in (fast, slow):
        p.grad = torch.ones(3)
    LARS([{"params": [fast]}, {"params": [slow], "lr": 0.25}], lr=0.5).step()
    assert fast.detach().tolist() == [0.5] * 3
    assert slow.detach().tolist() == [0.75] * 3


def test_lars_resumes_exactly() -> None:
    start, gradients = setting(5)
    straight, resumed = tensors(start), tensors(start)
    options: dict[str, Any] = {"lr": 0.7, "weight_decay": 0.01, "trust_coefficient": 0.1}
    first, second = LARS(straight.values(), **options), LARS(resumed.values(), **options)
    for gradient in gradients[:3]:
        for parameters, optimizer in ((straight, first), (resumed, second)):
            assign(parameters, gradient)
            optimizer.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    third = LARS(resumed.values(), lr=0.1)
    third.load_state_dict(torch.load(file, weights_only=True))
    for gradient in gradients[3:]:
        for parameters, optimizer in ((straight, first), (resumed, third)):
            assign(parameters, gradient)
            optimizer.step()
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("trust_coefficient", 0.0),
    ],
)
def test_lars_refuses(option: str, value: float) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    options: dict[str, Any] = {"lr": 0.1, option: value}
    with pytest.raises(ValueError, match=option):
        LARS([p], **options)
    with pytest.raises(ValueError, match=option):
        LARS([{"params": [p], option: value}], lr=0.1)


def test_lars_refuses_sparse_gradients() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        LARS(table.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 11),
        (4, 5 / 11),
        (9, 10 / 11),
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (60, 0.55),
        (110, 0.1),
        (111, 0.1),
        (1000, 0.1),
    ],
)
def test_warmup_cosine_closed_form(step: int, expected: float) -> None:
    value = warmup_cosine(step, total_steps=110, warmup_steps=10, floor=0.1)
    assert value == pytest.approx(expected, rel=1e-12)


def test_cosine_without_warmup_starts_at_the_base_and_falls_to_zero() -> None:
    values = [warmup_cosine(step, total_steps=8) for step in range(9)]
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.5)
    assert values[8] == pytest.approx(0.0, abs=1e-15)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_warmup_never_starts_at_the_base(warmup: int) -> None:
    values = [warmup_cosine(step, total_steps=20, warmup_steps=warmup) for step in range(warmup + 1)]
    assert 0 < values[0] < 1
    assert values[-1] == 1.0
    np.testing.assert_allclose(np.diff(values), 1 / (warmup + 1))


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (-1, {"total_steps": 5}, "step"),
        (0, {"total_steps": 0}, "warmup_steps"),
        (0, {"total_steps": 5, "warmup_steps": 5}, "warmup_steps"),
        (0, {"total_steps": 5, "warmup_steps": -1}, "warmup_steps"),
        (0, {"total_steps": 5, "floor": 1.5}, "floor"),
        (0, {"total_steps": 5, "floor": math.nan}, "floor"),
    ],
)
def test_warmup_cosine_refuses(step: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup_cosine(step, **options)


def rates_used(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int
) -> list[list[float]]:
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def two_groups() -> LARS:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (4.8, 0.1)]
    return LARS(groups, lr=1.0)


def test_schedule_drives_every_group_from_its_own_base() -> None:
    optimizer = two_groups()
    scheduler = schedule(optimizer, total_steps=6, warmup_steps=2, floor=0.001)
    used = rates_used(optimizer, scheduler, 6)
    shape = [1 / 3, 2 / 3] + [0.001 + 0.999 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(used, [[4.8 * value, 0.1 * value] for value in shape], rtol=1e-12)
    assert scheduler.get_last_lr() == pytest.approx([4.8e-3, 1e-4])


def test_schedule_resumes_exactly() -> None:
    optimizer = two_groups()
    straight = rates_used(optimizer, schedule(optimizer, total_steps=9, warmup_steps=3), 9)
    optimizer = two_groups()
    scheduler = schedule(optimizer, total_steps=9, warmup_steps=3)
    head = rates_used(optimizer, scheduler, 4)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer = two_groups()
    scheduler = schedule(optimizer, total_steps=9, warmup_steps=3)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["schedule"])
    assert head + rates_used(optimizer, scheduler, 5) == straight


def test_constant_schedule_keeps_the_base_rates() -> None:
    optimizer = two_groups()
    assert rates_used(optimizer, schedule(optimizer, "constant", total_steps=1), 4) == [[4.8, 0.1]] * 4
    assert [constant(step) for step in (0, 7)] == [1.0, 1.0]


def test_schedule_refuses_an_unknown_shape_and_bad_lengths() -> None:
    with pytest.raises(ValueError, match="shape"):
        schedule(two_groups(), "linear", total_steps=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="warmup_steps"):
        schedule(two_groups(), total_steps=3, warmup_steps=3)


def test_normalized_steps_have_the_given_size_along_the_gradient() -> None:
    p, still, free = (torch.ones(2, 2, requires_grad=True) for _ in range(3))
    p.grad, still.grad = torch.tensor([[3e-9, 0.0], [0.0, 4e-9]]), torch.zeros(2, 2)
    NormalizedSGD([p, still, free], lr=0.5).step()
    # The root mean square of the gradient is 2.5e-9.
    torch.testing.assert_close(p.detach(), torch.tensor([[0.4, 1.0], [1.0, 0.2]]))
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(free, torch.ones(2, 2))
