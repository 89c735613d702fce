"""How the two levels take turns."""

from dataclasses import dataclass


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

    Raises:
        ValueError: a value out of range.
    """

    alternations: int
    lower_steps: int
    upper_steps: int
    adaptation_every: int | None = None
    adaptation_strength: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("alternations", self.alternations, 1),
            ("lower_steps", self.lower_steps, 0),
            ("upper_steps", self.upper_steps, 0),
            ("adaptation_every", 1 if self.adaptation_every is None else self.adaptation_every, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"AlternatingSchedule: {name} must be a whole number >= {least}, got {value!r}")
        if not 0.0 <= self.adaptation_strength <= 1.0:
            raise ValueError(
                f"AlternatingSchedule: adaptation_strength must lie in [0, 1], got {self.adaptation_strength!r}"
            )

    def adapts(self, alternation: int) -> bool:
        """Whether alternation number `alternation` (from 1) has an adaptation."""
        return self.adaptation_every is not None and alternation % self.adaptation_every == 0
