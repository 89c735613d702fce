"""What can be known before a training, and how often a rule made of it says rightly whether the solve is worth it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.disagreement.model import Draws, Setting, direction_of, largest_curvature, times, train

Array = NDArray[np.floating[Any]]

LEAST_GAIN = 0.02
"""Share of the risk that a solve has to save to be worth anything."""


@dataclass(frozen=True)
class Measured:
    """A setting's outcome.

    Attributes:
        setting: its dials.
        gain: ln(risk with x = v) - ln(risk with x = A^-1 v), one a seed: above 0 the solve is better.
        signs: what is known beforehand, by name, one a seed.
    """

    setting: Setting
    gain: Array
    signs: Mapping[str, Array]

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Mean gain -+ 1.96 standard errors."""
        error = 1.96 * self.gain.std(ddof=1) / math.sqrt(len(self.gain))
        return float(self.gain.mean() - error), float(self.gain.mean() + error)

    @cached_property
    def worth(self) -> bool:
        """Whether the solve saves at least that share, and its interval is above 0."""
        return bool(self.gain.mean() >= -math.log1p(-LEAST_GAIN) and self.interval[0] > 0.0)

    @property
    def harmful(self) -> bool:
        """Whether it costs at least that share, and its interval is below 0."""
        return bool(self.gain.mean() <= math.log1p(-LEAST_GAIN) and self.interval[1] < 0.0)


TRIALS = {"trial of 1": 1, "trial of 5": 5, "both trained": None}
"""Alternations of a trial, by name; None for all."""


def signs_of(draws: Draws) -> dict[str, Tensor]:
    """What can be known of each draw before a training, or by trying both, [B].

    - cosine: cos(x, v) at the start, x = A^-1 v.
    - relative change: |x - v| / |v|.
    - c: lambda + damping, over the mean eigenvalue of H.
    - stationarity: what the lower steps leave of the lower gradient, after a first upper step.
    - agreement: cos(x, v') - cos(v, v'), v' the gradient of the labels that validate.
    - trial of k: the fall of the validation loss within k alternations with the solve, less that with x = v, over the
      larger one; each at the best of the rates.
    """
    start = draws.a
    v, held_out = draws.gradient(start), times(draws.S_val, start) - draws.g_val
    x = direction_of("solve", draws.system(0))(v)
    moved = start - v / largest_curvature(draws, "identity")[:, None]
    before, after = draws.stationarity(moved, start), draws.stationarity(moved, draws.lower(moved, start))
    signs = {
        "cosine": cosine_similarity(x, v),
        "relative change": torch.linalg.vector_norm(x - v, dim=-1) / torch.linalg.vector_norm(v, dim=-1),
        "c": torch.full((len(v),), draws.setting.c, dtype=v.dtype),
        "stationarity": after / before,
        "agreement": cosine_similarity(x, held_out) - cosine_similarity(v, held_out),
    }
    for name, alternations in TRIALS.items():
        solve, identity = (train(draws, arm, alternations).fall for arm in ("solve", "identity"))
        # Where neither falls, there is no difference.
        signs[name] = (solve - identity) / torch.maximum(solve, identity).clamp_min(torch.finfo(v.dtype).tiny)
    return signs


@dataclass(frozen=True)
class Rule:
    """Solve where `sign` is above (or below) `threshold`."""

    sign: str
    above: bool
    threshold: float

    def says(self, measured: Measured) -> NDArray[np.bool_]:
        """The advice for each draw: True for the solve."""
        values = measured.signs[self.sign]
        return values > self.threshold if self.above else values < self.threshold

    def text(self) -> str:
        return f"{self.sign} {'>' if self.above else '<'} {self.threshold:.3g}"


Advice = Callable[[Measured], NDArray[np.bool_]]


def fit(sign: str, measured: Sequence[Measured]) -> Rule:
    """The threshold and side of the best balanced score."""
    values = np.concatenate([each.signs[sign] for each in measured])
    thresholds = np.quantile(values, np.linspace(0.02, 0.98, 49))
    candidates = [Rule(sign, above, float(threshold)) for threshold in thresholds for above in (True, False)]
    return max(candidates, key=lambda rule: score(rule.says, measured)["balanced"]["mean"])


def score(advice: Advice, measured: Sequence[Measured]) -> dict[str, Any]:
    """How good a rule's advice is, over settings and their draws, each with 1.96 standard errors over settings.

    - hits: share of right advice (solve where it is worth it, not elsewhere).
    - balanced: the mean of the share of right advice where the solve is worth it and where it is not.
    - solves: share of draws in which it says to solve.
    - loss: mean ln(risk of the advised) - ln(risk of the better one of the two in that setting).
    """
    said = [advice(each) for each in measured]
    right = np.array([np.mean(s == each.worth) for s, each in zip(said, measured, strict=True)])
    worth = np.array([each.worth for each in measured])
    gains = np.array([each.gain.mean() for each in measured])
    solves = np.array([np.mean(s) for s in said])
    loss = np.maximum(gains, 0.0) - solves * gains
    # Of the settings of either kind; of a kind that is not among them nothing is known.
    parts = [part for part in (right[worth], right[~worth]) if len(part) > 1]
    balanced = {
        "mean": float(np.mean([part.mean() for part in parts])),
        "error": float(1.96 / len(parts) * math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))),
    }
    return {"hits": _mean(right), "balanced": balanced, "solves": _mean(solves), "loss": _mean(loss)}


def _mean(values: Array) -> dict[str, float]:
    return {"mean": float(values.mean()), "error": float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))}
