"""Seeded choices of images: stratified hold-outs, caps for each class, random limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..imagesets import KINDS

Rounding = Literal["largest remainders", "down"]

# One stream of random numbers for each purpose, so that no choice shifts another one.
TEST_STREAM, VAL_STREAM, TRAIN_CAP_STREAM, VAL_CAP_STREAM, LIMIT_STREAM, FIXED_TRAIN_STREAM = range(6)


def stream(split_seed: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose."""
    return np.random.default_rng([split_seed, purpose])


def _strata(positions: Tensor, labels: Tensor, count: int) -> list[Tensor]:
    """`positions` by class; multi-label ones by their first class (the last stratum has none); else one stratum."""
    here = labels[positions]
    if labels.dtype == torch.bool:
        # argmax gives the first of equal values; an image without any class goes behind all of them.
        here = torch.where(here.any(1), here.to(torch.uint8).argmax(1), count)
        count += 1
    elif labels.dtype != torch.int64:
        here, count = torch.zeros(len(positions), dtype=torch.int64), 1
    return [positions[here == label] for label in range(count)]


def shuffled_strata(positions: Tensor, labels: Tensor, count: int, generator: np.random.Generator) -> list[Tensor]:
    """The members of each stratum among `positions`, shuffled: of each class of `count`, or see `_strata`."""
    return [group[torch.from_numpy(generator.permutation(len(group)))] for group in _strata(positions, labels, count)]


def _counts(sizes: np.ndarray, fraction: float, rounding: Rounding) -> np.ndarray:
    """How many of each stratum make `fraction` of it."""
    quotas = sizes * fraction
    counts = np.floor(quotas + 1e-9).astype(int)
    if rounding == "largest remainders":
        missing = round(float(quotas.sum())) - int(counts.sum())
        counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
    return counts


def hold_out(
    positions: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    name: str,
    fraction: float,
    keep: int,
    generator: np.random.Generator,
    rounding: Rounding = "largest remainders",
    passed_over: str = "",
) -> tuple[Tensor, Tensor]:
    """Split `positions` into a stratified `fraction` and the rest, both sorted.

    With one class an image, each class gives at least 1 image and keeps at least `keep`; DataError names one that has
    too few. Multi-label images are stratified by their first class, a regression is not stratified; there the set as
    a whole gives at least 1 and keeps at least `keep`. `rounding` is that of each stratum's number: so that the sum is
    `fraction` of the whole ("largest remainders"), or "down". `passed_over` ends the error.
    """
    groups = shuffled_strata(positions, labels, len(classes), generator)
    sizes = np.asarray([len(group) for group in groups])
    counts = _counts(sizes, fraction, rounding)
    ending = f" ({passed_over})" if passed_over else ""
    if labels.dtype == torch.int64:
        for class_name, size in zip(classes, sizes, strict=True):
            if size <= keep:
                raise DataError(
                    f"{name}: class {class_name!r} has too few images to be split: "
                    f"{size} where at least {keep + 1} are needed; add images or remove the class{ending}"
                )
        counts = np.clip(counts, 1, sizes - keep)
    else:
        if len(positions) <= keep:
            raise DataError(
                f"{name} has too few images to be split: "
                f"{len(positions)} where at least {keep + 1} are needed; add images{ending}"
            )
        largest = int(sizes.argmax())
        counts[largest] += max(0, 1 - counts.sum())
        counts[largest] -= max(0, counts.sum() - (len(positions) - keep))
    held = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)])
    rest = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)])
    return held.sort().values, rest.sort().values


def folds(labels: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """The fold of each single-label image, int64 [N] in 0 .. count - 1, at random; each class is spread evenly."""
    order = torch.from_numpy(generator.permutation(len(labels)))
    # Those of one class behind one another are dealt out in turn.
    order = order[labels[order].argsort(stable=True)]
    made = torch.empty(len(labels), dtype=torch.int64)
    made[order] = torch.arange(len(labels)) % count
    return made


@dataclass(frozen=True)
class Cap:
    """How many images of each class a set may keep (None: all), and the option's name for the error."""

    per_class: int | None
    option: str
    purpose: int

    def kept(
        self,
        positions: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        name: str,
        split_seed: int,
        passed_over: str = "",
    ) -> Tensor:
        """Sorted `positions` (into `labels`) of `per_class` images of each class, nested for growing `per_class`.

        Multi-label images count for their first class, those without any class for one more, and a class that has fewer
        keeps all. Raises DataError where a class has fewer with one class an image (`passed_over` ends it), and for a
        regression, which has no classes.
        """
        if self.per_class is None:
            return positions
        if labels.dtype not in (torch.int64, torch.bool):
            kind = "targets of a regression" if KINDS[labels.dtype] == "regression" else "masks of a segmentation"
            raise DataError(
                f"{name}: {self.option} = {self.per_class} needs classes, but these are {kind}; "
                f"leave {self.option} out, or make the set itself smaller"
            )
        groups = shuffled_strata(positions, labels, len(classes), stream(split_seed, self.purpose))
        if labels.dtype == torch.int64:
            for class_name, group in zip(classes, groups, strict=True):
                if len(group) < self.per_class:
                    raise DataError(
                        f"{name}: class {class_name!r} has too few images for {self.option} = {self.per_class}: "
                        f"{len(group)} are left for this part; lower {self.option} or add images"
                        + (f" ({passed_over})" if passed_over else "")
                    )
        return torch.cat([group[: self.per_class] for group in groups]).sort().values


def limited(count: int, limit: int, split_seed: int) -> Tensor:
    """Sorted positions of at most `limit` of `count` images."""
    chosen = stream(split_seed, LIMIT_STREAM).permutation(count)[:limit]
    return torch.from_numpy(np.sort(chosen))
