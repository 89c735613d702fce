"""The arms of a run: what each of the two training pipelines, and each control beside them, is made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Rates = Literal["bissl", "baseline", "scratch"]
"""Whose learning rate and weight decay an arm's fine-tuning takes."""

METHOD: Final = "bissl"
BASELINE: Final = "baseline"
SCRATCH: Final = "scratch"
"""Arms with a role of their own: the method is compared with every other arm, and every other arm with scratch."""

REQUIRED = (METHOD, BASELINE)
"""Arms of every run, which tables and figures show first and in this order."""

EQUAL_TIME, EQUAL_LABELS, WARMUP_LR = "baseline-time", "baseline-labels", "baseline-warmup-lr"
"""Baselines that differ in how long they are pre-trained, in how long they are fine-tuned, and in the pretext rate."""


@dataclass(frozen=True)
class Arm:
    """One pipeline up to fine-tuning.

    Attributes:
        meaning: what a comparison with it tells.
        start: stage 1: the BiSSL arm's warm-up, the baseline's longer pre-training, or random weights.
        then: what follows: the head and the bilevel stage, the same pretext steps without an upper level, or nothing.
        rates: whose learning rate and weight decay its fine-tuning takes.
        bissl: fields of the bilevel stage that differ from the run's.
    """

    meaning: str
    start: Literal["warm-up", "baseline", "random"]
    then: Literal["bissl", "restart", "nothing"]
    rates: Rates
    bissl: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    METHOD: Arm("the method", "warm-up", "bissl", METHOD),
    BASELINE: Arm("pre-training, then fine-tuning", "baseline", "nothing", BASELINE),
    SCRATCH: Arm("fine-tuning of random weights", "random", "nothing", SCRATCH),
    "identity": Arm(
        "the bilevel stage without a Hessian product (x = v): what the solve brings",
        "warm-up",
        "bissl",
        METHOD,
        {"solver": "identity", "layerwise": False, "through_negative_curvature": False, "escalate": False},
    ),
    "restart": Arm(
        "as many pretext steps with the bilevel stage's restarted schedule, no upper level: what the restart brings",
        "warm-up",
        "restart",
        METHOD,
    ),
    WARMUP_LR: Arm("the baseline at the warm-up's learning rate", "baseline", "nothing", BASELINE),
    EQUAL_LABELS: Arm(
        "the baseline, fine-tuned for as many labelled steps as the BiSSL arm makes in all",
        "baseline",
        "nothing",
        BASELINE,
    ),
    EQUAL_TIME: Arm(
        "the baseline, pre-trained for as many seconds as the BiSSL arm takes before fine-tuning",
        "baseline",
        "nothing",
        BASELINE,
    ),
}
"""Name on the command line -> arm; a run's own variants of the bilevel stage come beside them."""


def arm_of(name: str) -> Arm:
    """The bundled arm, or the method itself for the name of a run's variant."""
    return ARMS.get(name, ARMS[METHOD])


def in_order(names: Iterable[str]) -> list[str]:
    """Names of arms as they are shown: those of `REQUIRED` that are among them, then the others as they come."""
    given = list(names)
    return [*(name for name in REQUIRED if name in given), *(name for name in given if name not in REQUIRED)]
