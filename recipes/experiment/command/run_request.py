"""The command line of a recipe without presets: a configuration, a folder, and whether a run goes on there."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from ..configuration import merge, read_config_file, validated
from ..errors import ConfigError
from ..folder.paths import user_path
from ..folder.run_folder import CHECKPOINTS, RunDirectory
from .parsing import Parser, add_run_options, field_options, field_values, hyphenated

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class RunRequest(Generic[C]):
    """A parsed command line."""

    config: C
    directory: RunDirectory
    artifacts: Path
    resume: bool
    overwrite: bool
    dry_run: bool


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """What a recipe's command line is made of.

    Attributes:
        defaults: a configuration whose fields are the options and the defaults shown.
        description: begins the help.
        folder: of a run, where none is named; `directory` says what a recipe keeps in a folder.
        short_names: options by other, shorter ones.
        example: fields of a run without any, given those that the command line and files name.
    """

    defaults: C
    description: str
    folder: Path
    directory: Callable[[Path], RunDirectory]
    short_names: Mapping[str, str]
    example: Callable[[Mapping[str, Any]], Mapping[str, Any]]

    def parse(self, arguments: Sequence[str]) -> RunRequest[C]:
        """The request that `arguments` make: the configuration that is saved in the folder, where a run is resumed,
        then the config file, then single options.

        Raises:
            ConfigError: an unknown option, field or value.
        """
        arguments = [hyphenated(argument) for argument in arguments]
        early, _ = self._parser(add_help=False).parse_known_args(arguments)
        directory = self.directory(user_path(early.output_dir or self.folder))
        file = read_config_file(user_path(early.config)) if early.config else {}
        saved = directory.saved_config() if early.resume and directory.started else None
        parser = self._parser(add_help=True)
        parser.add_argument("command", nargs="?", default="run", help="run, the only command")
        source = field_options(parser, self.defaults, self.short_names)
        given = parser.parse_args(arguments)
        if given.command != "run":
            raise ConfigError(f"command: unknown command {given.command!r}; there is run")
        if given.resume and given.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; give one of them")
        values = merge(merge(saved or {}, file), field_values(source, given))
        config = validated(type(self.defaults), merge(self.example(values), values))
        artifacts = user_path(given.artifacts) if given.artifacts else directory.path / CHECKPOINTS
        return RunRequest(config, directory, artifacts, given.resume, given.overwrite, given.dry_run)

    def _parser(self, *, add_help: bool) -> argparse.ArgumentParser:
        parser = Parser(self.description, add_help=add_help)
        add_run_options(parser, str(self.folder), "check what the run checks, and print the config")
        return parser
