"""What the report's drawings take from the events of a stage."""

import math

import numpy as np

from recipes.bissl.outcome.stage_curves import _last_solves
from recipes.experiment.records import curves


def test_the_last_solve_of_each_seed_over_its_iterations() -> None:
    def solve(seed: int, step: int, curve: list[float | None] | None) -> dict[str, object]:
        rest = {} if curve is None else {"residual_curve": curve}
        return {"stage": "bissl", "variant": "a", "seed": seed, "event": "upper", "step": step, "residual": 9.0, **rest}

    # An empty curve is that of a method without iterations, none at all that of a step without a solve.
    rows = [solve(0, 1, [0.5]), solve(0, 2, [0.5, None, 0.1]), solve(0, 3, []), solve(0, 4, None), solve(1, 1, [0.2])]
    by_seed = curves(_last_solves(rows), "residual", x="iteration")["a"]
    np.testing.assert_array_equal(by_seed[0].x, [1, 2, 3])
    np.testing.assert_array_equal(by_seed[0].y, [0.5, math.nan, 0.1])
    np.testing.assert_array_equal(by_seed[1].y, [0.2])
