"""Reads and writes what the command `features` leaves: `features.json` beside `features.png`."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...settings.run_directory import FEATURES, FEATURES_PICTURE
from ..wording import shown_name


class ArmScores(BaseModel):
    """One backbone: its artifact, and its scores by name; None where one is undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stage: str
    key: str
    scores: dict[str, float | None]


class SavedFeatures(BaseModel):
    """What was shown, how, and what came out.

    Attributes:
        split: part of the labelled data that is shown; `images` of it were scored, `points` of them drawn.
        definitions: what each score is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str
    split: str
    seed: int
    method: str
    perplexity: float
    classes: int
    train_images: int
    images: int
    points: int
    batch_norm: str
    definitions: dict[str, str]
    arms: dict[str, ArmScores]

    def caption(self) -> str:
        """What a reader of the picture must know."""
        part = f"{self.points} of {self.images}" if self.points < self.images else str(self.points)
        return (
            f"{shown_name(self.dataset)}: features of {part} {self.split} images before fine-tuning, "
            f"seed {self.seed}; t-SNE ({self.method}, perplexity {self.perplexity:g}), each panel on its own: compare "
            f"groups, not positions. {self.classes} classes, one colour and shape each."
        )

    def dump(self) -> bytes:
        """The content of `features.json`."""
        return json.dumps(self.model_dump(), indent=1, allow_nan=False).encode()


def read_features(run_dir: Path) -> tuple[SavedFeatures, bytes] | None:
    """The record and the picture in a run's folder; None where there are none.

    Raises:
        ValueError: a file is damaged.
    """
    path = run_dir / FEATURES
    if not path.exists():
        return None
    remedy = "make it again by the command features --overwrite, or delete it"
    try:
        values: Any = json.loads(path.read_bytes())
        record, picture = SavedFeatures.model_validate(values), (run_dir / FEATURES_PICTURE).read_bytes()
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} or {FEATURES_PICTURE} cannot be read ({error}); {remedy}") from error
    if not picture.startswith(b"\x89PNG"):
        raise ValueError(f"{run_dir / FEATURES_PICTURE} is no PNG; {remedy}")
    return record, picture
