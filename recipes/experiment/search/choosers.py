"""Optuna's samplers and pruners by name, for searches whose trials follow from those before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..plugins import PluginError, resolve
from .storage import load_optuna

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler", "random": "RandomSampler"}
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}


def make_sampler(name: str, seed: int) -> BaseSampler:
    """The sampler of that name, one of `SAMPLERS` or ``module:Class``, with this seed.

    Raises:
        ConfigError: there is none, or it cannot be made with a seed alone.
    """
    samplers = load_optuna().samplers
    return _made("--sampler", name, samplers, SAMPLERS, samplers.BaseSampler, {"seed": seed % 2**32})


def make_pruner(name: str | None) -> BasePruner:
    """The pruner of that name, one of `PRUNERS` or ``module:Class``; None: one that gives no trial up.

    Raises:
        ConfigError: there is none, or it cannot be made without arguments.
    """
    pruners = load_optuna().pruners
    if name is None:
        return pruners.NopPruner()
    return _made("--pruner", name, pruners, PRUNERS, pruners.BasePruner, {})


def _made(option: str, name: str, package: Any, known: dict[str, str], base: type, arguments: dict[str, Any]) -> Any:
    try:
        kind = getattr(package, known[name]) if name in known else resolve(name)
        made = kind(**arguments)
    except (PluginError, TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{option}: {error}; there are {', '.join(known)} and module:Class") from error
    if not isinstance(made, base):
        raise ConfigError(f"{option}: {name!r} is no {base.__name__} of Optuna; there are {', '.join(known)}")
    return made
