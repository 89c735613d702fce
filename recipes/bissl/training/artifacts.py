"""Artifacts of this recipe's stages: those that count the steps which led to them."""

from pathlib import Path

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
