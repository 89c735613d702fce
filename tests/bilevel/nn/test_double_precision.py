"""Objectives of float32 modules and data in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import functional_call
from bilevel.nn import DoublePrecision, curvature_pass
from bilevel.products import ForwardOverReverse, ReverseOverReverse

MODULES: dict[str, tuple[nn.Module, Tensor]] = {
    "dense": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(5, 3)),
    "batch norm": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), torch.rand(4, 1, 5, 5)),
    "attention": (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0), torch.rand(2, 3, 8)),
    "embedding": (nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3)), torch.tensor([[0, 1], [2, 4]])),
    "complex": (nn.Linear(3, 2, dtype=torch.complex64), torch.ones(5, 3, dtype=torch.complex64)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_and_its_own_tensors(name: str, train: bool) -> None:
    module, inputs = MODULES[name]
    module.train(train)
    with torch.no_grad(), curvature_pass():
        expected = functional_call(module, {}, (inputs,))
        with DoublePrecision():
            found = functional_call(module, {}, (inputs,))
    assert expected.dtype in (torch.float32, torch.complex64)
    assert found.dtype in (torch.float64, torch.complex128)
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)
    assert all(t.dtype in (torch.float32, torch.complex64, torch.int64) for t in module.state_dict().values())


@pytest.mark.parametrize("provider", [ReverseOverReverse(), ForwardOverReverse()], ids=str)
def test_derivatives_of_what_closes_over_float32_are_those_of_float64(provider: Any) -> None:
    X, scale = torch.rand(6, 3), torch.tensor([0.5, 1.0, 2.0])
    y, w = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def objective(upper: Any, lower: Any) -> Tensor:
        return (X @ (scale * lower["y"])).tanh().square().sum() + torch.zeros(3) @ lower["y"]

    with DoublePrecision():
        found = provider.linearize(objective, {}, {"y": y}).hessian({"y": w})["y"]
    X, scale = X.double(), scale.double()
    H = torch.autograd.functional.hessian(lambda y: (X @ (scale * y)).tanh().square().sum(), y)
    assert isinstance(H, Tensor)
    torch.testing.assert_close(found, H @ w, rtol=1e-12, atol=1e-12)


def test_a_lower_precision_that_is_asked_for_is_not_taken() -> None:
    y = torch.rand(3, dtype=torch.float64)
    with DoublePrecision():
        assert torch.equal(y.float().square().to(torch.bfloat16).double(), y.square())
        assert torch.zeros(3, dtype=torch.float32).dtype == torch.float64


def test_what_would_be_lost_is_refused_and_the_default_comes_back() -> None:
    buffer = torch.zeros(3)
    with DoublePrecision():
        torch.zeros(3).add_(1.0)
        for write in (lambda: buffer.add_(1.0), lambda: buffer.__setitem__(0, 1.0)):
            with pytest.raises(TypeError, match=r"writes into a torch\.float32 tensor"):
                write()
    assert torch.zeros(1).dtype == torch.float32
    assert buffer.tolist() == [0.0, 0.0, 0.0]
