"""Small systems with dense answers, through every solver and every Hessian-vector product provider."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import CG, MINRES, Identity, Neumann, Params, Problem, linearize
from bilevel.linear import Dense, Diagonal, Escalating, Nystrom, NystromPreconditioner, Solver
from bilevel.products import FiniteDifference, ForwardOverReverse, GaussNewton, HVPProvider, ReverseOverReverse

RTOL = 1e-8
ITERATIONS = 130

SOLVERS: dict[str, Solver] = {
    "CG": CG(ITERATIONS, RTOL),
    "CG, diagonal preconditioner": CG(ITERATIONS, RTOL, preconditioner=Diagonal()),
    "CG, Nystrom preconditioner": CG(ITERATIONS, RTOL, preconditioner=NystromPreconditioner(10)),
    "MINRES": MINRES(ITERATIONS, RTOL),
    "Escalating(CG)": Escalating(CG(ITERATIONS, RTOL)),
    "layer-wise CG": CG(ITERATIONS, RTOL, layerwise=True),
    "Neumann": Neumann(ITERATIONS, RTOL),
    "Nystrom": Nystrom(10, max_refinements=ITERATIONS, rtol=RTOL),
    "Dense": Dense(),
    "Identity": Identity(),
}

PROVIDERS: dict[str, HVPProvider] = {
    "ReverseOverReverse()": ReverseOverReverse(),
    "ReverseOverReverse(keep_graph=True)": ReverseOverReverse(keep_graph=True),
    "ForwardOverReverse()": ForwardOverReverse(),
    "GaussNewton()": GaussNewton(),
    "FiniteDifference()": FiniteDifference(),
    "FiniteDifference(central=False)": FiniteDifference(central=False),
}


@dataclass(frozen=True)
class Case:
    """A symmetric system A x = b in float64.

    Attributes:
        shapes: of the leaves that the variables are split into.
        unused: how many of the last leaves the objective does not touch (A has zeros there).
    """

    name: str
    matrix: Tensor
    right: Tensor
    shapes: tuple[tuple[int, ...], ...]
    unused: int = 0

    def split(self, vector: Tensor) -> Params:
        leaves = vector.split([torch.Size(shape).numel() for shape in self.shapes])
        return {f"{k}": leaf.reshape(shape) for k, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True))}

    def reference(self) -> Tensor | None:
        """The solution of least norm by dense algebra; None where there is none."""
        if not bool(torch.isfinite(self.matrix).all()):
            return None
        solution = torch.linalg.pinv(self.matrix, hermitian=True, rtol=1e-12) @ self.right
        consistent = (self.matrix @ solution - self.right).norm() <= 1e-9 * self.right.norm()
        return solution if consistent else None


class Curved(Problem):
    """L = 1/2 y'Ay + 1/6 sum y^3 + 1/24 sum y^4: the Hessian at y = 0 is A, and differences are inexact.

    The outputs are y itself, so that the Gauss-Newton product is the Hessian's.
    """

    def __init__(self, case: Case) -> None:
        self.case = case

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        used = list(lower.values())[: len(lower) - self.case.unused]
        return torch.cat([leaf.reshape(-1) for leaf in used])

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Any) -> Tensor:
        n = outputs.numel()
        quadratic = 0.5 * outputs @ self.case.matrix[:n, :n] @ outputs
        return quadratic + (outputs**3).sum() / 6 + (outputs**4).sum() / 24

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.case.right @ torch.cat([leaf.reshape(-1) for leaf in lower.values()])


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    n = values.numel()
    directions = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return directions @ torch.diag(values) @ directions.T


def cases() -> list[Case]:
    n, split = 40, ((4, 6), (), (15,))

    def range_of(low: float, high: float, count: int = n) -> Tensor:
        return torch.linspace(low, high, count, dtype=torch.float64)

    b = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    well = with_spectrum(range_of(0.5, 4.0))
    singular = with_spectrum(torch.cat([torch.zeros(5, dtype=torch.float64), range_of(0.5, 4.0, n - 5)]))
    indefinite = with_spectrum(torch.cat([range_of(-1.0, -0.2, 6), range_of(0.3, 4.0, n - 6)]))
    few = with_spectrum(torch.cat([range_of(1.0, 2.0, n - 5), torch.logspace(2, 6, 5, dtype=torch.float64)]))
    spread = with_spectrum(torch.logspace(-6, 0, n, dtype=torch.float64))
    partly = torch.zeros(n, n, dtype=torch.float64)
    partly[:25, :25] = with_spectrum(range_of(0.5, 4.0, 25))
    untouched = torch.cat([b[:25], torch.zeros(n - 25, dtype=torch.float64)])
    broken = well.clone()
    broken[2, 2] = torch.nan
    return [
        Case("A = I", torch.eye(n, dtype=torch.float64), b, split),
        Case("well-conditioned (8)", well, b, split),
        Case("ill-conditioned (1e6), 5 large eigenvalues", few, b, split),
        Case("ill-conditioned (1e6), evenly spread", spread, b, split),
        Case("0-dimensional variable", torch.tensor([[2.5]], dtype=torch.float64), b[:1], ((),)),
        Case("indefinite", indefinite, b, split),
        Case("singular, consistent", singular, singular @ b, split),
        Case("singular, inconsistent", singular, b, split),
        Case("unused variables, b = 0 there", partly, untouched, ((4, 6), (), (15,)), 1),
        Case("unused variables, b not 0 there", partly, b, ((4, 6), (), (15,)), 1),
        Case("NaN in the data", broken, b, split),
    ]


def measure_one(case: Case, solver: Solver, provider: HVPProvider) -> dict[str, Any]:
    """Status, products, and against dense algebra the residual and the error (None where there is no solution)."""
    y = case.split(torch.zeros_like(case.right))
    system = linearize(Curved(case), {}, y, [None], solver=solver, hvp=provider)
    solution = system.solve(case.split(case.right))
    x = torch.cat([leaf.reshape(-1) for leaf in solution.value.values()])
    reference = case.reference()
    known = reference is not None
    return {
        "status": solution.status.name,
        "products": solution.num_hvps,
        "error": float((x - reference).norm() / reference.norm()) if known else None,
        "residual": float((case.matrix @ x - case.right).norm() / case.right.norm()) if known else None,
        "shifted": solution.tikhonov > 0.0,
    }


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """Every case, solver and provider; a quick run leaves out what goes on for long."""
    kept = [
        case for case in cases() if not quick or case.name in ("A = I", "0-dimensional variable", "NaN in the data")
    ]
    return [
        {"case": case.name, "solver": name, "provider": hvp_name, **measure_one(case, solver, hvp)}
        for case in kept
        for name, solver in SOLVERS.items()
        for hvp_name, hvp in PROVIDERS.items()
    ]


def verdict(row: dict[str, Any]) -> str:
    """`right`: solved to the tolerance; `reported`: a status or a Tikhonov term says that it was not; `unchecked`: a
    method that makes no product has nothing to say; `wrong`: said to be solved, and is not."""
    if row["products"] == 0:
        return "right" if row["residual"] == 0.0 else "unchecked"
    if row["status"] != "CONVERGED" or row["shifted"]:
        return "reported"
    # Differences are products with another operator: their own error comes on top.
    tolerance = (100.0 if row["provider"].startswith("FiniteDifference") else 10.0) * RTOL
    return "right" if row["residual"] is not None and row["residual"] <= tolerance else "wrong"
