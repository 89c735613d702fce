"""What stages cost in steps and seconds, and the artifacts that count it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...experiment.artifacts import Artifact, ArtifactStore, read_artifact

STEPS = {"pretext_steps": int, "label_steps": int}
"""Facts of every artifact: steps on images without and with labels, of its stage and all earlier ones."""

SKIPPED = ("skipped_pretext_steps", "skipped_label_steps")
"""Facts of those artifacts alone of which steps were left out."""


def artifact_store(folder: Path, *, waits: bool = False) -> ArtifactStore:
    """The artifacts under a folder; `waits` as for `ArtifactStore`."""
    return ArtifactStore(folder, STEPS, waits=waits)


def read_stage(directory: Path) -> Artifact:
    """The artifact of a stage, in its folder.

    Raises:
        ArtifactError: there is none, or its facts cannot be read.
    """
    return read_artifact(directory, STEPS)


@dataclass(frozen=True)
class Costs:
    """Optimizer steps on the pretext loss, optimizer steps that saw labels, and wall-clock seconds.

    Those of the steps that were left out, as their loss or gradient was not finite, are counted by themselves too.
    """

    pretext_steps: int = 0
    label_steps: int = 0
    seconds: float = 0.0
    skipped_pretext_steps: int = 0
    skipped_label_steps: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.pretext_steps + other.pretext_steps,
            self.label_steps + other.label_steps,
            self.seconds + other.seconds,
            self.skipped_pretext_steps + other.skipped_pretext_steps,
            self.skipped_label_steps + other.skipped_label_steps,
        )

    def facts(self) -> dict[str, Any]:
        """The fields of an artifact's facts; skipped steps where there are any."""
        skipped = {name: count for name in SKIPPED if (count := getattr(self, name))}
        return {
            "pretext_steps": self.pretext_steps,
            "label_steps": self.label_steps,
            "seconds": self.seconds,
            **skipped,
        }


def costs_of(artifact: Artifact | None) -> Costs:
    """What a stage and all before it cost; nothing for random weights."""
    if artifact is None:
        return Costs()
    info = artifact.info
    return Costs(info["pretext_steps"], info["label_steps"], info["seconds"], *(info.get(name, 0) for name in SKIPPED))
