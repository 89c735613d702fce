"""One process at a time in a folder: of a run, or of a stage that several runs share."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bilevel.distributed import rank

from ..errors import ConfigError
from ..terminal import command_name
from .leases import Claim, ClaimLost, Claims
from .process_identity import describe, identity

LEASE = 180.0
"""Seconds without a sign of life after which a process of another machine counts as dead."""
MARGIN = 30.0
"""Seconds by which a job that was started again outwaits the lease of its earlier attempt."""
_NAME, _POLL = ".lock", 0.2


class Hold(Protocol):
    """What keeps other processes out of a folder."""

    def check(self) -> None: ...


class _HeldForAll:
    """Rank 0 looks, and ends where the folder was taken over; the others then end too."""

    def check(self) -> None:
        return None


@contextmanager
def held(folder: Path, what: str, *, lease: float = LEASE) -> Iterator[Hold]:
    """Hold `folder`, made where missing, until the block ends; ``check()`` inside tells whether it still is.

    Of several ranks the first holds it for all. A job that its scheduler has started again on another machine waits
    until the lease of its earlier attempt is over.

    Args:
        what: the field or thing that the message begins with.
        lease: as for `Claims`.

    Raises:
        ConfigError: somebody else holds it.
        OSError: it cannot be written to.
    """
    if rank() > 0:
        yield _HeldForAll()
        return
    claims = Claims(folder, lease)
    claim = _taken(claims)
    if claim is None:
        holder = claims.holder(_NAME)
        who = "another process" if holder is None else f"{describe(holder)}, seen {max(holder['age'], 0.0):.0f} s ago"
        raise ConfigError(
            f"{what}: {folder} is in use by {who}; wait until it ends, or name another folder. One that was killed "
            f"lets go at once on its own machine, on others after {lease:g} s"
        )
    with claim.kept():
        try:
            yield claim
        finally:
            _give_up(claims, claim)


def _taken(claims: Claims) -> Claim | None:
    """The claim, None where somebody else has it and is not an earlier attempt of this job."""
    until, told = time.monotonic() + claims.lease + MARGIN, False
    while (claim := claims.take(_NAME)) is None:
        holder = claims.holder(_NAME)
        if holder is None:
            continue
        if not _earlier_attempt(holder) or time.monotonic() > until:
            return None
        if not told:
            where = f"{claims.folder} is held by an earlier attempt of this job, {describe(holder)}"
            print(f"{command_name()}: {where}; waiting until its lease of {claims.lease:g} s is over", file=sys.stderr)
            told = True
        time.sleep(_POLL)
    return claim


def _earlier_attempt(holder: Mapping[str, Any]) -> bool:
    """Whether the holder is of this process's job, on another machine: none is known to have ended there."""
    own = identity()
    return own["job"] is not None and holder.get("job") == own["job"] and holder.get("machine") != own["machine"]


def _give_up(claims: Claims, claim: Claim) -> None:
    """Delete the claim and what dead processes left, unless somebody took over."""
    try:
        claim.check()
    except ClaimLost:
        return
    claims.clear(_NAME)
