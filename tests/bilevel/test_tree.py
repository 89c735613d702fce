"""Arithmetic on trees against the same arithmetic on one numpy vector."""

import itertools
import math
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from bilevel import Params, tree
from tests.support.cases import joined

SHAPES = {"matrix": (2, 3), "scalar": (), "empty": (0, 4), "vector": (5,)}


def sample(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def array(x: Params) -> np.ndarray:
    return np.concatenate([leaf.numpy().reshape(-1) for leaf in x.values()])


X, Y = sample(0), sample(1)


@pytest.mark.parametrize(
    ("result", "reference"),
    [
        (tree.add(X, Y), array(X) + array(Y)),
        (tree.sub(X, Y), array(X) - array(Y)),
        (tree.scale(-2.5, X), -2.5 * array(X)),
        (tree.scale(torch.tensor(3.0), X), 3.0 * array(X)),
        (tree.axpy(0.5, X, Y), 0.5 * array(X) + array(Y)),
        (tree.axpy(torch.tensor(-1.5, dtype=torch.float64), X, Y), -1.5 * array(X) + array(Y)),
        (tree.zeros_like(X), np.zeros(12)),
    ],
)
def test_arithmetic(result: Params, reference: np.ndarray) -> None:
    assert list(result) == list(SHAPES)
    assert [leaf.shape for leaf in result.values()] == [leaf.shape for leaf in X.values()]
    np.testing.assert_allclose(array(result), reference, rtol=1e-15)


def test_coefficients_per_leaf() -> None:
    alpha = {name: torch.tensor(float(k), dtype=torch.float64) for k, name in enumerate(SHAPES)}
    factors = np.repeat([0.0, 1.0, 2.0, 3.0], [6, 1, 0, 5])
    np.testing.assert_allclose(array(tree.scale(alpha, X)), factors * array(X))
    np.testing.assert_allclose(array(tree.axpy(alpha, X, Y)), factors * array(X) + array(Y))


def test_a_tensor_coefficient_keeps_each_dtype_and_its_own_derivative() -> None:
    mixed = {"half": torch.tensor([3.0, -1.0], dtype=torch.bfloat16), "single": torch.tensor(2.0)}
    mixed["double"] = torch.ones(3, dtype=torch.float64)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    result = tree.scale(alpha, mixed)
    assert [leaf.dtype for leaf in result.values()] == [torch.bfloat16, torch.float32, torch.float64]
    assert [leaf.tolist() for leaf in result.values()] == [[1.5, -0.5], 1.0, [0.5, 0.5, 0.5]]
    total = torch.stack([leaf.sum().double() for leaf in result.values()]).sum()
    assert float(torch.autograd.grad(total, alpha)[0]) == 3.0 - 1.0 + 2.0 + 3.0


def test_products_and_norms() -> None:
    assert float(tree.dot(X, Y)) == pytest.approx(array(X) @ array(Y), rel=1e-14)
    assert float(tree.norm(X)) == pytest.approx(np.linalg.norm(array(X)), rel=1e-14)
    per_leaf = {name: float(value) for name, value in tree.leaf_dots(X, Y).items()}
    assert per_leaf == pytest.approx({name: float((X[name] * Y[name]).sum()) for name in SHAPES}, rel=1e-14)
    assert tree.size(X) == 12


def test_order_of_the_second_argument_does_not_matter() -> None:
    turned = {name: Y[name] for name in reversed(SHAPES)}
    for function in (tree.add, tree.sub):
        np.testing.assert_array_equal(array(function(X, turned)), array(function(X, Y)))
    assert tree.dot(X, turned) == tree.dot(X, Y)


def test_nothing_is_written() -> None:
    x, y = sample(0), sample(1)
    results = [tree.axpy(2.0, x, y), tree.scale(2.0, x), tree.add(x, y), tree.sub(x, y)]
    assert tree.power_of_two(x) > 0.0
    for leaf in itertools.chain.from_iterable(result.values() for result in results):
        leaf.zero_()
    assert all(torch.equal(x[name], X[name]) and torch.equal(y[name], Y[name]) for name in SHAPES)


def test_the_empty_tree() -> None:
    for result in (
        tree.add({}, {}),
        tree.sub({}, {}),
        tree.scale(2.0, {}),
        tree.axpy(2.0, {}, {}),
        tree.zeros_like({}),
    ):
        assert result == {}
    assert float(tree.dot({}, {})) == float(tree.norm({})) == tree.power_of_two({}) == 0.0
    assert tree.all_finite({})
    assert tree.flatten({}).shape == (0,)
    assert tree.gradients(torch.zeros((), requires_grad=True), {}) == {}


def test_flatten_and_its_inverse() -> None:
    np.testing.assert_array_equal(tree.flatten(X).numpy(), array(X))
    back = tree.unflatten(tree.flatten(X), X)
    assert all(torch.equal(back[name], X[name]) for name in SHAPES)
    mixed = {"half": torch.ones(2, dtype=torch.float32), "whole": torch.ones(2, dtype=torch.float64)}
    assert [leaf.dtype for leaf in tree.unflatten(tree.flatten(mixed), mixed).values()] == [
        torch.float32,
        torch.float64,
    ]


def test_the_widest_dtype_is_what_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree.wide(torch.ones(2)).dtype == torch.float64
    assert [tree.widest(torch.device(name)) for name in ("cuda", "mps")] == [torch.float64, torch.float32]
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        about = SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, about=about: about)
        assert tree.widest(torch.device("xpu")) == dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite(bad: float) -> None:
    assert tree.all_finite(X)
    broken = sample(0)
    broken["scalar"].fill_(bad)
    assert not tree.all_finite(broken)


