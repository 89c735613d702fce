"""Child processes that leave this one's signals and its main module alone."""

import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from bilevel.interruption import SIGNALS


@contextmanager
def processes_apart() -> Iterator[None]:
    """What is started inside leaves signals alone and does not import this program's main module.

    A mask of signals is inherited, from the moment of the start on. The main module is not needed, and importing it
    would run a script that lacks the guard ``if __name__ == "__main__"`` once more in every worker.
    """
    # The first of all processes that multiprocessing starts; its start would let these signals through again.
    resource_tracker.ensure_running()
    main = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
