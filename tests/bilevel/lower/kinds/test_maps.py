"""Proximal maps and projections: the right point, the right derivative on the active set, distances from the kinks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel import Params
from bilevel.lower import L1, Box, ByName, ElasticNet, GroupL1, LinearEqualities, NonNegative, ProximalMap, Simplex
from tests.support.kinds.problems import draw, f64

STEP = 0.4
LABELS = torch.tensor([0, 1, 0, 2, 1, 2])
MATRIX = draw(2, 6, seed=8)

# A map, and h of which it is the proximal map (None: the set is met otherwise below).
PENALTIES: dict[str, tuple[ProximalMap, Callable[[Tensor], Tensor]]] = {
    "L1": (L1(0.7), lambda y: 0.7 * y.abs().sum()),
    "L1 by entry": (L1(f64(0.1, 2.0, 0.0, 1.0, 0.5, 3.0)), lambda y: f64(0.1, 2.0, 0.0, 1.0, 0.5, 3.0) @ y.abs()),
    "elastic net": (ElasticNet(0.7, 0.5), lambda y: 0.7 * y.abs().sum() + 0.25 * y.square().sum()),
    "one group": (GroupL1(1.5), lambda y: 1.5 * y.norm()),
    "groups": (
        GroupL1(1.5, LABELS),
        lambda y: 1.5 * sum((y[torch.eq(LABELS, g)].norm() for g in range(3)), f64(0.0)[0]),
    ),
}
SETS: dict[str, ProximalMap] = {
    "box": Box(-0.3, 0.8),
    "box by entry": Box(f64(-1, -1, 0, 0, 0.5, -2), f64(0, 0.2, 1, 1, 0.6, 2)),
    "bounded below": Box(low=0.1),
    "bounded above": Box(high=0.1),
    "non-negative": NonNegative(),
    "simplex": Simplex(),
    "simplex of another size": Simplex(2.5),
    "equalities": LinearEqualities(MATRIX, f64(0.5, -1.0)),
}


def image(one: ProximalMap, z: Tensor) -> Tensor:
    return one({"y": z}, STEP)["y"]


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_proximal_map_minimises(name: str, seed: int) -> None:
    one, penalty = PENALTIES[name]
    z = draw(6, seed=seed)
    y = image(one, z)

    def value(point: Tensor) -> float:
        return float(penalty(point) + (point - z).square().sum() / (2.0 * STEP))

    for trial in range(40):
        assert value(y) <= value(y + 10.0 ** -(1 + trial % 4) * draw(6, seed=1000 + trial)) + 1e-12
    # Along the way from 0 too, where the penalties have their kinks.
    assert value(y) <= min(value(share * y) for share in (0.0, 0.5, 0.9, 1.1)) + 1e-12


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_a_projection_is_in_the_set_and_nearest(name: str, seed: int) -> None:
    one, z = SETS[name], 2.0 * draw(6, seed=seed)
    y = image(one, z)
    assert torch.allclose(image(one, y), y, atol=1e-14), "a point of the set stays"
    for trial in range(40):
        other = image(one, 2.0 * draw(6, seed=1000 + trial))
        assert float((z - y) @ (other - y)) <= 1e-12


def test_the_sets_are_those_that_are_meant() -> None:
    z = f64(-2.0, 0.3, 0.9, 0.31, 5.0, 0.0)
    assert torch.equal(image(Box(-0.3, 0.8), z), f64(-0.3, 0.3, 0.8, 0.31, 0.8, 0.0))
    assert torch.equal(image(NonNegative(), z), f64(0.0, 0.3, 0.9, 0.31, 5.0, 0.0))
    assert torch.allclose(image(Simplex(), f64(0.5, 0.4, -1.0)), f64(0.55, 0.45, 0.0), atol=1e-15)
    y = image(LinearEqualities(MATRIX, f64(0.5, -1.0)), z)
    assert torch.allclose(MATRIX @ y, f64(0.5, -1.0), atol=1e-14)


@pytest.mark.parametrize("name", [*PENALTIES, *SETS])
@pytest.mark.parametrize("seed", range(3))
def test_derivatives_are_those_of_differences(name: str, seed: int) -> None:
    one = PENALTIES[name][0] if name in PENALTIES else SETS[name]
    z = draw(6, seed=seed)
    jacobian = torch.autograd.functional.jacobian(lambda point: image(one, point), z)
    assert isinstance(jacobian, Tensor)
    h = 1e-6
    columns = [(image(one, z + h * e) - image(one, z - h * e)) / (2.0 * h) for e in torch.eye(6, dtype=z.dtype)]
    assert torch.allclose(jacobian, torch.stack(columns, dim=1), atol=1e-8)


def test_the_derivative_of_a_simplex_is_known() -> None:
    z = f64(0.9, 0.8, -0.5, 0.1)
    y = image(Simplex(), z)
    support = (y > 0.0).double()
    assert support.tolist() == [1.0, 1.0, 0.0, 0.0]
    known = torch.diag(support) - torch.outer(support, support) / support.sum()
    jacobian = torch.autograd.functional.jacobian(lambda point: image(Simplex(), point), z)
    assert torch.allclose(jacobian, known, atol=1e-15)


@pytest.mark.parametrize(
    ("one", "z"),
    [
        (NonNegative(), f64(0.0, 1.0)),
        (Box(0.0, 1.0), f64(0.0, 1.0)),
        (L1(2.5), f64(1.0, -1.0)),
        (GroupL1(1.0), f64(0.0, 0.0)),
    ],
)
def test_at_a_kink_the_derivative_is_that_of_a_piece_and_the_distance_0(one: ProximalMap, z: Tensor) -> None:
    jacobian = torch.autograd.functional.jacobian(lambda point: image(one, point), z)
    assert torch.equal(jacobian, jacobian.round()), "0 or 1, no mean of both"
    distances = one.distances({"y": z}, STEP)["y"]
    assert float(distances.abs().min()) <= (0.4 if isinstance(one, GroupL1) else 0.0)


def test_parameters_that_depend_on_x_are_differentiated() -> None:
    z = f64(-1.0, 0.5, 2.0)
    cases: list[tuple[Callable[[Tensor], ProximalMap], Tensor]] = [
        (lambda x: Box(x, 10.0), f64(1.0, 0.0, 0.0)),
        (lambda x: Box(-10.0, x), f64(0.0, 1.0, 1.0)),
        (L1, STEP * f64(1.0, -1.0, -1.0)),
        (lambda x: Simplex(12.0 * x), f64(0.0, 6.0, 6.0)),
        (lambda x: LinearEqualities(torch.ones(1, 3, dtype=z.dtype), x.reshape(1)), f64(1, 1, 1) / 3.0),
        (lambda x: GroupL1(x), -STEP * z / z.norm()),
    ]
    for make, expected in cases:
        slope = torch.autograd.functional.jacobian(lambda x, make=make: image(make(x), z), f64(0.25)[0])
        assert torch.allclose(slope, expected, atol=1e-14), make


def test_a_simplex_of_each_row_and_groups_of_each_row() -> None:
    z = draw(4, 3, seed=1)
    rows = image(Simplex(f64(1.0, 2.0, 3.0, 4.0)), z)
    assert torch.allclose(rows.sum(1), f64(1.0, 2.0, 3.0, 4.0), atol=1e-14)
    assert torch.allclose(rows[1], image(Simplex(2.0), z[1]), atol=1e-15)
    shrunk = image(GroupL1(0.5), z)
    assert torch.allclose(shrunk[2], image(GroupL1(0.5), z[2]), atol=1e-15)


def test_by_name_and_parameters_by_name_leave_the_others() -> None:
    point = {"a": draw(3, seed=2), "b": draw(3, seed=3), "c": draw(2, seed=4)}
    both = ByName({"a": L1(0.5), "b": Simplex()})
    moved = both(point, STEP)
    assert list(moved) == list(point)
    assert torch.equal(moved["c"], point["c"])
    assert torch.equal(moved["a"], image(L1(0.5), point["a"]))
    assert torch.equal(L1({"a": 0.5})(point, STEP)["a"], moved["a"])
    for one in (L1({"a": 0.5}), Box({"a": 0.5}), GroupL1({"a": 0.5}), ElasticNet({"a": 0.5}, 1.0), Simplex({"a": 1.0})):
        assert torch.equal(one(point, STEP)["b"], point["b"])
        assert set(one.distances(point, STEP)) == {"a"}
    assert set(both.distances(point, STEP)) == {"a", "b"}
    assert LinearEqualities(MATRIX, 0.0).distances({"y": draw(6, seed=1)}, STEP) == {}


def test_float32_variables_stay_so() -> None:
    z = draw(6, seed=1).float()
    for one in [*(one for one, _ in PENALTIES.values()), *SETS.values()]:
        assert image(one, z).dtype == torch.float32


def test_equations_that_repeat_each_other_serve() -> None:
    twice = torch.cat([MATRIX, MATRIX])
    once = image(LinearEqualities(MATRIX, 1.0), draw(6, seed=1))
    assert torch.allclose(image(LinearEqualities(twice, 1.0), draw(6, seed=1)), once, atol=1e-13)


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no bound": (lambda: Box(), ValueError, "Box: low and high are both None"),
    "crossed bounds": (lambda: Box(2.0, 1.0), ValueError, "low=2 is above high=1"),
    "a bound that is a word": (lambda: Box("low"), TypeError, "Box: low must be a number or a tensor, got str"),  # type: ignore[arg-type]
    "a NaN": (lambda: Box(float("nan")), ValueError, "got nan"),
    "a negative weight": (lambda: L1(-1.0), ValueError, "L1: weight must be"),
    "a negative weight by name": (lambda: L1({"y": -1.0}), ValueError, r"L1: weight\['y'\] must be"),
    "a negative ridge": (lambda: ElasticNet(1.0, -1.0), ValueError, "ElasticNet: ridge must be"),
    "radius 0": (lambda: Simplex(0.0), ValueError, "Simplex: radius must be positive"),
    "a simplex of a number": (lambda: image(Simplex(), torch.tensor(1.0)), ValueError, "has no dimension to sum"),
    "labels that are no whole numbers": (lambda: GroupL1(1.0, f64(0.0, 1.0)), TypeError, "whole numbers"),
    "labels of another shape": (lambda: image(GroupL1(1.0, LABELS), f64(1.0)), ValueError, "groups has shape"),
    "a matrix that is a vector": (lambda: LinearEqualities(f64(1.0), 0.0), ValueError, "two dimensions"),
    "a matrix that is learnt": (
        lambda: LinearEqualities(MATRIX.clone().requires_grad_(), 0.0),
        ValueError,
        "matrix needs gradients",
    ),
    "columns": (lambda: image(LinearEqualities(MATRIX, 0.0), f64(1.0)), ValueError, "has 6 columns"),
    "contradicting equations": (
        lambda: LinearEqualities(torch.ones(2, 3, dtype=torch.float64), f64(0.0, 1.0)),
        ValueError,
        "contradict each other",
    ),
    "no maps": (lambda: ByName({}), ValueError, "maps is empty"),
    "a map that is none": (lambda: ByName({"y": 1.0}), TypeError, r"ByName: maps\['y'\]"),  # type: ignore[dict-item]
    "an unknown name": (lambda: ByName({"z": L1(1.0)})({"y": f64(1.0)}, STEP), ValueError, r"names \['z'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_refused_by_name(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_a_map_of_ones_own_has_no_kinks_unless_it_says_so() -> None:
    class Halved(ProximalMap):
        def __call__(self, point: Params, step: float) -> Params:
            return {name: 0.5 * leaf for name, leaf in point.items()}

    assert Halved().distances({"y": f64(1.0)}, STEP) == {}
    assert Halved().separable


def test_a_single_number_is_a_group_of_its_own() -> None:
    z = torch.tensor(2.0, dtype=torch.float64)
    y = image(GroupL1(0.5), z)
    assert y.shape == ()
    assert float(y) == pytest.approx(2.0 - STEP * 0.5)
    assert float(image(GroupL1(7.0), z)) == 0.0


def test_bounds_that_have_crossed_are_refused_with_their_number() -> None:
    low, high = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Box: 2 entries of low are above those of high for 'y'"):
        Box(low, high)({"y": torch.zeros(3, dtype=torch.float64)}, 0.1)