def test_finite_numbers_whose_squares_overflow_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        large = {"a": torch.full((4,), torch.finfo(dtype).max, dtype=dtype)}
        assert not tree.norm(large).isfinite()
        assert tree.all_finite(large)


def test_variables_with_gradients_are_read_without_a_warning() -> None:
    # The suite makes errors of warnings, and torch warns once a process.
    torch.set_warn_always(True)
    try:
        assert tree.all_finite({"a": torch.ones(2, requires_grad=True)})
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_power_of_two_brackets_the_norm(dtype: torch.dtype) -> None:
    limit = math.frexp(torch.finfo(dtype).max)[1] - 3
    for exponent in (-limit, -3, 0, 5, limit - 3):
        x = {
            "a": torch.tensor([3.0, 0.0], dtype=dtype) * 2.0**exponent,
            "b": torch.tensor(4.0, dtype=dtype) * 2.0**exponent,
        }
        assert tree.power_of_two(x) == 4.0 * 2.0**exponent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.smallest_normal / 4, info.smallest_normal, info.max):
        x = {"a": torch.full((3,), value, dtype=dtype)}
        power = tree.power_of_two(x)
        unit = tree.scale(1.0 / power, x)["a"]
        assert math.frexp(power)[0] == 0.5
        assert torch.isfinite(unit).all()
        assert (unit * unit > 0.0).all()
        assert torch.isfinite(tree.norm({"a": unit}))
    assert tree.power_of_two({"a": torch.zeros(3), "b": torch.zeros(0)}) == 0.0


def test_variables_share_storage_and_not_history() -> None:
    w = torch.ones(3, requires_grad=True)
    x = {"w": w * 2.0}
    detached, variables = tree.detach(x), tree.as_variables(x)
    assert detached["w"].data_ptr() == variables["w"].data_ptr() == x["w"].data_ptr()
    assert not detached["w"].requires_grad
    assert variables["w"].requires_grad
    assert variables["w"].is_leaf


def test_gradients_of_unused_variables_are_zero() -> None:
    x = tree.as_variables({"used": torch.ones(2), "unused": torch.ones(3), "scalar": torch.tensor(2.0)})
    loss = (x["used"] ** 2).sum() * x["scalar"]
    found = tree.gradients(loss, x, create_graph=True)
    torch.testing.assert_close(found["used"], 4.0 * torch.ones(2))
    assert not found["unused"].any()
    assert float(found["scalar"].detach()) == 2.0
    assert found["used"].requires_grad
    constant = tree.gradients(torch.tensor(1.0), x)
    assert not joined(constant).any()


