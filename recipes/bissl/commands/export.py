"""``bissl export``: the backbone of a finished stage as safetensors, with a model card and the run's configuration."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from bilevel.checkpoint import write_atomic

from ...experiment.artifacts import INFO, Artifact, ArtifactError
from ...experiment.command.parsing import Parser
from ...experiment.configuration import read_config_file
from ...experiment.folder.paths import user_path
from ...experiment.folder.run_folder import CHECKPOINTS, CONFIG, RESULTS
from ...vision.networks.timm_backbones import TIMM
from ..outcome.model_card import model_card
from ..outcome.open_run import config_of
from ..settings.arms import METHOD, arm_of
from ..settings.config import Config
from ..training.costs import costs_of, read_stage

WEIGHTS, CARD = "backbone.safetensors", "MODEL_CARD.md"
STAGES = ("pretext", "restart", "head", "bissl", "finetune")
SHARED = ("pretext", "head")
"""Stages that arms with the same start have in common."""


def main(arguments: list[str]) -> int:
    """Export one artifact.

    Raises:
        ArtifactError: none or several artifacts match, the artifact is damaged, or the target holds files already.
        ConfigError: the run's configuration or results cannot be read.
    """
    given = _parser().parse_args(arguments)
    source, target = user_path(given.source), user_path(given.to)
    run = user_path(given.run) if given.run else _run_of(source)
    config = config_of(run)
    if (source / INFO).exists():
        artifact = read_stage(source)
    else:
        artifact = _find(source, given.stage, given.arm, config.seed if given.seed is None else given.seed)
    results = user_path(given.results) if given.results else run / RESULTS
    scores = read_config_file(results) if given.results or results.exists() else None
    export(artifact, config, target, licence=given.licence, results=scores)
    print(f"{artifact.directory} -> {target / WEIGHTS}, {target / CARD}, {target / CONFIG}")
    return 0


def export(
    artifact: Artifact, config: Config, target: Path, *, licence: str | None, results: Mapping[str, Any] | None
) -> None:
    """Write weights, configuration and, last, the card into a new folder.

    Raises:
        ArtifactError: the folder is not empty, or the artifact is damaged.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"--to: {target} exists already and is not an empty folder; name another one")
    prefix = "backbone.network." if config.model.backbone.startswith(TIMM) else "backbone."
    tensors = artifact.tensors()
    backbone = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not backbone:
        raise ArtifactError(f"{artifact.directory} holds no backbone; name an artifact of another stage")
    content = save(backbone, metadata={"format": "pt", "backbone": config.model.backbone})
    digest = hashlib.sha256(content).hexdigest()
    try:
        card = model_card(artifact, config, WEIGHTS, digest, licence=licence, results=results)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.directory / INFO}, or the results for the card, hold something else than a run writes ({error})"
        ) from error
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(target / WEIGHTS, content)
        write_atomic(target / CONFIG, config.model_dump_json(indent=1).encode())
        write_atomic(target / CARD, card.encode())
    except OSError as error:
        raise ArtifactError(f"--to: {target} cannot be written to ({error.strerror})") from error


def _parser() -> Parser:
    parser = Parser(
        "Write the backbone of a finished stage as safetensors, under the names of torchvision or timm where it is\n"
        f"one of their networks, with {CARD} and {CONFIG}.",
        command="export",
    )
    parser.add_argument("source", help="folder of a run, or of one artifact")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder for the files")
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="of a run (default: finetune)")
    parser.add_argument("--arm", default=METHOD, help="of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of a run (default: its first seed; none is chosen by its score)")
    parser.add_argument("--licence", metavar="NAME", help="licence of the weights, for the card (default: not stated)")
    parser.add_argument("--run", metavar="DIR", help="run that made the artifact (default: where it lies)")
    parser.add_argument(
        "--results", metavar="FILE", help=f"results for the card (default: the run's {RESULTS}, if any)"
    )
    return parser


def _run_of(source: Path) -> Path:
    """The run's folder: the source itself, or where a run keeps the artifact that it is."""
    return source.resolve().parents[1] if (source / INFO).exists() else source


def _find(run: Path, stage: str, arm: str, seed: int) -> Artifact:
    """The one artifact of the run that the options describe."""
    found = [read_stage(path.parent) for path in sorted((run / CHECKPOINTS).glob(f"*/{INFO}"))]
    of_stage = [artifact for artifact in found if (artifact.stage, artifact.info.get("seed")) == (stage, seed)]
    fitting = [artifact for artifact in of_stage if _arm(artifact, arm) == arm]
    if not fitting and stage in SHARED:
        # Recorded for the first arm that needed it.
        fitting = [artifact for artifact in of_stage if arm_of(_arm(artifact, arm)).start == arm_of(arm).start]
    if len(fitting) == 1:
        return fitting[0]
    what = f"of stage {stage}, arm {arm} and seed {seed}"
    if not fitting:
        raise ArtifactError(
            f"{run / CHECKPOINTS} holds no finished artifact {what}; there are:\n{_listing(found)}\nGive --stage, "
            "--arm and --seed of one of these, or a folder, also one in a shared folder of artifacts (with --run)"
        )
    raise ArtifactError(f"{run / CHECKPOINTS} holds several artifacts {what}; name one's folder:\n{_listing(fitting)}")


def _arm(artifact: Artifact, default: str) -> str:
    return artifact.info.get("variant", default)


def _listing(artifacts: list[Artifact]) -> str:
    lines = [
        f"  {artifact.directory}: {artifact.stage}, arm {artifact.info.get('variant', 'any')}, seed "
        f"{artifact.info.get('seed')}, {costs_of(artifact).pretext_steps} pretext steps"
        for artifact in artifacts
    ]
    return "\n".join(lines) or "  none"
