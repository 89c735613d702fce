"""Keeps a run's record of its images up to date while files are read for the first time."""

import time
from typing import Any

from bilevel.training import Callback

from ...vision.record.identity import Identity

SECONDS = 600.0
"""Between two times that the record is written, of a million files in a few seconds, while nothing stops."""


class KeepRecord(Callback):
    """Writes the record now and then, and when a training ends in whatever way, if digests have been added."""

    def __init__(self, identity: Identity) -> None:
        self.identity, self._written = identity, time.monotonic()

    def on_progress(self, trainer: Any) -> None:
        if time.monotonic() - self._written >= SECONDS:
            self._write()

    def on_interrupt(self, trainer: Any) -> None:
        self._write()

    def on_run_end(self, trainer: Any) -> None:
        self._write()

    def _write(self) -> None:
        self.identity.update()
        self._written = time.monotonic()
