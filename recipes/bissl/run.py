"""BiSSL from the command line: ``python recipes/bissl/run.py --help``."""

import math
import os
import sys
import warnings
from pathlib import Path

if not __package__:
    # As a script: the repository's root instead of this folder, whose file names could hide installed modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from rich.console import Console

from bilevel import NonFiniteError
from bilevel.checkpoint import CheckpointError
from recipes.bissl import estimate
from recipes.bissl.artifact import Artifact, ArtifactError, ArtifactStore, read_artifact
from recipes.bissl.command_line import Request, fail, parse, show_config, show_presets
from recipes.bissl.config import Config, ConfigError
from recipes.bissl.context import Context, Datasets
from recipes.bissl.imagesets import DataError
from recipes.bissl.plugins import PluginError
from recipes.bissl.report import write_report
from recipes.bissl.results import ArmResult, assemble, environment
from recipes.bissl.run_directory import CHECKPOINTS, METRICS, REPORT, RESULTS, SPLITS
from recipes.bissl.stages import bissl, finetune, head, pretext
from recipes.bissl.tables import comparison_lines, number_text, results_table

INTERRUPTED, DIVERGED = 130, 3


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the process's exit code (0 done, 2 bad input, 3 numbers that went wrong, 130 Ctrl-C)."""
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
        return _execute(request)
    except (ConfigError, DataError, ArtifactError, PluginError, CheckpointError) as error:
        return fail(str(error))
    except NonFiniteError as error:
        print(f"run.py: stopped: {error}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command with --resume continues", file=sys.stderr)
        return INTERRUPTED


def run_pipeline(context: Context) -> dict[str, list[Artifact]]:
    """All stages of all arms; the fine-tuned artifacts of each arm, one for each seed."""
    config = context.config
    repeats = config.pipeline_seeds
    pipeline = [config.seed + i for i in range(repeats or 1)]
    tested: dict[str, list[Artifact]] = {arm: [] for arm in config.arms}
    for seed in pipeline:
        for arm in config.arms:
            at = context.at(arm, seed)
            weights = None if arm == "scratch" else pretext.run(at)
            if arm == "bissl" and weights is not None:
                weights = bissl.run(at, head.run(at, weights))
            tuning = [seed] if repeats else [config.seed + i for i in range(config.seeds)]
            tested[arm] += [finetune.run(context.at(arm, s), weights) for s in tuning]
    return tested


def run_stage(context: Context, request: Request, parent: Artifact | None) -> None:
    """One stage alone, from the artifact that the command line names."""
    config = context.config
    at = context.at(request.arm, config.seed)
    if request.command == "finetune":
        seeds = [config.seed + i for i in range(config.pipeline_seeds or config.seeds)]
        for artifact in [finetune.run(context.at(request.arm, seed), parent) for seed in seeds]:
            scores = ", ".join(f"{name} {number_text(value)}" for name, value in artifact.info["test"].items())
            _say(context, f"seed {artifact.info['seed']}: test {scores}")
            _say(context, f"artifact: {artifact.directory}")
        return
    stage = {"pretext": pretext.run, "head": head.run, "bissl": bissl.run}[request.command]
    _say(context, f"artifact: {stage(at, parent).directory}")


def summarise(context: Context, tested: dict[str, list[Artifact]]) -> dict:
    """The content of results.json."""
    config = context.config
    first = tested["bissl"][0].info
    arms = {}
    for arm, artifacts in tested.items():
        infos = [artifact.info for artifact in artifacts]
        metrics = {name: [_number(info["test"][name]) for info in infos] for name in first["higher_is_better"]}
        seconds = sum(info["seconds"] for info in infos) / len(infos)
        # Where only fine-tuning is repeated, all start from the one bilevel stage of the first seed.
        stages = infos[: config.pipeline_seeds or 1]
        solves = {info["seed"]: info["solves"] for info in stages if info["solves"]}
        arms[arm] = ArmResult(metrics, infos[0]["pretext_steps"], infos[0]["label_steps"], seconds, solves)
    results = assemble(
        config.preset,
        [artifact.info["seed"] for artifact in tested["bissl"]],
        "pipeline" if config.pipeline_seeds else "finetune",
        first["primary_metric"],
        arms,
        environment(context.device),
        higher_is_better=first["higher_is_better"],
    )
    results["notes"] = notes(config, context)
    return results


def notes(config: Config, context: Context) -> list[str]:
    """What a reader of the table must know."""
    sets = context.data.downstream
    lines = [
        f"data: {len(context.data.pretext)} pretext images without labels; {len(sets.train)} labelled for training, "
        f"{len(sets.val)} to choose the epoch by, {len(sets.test)} for the test",
        "test accuracy is that of the best validation epoch's weights; steps and seconds are those of one repeat",
        "weight decay of the lower optimizer is outside the lower objective, so its stationarity does not reach 0",
    ]
    return lines + config.pretext_task().describe() + config.downstream_task(sets.train.classes).describe()


def _execute(request: Request) -> int:
    console, config, directory = Console(), request.config, request.directory
    if request.list_presets:
        print(show_presets())
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: the recipe runs in one process so far; start it without torchrun")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if request.dry_run:
        description = estimate.describe(config)
        directory.open(config, resume=request.resume, overwrite=False)
        print(show_config(config))
        print(description)
        return 0
    store = ArtifactStore(request.artifacts or directory.path / CHECKPOINTS)
    context = Context(config, _device(config), store, directory.path / METRICS, Datasets(config), console)
    context.computing.set_up()
    # Read before the folder is touched: what cannot be read must leave nothing behind, and nothing lost.
    parent = _parent(request)
    estimate.check_data(context)
    directory.open(config, resume=request.resume, overwrite=request.overwrite)
    (directory.path / METRICS).touch()
    directory.write_json(SPLITS, context.data.downstream.indices)
    if request.command != "all":
        run_stage(context, request, parent)
        return 0
    results = summarise(context, run_pipeline(context))
    directory.write_json(RESULTS, results)
    try:
        write_report(directory.path)
    except ValueError as error:
        raise ConfigError(f"{REPORT} was not written, all other files were: {error}") from error
    console.print(results_table(results))
    for line in comparison_lines(results):
        _say(context, line)
    _say(context, f"{directory.path / REPORT}, {directory.path / RESULTS}")
    return 0


def _say(context: Context, line: str) -> None:
    """Print a line as it is: brackets are no markup, and a path is not broken."""
    context.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _parent(request: Request) -> Artifact | None:
    """The artifact that the command line names, verified."""
    if request.parent is None:
        return None
    artifact = read_artifact(request.parent)
    # Fine-tuning takes the rates of its arm, so that weights of another one would be tuned with the wrong ones.
    fine_tuned = {"bissl": "bissl", "baseline": "pretext"}.get(request.arm)
    expected = {"head": "pretext", "bissl": "head", "finetune": fine_tuned}[request.command]
    if artifact.stage != expected:
        raise ArtifactError(
            f"--from: {request.command} of the arm {request.arm!r} starts from a {expected} artifact, {request.parent} "
            f"is of {artifact.stage}; name another one, or another --arm"
        )
    artifact.tensors()
    return artifact


def _number(value: float | None) -> float:
    """A recorded value, NaN where null stands for one that was not finite."""
    return math.nan if value is None else value


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA device; use --device cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


if __name__ == "__main__":
    # torch.func's first use makes torch import its own deprecated TorchScript.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    sys.exit(main())
