"""The command line: preset, then config file, then every field of the configuration as an option."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ...experiment.command.parsing import Parser, add_run_options, field_options, field_values, hyphenated
from ...experiment.configuration import read_config_file
from ...experiment.errors import ConfigError
from ...experiment.folder.paths import user_path
from ...experiment.folder.run_folder import RunDirectory
from ..settings import compatibility
from ..settings.arms import ARMS, EQUAL_TIME, METHOD, SCRATCH, arm_of
from ..settings.config import Config, build_config
from ..settings.presets import PRESETS, PaperVersion, describe_preset
from ..settings.run_directory import run_directory

COMMANDS = ("all", "pretext", "restart", "head", "bissl", "finetune")
DEFAULT_PRESET = "digits"
SHORT_NAMES = {"--init-backbone": "--model.init-backbone"}

_DESCRIPTION = """\
BiSSL: self-supervised pre-training, bilevel training and fine-tuning, beside the same without the bilevel stage.

Without a command the whole pipeline runs. A preset gives every field a value; a config file (TOML or JSON, such as a
run's own config.json) changes some; options change single fields. The defaults shown are those of the chosen preset.

Further commands, each with its own --help: data, search, table, figure2, features, export.

Exit codes: 0 done; 1 a fault of the program or a plug-in; 2 bad input; 3 losses or gradients that are not finite; 74
files that cannot be written; 75 stopped by SIGTERM or SIGUSR1; 76 another rank or a worker process is lost; 130 stopped
by Ctrl-C. Signals let the step end and save; after 74, 75, 76 and 130 the same command with --resume continues. A
second Ctrl-C stops at once.

Several processes: torchrun --nproc-per-node=N -m bilevel.recipes.bissl.run ...
"""


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
    """The request that `arguments` make.

    Raises:
        ConfigError: an unknown option, preset, field or value.
    """
    arguments = [hyphenated(argument) for argument in arguments]
    early, _ = _base_parser(add_help=False).parse_known_args(arguments)
    file = read_config_file(user_path(early.config)) if early.config else {}
    base = _base_config(early, file)
    parser = _base_parser(add_help=True)
    parser.description = f"{_DESCRIPTION}\nPreset {base.preset}: {describe_preset(base.preset)}"
    # Not among the early options, where it would swallow the value of a field; its choices are checked below.
    parser.add_argument("command", nargs="?", default="all", help=f"one of {', '.join(COMMANDS)} (default: all)")
    source = field_options(parser, base, SHORT_NAMES, ("preset", "paper_version"))
    given = parser.parse_args(arguments)
    if given.command not in COMMANDS:
        raise ConfigError(f"command: unknown command {given.command!r}; there are {', '.join(COMMANDS)}")
    values = field_values(source, given)
    config = compatibility.apply(build_config(base, file, values))
    _check_options(given, config)
    return Request(
        command=given.command,
        config=config,
        directory=_directory(given, base.preset),
        artifacts=user_path(given.artifacts) if given.artifacts else None,
        parent=user_path(given.from_artifact) if given.from_artifact else None,
        arm=_arm(given),
        resume=given.resume,
        overwrite=given.overwrite,
        dry_run=given.dry_run,
        list_presets=given.list_presets,
    )


def _base_parser(*, add_help: bool) -> argparse.ArgumentParser:
    parser = Parser(_DESCRIPTION, add_help=add_help)
    parser.add_argument(
        "--preset", default=None, metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: {DEFAULT_PRESET})"
    )
    parser.add_argument(
        "--paper-version",
        choices=get_args(PaperVersion),
        default="v2",
        help="whose values the paper presets take (default: v2)",
    )
    dry_run = "check what the run checks, print and write the config, estimate steps and time"
    add_run_options(parser, "runs/PRESET", dry_run)
    parser.add_argument(
        "--from", dest="from_artifact", metavar="ARTIFACT", help="folder of the artifact that one stage starts from"
    )
    parser.add_argument(
        "--arm", metavar="NAME", help="whose steps and rates a single stage takes (default: bissl, or restart)"
    )
    parser.add_argument("--list-presets", action="store_true", help="print the presets and what they are for")
    return parser


def _check_options(given: argparse.Namespace, config: Config) -> None:
    """Refuse options that do not go together."""
    if given.resume and given.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    if given.from_artifact is not None and given.command in ("all", "pretext"):
        raise ConfigError(f"--from: the command {given.command!r} starts from nothing; leave it out")
    arms = _arms_of(given.command, config)
    if _arm(given) not in arms:
        raise ConfigError(f"--arm: the command {given.command!r} knows {', '.join(arms)}, not {given.arm!r}")
    if given.command == "finetune" and arm_of(_arm(given)).start == "random":
        if given.from_artifact is not None:
            raise ConfigError(f"--from: the arm {given.arm!r} starts from random weights; leave out one of the two")
    elif given.command not in ("all", "pretext") and given.from_artifact is None:
        remedy = f" (or --arm {SCRATCH}, from random weights)" if given.command == "finetune" else ""
        raise ConfigError(f"{given.command}: needs --from ARTIFACT, the folder of an earlier stage's artifact{remedy}")


def _arm(given: argparse.Namespace) -> str:
    return given.arm or ("restart" if given.command == "restart" else METHOD)


def _arms_of(command: str, config: Config) -> list[str]:
    """The arms that have the stage."""
    names = [*ARMS, *config.variants]
    if command == "pretext":
        # How long the arm of equal time trains is known only after others.
        return [name for name in names if arm_of(name).start != "random" and name != EQUAL_TIME]
    if command in ("head", "bissl", "restart"):
        return [name for name in names if arm_of(name).then == ("restart" if command == "restart" else "bissl")]
    return names


def _base_config(early: argparse.Namespace, file: Mapping[str, Any]) -> Config:
    """The config of the preset that is named by option or file or, on resume without either, the saved one."""
    named = early.preset or file.get("preset")
    if early.preset and file.get("preset", named) != named:
        raise ConfigError(
            f"--preset: {named!r} was asked for, but {early.config} is made from {file['preset']!r}; leave --preset out"
        )
    saved = _directory(early, DEFAULT_PRESET).saved_config() if early.resume and named is None else None
    name = named or (saved or {}).get("preset", DEFAULT_PRESET)
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"--preset: unknown preset {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name](early.paper_version)
    return build_config(preset, saved) if saved else preset


def _directory(given: argparse.Namespace, preset: str) -> RunDirectory:
    return run_directory(user_path(given.output_dir) if given.output_dir else Path("runs") / preset)


def show_config(config: Config) -> str:
    """The config as JSON."""
    return json.dumps(json.loads(config.model_dump_json()), indent=1)
