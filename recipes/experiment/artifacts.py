"""Artifacts: weights and facts of finished stages, in folders that are named by a hash of what made them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bilevel.checkpoint import write_atomic
from bilevel.distributed import on_first_rank

WEIGHTS, INFO = "weights.safetensors", "artifact.json"
FORMAT = 1
Kinds = Mapping[str, type | UnionType]
"""Types of facts, by name."""
FACTS: Kinds = {"format": int, "stage": str, "key": str, "sha256": str, "seconds": int | float}
"""What every artifact.json holds."""


class ArtifactError(ValueError):
    """An artifact cannot be used; the message names its folder and what is wrong."""


@dataclass(frozen=True)
class Artifact:
    """What one stage made: weights of the modules, and facts about how.

    Attributes:
        stage: the stage's name.
        key: hash of the configuration, the parent's key and the seed that made it.
        directory: its folder, with ``weights.safetensors`` and ``artifact.json``.
        info: JSON facts; always "seconds", of this and all earlier stages.
    """

    stage: str
    key: str
    directory: Path
    info: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All weights and buffers, verified, as ``<module>.<name>``; rank 0 reads them for all.

        Raises:
            ArtifactError: the file is missing, unreadable, or not the one that was written.
        """
        return on_first_rank(self._read)

    def _read(self) -> dict[str, Tensor]:
        path, remedy = self.directory / WEIGHTS, "delete the folder to remake it"
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.info["sha256"]:
                raise ArtifactError(f"{path} is damaged: its SHA-256 differs from the one in {INFO}; {remedy}")
            return load(content)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); {remedy}") from error

    def load_into(self, modules: Mapping[str, nn.Module]) -> None:
        """Load each module's weights and buffers, saved under the module's name here.

        Raises:
            ArtifactError: weights that are missing, damaged, not finite or of another architecture.
        """
        tensors = self.tensors()
        for name, module in modules.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            wrong = not_finite(own, module.state_dict())
            if wrong:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise ArtifactError(
                    f"{self.directory}: the weights of {name!r} hold NaN or infinity in {wrong[0]}{more}; delete the "
                    "folder to remake it, at a lower learning rate"
                )
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ArtifactError(
                    f"{self.directory}: the weights of {name!r} do not fit this configuration: {_first_misfit(error)}"
                ) from error


class ArtifactStore:
    """Artifacts under one folder, each in ``<stage>-<key>``. Of several ranks only the first looks there and writes.

    Args:
        facts: as for `read_artifact`.
        waits: whether a stage that another process makes is waited for, instead of refused.
    """

    def __init__(self, folder: Path, facts: Kinds = MappingProxyType({}), *, waits: bool = False) -> None:
        self.folder, self.facts, self.waits = folder, facts, waits

    def directory(self, stage: str, key: str) -> Path:
        """Where the artifact is or will be; a stage's checkpoints are there while it runs."""
        return self.folder / f"{stage}-{key}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, or None."""
        directory = self.directory(stage, key)
        there = on_first_rank(lambda: (directory / INFO).exists())
        return read_artifact(directory, self.facts) if there else None

    def save(self, stage: str, key: str, modules: Mapping[str, nn.Module], info: Mapping[str, Any]) -> Artifact:
        """Write weights, then the facts that mark the artifact as finished; a fact that is not finite becomes null."""
        directory = self.directory(stage, key)
        facts = on_first_rank(lambda: _write(directory, stage, key, modules, info))
        return Artifact(stage, key, directory, facts)


def _write(
    directory: Path, stage: str, key: str, modules: Mapping[str, nn.Module], info: Mapping[str, Any]
) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        state = module.state_dict()
        tensors |= {f"{name}.{entry}": value.detach().cpu().contiguous() for entry, value in state.items()}
    content = save(tensors)
    write_atomic(directory / WEIGHTS, content)
    facts = {
        "format": FORMAT,
        "stage": stage,
        "key": key,
        "sha256": hashlib.sha256(content).hexdigest(),
        **_finite(info),
    }
    write_atomic(directory / INFO, json.dumps(facts, indent=1, allow_nan=False).encode())
    return facts


def not_finite(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of `values` that hold NaN or infinity, as tensors of the type of `own`, where `own` holds none.

    A network may hold infinities by design, in a mask. One pass over each tensor, and no copy of one of its own type.
    """
    wrong = []
    for name in values.keys() & own.keys():
        value, before = values[name].to(own[name].dtype), own[name]
        if not value.is_floating_point() or value.numel() == 0:
            continue
        # The smallest and largest of numbers with a NaN among them are NaN.
        if all(bool(extreme.isfinite()) for extreme in torch.aminmax(value)):
            continue
        if value.shape != before.shape or bool((~value.isfinite() & before.isfinite().to(value.device)).any()):
            wrong.append(name)
    return sorted(wrong)


def read_artifact(directory: Path, facts: Kinds = MappingProxyType({})) -> Artifact:
    """The artifact in a folder; rank 0 reads its facts for all.

    Args:
        facts: types of further facts that must be there, by name.

    Raises:
        ArtifactError: there is none, or its facts cannot be read, are missing or of another type.
    """
    info = on_first_rank(lambda: _facts(directory, {**FACTS, **facts}))
    return Artifact(info["stage"], info["key"], directory, info)


def _facts(directory: Path, kinds: Kinds) -> dict[str, Any]:
    path, remedy = directory / INFO, "delete the folder to remake it"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{directory} holds no finished artifact: {INFO} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); {remedy}") from error
    missing = kinds.keys() - info.keys() if isinstance(info, dict) else kinds.keys()
    if missing:
        raise ArtifactError(f"{path} is damaged: {', '.join(sorted(missing))} missing; {remedy}")
    if info["format"] != FORMAT:
        raise ArtifactError(f"{path} has format {info['format']!r}, this version reads {FORMAT}; {remedy}")
    wrong = [name for name, kind in kinds.items() if not isinstance(info[name], kind)]
    if wrong:
        raise ArtifactError(f"{path} is damaged: {wrong[0]} is {str(info[wrong[0]])[:80]!r}; {remedy}")
    return info


def make_key(stage: str, seed: int, parent: Artifact | None, *parts: Any) -> str:
    """Hash of everything that decides an artifact; `parts` must be JSON values."""
    content = [FORMAT, stage, seed, parent.key if parent else None, *parts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _first_misfit(error: RuntimeError) -> str:
    """The first of the misfits that torch lists line by line, and how many there are."""
    misfits = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    return misfits[0][:300] + more


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
