"""The pictures of a run, their labels, and which of these are trusted, planted or known."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..experiment.folder.paths import user_path
from ..experiment.terminal import counted
from ..vision.errors import DataError
from ..vision.imagesets import ImageSet
from ..vision.pictures.base import EncodedImages
from ..vision.record.copies import but_copies, contradictions, labels_of_copies
from ..vision.record.identity import Identity
from ..vision.sources.loading import load_labelled
from ..vision.sources.splits import hold_out
from ..vision.sources.wrong_labels import labels_by_table, planted
from .settings import Config

FEWEST = 2
"""Trusted pictures of each class: every fold holds some of them out."""


@dataclass(frozen=True)
class Sets:
    """One repeat's samples as rows of all pictures, those of the data first.

    Attributes:
        rows: int64 [N], the samples to look at; `given`: int64 [N], their labels as they are given.
        right: int64 [N], their right labels; None where nobody knows.
        trusted: int64 [M], rows of trusted pictures; `labels`: int64 [M], theirs, in each of `classes`.
    """

    rows: Tensor
    given: Tensor
    right: Tensor | None
    trusted: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        """How many there are, each of which has trusted pictures."""
        return 1 + int(self.labels.max())


class Pictures:
    """What a run reads: the data and, where they come from elsewhere, the trusted pictures."""

    def __init__(self, config: Config) -> None:
        self.config, self.section = config, config.data

    @cached_property
    def data(self) -> ImageSet:
        """The pictures to look at, and their labels."""
        return self._read("data.source", self.section.source)

    @cached_property
    def trusted(self) -> ImageSet | None:
        """Trusted pictures, with labels by the data's classes; None where a fraction of the data is held as such.

        Raises:
            DataError: their classes are not those of the data.
        """
        if self.section.trusted is None:
            return None
        return self._read("data.trusted", self.section.trusted).by_classes_of(self.data)

    @property
    def parts(self) -> dict[str, ImageSet]:
        """The sets by name, in the order of rows."""
        return {"data": self.data} | ({} if self.trusted is None else {"trusted": self.trusted})

    @cached_property
    def identity(self) -> Identity:
        """Which pictures and labels they are."""
        return Identity(self.parts.__getitem__, tuple(self.parts))

    @cached_property
    def copies(self) -> Tensor:
        """int64 [N], of each of the data that is a copy of a picture of `trusted` the trusted label, else -1."""
        if self.trusted is None:
            return torch.full((len(self.data),), -1)
        self.identity.complete(lambda line: None)
        assert self.trusted.labels is not None, "read with labels"
        return labels_of_copies(self.identity.contents("data"), self.identity.contents("trusted"), self.trusted.labels)

    def sets(self, seed: int) -> Sets:
        """The samples of one repeat.

        Raises:
            DataError: a class has too few trusted pictures, or too little is left to look at.
        """
        labels, classes, section = self.data.labels, self.data.classes, self.section
        assert labels is not None, "read with labels"
        rows, right = torch.arange(len(labels)), self.truth
        if self.trusted is None:
            known, generator = labels if right is None else right, np.random.default_rng([seed, 0])
            name, share = self.data.name, section.trusted_fraction
            trusted, rows = hold_out(rows, known, classes, name=name, fraction=share, keep=1, generator=generator)
            self.identity.complete(lambda line: None)
            rows, trusted_labels = but_copies(self.identity.contents("data"), rows, trusted), known[trusted]
        else:
            rows, trusted = rows[self.copies < 0], len(labels) + torch.arange(len(self.trusted))
            assert self.trusted.labels is not None, "read with labels"
            trusted_labels = self.trusted.labels
        self._check_counts(len(rows), trusted_labels)
        if section.flips is None:
            return Sets(rows, labels[rows], None if right is None else right[rows], trusted, trusted_labels)
        given = planted(labels[rows], len(classes), section.flips, seed)
        return Sets(rows, given, labels[rows], trusted, trusted_labels)

    def _check_counts(self, left: int, trusted: Tensor) -> None:
        counts = torch.bincount(trusted, minlength=len(self.data.classes))
        fewest = int(counts.argmin())
        if int(counts[fewest]) < FEWEST:
            field = "data.trusted_fraction" if self.trusted is None else "data.trusted"
            raise DataError(
                f"{field}: class {self.data.classes[fewest]!r} has {counted(int(counts[fewest]), 'trusted picture')}; "
                f"every class needs {FEWEST} or more"
            )
        if left < 2 * self.config.folds:
            raise DataError(
                f"data.source: {counted(left, 'picture')} left to look at, too few for folds={self.config.folds}; the "
                "others are trusted, or copies of trusted ones"
            )

    @cached_property
    def truth(self) -> Tensor | None:
        """int64 [N], the right labels of the data, by the table that the configuration names; None without one.

        Raises:
            DataError: it is of other pictures or classes, or cannot be read.
        """
        if self.section.truth is None:
            return None
        return labels_by_table(self.data, user_path(self.section.truth), "data.truth")

    @property
    def contradictions(self) -> list[str]:
        """The copies of trusted pictures whose label is not the trusted one, in words."""
        return contradictions(self.data, self.copies, self.name)

    def name(self, row: int) -> str:
        """What a picture of the data is called: its path below the source's folder, else its number."""
        origin = self.data.images.origin
        return origin.file_name(row) if isinstance(origin, EncodedImages) else str(row)

    def _read(self, field: str, source: str) -> ImageSet:
        section = self.section
        images = load_labelled(source, root=section.root, download=section.download, storage=section.storage)
        if images.kind != "single-label":
            raise DataError(f"{field}: {source} must have one class a picture; it has {images.kind} labels")
        return images
