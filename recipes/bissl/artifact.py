"""Finished stages on disk, found again by the hash of what made them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bilevel.checkpoint import write_atomic

WEIGHTS, INFO = "weights.safetensors", "artifact.json"
FORMAT = 1


class ArtifactError(ValueError):
    """An artifact cannot be used; the message names its folder and what is wrong."""


@dataclass(frozen=True)
class Artifact:
    """What one stage made: weights of the modules, and facts about how.

    Attributes:
        stage: "pretext", "head", "bissl" or "finetune".
        key: hash of the configuration, the parent's key and the seed that made it.
        directory: its folder, with ``weights.safetensors`` and ``artifact.json``.
        info: JSON facts; always "pretext_steps", "label_steps" and "seconds" of this and all earlier stages.
    """

    stage: str
    key: str
    directory: Path
    info: Mapping[str, Any]

    def load_into(self, modules: Mapping[str, nn.Module]) -> None:
        """Load each module's weights and buffers, saved under the module's name here.

        Raises:
            ArtifactError: weights that are missing, unreadable or of another architecture.
        """
        try:
            tensors = load_file(self.directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.directory / WEIGHTS} cannot be read ({error}); delete the folder to remake it") from error
        for name, module in modules.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ArtifactError(
                    f"{self.directory}: the weights of {name!r} do not fit this configuration: {error}"
                ) from error


class ArtifactStore:
    """Artifacts under one folder, each in ``<stage>-<key>``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def directory(self, stage: str, key: str) -> Path:
        """Where the artifact is or will be; a stage's checkpoints are there while it runs."""
        return self.folder / f"{stage}-{key}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, or None."""
        directory = self.directory(stage, key)
        return read_artifact(directory) if (directory / INFO).exists() else None

    def save(self, stage: str, key: str, modules: Mapping[str, nn.Module], info: Mapping[str, Any]) -> Artifact:
        """Write weights, then the facts that mark the artifact as finished."""
        directory = self.directory(stage, key)
        directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, module in modules.items():
            state = module.state_dict()
            tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        write_atomic(directory / WEIGHTS, save(tensors))
        facts = {"format": FORMAT, "stage": stage, "key": key, **info}
        write_atomic(directory / INFO, json.dumps(facts, indent=1, allow_nan=False).encode())
        return Artifact(stage, key, directory, facts)


def read_artifact(directory: Path) -> Artifact:
    """The artifact in a folder.

    Raises:
        ArtifactError: there is none, or its facts cannot be read.
    """
    path = directory / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        stage, key, version = info["stage"], info["key"], info["format"]
    except FileNotFoundError as error:
        raise ArtifactError(f"{directory} holds no finished artifact: {INFO} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from error
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version!r}, this version reads {FORMAT}")
    return Artifact(stage, key, directory, info)


def make_key(stage: str, seed: int, parent: Artifact | None, *parts: Any) -> str:
    """Hash of everything that decides an artifact; `parts` must be JSON values."""
    content = [FORMAT, stage, seed, parent.key if parent else None, *parts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
