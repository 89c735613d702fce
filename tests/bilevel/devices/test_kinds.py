"""Every solver, recurrent layer and examination on a device, in float64 against the CPU.

Two computations in float64 agree to about half their digits where the systems are as well conditioned as these; a
number that went through float32 is off by more than that.
"""

import pytest
import torch
from torch import nn

from bilevel import CG, MINRES, Identity, Implicit, Neumann, Params, hypergradient, linearize
from bilevel.linear import GMRES, AdjointIteration, Dense, Diagonal, Escalating, Nystrom, NystromPreconditioner, Solver
from bilevel.nn import functional_call
from bilevel.products import Automatic, GaussNewton, HVPProvider, MicroBatched, ReverseOverReverse
from tests.support.cases import vector
from tests.support.problems.device_networks import Weighted, made
from tests.support.problems.small_modules import BATCH, EXACT, Fit, Forgetful, double, parameters
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
    "GMRES": GMRES(10, 1e-10),
    "Neumann": Neumann(5),
    "Nystrom": Nystrom(4),
    "Dense": Dense(),
    "Identity": Identity(),
    "Escalating": Escalating(CG(20, 1e-10)),
    "AdjointIteration": AdjointIteration(200, 1e-10),
}


def gradient(device: torch.device, method: Implicit, network: str = "weight norm") -> Params:
    problem, upper, lower, batch = made(network, device)
    found = hypergradient(problem, upper, lower, method, upper_batch=batch, lower_batches=[batch, batch])
    return found.grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_what_it_gives_on_the_cpu(solver: str, device: torch.device) -> None:
    method = Implicit(SOLVERS[solver], hvp=ReverseOverReverse(keep_graph=True), hessian_batches=2)
    found = gradient(device, method)
    assert all(leaf.device.type == device.type for leaf in found.values())
    assert distance(found, gradient(CPU, method)) <= AGREE
