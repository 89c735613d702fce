"""What solvers are measured against: accurate solutions, the spectrum, what other batches would change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.compare.curves import lower_gradient
from bilevel.compare.measuring import Deadline
from bilevel.hypergradients import System, linearize
from bilevel.linear import CG, GMRES, MINRES, Dense, Identity, Solution, Solver, Status, spectrum_bounds
from bilevel.lower import halves, in_double_precision
from bilevel.nn import as_double
from bilevel.problem import Problem
from bilevel.products import HVP, HVPProvider
from bilevel.tree import Params

DENSE_SIZE = 1500
"""Variables up to which A is formed."""
_STEPS, _FEWEST_STEPS = 40, 10
_MOST_ITERATIONS, _FEWEST_ITERATIONS, _MOST_VECTORS = 3000, 3, 200
_RTOL = 1e-12
_FOR_FLOAT64 = 60
"""Products a right-hand side that there must be time for."""
_NOISE_RTOL, _NOISE_BATCHES = 0.05, 8
_OTHER_SYSTEM = 1e-2
_INDEFINITE = 10.0
"""The error over the residual that is reckoned with where the eigenvalue nearest to 0 is not known."""


@dataclass(frozen=True)
class Place:
    """A problem at one point, with the lower batches and the options that make its linear system."""

    problem: Problem
    upper: Params
    lower: Params
    batches: Sequence[Any]
    hvp: HVP | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """`damping`, `tikhonov` and `implicit`."""

    def linearize(self, solver: Solver, hvp: HVPProvider | None = None) -> System:
        """Every system has the same random masks."""
        torch.default_generator.manual_seed(self.seed)
        provider = self.hvp if hvp is None else hvp
        return linearize(
            self.problem, self.upper, self.lower, self.batches, solver=solver, hvp=provider, **self.options
        )

    def gradient(self) -> None:
        for batch in self.batches:
            lower_gradient(self.problem, self.upper, self.lower, batch)

    def with_batches(self, batches: Sequence[Any]) -> "Place":
        return replace(self, batches=batches)

    def in_float64(self) -> "Place":
        upper, lower = ({n: as_double(leaf.detach()) for n, leaf in v.items()} for v in (self.upper, self.lower))
        batches = [tree.map_tensors(as_double, batch) for batch in self.batches]
        return replace(self, upper=upper, lower=lower, batches=batches)

    @property
    def is_float64(self) -> bool:
        return all(as_double(leaf) is leaf for leaf in self.lower.values())


@dataclass(frozen=True)
class Reference:
    """Solutions of A x = b that stand for the exact ones.

    Attributes:
        exact: x for every right-hand side, flattened, in float64.
        solver, dtype: how they were found.
        residual: the largest ``||b - A x|| / ||b||``, measured in `dtype`.
        accuracy: relative error of x that such a residual can hide, where A is definite by the smallest eigenvalue met.
        status: of the worst solve.
        eigenvalues: smallest and largest one, met by Lanczos steps or, if `complete`, of all; None where A is not
            symmetric.
        bounds: smallest and largest eigenvalue that A has hardly anything beyond, None as well.
        noise: standard error of x from the choice of the lower batches, relative to x; None where not measured.
        noise_from: "batches"; "halves" of a single one; "product" where there was no time for solves and it is that of
            A x, relative to b; "" where not measured.
        remarks: in words what was done otherwise.
    """

    exact: tuple[Tensor, ...]
    solver: str
    dtype: str
    residual: float
    accuracy: float
    status: str
    eigenvalues: tuple[float, float] | None
    bounds: tuple[float, float] | None
    complete: bool
    noise: float | None
    noise_from: str
    remarks: tuple[str, ...] = ()


def find_reference(place: Place, rights: Sequence[Params], product: float, deadline: Deadline) -> Reference:
    """Solutions in float64 where the problem computes in it and the time allows that, else in its own precision.

    Args:
        product: seconds of a product in the problem's own precision.

    Raises:
        ValueError: a product with A is not finite, or A is singular and a right-hand side outside its range.
    """
    own = _Search(place, rights, product, deadline)
    if place.is_float64:
        return own.find()
    if own.affordable() < _FOR_FLOAT64 * len(rights):
        return replace(own.find(), remarks=("Products take too long for a reference in float64",))
    try:
        with in_double_precision(place.problem):
            doubles = [{name: as_double(leaf) for name, leaf in b.items()} for b in rights]
            found = _Search(place.in_float64(), doubles, 2.0 * product, deadline).find()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        remark = f"The problem does not compute in float64 ({_first_line(error)})"
        return replace(own.find(), remarks=(remark,))
    # Random masks and kinks may make another system of it in the other precision.
    x = tree.unflatten(found.exact[0], rights[0])
    away = float(tree.norm(tree.sub(place.linearize(Identity()).operator(x), rights[0])) / tree.norm(rights[0]))
    if away <= max(_OTHER_SYSTEM, 10.0 * found.residual):
        return found
    remark = f"In float64 the system is another one (its solution leaves a residual of {away:.1e} here)"
    return replace(own.find(), remarks=(remark,))


@dataclass
class _Search:
    """In one precision; `product` is about the seconds of one there."""

    place: Place
    rights: Sequence[Params]
    product: float
    deadline: Deadline

    def affordable(self) -> int:
        """Products that there is time for."""
        return int(min(self.deadline.left() / max(self.product, 1e-9), 1e9))

    def find(self) -> Reference:
        system = self.place.linearize(Identity())
        if not tree.all_finite(system.operator(self.rights[0])):
            raise ValueError(
                "the product of A with dF/dy is not finite, so that there is no system to compare solvers on; check "
                "the lower objective, its data and the lower variables"
            )
        met = self._lanczos(system) if system.operator.symmetric else []
        solver = self._solver(met, symmetric=system.operator.symmetric)
        solved = self.place.linearize(solver)
        solutions = [solved.solve(b) for b in self.rights]
        if any(s.status is Status.NEGATIVE_CURVATURE for s in solutions):
            solver = MINRES(self._iterations(), _RTOL)
            solved = self.place.linearize(solver)
            solutions = [solved.solve(b) for b in self.rights]
        self._check(solutions)
        # Those of `Dense` are exact.
        eigenvalues = _range(solutions if isinstance(solver, Dense) else [*met, *solutions])
        noise, noise_from = self._noise(solutions[0], solved, solver)
        return Reference(
            exact=tuple(tree.flatten({n: s.value[n] for n in self.rights[0]}).double() for s in solutions),
            solver=type(solver).__name__,
            dtype=str(next(iter(self.rights[0].values())).dtype).removeprefix("torch."),
            residual=max(s.residual_norms[1] for s in solutions),
            accuracy=self._accuracy(solutions, eigenvalues),
            status=max(solutions, key=lambda s: s.residual_norms[1]).status.name,
            eigenvalues=eigenvalues,
            bounds=self._bounds(system, eigenvalues),
            complete=isinstance(solver, Dense),
            noise=noise,
            noise_from=noise_from,
        )

    def _lanczos(self, system: System) -> list[Solution]:
        """Iterations from a random start beside dF/dy, for the eigenvalues they meet, where there is time for them."""
        steps = min(_STEPS, self.affordable() // 8)
        if steps < _FEWEST_STEPS:
            return []
        generator = torch.Generator().manual_seed(0)
        b = tree.scale(1.0 / float(tree.norm(self.rights[0])), self.rights[0])
        drawn = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for n, v in b.items()}
        start = tree.axpy(1.0 / float(tree.norm(drawn)), drawn, b)
        return [MINRES(steps, None).solve(system.operator, start)]

    def _bounds(self, system: System, eigenvalues: tuple[float, float] | None) -> tuple[float, float] | None:
        """Wider than what was met where that is negative, and a term is to be suggested for it."""
        if eigenvalues is None or eigenvalues[0] > 0.0 or self.affordable() < 15:
            return eigenvalues
        found = spectrum_bounds(system.operator, self.rights[0])
        return eigenvalues if found is None else (min(found[0], eigenvalues[0]), max(found[1], eigenvalues[1]))

    def _solver(self, met: Sequence[Solution], *, symmetric: bool) -> Solver:
        n = tree.size(self.rights[0])
        if n <= DENSE_SIZE and n <= 0.3 * self.affordable():
            return Dense()
        most, seen = self._iterations(), _range(met)
        if not symmetric:
            return GMRES(min(most, _MOST_VECTORS), None, _RTOL)
        return MINRES(most, _RTOL) if seen is not None and seen[0] <= 0.0 else CG(most, _RTOL)

    def _iterations(self) -> int:
        """For each right-hand side, of about half of what there is time for."""
        return max(10, min(self.affordable() // (2 * len(self.rights)), _MOST_ITERATIONS))

    def _check(self, solutions: Sequence[Solution]) -> None:
        for index, solution in enumerate(solutions):
            if solution.status in (Status.NON_FINITE, Status.INCONSISTENT):
                raise ValueError(
                    f"upper_batches[{index}]: the system of this right-hand side has no solution that solvers could be "
                    f"compared with ({solution.status.value})"
                )

    def _accuracy(self, solutions: Sequence[Solution], eigenvalues: tuple[float, float] | None) -> float:
        found, smallest = 0.0, 0.0 if eigenvalues is None else eigenvalues[0]
        for solution, b in zip(solutions, self.rights, strict=True):
            stretch = float(tree.norm(b) / tree.norm(solution.value)) / smallest if smallest > 0.0 else _INDEFINITE
            found = max(found, solution.residual_norms[1] * max(stretch, 1.0))
        return found

    def _noise(self, solution: Solution, solved: System, solver: Solver) -> tuple[float | None, str]:
        """Relative standard error of x from the choice of batches, by :math:`A^{-1} (A_k - A) x`, and its source."""
        x, parts, source = solution.value, list(self.place.batches[:_NOISE_BATCHES]), "batches"
        if len(parts) == 1:
            parts, source = halves(self.place.problem, parts[0]) or [], "halves"
        iterations = self.affordable() // max(2 * len(parts), 1) - 1
        if not parts or (iterations < _FEWEST_ITERATIONS and not isinstance(solver, Dense)):
            # That of A x, which came for nothing with the solve.
            return solution.noise, "" if solution.noise is None else "product"
        try:
            products = [self.place.with_batches([part]).linearize(Identity()).operator(x) for part in parts]
        except (RuntimeError, ValueError, TypeError, IndexError):
            if source == "batches":
                raise
            # Nobody has promised that the objective takes a batch of another size.
            return None, ""
        mean = tree.scale(1.0 / len(products), _total(products))
        if not isinstance(solver, Dense):
            solved = self.place.linearize(_rough(solver, iterations))
        squares = 0.0
        for product in products:
            squares += float(tree.norm(solved.solve(tree.sub(product, mean)).value)) ** 2
        count = len(parts)
        # Of a mean over all batches, whether or not all of them were looked at.
        error = math.sqrt(squares / (count - 1) / max(count, len(self.place.batches)))
        return error / float(tree.norm(x)), source


def _rough(solver: Solver, iterations: int) -> Solver:
    """The same method to a few percent."""
    if isinstance(solver, GMRES):
        return GMRES(min(iterations, _MOST_VECTORS), None, _NOISE_RTOL)
    kind = CG if isinstance(solver, CG) else MINRES
    return kind(min(iterations, _MOST_ITERATIONS), _NOISE_RTOL)


def _range(solutions: Sequence[Solution]) -> tuple[float, float] | None:
    """Smallest and largest eigenvalue estimate that solves have met; None where there is none."""
    ranges = [s.ritz_range for s in solutions if s.ritz_range is not None]
    if not ranges:
        return None
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _total(parts: Sequence[Params]) -> Params:
    total = parts[0]
    for part in parts[1:]:
        total = tree.add(total, part)
    return total


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def own_randomness(devices: Sequence[torch.device]) -> Iterator[None]:
    """What is drawn inside leaves the default generators as they were."""
    with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]):
        yield
