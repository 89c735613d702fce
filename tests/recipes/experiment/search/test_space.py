"""What a search tries: distributions of fields, draws that are a function of seed and number, grids."""

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.search.space import Trial, draw, grid, log_uniform, nested, parse_space, probes, quantile

pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")


def space() -> dict[str, Any]:
    return {"rate": log_uniform(1e-4, 1.0), "decay_of_weights": log_uniform(1e-5, 1e-2)}


def test_a_value_is_a_function_of_seed_number_and_field() -> None:
    def uniform(seed: int, number: int, what: str) -> float:
        digest = hashlib.sha256(f"{seed}/search/{number}/{what}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    for seed, number in ((0, 0), (0, 199), (7, 3)):
        values = draw(space(), 200, seed)[number].values
        assert math.log10(values["rate"]) == pytest.approx(-4 + 4 * uniform(seed, number, "rate"), abs=1e-12)
        expected = -5 + 3 * uniform(seed, number, "decay of weights")
        assert math.log10(values["decay_of_weights"]) == pytest.approx(expected, abs=1e-12)
    whole = draw(space(), 200, 0)
    assert [trial.number for trial in whole] == list(range(200))
    assert len({tuple(trial.values.values()) for trial in whole}) == 200
    assert draw(space(), 12, 0) == whole[:12]
    assert draw(space(), 1, 1)[0] != whole[0]


def test_fields_are_independent() -> None:
    trials = draw(space(), 3000, 0)
    rates, decays = (np.log([trial.values[field] for trial in trials]) for field in space())
    assert abs(np.corrcoef(rates, decays)[0, 1]) < 0.05
    assert abs(np.corrcoef(rates[:-1], rates[1:])[0, 1]) < 0.05


def test_quantiles_of_a_log_uniform() -> None:
    between = log_uniform(1e-4, 1.0)
    assert [quantile(between, u) for u in (0.0, 0.25, 0.5)] == pytest.approx([1e-4, 1e-3, 1e-2], rel=1e-12)
    assert quantile(between, 1.0) == 1.0
    assert quantile(log_uniform(0.3, 0.3), 0.7) == 0.3
    for low, high in ((1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="needs 0 < LOW <= HIGH, got"):
            log_uniform(low, high)


def test_quantiles_of_the_other_forms() -> None:
    found = parse_space(["a=uniform:-1:3", "b=int:1:4", "c=logint:1:100", "d=choice:x,2,0.5,true,null"])
    shares = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert [quantile(found["a"], u) for u in shares] == pytest.approx([-1.0, -0.6, 0.2, 1.0, 1.8, 2.6, 3.0])
    assert [quantile(found["b"], u) for u in (0.0, 0.24, 0.26, 0.6, 0.76, 1.0)] == [1, 1, 2, 3, 4, 4]
    # 100.5 / 0.5 = 201: a share u lies below 0.5 * 201^u.
    assert [quantile(found["c"], u) for u in shares] == [1, 1, 2, 7, 20, 59, 100]
    assert [quantile(found["d"], u) for u in shares] == ["x", "x", 2, 0.5, True, None, None]
    assert [type(quantile(found[name], 0.5)) for name in "abc"] == [float, int, int]
    assert probes(found["d"]) == ["x", 2, 0.5, True, None]
    assert probes(found["b"]) == [1, 4, 2]


def test_each_integer_is_drawn_as_often() -> None:
    numbers = [trial.values["n"] for trial in draw(parse_space(["n=int:1:4"]), 4000, 0)]
    counts = [numbers.count(n) for n in (1, 2, 3, 4)]
    # Four standard deviations of a binomial count.
    assert all(abs(count - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for count in counts)


def test_a_grid_is_every_combination() -> None:
    within, found = grid({"a": [1.0, 2.0], "b": [3.0, 4.0, 5.0]})
    assert found == [
        Trial(number, {"a": a, "b": b}) for number, (a, b) in enumerate(itertools.product((1.0, 2.0), (3.0, 4.0, 5.0)))
    ]
    assert {field: (quantile(d, 0.0), quantile(d, 1.0)) for field, d in within.items()} == {"a": (1, 2), "b": (3, 5)}


def test_dotted_names_are_nested_tables() -> None:
    assert nested({"a.b": 1, "a.c.d": None, "e": "x"}) == {"a": {"b": 1, "c": {"d": None}}, "e": "x"}


def test_hyphens_are_taken_for_underscores() -> None:
    assert list(parse_space(["part.some-rate=log:0.1:1"])) == ["part.some_rate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a"], "needs FIELD=FORM, such as .*, got 'a'"),
        (["=log:1:2"], "needs FIELD=FORM"),
        (["a..b=log:1:2"], "needs FIELD=FORM"),
        (["a=log:1:2", "a=log:1:3"], "a is given twice"),
        (["a=choice:1,2", "a.b=choice:1,2"], r"a\.b lies within a"),
        (["a=log:0:2"], "--space a=log:0:2: needs 0 < LOW <= HIGH, got 0 2; forms are log:LOW:HIGH, "),
        (["a=log:1"], "is of no known form"),
        (["a=normal:0:1"], "is of no known form"),
        (["a=log:x:1"], "could not convert string to float: 'x'"),
        (["a=uniform:2:1"], "needs LOW <= HIGH, got 2 1"),
        (["a=uniform:0:inf"], "needs LOW <= HIGH, got 0 inf"),
        (["a=uniform:nan:1"], "needs LOW <= HIGH, got nan 1"),
        (["a=int:1.5:2"], "invalid literal for int"),
        (["a=int:3:2"], "needs LOW <= HIGH, got 3 2"),
        (["a=logint:0:2"], "needs 1 <= LOW <= HIGH, got 0 2"),
        (["a=choice:"], "needs choices, each once"),
        (["a=choice:1,1"], "needs choices, each once"),
        (["a=choice:[]"], "needs choices that are text, numbers, true, false or null"),
    ],
)
def test_bad_spaces_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(options)
