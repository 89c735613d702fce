"""The trials of a search: log-uniform or on a grid, and a function of seed and number."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from recipes.experiment.search.trials import LogUniform, Trial, draw, grid

SPACE = {"rate": LogUniform(1e-4, 1.0), "decay_of_weights": LogUniform(1e-5, 1e-2)}


def test_a_value_is_a_function_of_seed_number_and_field() -> None:
    def uniform(seed: int, number: int, what: str) -> float:
        digest = hashlib.sha256(f"{seed}/search/{number}/{what}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    for seed, number in ((0, 0), (0, 199), (7, 3)):
        values = draw(SPACE, 200, seed)[number].values
        assert math.log10(values["rate"]) == pytest.approx(-4 + 4 * uniform(seed, number, "rate"), abs=1e-12)
        expected = -5 + 3 * uniform(seed, number, "decay of weights")
        assert math.log10(values["decay_of_weights"]) == pytest.approx(expected, abs=1e-12)
    whole = draw(SPACE, 200, 0)
    assert [trial.number for trial in whole] == list(range(200))
    assert len({tuple(trial.values.values()) for trial in whole}) == 200
    assert draw(SPACE, 12, 0) == whole[:12]
    assert draw(SPACE, 1, 1)[0] != whole[0]


def test_fields_are_independent() -> None:
    trials = draw(SPACE, 3000, 0)
    rates, decays = (np.log([trial.values[field] for trial in trials]) for field in SPACE)
    assert abs(np.corrcoef(rates, decays)[0, 1]) < 0.05
    assert abs(np.corrcoef(rates[:-1], rates[1:])[0, 1]) < 0.05


def test_quantiles_of_a_log_uniform() -> None:
    between = LogUniform(1e-4, 1.0)
    assert [between.quantile(u) for u in (0.0, 0.25, 0.5)] == pytest.approx([1e-4, 1e-3, 1e-2], rel=1e-12)
    assert between.quantile(1.0) == 1.0
    assert LogUniform(0.3, 0.3).quantile(0.7) == 0.3
    for low, high in ((1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="needs 0 < LOW <= HIGH, got"):
            LogUniform(low, high)


def test_a_grid_is_every_combination() -> None:
    found = grid({"a": [1.0, 2.0], "b": [3.0, 4.0, 5.0]})
    assert found == [
        Trial(number, {"a": a, "b": b}) for number, (a, b) in enumerate(itertools.product((1.0, 2.0), (3.0, 4.0, 5.0)))
    ]
