"""The folder of a run: the names of its files, and which run and which process may write there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bilevel.checkpoint import write_atomic
from bilevel.distributed import rank

from ..configuration import differences, read_config_file
from ..errors import ConfigError
from .folder_lease import leased

CONFIG, METRICS, RESULTS, REPORT, SPLITS = "config.json", "metrics.jsonl", "results.json", "report.html", "splits.json"
CHECKPOINTS, TRACKING, INSPECT, LOGS = "checkpoints", "tracking", "inspect", "logs"
FILES, FOLDERS = (CONFIG, METRICS, RESULTS, REPORT, SPLITS), (CHECKPOINTS, TRACKING, INSPECT, LOGS)


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, and what its recipe says about it.

    Attributes:
        path: the folder.
        marks: fields of a config by which a saved one is recognised as this recipe's.
        safe_to_change: fields, as ``section.name``, that may differ on resume.
        own_files: names of further files that the recipe writes into it.
    """

    path: Path
    marks: frozenset[str]
    safe_to_change: frozenset[str]
    own_files: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that a run may write beside its folders."""
        return (*FILES, *self.own_files)

    @property
    def started(self) -> bool:
        """Whether a run has written here (a config alone, from a dry run, does not count)."""
        return any((self.path / name).exists() for name in (METRICS, RESULTS, REPORT, CHECKPOINTS))

    def saved_config(self) -> dict[str, Any] | None:
        """The config of the run that is here, or None.

        Raises:
            ConfigError: there is a file of that name that is no such config.
        """
        path = self.path / CONFIG
        if not path.exists():
            return None
        saved = read_config_file(path)
        if not saved.keys() >= self.marks:
            raise ConfigError(f"output-dir: {path} is no config of a run of this program; name another folder")
        return saved

    @contextmanager
    def leased(self, config: BaseModel, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """`open` the folder for `config` and keep other processes out until the block ends. Rank 0 does so for all.

        Raises:
            ConfigError: as `open`, or another process is at work in it.
        """
        if rank() > 0:
            yield
            return
        self.check(config, resume=resume, overwrite=overwrite)
        with ExitStack() as stack:
            try:
                stack.enter_context(leased(self.path, "output-dir"))
            except OSError as error:
                raise self._unwritable(error) from error
            self.open(config, resume=resume, overwrite=overwrite)
            yield

    def open(self, config: BaseModel, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready for `config` and save the config in it.

        Raises:
            ConfigError: as `check`, or the folder cannot be written to.
        """
        self.check(config, resume=resume, overwrite=overwrite)
        try:
            if overwrite:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / CONFIG, config.model_dump_json(indent=1).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def check(self, config: BaseModel, *, resume: bool, overwrite: bool) -> None:
        """Whether `open` may be called; nothing is written.

        Raises:
            ConfigError: it holds another run, one whose config differs where it must not, or files of something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output-dir: {self.path} is a file; name a folder")
        self._check_own()
        if self.started and not overwrite:
            if not resume:
                raise ConfigError(
                    f"output-dir: {self.path} holds a run already; continue it with --resume, replace it with "
                    "--overwrite, or name another folder"
                )
            self._check_unchanged(config)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run, atomically; rank 0 does so for all."""
        if rank() == 0:
            write_atomic(self.path / name, json.dumps(content, indent=1, allow_nan=False).encode())

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"output-dir: {self.path} cannot be written to ({error.strerror})")

    def _check_own(self) -> None:
        """Refuse a folder in which somebody else's files have the names of ours."""
        found = [name for name in (*self.files, *FOLDERS) if (self.path / name).exists()]
        if found and self.saved_config() is None:
            raise ConfigError(
                f"output-dir: {self.path} holds {', '.join(found)}, but no {CONFIG} of a run; name another folder, or "
                "delete them by hand if they are of no use"
            )

    def _check_unchanged(self, config: BaseModel) -> None:
        changed = differences(self.saved_config() or {}, json.loads(config.model_dump_json()))
        refused = [line for line in changed if line.partition(":")[0] not in self.safe_to_change]
        if refused:
            raise ConfigError(
                f"--resume: the run in {self.path} was made with another configuration:\n  "
                + "\n  ".join(refused)
                + "\nLeave these fields as they were, or name another output-dir"
            )

    def _clear(self) -> None:
        """Delete the files of a run, and nothing else that may lie there."""
        for name in self.files:
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
