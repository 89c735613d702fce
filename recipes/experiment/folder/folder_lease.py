"""The lease on a folder, of a run or of a stage that several runs share: one process at a time writes there."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel import interruption
from bilevel.distributed import rank

from ..errors import ConfigError
from .leases import Lease, Leases
from .process_identity import describe, identity

DURATION = 180.0
"""Seconds without a sign of life after which a process of another machine counts as dead."""
MARGIN = 30.0
"""Seconds by which a job that was started again outwaits the lease of its earlier attempt."""
_NAME, _POLL = ".writer", 0.2


@contextmanager
def leased(folder: Path, what: str, *, duration: float = DURATION, waits: bool = False) -> Iterator[Callable[[], None]]:
    """Lease `folder`, made where missing, to this process until the block ends.

    The block gets a function to call at every step: it raises LeaseLost once another process has taken over. Of several
    ranks rank 0 holds the lease for all, and the function does nothing on the others. A job that its scheduler has
    started again on another machine waits until the lease of its earlier attempt is over.

    Args:
        what: the field or thing that the message begins with.
        duration: as for `Leases`.
        waits: wait for a process that holds the lease, whichever it is; a signal that asks for a stop ends that.

    Raises:
        ConfigError: another process holds the lease, and `waits` is false.
        OSError: the folder cannot be written to.
    """
    if rank() > 0:
        yield lambda: None
        return
    leases = Leases(folder, duration)
    lease = _take(leases, waits)
    if lease is None:
        holder = leases.holder(_NAME)
        who = "another process" if holder is None else f"{describe(holder)}, seen {max(holder['age'], 0.0):.0f} s ago"
        raise ConfigError(
            f"{what}: {folder} is in use by {who}; wait until it ends, or name another folder. One that was killed "
            f"lets go at once on its own machine, on others after {duration:g} s"
        )
    with lease.kept():
        yield lease.check


def _take(leases: Leases, waits: bool) -> Lease | None:
    """The lease, None where it is held by a process that is waited for neither by `waits` nor as an earlier attempt of
    this job."""
    until, told = time.monotonic() + leases.duration + MARGIN, False
    while (lease := leases.take(_NAME)) is None:
        holder = leases.holder(_NAME)
        if holder is None:
            continue
        if waits:
            interruption.check()
            time.sleep(_POLL)
            continue
        if not _earlier_attempt(holder) or time.monotonic() > until:
            return None
        if not told:
            where = f"{leases.folder} is held by an earlier attempt of this job, {describe(holder)}"
            print(f"{where}; waiting until its lease of {leases.duration:g} s is over", file=sys.stderr)
            told = True
        time.sleep(_POLL)
    return lease


def _earlier_attempt(holder: Mapping[str, Any]) -> bool:
    """Whether the holder is of this process's job, on another machine: none is known to have ended there."""
    own = identity()
    return own["job"] is not None and holder.get("job") == own["job"] and holder.get("machine") != own["machine"]
