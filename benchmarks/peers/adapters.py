"""One hypergradient by each package, from its published interface.

An adapter takes a `Case` and a number of iterations of conjugate gradients and gives an `Answer`. What had to be chosen
to make a package solve the case stands beside it (`choices`) and is shown with the figures. Versions tried: TorchOpt
0.7.3, curvlinops 3.0.1, Betty 0.1.1 (what pip gives Python 3.11; 0.2 asks for an older Python), BOAT 1.1.1.
Left out: `hypertorch` on the package index is another project of that name, and `higher` unrolls but solves no system.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.cases import Case, Variables
from bilevel import CG, Params, Problem, __version__, functional_call, linearize
from bilevel.linear import Solver
from bilevel.products import HVPProvider, ReverseOverReverse


@dataclass(frozen=True)
class Answer:
    """The hypergradient over the upper variables, and what came with it: None where nothing did."""

    value: Variables
    status: str | None = None
    residual: float | None = None
    products: float | None = None


Adapter = Callable[[Case, int], Answer]


@dataclass(frozen=True)
class Method:
    """A row of the comparison; `distribution` is the package's name for pip, "" for this one."""

    name: str
    distribution: str
    run: Adapter
    choices: str


def installed(distribution: str) -> str | None:
    """The version of a distribution, this package's own for ""; None where it is not installed."""
    if not distribution:
        return __version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class CaseProblem(Problem):
    """A case in this package's terms; its penalty is the regularizer, of weight 1."""

    regularization_weight = 1.0

    def __init__(self, case: Case) -> None:
        self.case = case

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, target = batch
        return self.case.loss(functional_call(self.case.module, lower, (inputs,)), target)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.case.upper_loss(tuple(upper.values()), tuple(lower.values()))

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return self.case.penalty(tuple(upper.values()), tuple(lower.values()))


def ours(make_solver: Callable[[int], Solver], hvp: HVPProvider) -> Adapter:
    """System, solve and cross term; `hypergradient` itself would add a gradient for its stationarity."""

    def run(case: Case, iterations: int) -> Answer:
        names = [name for name, _ in case.module.named_parameters()]
        upper = {f"x{i}": x for i, x in enumerate(case.upper)}
        lower = dict(zip(names, case.lower, strict=True))
        system = linearize(CaseProblem(case), upper, lower, case.batches, solver=make_solver(iterations), hvp=hvp)
        direct, v = upper_gradients(case)
        solution = system.solve(dict(zip(names, v, strict=True)))
        cross = system.cross(solution.value)
        value = tuple(d - cross[name] for d, name in zip(direct, upper, strict=True))
        return Answer(value, solution.status.name, solution.residual_norms[1], solution.num_hvps)

    return run


def upper_gradients(case: Case) -> tuple[Variables, Variables]:
    """dF/dx and dF/dy at the case's point."""
    x, y = ([leaf.detach().requires_grad_() for leaf in leaves] for leaves in (case.upper, case.lower))
    found = torch.autograd.grad(case.upper_loss(tuple(x), tuple(y)), [*x, *y], allow_unused=True)
    filled = tuple(torch.zeros_like(p) if g is None else g for p, g in zip([*x, *y], found, strict=True))
    return filled[: len(x)], filled[len(x) :]


def torchopt(case: Case, iterations: int) -> Answer:
    package = importlib.import_module("torchopt")
    case = case.copied(statistics=False)

    def gradient(y: Variables, x: Variables) -> Variables:
        return torch.func.grad(case.lower_loss, argnums=1)(x, y)

    solve = package.linear_solve.solve_cg(maxiter=iterations, rtol=0.0, atol=0.0)

    @package.diff.implicit.custom_root(gradient, argnums=1, solve=solve)
    def solution(y: Variables, x: Variables) -> Variables:
        return y

    x = tuple(leaf.detach().requires_grad_() for leaf in case.upper)
    return Answer(torch.autograd.grad(case.upper_loss(x, solution(case.lower, x)), x))


