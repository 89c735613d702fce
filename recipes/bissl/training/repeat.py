"""One repeat of one variant: what every stage is told about itself."""

from dataclasses import dataclass
from typing import Any

from ...experiment.events import StageEvents
from ...experiment.workspace import Workspace
from ..settings.config import Config


@dataclass(frozen=True)
class Repeat:
    """The pipeline of one variant at one seed.

    Attributes:
        settings: the run's configuration, with the variant's own bilevel stage.
        variant: its name, which events and artifacts carry.
    """

    settings: Config
    variant: str
    seed: int

    @classmethod
    def of(cls, config: Config, variant: str, seed: int) -> "Repeat":
        """That of `variant` in a run with the configuration `config`."""
        return cls(config.for_arm(variant), variant, seed)

    def events(self, stage: str, workspace: Workspace) -> StageEvents:
        """Where the events of one of its stages go."""
        fields = {"stage": stage, "variant": self.variant, "seed": self.seed}
        return workspace.events(fields, self.settings.model_dump(mode="json"))

    def facts(self) -> dict[str, Any]:
        """What the artifacts of its stages say about it."""
        return {"seed": self.seed, "variant": self.variant}