def test_gradients_keep_a_nan() -> None:
    x = tree.as_variables({"w": torch.tensor([1.0, -1.0])})
    assert tree.gradients(x["w"].sqrt().sum(), x)["w"].isnan().tolist() == [False, True]


def test_tensors_in_nested_batches() -> None:
    a, b, c, d, e = (torch.tensor(float(k)) for k in range(5))
    pair = namedtuple("pair", ["left", "right"])

    @dataclass
    class Batch:
        image: torch.Tensor
        label: Any = None

    batch = {"x": a, "rest": [b, (c, "text", 3)], "pair": pair(d, None), "batch": Batch(e)}
    assert [float(t) for t in tree.tensors_in(batch)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert list(tree.tensors_in(Batch)) == []


class Measured(NamedTuple):
    value: torch.Tensor
    unit: str = "m"


@dataclass(frozen=True)
class Counted:
    rows: torch.Tensor
    name: str = "a"
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.rows))


def test_map_tensors_keeps_the_kind_of_every_container() -> None:
    one = torch.ones(3)
    batch = {"list": [one, 2.0], "tuple": (one,), "named": Measured(one), "size": one.shape, "kind": Counted}
    found = tree.map_tensors(lambda tensor: 2.0 * tensor[:2], batch | {"data": Counted(one, "b")})
    data = found.pop("data")
    assert (type(data), data.name, data.count, data.rows.tolist()) == (Counted, "b", 2, [2.0, 2.0])
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in batch.items()}
    assert (found["named"].unit, found["list"][1], found["size"], found["kind"]) == ("m", 2.0, (3,), Counted)
    for tensor in (found["list"][0], found["tuple"][0], found["named"].value):
        assert tensor.tolist() == [2.0, 2.0]
    assert one.tolist() == [1.0, 1.0, 1.0]


class Attributed(OrderedDict[str, Any]):
    """Items are attributes too, beside others."""

    unit = "m"

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def test_map_tensors_keeps_kinds_of_dicts_and_makes_dicts_of_other_mappings() -> None:
    given = Attributed(one=torch.ones(3), size=2)
    given.unit = "s"
    found = tree.map_tensors(lambda tensor: 2.0 * tensor, given)
    assert (type(found), found.unit, found.size, found.one.tolist()) == (Attributed, "s", 2, [2.0] * 3)
    assert given.one.tolist() == [1.0] * 3
    counts = tree.map_tensors(lambda tensor: tensor, defaultdict(list, a=torch.ones(1)))
    assert (type(counts), counts["none"]) == (defaultdict, [])
    assert type(tree.map_tensors(lambda tensor: tensor, MappingProxyType({"a": torch.ones(1)}))) is dict


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([torch.ones(1)], "upper must be a dict"),
        ({"w": 1.0}, r"upper\['w'\] must be a tensor"),
        ({3: torch.ones(1)}, r"upper\[3\] must be a tensor"),
        ({"w": torch.ones(1, dtype=torch.int64)}, r"upper\['w'\] must be real floating point"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, r"upper\['w'\] must be real floating point"),
        ({"w": torch.ones(1).to(torch.float8_e5m2)}, r"upper\['w'\] must have at least 16 bits.*keep.*in float32"),
        (
            {"w": torch.eye(2).to_sparse_coo()},
            r"upper\['w'\] must be a dense tensor, got layout torch.sparse_coo.*to_dense",
        ),
        ({"w": torch.eye(2).to_mkldnn()}, r"upper\['w'\] must be a dense tensor, got layout torch._mkldnn.*to_dense"),
        (
            {"w": torch.nested.nested_tensor([torch.ones(1)])},
            r"upper\['w'\] must be a dense tensor, got a nested tensor",
        ),
        ({"w": nn.LazyLinear(1).weight}, r"upper\['w'\] has no shape yet.*call the module once"),
    ],
)
def test_params_are_checked_by_name(value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        tree.check_params("upper", value)
    tree.check_params("upper", {"w": torch.ones(1)})
