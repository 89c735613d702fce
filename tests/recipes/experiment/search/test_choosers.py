"""Samplers and pruners by name."""

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.search.choosers import PRUNERS, SAMPLERS, make_pruner, make_sampler

pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")


def test_each_name_is_one_of_optuna() -> None:
    assert {name: type(make_sampler(name, 2**63 + 1)).__name__ for name in SAMPLERS} == SAMPLERS
    assert {name: type(make_pruner(name)).__name__ for name in PRUNERS} == PRUNERS
    assert type(make_pruner(None)).__name__ == "NopPruner"
    assert type(make_sampler("optuna.samplers:CmaEsSampler", 0)).__name__ == "CmaEsSampler"
    assert type(make_pruner("optuna.pruners:NopPruner")).__name__ == "NopPruner"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tree", "--sampler: 'tree' is not of the form 'module:Class'.*; there are tpe, gp, random and module:Class"),
        ("optuna.samplers:Nothing", "has no 'Nothing'"),
        ("optuna.samplers:GridSampler", "--sampler: .*search_space"),
        ("random:Random", "--sampler: .*'seed'|is no BaseSampler of Optuna"),
    ],
)
def test_others_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sampler(name, 0)


def test_pruners_alike() -> None:
    with pytest.raises(ConfigError, match=r"--pruner: 'mean' is not of the form .*; there are median, halving"):
        make_pruner("mean")
    with pytest.raises(ConfigError, match=r"--pruner: .*PercentilePruner.*percentile"):
        make_pruner("optuna.pruners:PercentilePruner")
