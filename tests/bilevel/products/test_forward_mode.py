"""What forward mode cannot do: said with the provider, the layer and the remedy; what is no fault of it, as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bilevel import Implicit, Params, Problem, functional_call, hypergradient, linearize
from bilevel.linear import Dense
from bilevel.products import (
    Automatic,
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    MicroBatched,
    ReverseOverReverse,
)
from tests.support.cases import vector
from tests.support.problems.small_modules import BATCH, Fit, double, parameters


class Backward(torch.autograd.Function):
    """Twice differentiable in reverse mode, without a rule for forward mode."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3.0 * x.square() * grads[0]


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Backward.apply(x)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([3, 2, 1, 3, 2])
        packed = pack_padded_sequence(x.unsqueeze(2), lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][0]


class InParts(Fit):
    """With outputs of their own, for micro-batches."""

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, batch)

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return torch.tanh(outputs).square().mean() * 3.0


@pytest.mark.parametrize(
    ("make", "hvp", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), Cubed()), ForwardOverReverse(), r"layer '1' \(Cubed\)"),
        (lambda: nn.Sequential(nn.Linear(3, 2), Cubed()), MicroBatched(2), r"layer '1' \(Cubed\)"),
        (Packed, ForwardOverReverse(), r"layer 'lstm' \(LSTM\)"),
    ],
    ids=["function", "function, micro-batched", "packed sequence"],
)
def test_the_layer_the_provider_and_the_remedy_are_named(make: type[nn.Module], hvp: HVPProvider, message: str) -> None:
    module = double(make())
    lower = parameters(module)
    system = linearize(InParts(module), lower, lower, [BATCH], hvp=hvp)
    match = (
        rf"^{type(hvp).__name__}: forward mode does not go through {message}: .*; take ReverseOverReverse\(\), or hvp="
    )
    with pytest.raises(RuntimeError, match=match) as caught:
        system.operator(lower)
    assert caught.value.__cause__ is not None
    expected = linearize(InParts(module), lower, lower, [BATCH], hvp=ReverseOverReverse()).operator(lower)
    automatic = Automatic()
    found = linearize(InParts(module), lower, lower, [BATCH], hvp=automatic).operator(lower)
    torch.testing.assert_close(found, expected)
    assert automatic.chosen == ReverseOverReverse()
    assert "forward mode does not go through" in automatic.report[1].failure


class Regression(Problem):
    """A batch of any layout times the weights."""

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).tanh().square().mean() + 0.1 * (lower["w"] - upper["w"]).square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean()


DATA = vector(24, 7).reshape(6, 4)
DATA[DATA.abs() < 0.5] = 0.0
VARIABLES = {"w": vector(12, 8).reshape(4, 3)}
LAYOUTS = {"coo": Tensor.to_sparse_coo, "csr": Tensor.to_sparse_csr, "csc": Tensor.to_sparse_csc}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hvp", [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), "auto"], ids=str)
def test_sparse_data_in_reverse_mode(hvp: HVPProvider, layout: str) -> None:
    upper = {"w": torch.zeros_like(VARIABLES["w"])}
    results = [
        hypergradient(
            Regression(),
            upper,
            VARIABLES,
            Implicit(Dense(), hvp=hvp),
            upper_batch=data,
            lower_batches=[data],
            on_failure="ignore",
        )
        for data in (LAYOUTS[layout](DATA), DATA)
    ]
    torch.testing.assert_close(results[0].grad, results[1].grad)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_data_in_forward_mode_name_the_remedy(layout: str) -> None:
    system = linearize(Regression(), VARIABLES, VARIABLES, [LAYOUTS[layout](DATA)], hvp=ForwardOverReverse())
    for call in (system.operator, system.cross):
        with pytest.raises(RuntimeError, match=r"ForwardOverReverse: forward mode does not.*take ReverseOverReverse"):
            call(VARIABLES)


class Mistaken(Fit):
    error: Exception

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a shape"), KeyError("weight"), NotImplementedError("later")], ids=repr)
@pytest.mark.parametrize("hvp", [ForwardOverReverse(), ReverseOverReverse(), FiniteDifference()], ids=str)
def test_errors_of_the_objective_itself_come_through(hvp: HVPProvider, error: Exception) -> None:
    module = double(nn.Linear(3, 2))
    lower, problem = parameters(module), Mistaken(module)
    problem.error = error
    with pytest.raises(type(error)) as caught:
        linearize(problem, lower, lower, [BATCH], hvp=hvp).operator(lower)
    assert caught.value is error
