"""The limited-memory BFGS preconditioner that directions of earlier systems make."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Status
from bilevel.linear import Diagonal, Escalating, Solver
from bilevel.linear.quasi_newton import QuasiNewton, loaded_pairs, saved_pairs
from tests.bilevel.linear.test_recycling import SIZE, error, random_right, spd, split
from tests.support.cases import dense, joined


def pairs_of(matrix: Tensor, count: int, *, conjugate: bool = False) -> list[tuple[Params, Params]]:
    directions: list[Tensor] = []
    for vector in random_right(count, seed=5):
        if conjugate:
            for p in directions:
                vector = vector - (p @ matrix @ vector) / (p @ matrix @ p) * p
        directions.append(vector)
    return [(split(p), split(matrix @ p)) for p in directions]


def as_matrix(inverse: QuasiNewton) -> Tensor:
    return torch.stack([joined(inverse(split(unit))) for unit in torch.eye(SIZE, dtype=torch.float64)], dim=1)


def test_it_is_the_formula() -> None:
    pairs = pairs_of(spd(), 4)
    flat = [(joined(p), joined(q)) for p, q in pairs]
    eye = torch.eye(SIZE, dtype=torch.float64)
    expected = max(float(p @ q / (q @ q)) for p, q in flat) * eye
    for p, q in flat:
        rho = 1.0 / (p @ q)
        v = eye - rho * torch.outer(p, q)
        expected = v @ expected @ v.T + rho * torch.outer(p, p)
    assert torch.allclose(as_matrix(QuasiNewton(pairs)), expected, rtol=1e-10, atol=1e-12)


def test_it_is_positive_definite_and_inverts_what_it_has_met() -> None:
    matrix = spd()
    for conjugate in (False, True):
        pairs = pairs_of(matrix, 5, conjugate=conjugate)
        inverse = QuasiNewton(pairs)
        assert float(torch.linalg.eigvalsh(as_matrix(inverse)).min()) > 0.0
        for p, q in pairs if conjugate else pairs[-1:]:
            assert torch.allclose(joined(inverse(q)), joined(p), rtol=1e-8, atol=1e-10)


def test_all_directions_of_the_space_make_the_inverse() -> None:
    matrix = spd()
    inverse = QuasiNewton(pairs_of(matrix, SIZE, conjugate=True))
    assert torch.allclose(as_matrix(inverse) @ matrix, torch.eye(SIZE, dtype=torch.float64), atol=1e-7)


def drifting(number: int) -> Tensor:
    """Systems with a few large eigenvalues, which change a little from one to the next."""
    generator = torch.Generator().manual_seed(3)
    outliers = torch.linalg.qr(torch.randn(SIZE, 4, generator=generator, dtype=torch.float64))[0]
    change = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(100 + number), dtype=torch.float64)
    base = torch.eye(SIZE, dtype=torch.float64) + outliers @ torch.diag(torch.tensor([40.0, 30, 20, 10]).double()) @ (
        outliers.T
    )
    return base + 0.002 * (change + change.T)


def solved_in_turn(solver: Solver, systems: int) -> list[int]:
    """Iterations a system, each with a right-hand side of its own."""
    memory: dict[str, Any] = {}
    spent = []
    for number in range(systems):
        matrix, b = drifting(number), random_right(1, seed=50 + number)[0]
        operator = dense(matrix, split)
        state = solver.prepare(operator)
        solver.remember(state, memory)
        solution = solver.solve(operator, split(b), state=state)
        assert solution.status is Status.CONVERGED
        assert error(solution, matrix, b) < 1e-4
        assert solution.num_hvps == len(operator.asked)
        memory = solver.memory_of(state)
        spent.append(solution.iterations)
    return spent


def test_later_systems_take_fewer_iterations_and_their_answers_are_right() -> None:
    for wrapped in (False, True):
        solver: Any = CG(40, 1e-6, memory=8)
        remembering = solved_in_turn(Escalating(solver) if wrapped else solver, 4)
        forgetting = solved_in_turn(CG(40, 1e-6), 4)
        assert remembering[0] == forgetting[0]
        assert all(few < many for few, many in zip(remembering[1:], forgetting[1:], strict=True))


def test_the_memory_is_bounded_and_the_latest_stay() -> None:
    operator, solver = dense(spd(), split), CG(12, None, memory=3)
    state = solver.prepare(operator)
    assert solver.memory_of(state) == {}
    solver.solve(operator, split(random_right(1)[0]), state=state)
    memory = solver.memory_of(state)
    assert list(memory) == ["0", "1", "2"]
    asked = operator.asked[-3:]
    for kept, direction in zip(memory.values(), asked, strict=True):
        assert torch.equal(joined(kept["direction"]), direction)
    assert CG(12, None).memory_of(CG(12, None).prepare(operator)) == {}


def test_later_right_hand_sides_of_a_system_profit_too() -> None:
    matrix = drifting(0)
    operator, solver = dense(matrix, split), CG(40, 1e-6, memory=12)
    assert solver.learns
    state, spent = solver.prepare(operator), []
    for b in random_right(4):
        found = solver.solve(operator, split(b), state=state)
        assert error(found, matrix, b) < 1e-4
        spent.append(found.iterations)
    alone = [CG(40, 1e-6).solve(operator, split(b)).iterations for b in random_right(4)]
    assert spent[0] == alone[0]
    assert all(few < many for few, many in zip(spent[1:], alone[1:], strict=True))


@pytest.mark.parametrize("change", ["names", "shapes", "dtype"])
def test_a_memory_of_other_variables_is_dropped(change: str) -> None:
    pairs = saved_pairs(pairs_of(spd(), 2))
    b = split(random_right(1)[0])
    assert [joined(p).tolist() for p, _ in loaded_pairs(pairs, b)] == [
        joined(entry["direction"]).tolist() for entry in pairs.values()
    ]
    other = {
        "names": {"c": b["a"], "b": b["b"]},
        "shapes": {"a": b["a"].reshape(5, 3), "b": b["b"]},
        "dtype": {name: leaf.float() for name, leaf in b.items()},
    }[change]
    assert loaded_pairs(pairs, other) == []


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="CG: memory must be a whole number of at least 0, got -1"):
        CG(memory=-1)
    with pytest.raises(ValueError, match=r"layerwise=True .* memory=2"):
        CG(memory=2, layerwise=True)
    with pytest.raises(ValueError, match="memory=2 makes a preconditioner of its own"):
        CG(memory=2, preconditioner=Diagonal())
