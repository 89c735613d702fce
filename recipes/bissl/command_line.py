"""The command line: preset, then config file, then every field of the configuration as an option."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import Field, create_model
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from recipes.bissl.config import Config, ConfigError, build_config, read_config_file
from recipes.bissl.presets import PRESETS, PaperVersion
from recipes.bissl.run_directory import RunDirectory

COMMANDS = ("all", "pretext", "head", "bissl", "finetune")

_DESCRIPTION = """\
BiSSL: self-supervised pre-training, bilevel training and fine-tuning, beside the same without the bilevel stage.

Without a command the whole pipeline runs. A preset gives every field a value; a config file (TOML or JSON, such as a
run's own config.json) changes some; options change single fields. The defaults shown are those of the chosen preset.
"""


class _Parser(argparse.ArgumentParser):
    """argparse without its page of usage before every error."""

    def error(self, message: str) -> NoReturn:
        self.exit(fail(f"{message}; --help lists all options"))


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    command: str
    config: Config
    directory: RunDirectory
    artifacts: Path | None
    parent: Path | None
    arm: str
    resume: bool
    overwrite: bool
    dry_run: bool
    list_presets: bool


def parse(arguments: Sequence[str]) -> Request:
    """The request that `arguments` make. Wrong options end in argparse's message and exit code 2.

    Raises:
        ConfigError: an unknown preset, field or value.
    """
    arguments = [_hyphenated(argument) for argument in arguments]
    early, _ = _base_parser(add_help=False).parse_known_args(arguments)
    base, base_name = _base_config(early)
    parser = _base_parser(add_help=True)
    # Not among the early options, where it would swallow the value of a field; its choices are checked below.
    parser.add_argument("command", nargs="?", default="all", help=f"one of {', '.join(COMMANDS)} (default: all)")
    source = _field_options(parser, base)
    given = parser.parse_args(arguments)
    if given.command not in COMMANDS:
        raise ConfigError(f"command: unknown command {given.command!r}; there are {', '.join(COMMANDS)}")
    try:
        values = source(parsed_args=given)()
    except SettingsError as error:
        raise ConfigError(f"command line: {error.__cause__ or error}") from error
    overrides = [read_config_file(Path(given.config))] if given.config else []
    config = build_config(base, *overrides, values)
    if given.resume and given.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    if given.command in ("head", "bissl") and given.from_artifact is None and not given.dry_run:
        raise ConfigError(f"{given.command}: needs --from ARTIFACT, the folder of an earlier stage's artifact")
    if given.from_artifact is not None and given.command in ("all", "pretext"):
        raise ConfigError(f"--from: the command {given.command!r} starts from nothing; leave it out")
    return Request(
        command=given.command,
        config=config,
        directory=_directory(given, base_name),
        artifacts=Path(given.artifacts) if given.artifacts else None,
        parent=Path(given.from_artifact) if given.from_artifact else None,
        arm=given.arm,
        resume=given.resume,
        overwrite=given.overwrite,
        dry_run=given.dry_run,
        list_presets=given.list_presets,
    )


def _base_parser(*, add_help: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.py",
        description=_DESCRIPTION,
        add_help=add_help,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default=None, metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: digits)")
    parser.add_argument("--paper-version", choices=get_args(PaperVersion), default="v2", help="whose values the paper presets take (default: v2)")
    parser.add_argument("--config", metavar="FILE", help="TOML or JSON file with fields to change")
    parser.add_argument("--output-dir", metavar="DIR", help="folder of the run (default: runs/PRESET)")
    parser.add_argument("--artifacts", metavar="DIR", help="folder of finished stages, may be shared by runs (default: OUTPUT_DIR/checkpoints)")
    parser.add_argument("--from", dest="from_artifact", metavar="ARTIFACT", help="folder of the artifact that one stage starts from")
    parser.add_argument("--arm", choices=("bissl", "baseline", "scratch"), default="bissl", help="whose steps and rates a single stage takes (default: bissl)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, or start there")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the output folder first")
    parser.add_argument("--dry-run", action="store_true", help="check, print and write the config, estimate steps and time")
    parser.add_argument("--list-presets", action="store_true", help="print the presets and what they are for")
    return parser


def _field_options(parser: argparse.ArgumentParser, base: Config) -> CliSettingsSource[Any]:
    """Adds one option for each field, with the base config's values as the defaults shown."""
    fields: dict[str, Any] = {
        name: (info.annotation, Field(getattr(base, name), description=info.description or info.annotation.__doc__))
        for name, info in Config.model_fields.items()
        if name != "preset" and info.annotation is not None
    }
    settings = create_model("Config", __base__=BaseSettings, **fields)
    return CliSettingsSource(settings, root_parser=parser, cli_kebab_case=True, cli_hide_none_type=True)


def _base_config(early: argparse.Namespace) -> tuple[Config, str]:
    """The preset's config or, when a run is resumed without naming one, that run's own."""
    saved = RunDirectory(Path(early.output_dir)).saved_config() if early.resume and early.output_dir else None
    name = early.preset or (saved or {}).get("preset", "digits")
    if name not in PRESETS:
        raise ConfigError(f"--preset: unknown preset {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name](early.paper_version)
    return (build_config(preset, saved) if saved and early.preset is None else preset), name


def _directory(given: argparse.Namespace, preset: str) -> RunDirectory:
    return RunDirectory(Path(given.output_dir) if given.output_dir else Path("runs") / preset)


def _hyphenated(argument: str) -> str:
    """``--pretext.batch_size=4`` as ``--pretext.batch-size=4``: both spellings are accepted."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def show_presets() -> str:
    """Names and docstrings of the presets."""
    return "\n\n".join(f"{name}\n    {(function.__doc__ or '').strip()}" for name, function in PRESETS.items())


def show_config(config: Config) -> str:
    """The config as JSON."""
    return json.dumps(json.loads(config.model_dump_json()), indent=1)


def fail(message: str) -> int:
    """Print one message to standard error; the exit code for bad input."""
    print(f"run.py: error: {message}", file=sys.stderr)
    return 2