def curvlinops(case: Case, iterations: int) -> Answer:
    package = importlib.import_module("curvlinops")
    case = case.copied(statistics=False)
    parameters = list(case.module.parameters())

    class Penalty(nn.Module):
        """The penalty as a model with one output, because an operator is made of a model and a loss."""

        def __init__(self) -> None:
            super().__init__()
            self.module = case.module

        def forward(self, inputs: Tensor) -> Tensor:
            return case.penalty(case.upper, tuple(self.module.parameters())) + 0.0 * inputs.sum()

    class Value(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
            return outputs

    one = torch.ones(1, dtype=parameters[0].dtype)
    hessian = package.HessianLinearOperator(
        case.module, case.loss, parameters, list(case.batches), check_deterministic=False
    )
    of_penalty = package.HessianLinearOperator(Penalty(), Value(), parameters, [(one, one)], check_deterministic=False)
    inverse = package.CGInverseLinearOperator(
        hessian + of_penalty, max_iter=iterations, max_tridiag_iter=0, tolerance=1e-10
    )
    direct, v = upper_gradients(case)
    solution = [s.detach() for s in inverse @ list(v)]
    x = tuple(leaf.detach().requires_grad_() for leaf in case.upper)
    gradients = torch.autograd.grad(case.penalty(x, tuple(parameters)), parameters, create_graph=True)
    cross = torch.autograd.grad(gradients, x, grad_outputs=solution)
    return Answer(tuple(d - c for d, c in zip(direct, cross, strict=True)))


@contextmanager
def quiet() -> Iterator[None]:
    """Betty reports every problem it sets up."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def betty(case: Case, iterations: int) -> Answer:
    problems = importlib.import_module("betty.problems")
    configs = importlib.import_module("betty.configs")
    engine = importlib.import_module("betty.engine")

    class Upper(problems.ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return case.upper_loss(tuple(self.module), tuple(self.lower.module.parameters()))

    class Lower(problems.ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return case.lower_loss(tuple(self.upper.module), tuple(self.module.parameters()))

    held = nn.ParameterList(leaf.detach().clone() for leaf in case.upper)
    config = configs.Config(type="cg", cg_iterations=iterations, cg_alpha=1.0)
    loader = [(torch.zeros(1),)]
    device = case.upper[0].device
    upper = Upper("upper", configs.Config(), held, None, None, loader, device)
    lower = Lower("lower", config, case.module, None, None, loader, device)
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    with quiet():
        engine.Engine([upper, lower], configs.EngineConfig(train_iters=1), dependencies)
    loss = upper.training_step(None)
    upper.backward(loss, upper.trainable_parameters(), upper.paths, retain_graph=True)
    return Answer(tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in held))


def boat(case: Case, iterations: int) -> Answer:
    operations = importlib.import_module("boat_torch.utils.op_utils")
    x, y = ([leaf.detach().requires_grad_() for leaf in leaves] for leaves in (case.upper, case.lower))

    def step(parameters: list[Tensor], loss: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return [p - g for p, g in zip(parameters, gradients, strict=True)]

    losses = case.upper_loss(tuple(x), tuple(y)), case.lower_loss(x, y)
    return Answer(tuple(operations.conjugate_gradient(y, x, *losses, iterations, step)))


RECOMPUTED, KEPT = ReverseOverReverse(), ReverseOverReverse(keep_graph=True)
METHODS: tuple[Method, ...] = (
    Method("CG, recomputed", "", ours(lambda n: CG(n, None), RECOMPUTED), "graphs rebuilt for every product"),
    Method("CG, kept graph", "", ours(lambda n: CG(n, None), KEPT), "one graph a batch kept for the solve"),
    Method(
        "CG, layer-wise",
        "",
        ours(lambda n: CG(n, None, layerwise=True), RECOMPUTED),
        "the procedure of the BiSSL paper: graphs rebuilt, one more product to measure the residual",
    ),
    Method("CG to 1e-2", "", ours(lambda n: CG(max(n, 1), 1e-2), KEPT), "stopped at a relative residual of 0.01"),
    Method(
        "TorchOpt",
        "torchopt",
        torchopt,
        "custom_root with solve_cg(rtol=0) around a given y; running statistics switched off beforehand, because "
        "torch.func transforms refuse to update them",
    ),
    Method(
        "curvlinops",
        "curvlinops-for-pytorch",
        curvlinops,
        "CGInverseLinearOperator of the sum of two Hessians (data, penalty), tolerance 1e-10, cross term by torch; "
        "running statistics switched off beforehand, for the same reason; progress and determinism checks off",
    ),
    Method(
        "Betty",
        "betty-ml",
        betty,
        "two ImplicitProblems in an Engine, type cg, cg_alpha 1; all batches in one training_step, since "
        "it solves with the batch at hand",
    ),
    Method(
        "BOAT",
        "boat-torch",
        boat,
        "its conjugate_gradient called by itself, with a fixed-point map of step 1 and the tolerance it has by default",
    ),
)
