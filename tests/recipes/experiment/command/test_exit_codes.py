"""Every ending of a command has its exit code and one message."""

import errno
from signal import Signals

import pytest

from bilevel.checkpoint import CheckpointError
from bilevel.interruption import Interrupted
from bilevel.training import NonFiniteError
from recipes.experiment.artifacts import ArtifactError
from recipes.experiment.command.exit_codes import Endings, before_a_run, run_command
from recipes.experiment.errors import ConfigError
from recipes.experiment.plugins import PluginError
from recipes.experiment.ranks.processes import Ranks


class Own(ValueError):
    """A recipe's own kind of bad input."""


class Gone(RuntimeError):
    """A recipe's own lost worker."""


ENDINGS = Endings((Own,), (Gone,), lambda error: "say it so" if "odd" in str(error) else None)
CONTINUES = "the same command with --resume continues"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a: wrong"), 2, "error: a: wrong"),
        (ArtifactError("x"), 2, "error: x"),
        (PluginError("x"), 2, "error: x"),
        (CheckpointError("x"), 2, "error: x"),
        (Own("mine"), 2, "error: mine"),
        (FileNotFoundError(errno.ENOENT, "none", "f"), 2, "error: [Errno 2] none: 'f'"),
        (NonFiniteError("nan"), 3, "stopped: nan"),
        (Gone("worker 1"), 76, f"stopped: worker 1; {CONTINUES}"),
        (KeyboardInterrupt(), 130, f"interrupted; {CONTINUES}"),
        (OSError(errno.ENOSPC, "full", "f"), 74, "cannot write: full (f); nothing that was saved is lost."),
        (RuntimeError("odd"), 2, "error: say it so"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_endings(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work(ranks: Ranks) -> int:
        raise error

    assert run_command(work, ENDINGS) == code
    told = capsys.readouterr().err
    assert told.startswith(f"run.py: {said}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (Interrupted(Signals.SIGTERM), 75, "stopped by SIGTERM"),
        (Interrupted(Signals.SIGINT), 130, "stopped by SIGINT"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["SIGTERM", "SIGINT", "Ctrl-C twice"],
)
def test_a_stop_before_a_run_is_no_saved_one(
    stop: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(ranks: Ranks) -> int:
        with before_a_run():
            raise stop

    assert run_command(work, ENDINGS) == code
    assert capsys.readouterr().err == f"run.py: {said} before a run began; this command has saved nothing\n"


def test_what_is_no_ending_is_a_fault_of_the_program() -> None:
    def work(ranks: Ranks) -> int:
        raise RuntimeError("even")

    with pytest.raises(RuntimeError, match="even"):
        run_command(work, ENDINGS)


def test_a_code_that_is_returned_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda ranks: 7, ENDINGS) == 7
    assert capsys.readouterr().err == ""
