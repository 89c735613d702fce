"""Every solver, recurrent layer and examination on a device, in float64 against the CPU.

Two computations in float64 agree to about half their digits where the systems are as well conditioned as these; a
number that went through float32 is off by more than that.
"""

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, MINRES, Identity, Implicit, Neumann, Params, hypergradient, linearize
from bilevel.linear import GMRES, AdjointIteration, Dense, Diagonal, Escalating, Nystrom, NystromPreconditioner, Solver
from bilevel.products import Automatic, ReverseOverReverse
from tests.support.problems.device_networks import Weighted, made
from tests.support.problems.small_modules import BATCH, EXACT, DetachesInBackward, Fit, double, parameters
from tests.support.rounding import distance

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CPU = torch.device("cpu")
AGREE = torch.finfo(torch.float64).eps ** 0.5
"""1.5e-8, where a rounding to float32 makes 6e-8."""

SOLVERS: dict[str, Solver] = {
    "CG, a budget": CG(3, rtol=None),
    "CG, a residual": CG(20, 1e-10),
    "CG, layer-wise": CG(3, rtol=None, layerwise=True),
    "CG, recycled": CG(5, rtol=None, recycle=5),
    "CG, preconditioned": CG(5, 1e-10, preconditioner=Diagonal()),
    "CG, Nystrom": CG(5, 1e-10, preconditioner=NystromPreconditioner(4)),
    "MINRES": MINRES(10, 1e-10),
    "GMRES": GMRES(10, rtol=1e-10),
    "Neumann": Neumann(5),
    "Nystrom": Nystrom(4),
    "Dense": Dense(),
    "Identity": Identity(),
    "Escalating": Escalating(CG(20, 1e-10)),
    "AdjointIteration": AdjointIteration(200, 1e-10),
}


def gradient(device: torch.device, method: Implicit) -> Params:
    """Of a small network whose start is the upper level's, and stands where no budget of iterations is too small."""
    module = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    lower = {name: leaf.to(device) for name, leaf in parameters(module).items()}
    batches = [BATCH.to(device), BATCH.flip(0).to(device)]
    return hypergradient(
        Fit(module.to(device)), lower, lower, method, upper_batch=batches[0], lower_batches=batches, on_failure="ignore"
    ).grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_what_it_gives_on_the_cpu(solver: str, device: torch.device) -> None:
    method = Implicit(SOLVERS[solver], hvp=ReverseOverReverse(keep_graph=True), damping=5.0)
    found = gradient(device, method)
    assert all(leaf.device.type == device.type for leaf in found.values())
    assert distance(found, gradient(CPU, method)) <= AGREE


def test_the_measured_choice_of_a_provider_works_and_is_exact(device: torch.device) -> None:
    provider = Automatic(memory_budget=2**24)
    found = gradient(device, Implicit(CG(3, rtol=None), hvp=provider, damping=5.0))
    assert distance(found, gradient(CPU, Implicit(CG(3, rtol=None), damping=5.0))) <= AGREE
    assert provider.state_dict()["chosen"] is not None
    assert [entry.failure for entry in provider.report if entry.failure] == []


class RowByRow(nn.Module):
    """A recurrent layer alone, a batch's rows being sequences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(2))[0]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_have_the_products_of_the_cpu(kind: str, device: torch.device) -> None:
    module = double(RowByRow(kind))
    lower = parameters(module)
    expected = linearize(Fit(module), lower, lower, [BATCH]).operator(lower)
    module, there = module.to(device), {name: leaf.to(device) for name, leaf in lower.items()}
    for hvp in EXACT:
        found = linearize(Fit(module), there, there, [BATCH.to(device)], hvp=hvp).operator(there)
        assert distance(found, expected) <= AGREE
    assert "forward" not in vars(module.layer)


class Faulty(Weighted):
    """A penalty whose curvature is lost."""

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        penalty = torch.stack([DetachesInBackward.apply(leaf).sum() for leaf in lower.values()]).sum()  # pyright: ignore
        return super().lower_objective(upper, lower, batch) + 1e-2 * penalty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [Weighted, Faulty])
def test_lost_curvature_is_found_and_nothing_else(
    kind: type[Weighted], dtype: torch.dtype, device: torch.device
) -> None:
    problem, upper, lower, batch = made("batch norm", device, dtype, kind)
    found = hypergradient(problem, upper, lower, upper_batch=batch, lower_batches=[batch], on_failure="ignore")
    assert ("lost curvature" in (found.failure or "")) == (kind is Faulty)
