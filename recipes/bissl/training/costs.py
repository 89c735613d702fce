"""What a stage cost, together with all stages before it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ...experiment.artifacts import INFO, Artifact, ArtifactError


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
    """The costs that an artifact records; none for random weights.

    Raises:
        ArtifactError: its file does not say them.
    """
    if artifact is None:
        return Costs()
    values = {field.name: artifact.info.get(field.name) for field in fields(Costs)}
    for name, value in values.items():
        kinds = (int, float) if name == "seconds" else (int,)
        if type(value) not in kinds:
            raise ArtifactError(
                f"{artifact.directory / INFO} is damaged: {name} is {str(value)[:80]!r}; delete the folder to remake it"
            )
    return Costs(**values)  # type: ignore[arg-type]
