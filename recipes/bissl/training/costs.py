"""What stages cost in steps and seconds, and the artifacts that count it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...experiment.artifacts import Artifact, ArtifactStore, read_artifact

STEPS = {"pretext_steps": int, "label_steps": int}
"""Facts of every artifact: steps on images without and with labels, of its stage and all earlier ones."""


def artifact_store(folder: Path) -> ArtifactStore:
    """The artifacts under a folder."""
    return ArtifactStore(folder, STEPS)


def read_stage(directory: Path) -> Artifact:
    """The artifact of a stage, in its folder.

    Raises:
        ArtifactError: there is none, or its facts cannot be read.
    """
    return read_artifact(directory, STEPS)


@dataclass(frozen=True)
class Costs:
    """Optimizer steps on the pretext loss, optimizer steps that saw labels, and wall-clock seconds."""

    pretext_steps: int = 0
    label_steps: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.pretext_steps + other.pretext_steps,
            self.label_steps + other.label_steps,
            self.seconds + other.seconds,
        )

    def facts(self) -> dict[str, Any]:
        """The fields of an artifact's facts."""
        return asdict(self)


def costs_of(artifact: Artifact | None) -> Costs:
    """What a stage and all before it cost; nothing for random weights."""
    if artifact is None:
        return Costs()
    return Costs(artifact.info["pretext_steps"], artifact.info["label_steps"], artifact.info["seconds"])
