"""What a search tries: pairs from the paper's ranges or on a grid, and the fields that they stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.search.presentation import toml
from recipes.bissl.outcome.search.space import decided, grid_around, random_pairs, with_values
from recipes.bissl.outcome.search.variant_search import Search
from recipes.experiment.search.queue import TrialQueue
from tests.support.recipes.small_runs import SMALL_OPTIONS, small_config


def test_pairs_fill_the_paper_s_ranges() -> None:
    trials = random_pairs(3000)
    rates, decays = ([trial.values[name] for trial in trials] for name in ("lr", "weight_decay"))
    assert stats.kstest(rates, stats.loguniform(1e-4, 1.0).cdf).pvalue > 0.01
    assert stats.kstest(decays, stats.loguniform(1e-5, 1e-2).cdf).pvalue > 0.01
    assert trials[:200] == random_pairs()


def test_the_paper_s_trials_stay_what_they_are() -> None:
    """A search goes on with the trials that it began with, also under a later version."""
    found = random_pairs()
    assert [trial.number for trial in found] == list(range(200))
    kept = {
        0: (0.00017640032163585175, 0.005738121063219924),
        1: (0.325529871780159, 0.008211036446025898),
        199: (0.37862220989451, 1.2098627531008655e-05),
    }
    for number, pair in kept.items():
        assert tuple(found[number].values.values()) == pytest.approx(pair, rel=1e-12)


def test_the_grid_is_even_on_a_logarithmic_scale() -> None:
    trials = grid_around((0.03, 0.001), side=5, factor=2.0)
    rates, decays = np.geomspace(0.03 / 4, 0.03 * 4, 5), np.geomspace(0.001 / 4, 0.001 * 4, 5)
    found = np.array([(trial.values["lr"], trial.values["weight_decay"]) for trial in trials])
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
    named = decided(stage, arm, {"lr": 0.5, "weight_decay": 1e-5})
    assert named == fields
    config = with_values(small_config(), named)
    if stage == "finetune":
        assert config.finetune.rates(arm) == (0.5, 1e-5)
        assert arm == "bissl" or config.finetune.rates("bissl") == small_config().finetune.rates("bissl")
    (tmp_path / "chosen.toml").write_text(toml(named, comment="x"))
    assert parse([*SMALL_OPTIONS, "--config", str(tmp_path / "chosen.toml")]).config == config


def test_the_image_cache_is_found_by_what_decides_the_images(tmp_path: Path) -> None:
    def cache(*options: str, images: str = "digest") -> Path:
        queue = TrialQueue(tmp_path / "search", (), 3.0)
        return Search(small_config(*options), tmp_path, "finetune", "bissl", queue).image_cache(images)

    folder = cache()
    assert cache("--data.pretext-limit=50", "--finetune.lr=0.5", "--data.root=other") == folder
    assert cache(images="another") != folder
    for option in ("--data.labels-per-class=2", "--data.split-seed=5", "--data.image-size=16"):
        assert cache(option) != folder
