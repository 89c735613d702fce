"""The trials of a search: a fixed set of pairs, log-uniform or on a grid, and the fields that they stand for."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.search.results import toml
from recipes.bissl.outcome.search.trials import RandomPairs, Trial, grid_around, rate_fields, with_pair
from tests.support.recipes.small_runs import SMALL_OPTIONS, small_config


def test_pairs_are_log_uniform_and_independent() -> None:
    trials = RandomPairs(trials=3000).all()
    rates, decays = [trial.lr for trial in trials], [trial.weight_decay for trial in trials]
    assert stats.kstest(rates, stats.loguniform(1e-4, 1.0).cdf).pvalue > 0.01
    assert stats.kstest(decays, stats.loguniform(1e-5, 1e-2).cdf).pvalue > 0.01
    assert abs(np.corrcoef(np.log(rates), np.log(decays))[0, 1]) < 0.05
    assert abs(np.corrcoef(np.log(rates[:-1]), np.log(rates[1:]))[0, 1]) < 0.05


def test_a_pair_is_a_function_of_seed_and_number() -> None:
    def uniform(seed: int, number: int, what: str) -> float:
        digest = hashlib.sha256(f"{seed}/search/{number}/{what}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    for seed, number in ((0, 0), (0, 199), (7, 3)):
        trial = RandomPairs(seed=seed).trial(number)
        assert math.log10(trial.lr) == pytest.approx(-4 + 4 * uniform(seed, number, "lr"), abs=1e-12)
        assert math.log10(trial.weight_decay) == pytest.approx(
            -5 + 3 * uniform(seed, number, "weight decay"), abs=1e-12
        )
    whole = RandomPairs().all()
    assert [trial.number for trial in whole] == list(range(200))
    assert len({(trial.lr, trial.weight_decay) for trial in whole}) == 200
    assert RandomPairs(trials=12).all() == whole[:12]
    assert RandomPairs(seed=1).all()[0] != whole[0]


def test_the_grid_is_even_on_a_logarithmic_scale() -> None:
    trials = grid_around((0.03, 0.001), side=5, factor=2.0)
    rates, decays = np.geomspace(0.03 / 4, 0.03 * 4, 5), np.geomspace(0.001 / 4, 0.001 * 4, 5)
    found = np.array([(trial.lr, trial.weight_decay) for trial in trials])
    np.testing.assert_allclose(found, [(rate, decay) for rate in rates for decay in decays], rtol=1e-12)
    assert [trial.number for trial in trials] == list(range(25))


@pytest.mark.parametrize(
    ("arm", "stage", "fields"),
    [
        ("bissl", "finetune", {"finetune": {"lr": 0.5, "weight_decay": 1e-05}}),
        ("baseline", "finetune", {"finetune": {"baseline_lr": 0.5, "baseline_weight_decay": 1e-05}}),
        ("scratch", "finetune", {"finetune": {"scratch_lr": 0.5, "scratch_weight_decay": 1e-05}}),
        (
            "bissl",
            "head",
            {
                "head": {"lr": 0.5, "weight_decay": 1e-05},
                "bissl": {"upper_lr": 0.5, "upper_weight_decay": 1e-05},
            },
        ),
    ],
)
def test_a_pair_reaches_the_fields_of_its_arm(tmp_path: Path, arm: Any, stage: Any, fields: dict[str, Any]) -> None:
    config = with_pair(small_config(), Trial(0, 0.5, 1e-5), stage, arm)
    if stage == "finetune":
        assert config.finetune.rates(arm) == (0.5, 1e-5)
        assert arm == "bissl" or config.finetune.rates("bissl") == small_config().finetune.rates("bissl")
    named = {section: {rate: 0.5, decay: 1e-5} for section, rate, decay in rate_fields(stage, arm)}
    assert named == fields
    (tmp_path / "chosen.toml").write_text(toml(named, comment="x"))
    assert parse([*SMALL_OPTIONS, "--config", str(tmp_path / "chosen.toml")]).config == config
