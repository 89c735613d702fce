"""A command line on top of a configuration: every field is an option."""

import argparse
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from pydantic import BaseModel, Field, create_model
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from ..errors import ConfigError
from ..terminal import command_name


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage before every error, and with null for None, as options take it.

    Args:
        command: the word after the command's name that these options belong to, if any; subcommands below it are
            parsers like this one.
        settings: further ones of argparse.
    """

    def __init__(self, description: str | None = None, *, command: str | None = None, **settings: Any) -> None:
        ours: dict[str, Any] = {
            "prog": command_name() if command is None else f"{command_name()} {command}",
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(description=description, **{**ours, **settings})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all options")

    def format_help(self) -> str:
        return re.sub(r"\(default:(\s+)None\)", r"(default:\1null)", super().format_help())


def add_run_options(parser: argparse.ArgumentParser, folder: str, dry_run: str) -> None:
    """Adds the options of every run: where its configuration and its stages lie, and whether it goes on.

    Args:
        folder: where it is written unless it is said, and `dry_run`: what a dry run does; both for the help.
    """
    parser.add_argument("--config", metavar="FILE", help="TOML or JSON file with fields to change")
    parser.add_argument("--output-dir", metavar="DIR", help=f"folder of the run (default: {folder})")
    parser.add_argument(
        "--artifacts",
        metavar="DIR",
        help="folder of finished stages, may be shared by runs (default: OUTPUT_DIR/checkpoints)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, or start there")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the output folder first")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def field_options(
    parser: argparse.ArgumentParser,
    base: BaseModel,
    short_names: Mapping[str, str],
    leave_out: Collection[str] = (),
) -> CliSettingsSource[Any]:
    """Adds one option for each field but those in `leave_out`, with the values of `base` as the defaults shown.

    Args:
        short_names: of options, by which they go too. That of a whole section gives way to a short name like its own.
    """
    shorter = {name: short for short, name in short_names.items()}

    def add(context: Any, *names: str, **settings: Any) -> None:
        if short_names.keys().isdisjoint(names):
            context.add_argument(*(shorter[name] for name in names if name in shorter), *names, **settings)

    fields: dict[str, Any] = {
        name: (info.annotation, Field(getattr(base, name), description=info.description or info.annotation.__doc__))
        for name, info in type(base).model_fields.items()
        if name not in leave_out and info.annotation is not None
    }
    settings = create_model("Config", __base__=BaseSettings, **fields)
    shown: dict[str, Any] = {"cli_kebab_case": True, "cli_hide_none_type": True}
    return CliSettingsSource(settings, root_parser=parser, add_argument_method=add, **shown)


def field_values(source: CliSettingsSource[Any], given: argparse.Namespace) -> dict[str, Any]:
    """The fields that a command line names, nested.

    Raises:
        ConfigError: a value is not what the command line takes.
    """
    try:
        return source(parsed_args=given)()
    except SettingsError as error:
        problem = str(error).removeprefix("Parsing error encountered for ")
        raise ConfigError(f"--{problem}; give JSON, or key=value for options") from error


def hyphenated(argument: str) -> str:
    """``--head.batch_size=4`` as ``--head.batch-size=4``: both spellings are accepted."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
