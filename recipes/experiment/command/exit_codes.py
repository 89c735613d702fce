"""How a command ends: its exit code, and the one message that says why it is not 0."""

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIG_IGN, Signals, signal
from typing import NoReturn

from bilevel.checkpoint import CheckpointError
from bilevel.distributed import CollectiveError
from bilevel.interruption import SIGNALS, Interrupted, Interruption, deferred
from bilevel.training import NonFiniteError

from ..artifacts import ArtifactError
from ..errors import ConfigError
from ..folder.leases import LeaseLost
from ..plugins import PluginError
from ..ranks.processes import Launch, Ranks
from ..side_by_side.pool import JobFailed, JobLost
from ..terminal import command_name, printable

FAILED, BAD_INPUT, INTERRUPTED, DIVERGED, UNWRITABLE, SAVED, LOST = 1, 2, 130, 3, 74, 75, 76
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
"""A file system that takes no more, or does not answer."""


class NothingSaved(KeyboardInterrupt):
    """A command was stopped where it had saved nothing; the cause is the stop itself."""


@contextmanager
def before_a_run() -> Iterator[None]:
    """What is checked before a run begins: a stop in this block is told as one that has saved nothing.

    Raises:
        NothingSaved: a signal, or Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise NothingSaved from stop


def _nothing(error: RuntimeError) -> None:
    """Explains no error."""


@dataclass(frozen=True)
class Endings:
    """Errors of a recipe's other rooms, by how its command ends.

    Attributes:
        bad_input: end with exit code 2.
        lost: that a process which worked for this one is gone; exit code 76.
        explained: what to say where a RuntimeError is bad input after all, else None.
    """

    bad_input: tuple[type[Exception], ...] = ()
    lost: tuple[type[Exception], ...] = ()
    explained: Callable[[RuntimeError], str | None] = _nothing


def run_command(work: Callable[[Ranks], int], endings: Endings) -> int:
    """Run `work` as one of the processes that torchrun has started, or as the only one; the process's exit code.

    0 or what `work` returns, 1 a fault of the program or a plug-in, 2 bad input, 3 numbers that went wrong, 74 files
    that cannot be written, 75 stopped by SIGTERM or SIGUSR1, 76 another rank or a worker process is lost, 130 stopped
    by Ctrl-C. After the last three, and a remedy for the others, the same command with --resume continues.
    """
    with Interruption():
        return _as_a_rank(work, endings)


def _as_a_rank(work: Callable[[Ranks], int], endings: Endings) -> int:
    try:
        ranks = Ranks(Launch.of_environment())
    except ConfigError as error:
        print(f"{command_name()}: error: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
    code, message = 1, ""
    try:
        code, message = _guarded(work, ranks, endings)
    finally:
        # Also where an exception goes on from here: the others must not wait for this rank.
        with deferred():
            prints = ranks.leave(code)
    if message and prints:
        who = f"rank {ranks.launch.rank}: " if ranks.launch.rank > 0 else ""
        print(f"{command_name()}: {who}{printable(message)}", file=sys.stderr)
    return code


def _guarded(work: Callable[[Ranks], int], ranks: Ranks, endings: Endings) -> tuple[int, str]:
    """Exit code, and why it is not 0."""
    try:
        return work(ranks), ""
    except (ConfigError, ArtifactError, PluginError, CheckpointError, LeaseLost, *endings.bad_input) as error:
        return BAD_INPUT, f"error: {error}"
    except NonFiniteError as error:
        return DIVERGED, f"stopped: {error}"
    except JobFailed as error:
        return FAILED, f"stopped: {error}"
    except (JobLost, *endings.lost) as error:
        return LOST, f"stopped: {error}; the same command with --resume continues"
    except CollectiveError as error:
        with deferred():
            message, code = ranks.explain(error)
        return code, f"stopped: {message}"
    except Interrupted as stop:
        return _code(stop), f"{stop}, and saved; the same command with --resume continues"
    except NothingSaved as error:
        stop = error.__cause__
        return _code(stop), f"{str(stop) or 'interrupted'} before a run began; this command has saved nothing"
    except OSError as error:
        # A name too long, a folder without permission: no fault of the program either.
        if error.errno not in WRITE_ERRORS:
            return BAD_INPUT, f"error: {error}"
        where = "" if error.filename is None else f" ({error.filename})"
        return UNWRITABLE, (
            f"cannot write: {error.strerror}{where}; nothing that was saved is lost. Make room, or allow it, and "
            "continue by the same command with --resume"
        )
    except RuntimeError as error:
        explained = endings.explained(error)
        if explained is None:
            raise
        return BAD_INPUT, f"error: {explained}"
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted; the same command with --resume continues"


def _code(stop: BaseException | None) -> int:
    """Of a stop by a signal or by Ctrl-C."""
    return SAVED if isinstance(stop, Interrupted) and stop.signal is not Signals.SIGINT else INTERRUPTED


def ignore_warnings_of_torch() -> None:
    """torch.func's first use makes torch import its own deprecated TorchScript."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run this process's command line and end with its exit code."""
    ignore_warnings_of_torch()
    # What `main` leaves behind: after it a signal could only change the exit code.
    for number in SIGNALS:
        signal(number, SIG_IGN)
    sys.exit(main())
