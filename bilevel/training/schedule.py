"""How the two levels take turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType

import torch

from bilevel.checks import check_count, check_kind, check_number
from bilevel.tree import Params


@dataclass(frozen=True)
class AlternatingSchedule:
    """T alternations of N_L lower steps, an occasional adaptation, and N_U upper steps (BiSSL, Algorithm 1).

    Args:
        alternations: T >= 1.
        lower_steps: N_L >= 0 for each alternation.
        upper_steps: N_U >= 0 for each alternation.
        adaptation_every: N_a; in alternation t (from 1) with ``t mod N_a == 0``, t = T included, the paired upper
            variables move towards the lower ones between the levels. None: never.
        adaptation_strength: alpha in [0, 1]: ``x <- (1 - alpha) x + alpha y``.
        adaptation_pairs: upper name -> lower name it adapts to; needed if there is an adaptation.

    Raises:
        TypeError: pairs that are not a mapping.
        ValueError: a value out of range, an adaptation without pairs.
    """

    alternations: int
    lower_steps: int
    upper_steps: int
    adaptation_every: int | None = None
    adaptation_strength: float = 0.0
    adaptation_pairs: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_count("AlternatingSchedule: alternations", self.alternations, least=1)
        check_count("AlternatingSchedule: lower_steps", self.lower_steps, least=0)
        check_count("AlternatingSchedule: upper_steps", self.upper_steps, least=0)
        remedy = "a mapping, upper name -> lower name, or None"
        check_kind("AlternatingSchedule: adaptation_pairs", self.adaptation_pairs, (Mapping, NoneType), remedy)
        check_number("AlternatingSchedule: adaptation_strength", self.adaptation_strength, most=1.0)
        if self.adaptation_every is not None:
            check_count("AlternatingSchedule: adaptation_every", self.adaptation_every, least=1)
            if not self.adaptation_pairs:
                raise ValueError(
                    "AlternatingSchedule: adaptation_pairs is empty; pass {'upper name': 'lower name'} of what adapts"
                )

    def adapts(self, alternation: int) -> bool:
        """Whether alternation number `alternation` (from 1) has an adaptation."""
        return self.adaptation_every is not None and alternation % self.adaptation_every == 0

    def check_pairs(self, upper: Params, lower: Params) -> None:
        """Raise ValueError where a pair is of variables that are not there, or differ in shape."""
        for upper_name, lower_name in (self.adaptation_pairs or {}).items():
            if upper_name not in upper or lower_name not in lower:
                raise ValueError(
                    f"adaptation_pairs: no upper {upper_name!r} or no lower {lower_name!r}; pass upper name -> lower "
                    f"name of the upper names {list(upper)[:8]} and the lower names {list(lower)[:8]}"
                )
            if upper[upper_name].shape != lower[lower_name].shape:
                raise ValueError(f"adaptation_pairs: {upper_name!r} and {lower_name!r} differ in shape")


def power_decay(optimizer: torch.optim.Optimizer, exponent: float) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate ``lr / (t + 1)^exponent`` in step t from 0, as the papers of stochastic methods have it: 1/2
    for SOBA, 3/5 above and 2/5 below for TTSA, 1/3 for SUSTAIN and MRBO. Two levels with the same exponent keep the
    ratio of their rates.

    Raises:
        ValueError: a negative exponent.
    """
    check_number("power_decay: exponent", exponent)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -exponent)
