"""A check that all processes (ranks) of a run have the same settings."""

from typing import Any

from bilevel.distributed import on_first_rank

from ..configuration import differences
from ..errors import ConfigError


def check_same(own: dict[str, Any], what: str) -> None:
    """Raise ConfigError, with `what` this rank does, unless rank 0 has the same values."""
    wrong = differences(on_first_rank(lambda: own), own)
    if wrong:
        raise ConfigError(f"this rank {what} (rank 0's -> its own):\n  " + "\n  ".join(wrong))
