"""The configuration of a run, and what its folder holds."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ..experiment.configuration import Section
from ..experiment.folder.run_folder import RunDirectory
from ..vision.frozen.features import FrozenFeatures
from ..vision.frozen.section import FrozenSection
from ..vision.reading_section import HOW_READ, ReadingSection
from ..vision.sources.loading import DIGITS
from ..vision.sources.wrong_labels import check_flips

IMAGES, RANKING = "images.npz", "suspicious.csv"
WIDEST = 2048
"""Features a picture at most: every fold solves for so many numbers a class, or hidden unit, again and again."""
MARKS = frozenset({"data", "model", "learning", "false_alarms"})
SAFE_TO_CHANGE = frozenset({"seeds", "device", "threads", "shown", *(f"data.{name}" for name in HOW_READ)})


class DataConfig(ReadingSection):
    """Pictures, their labels, and which of these are trusted."""

    source: str = Field(
        default=DIGITS, description='pictures with labels to look at: "digits", "folder:PATH" or any other source'
    )
    trusted: str | None = Field(
        default=None, description="source of pictures whose labels are right; null: trusted_fraction of the data"
    )
    trusted_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of the data, of each class, that is held as trusted"
    )
    truth: str | None = Field(
        default=None, description="table file,label of the data's right labels, for scores; null: unknown"
    )
    flips: Annotated[str | None, AfterValidator(check_flips)] = Field(
        default=None, description="wrong labels to plant, which are then known: uniform:0.2 or pair:0.4; null: none"
    )

    @model_validator(mode="after")
    def _one_truth(self) -> "DataConfig":
        if self.truth is not None and self.flips is not None:
            raise ValueError("truth and flips exclude each other: planted labels are known; give one of them")
        return self


class LearningConfig(Section):
    """The bilevel problem: one weight a sample above, a classifier with a ridge below."""

    method: Literal["auto", "implicit", "soba"] = Field(
        default="auto",
        description="implicit: the lower level solved anew each alternation, hypergradients by conjugate gradients; "
        "soba: single-loop steps on batches; auto: soba above 100,000 samples",
    )
    alternations: int = Field(
        default=2, ge=1, description="hypergradient steps of implicit; more of them fit the trusted part, see docs"
    )
    lr: float = Field(default=1.0, gt=0, description="step of the logits, in the mean square over samples, implicit")
    hidden: int = Field(
        default=0, ge=0, le=1024, description="tanh units between features and classes; 0: a linear model"
    )
    ridge: float | None = Field(
        default=None, gt=0, description="of the classifier; null: chosen in each fold by the trusted part"
    )
    cg_iterations: int = Field(default=100, ge=1, description="of each linear solve, at most")
    epochs: int = Field(default=10, ge=1, description="passes over the samples, soba")
    batch_size: int = Field(default=256, ge=2, description="samples a step, soba")
    soba_lr: float = Field(default=0.1, gt=0, description="step of Adam on the weights' logits, soba")
    checkpoint_every: int = Field(default=1, ge=1, description="alternations, or passes of soba, between checkpoints")


class Config(Section):
    """Everything that decides what a run computes."""

    seed: int = Field(default=0, ge=0, description="first seed: of folds, flips and the fraction held as trusted")
    seeds: int = Field(default=1, ge=1, description="repeats, seeds seed, seed+1, ...")
    folds: int = Field(default=5, ge=2, le=20, description="parts that are scored by models that have not seen them")
    false_alarms: float = Field(
        default=0.05, gt=0, lt=1, description="share of right labels that may be called suspicious"
    )
    shown: int = Field(default=60, ge=0, le=1000, description="most suspicious pictures on the page")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    threads: int | None = Field(default=None, ge=1, description="torch's CPU threads; null: torch's choice")
    data: DataConfig = DataConfig()
    model: FrozenSection = FrozenSection()
    learning: LearningConfig = LearningConfig()

    @property
    def repeats(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.seeds)

    @cached_property
    def features(self) -> FrozenFeatures:
        """What the model sees of a picture."""
        return FrozenFeatures(self.model.settled(native=8 if self.data.source == DIGITS else None), WIDEST)


def run_directory(path: Path) -> RunDirectory:
    """The folder of a run of this recipe."""
    return RunDirectory(path, MARKS, SAFE_TO_CHANGE, (IMAGES, RANKING))
