"""Batches of views: who reads which pictures, what is made of them there, and what on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bilevel.training import Arriving, Transfer, transfer_to

from ..pictures.base import EncodedImages, Images
from ..views.batched_views import masks_of_crops, views_of_crops, views_of_pictures
from ..views.evaluation_view import EvalView
from ..views.view_policy import ViewParameters, ViewPolicy, draw
from .reduction import View
from .work import Crops, EvaluationCrops, Made, RandomCrops, Squares, Work, joined
from .workers import Later, Pending, Workers

HERE = Transfer(torch.device("cpu"))
SLICE = 64
"""Pictures at a time: a whole batch in one worker would be waited for while the others have nothing to do."""


@dataclass(eq=False)
class UnderWay:
    """A batch that is being made, or is made and on its way to the device."""

    parts: list[Pending]
    nbytes: int
    parameters: list[ViewParameters | None]
    rows: slice
    indices: Tensor
    hashed: tuple[Tensor, ...] = ()
    """Of each part, the pictures whose files are hashed on the way."""
    arriving: Arriving | None = None
    failure: Exception | None = None


class Digests(Protocol):
    """What is known of the contents of an image set's files."""

    def missing(self, positions: Tensor) -> Tensor:
        """Which of the pictures at `positions` have not been hashed: bool [N]."""
        ...

    def add(self, positions: Tensor, digests: Iterable[bytes]) -> None:
        """Note the digests of the pictures at `positions`."""
        ...


class Loader:
    """Makes views of an image set's pictures.

    Pictures are decoded, cropped and resized to uint8 by `workers` (those in memory by this process), and the rest is
    computed on the device, a batch at a time; or, where all of them lie on the device at one size, crops and all.

    Args:
        images: the pictures.
        views: what is made of each.
        workers: read those that do not lie in memory.
        transfer: brings them to the device.
        masks: uint8 [N, H, W], cut and mirrored as the pictures are.
        array: the pictures on the device, uint8 [N, 1 or 3, H, W], for crops in float; not with masks.
        digests: is told the digest of a file where it has none, once the file is read.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[View],
        workers: Workers,
        *,
        transfer: Transfer = HERE,
        masks: Tensor | None = None,
        array: Tensor | None = None,
        digests: Digests | None = None,
    ) -> None:
        assert array is None or masks is None, "masks are cut where pictures are read"
        self.images, self.views, self.workers = images, tuple(views), workers
        self.transfer, self.masks, self.array = transfer, masks, array
        self.digests = digests if isinstance(images, EncodedImages) else None
        self._in_memory = images.array

    def begin(self, indices: Tensor, seed: int = 0, rows: slice | None = None) -> UnderWay:
        """Begin views of the pictures at `indices`, int64 [N], of which only those in `rows` are made.

        Random views are drawn for all N, by `seed` alone, so that a share of a batch is what it is in the whole.
        """
        count = len(indices)
        rows = slice(0, count) if rows is None else rows
        generator = torch.Generator().manual_seed(seed)
        parameters = [draw(view, count, generator) if isinstance(view, ViewPolicy) else None for view in self.views]
        if self.array is not None:
            return UnderWay([], 0, parameters, rows, indices)
        if self.images.in_memory:
            return UnderWay([Later(self._work(indices, rows, parameters))], 0, parameters, rows, indices)
        slices = [slice(start, min(start + SLICE, rows.stop)) for start in range(rows.start, rows.stop, SLICE)]
        works = [self._work(indices, part, parameters) for part in slices]
        nbytes = sum(work.nbytes for work in works)
        parts = [self.workers.submit(work) for work in works]
        self.workers.in_flight += nbytes
        hashed = [indices[part][sorted(work.digests)] for part, work in zip(slices, works, strict=True)]
        return UnderWay(parts, nbytes, parameters, rows, indices, tuple(hashed))

    def finish(self, begun: UnderWay) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The views, one tensor each, and their masks, on the device; they share no memory with anything else.

        A random view is float32 [n, 3, size, size], an evaluation's too, a square uint8 [n, 1 or 3, side, side]; a mask
        uint8 [n, side, side].

        Raises:
            DataError: a picture cannot be read.
            WorkerLost: a worker process is gone.
        """
        if self.array is not None:
            return tuple(self._from_array(self.array, index, begun) for index in range(len(self.views))), ()
        crops, masks = self._sent(begun).take()
        crops = crops[0] if len(crops) == 1 else [joined(parts) for parts in zip(*crops, strict=True)]
        views = tuple(self._finished(index, crop, begun) for index, crop in enumerate(crops))
        return views, self._masks(masks, begun)

    def send(self, begun: UnderWay) -> None:
        """Begin the copies of a batch to the device, if it is made by now; what goes wrong is for `finish` to raise."""
        if self.array is None and all(part.done() for part in begun.parts):
            try:
                self._sent(begun)
            except Exception as error:
                begun.failure = error

    def _sent(self, begun: UnderWay) -> Arriving:
        """The crops and masks of each part, on their way."""
        if begun.failure is not None:
            raise begun.failure
        if begun.arriving is None:
            made = self._made(begun)
            begun.arriving = self.transfer.begin(([part.crops for part in made], [part.masks for part in made]))
        return begun.arriving

    def _made(self, begun: UnderWay) -> list[Made]:
        try:
            made = [part.result() for part in begun.parts]
        finally:
            self.workers.in_flight -= begun.nbytes
            begun.nbytes = 0
        if self.digests is not None:
            for indices, part in zip(begun.hashed, made, strict=True):
                self.digests.add(indices, part.digests)
        return made

    def give_up(self, begun: UnderWay) -> None:
        """Forget a batch that nobody will ask for."""
        self.workers.in_flight -= begun.nbytes
        begun.nbytes = 0
        for part in begun.parts:
            part.cancel()

    def room(self, indices: Tensor) -> bool:
        """Whether those pictures may be begun before they are needed."""
        return self.workers.room(len(indices) * sum(3 * _side(view) ** 2 for view in self.views))

    def make(self, indices: Tensor, seed: int = 0, rows: slice | None = None) -> tuple[Tensor, ...]:
        """The views of some pictures, begun and waited for."""
        return self.finish(self.begin(indices, seed, rows))[0]

    def _work(self, indices: Tensor, part: slice, parameters: Sequence[ViewParameters | None]) -> Work:
        chosen = indices[part]
        crops = [_crops(view, drawn, part) for view, drawn in zip(self.views, parameters, strict=True)]
        masks = None if self.masks is None else self.masks[chosen]
        pictures = self.images.items(chosen.tolist()) if self._in_memory is None else self._in_memory[chosen]
        missing = () if self.digests is None else self.digests.missing(chosen).nonzero().flatten().tolist()
        return Work(pictures, crops, masks, frozenset(missing))

    def _finished(self, index: int, crops: Tensor, begun: UnderWay) -> Tensor:
        view, parameters = self.views[index], begun.parameters[index]
        if isinstance(view, ViewPolicy):
            assert parameters is not None, "drawn for every random view"
            return views_of_crops(view, crops, parameters, begun.rows)
        return view.finish(crops) if isinstance(view, EvalView) else crops

    def _from_array(self, array: Tensor, index: int, begun: UnderWay) -> Tensor:
        view, parameters = self.views[index], begun.parameters[index]
        pictures = array[transfer_to(array.device)(begun.indices[begun.rows])]
        if isinstance(view, ViewPolicy):
            assert parameters is not None, "drawn for every random view"
            return views_of_pictures(view, pictures, parameters[begun.rows])
        crops = _crops(view, None, begun.rows).of_all(pictures.cpu())
        return self.transfer(view.finish(crops) if isinstance(view, EvalView) else crops)

    def _masks(self, parts: Sequence[Sequence[Tensor]], begun: UnderWay) -> tuple[Tensor, ...]:
        if self.masks is None:
            return ()
        return tuple(
            masks_of_crops(torch.cat([part[index] for part in parts]), begun.parameters[index], begun.rows)
            for index in range(len(self.views))
        )


def _crops(view: View, parameters: ViewParameters | None, part: slice) -> Crops:
    if isinstance(view, ViewPolicy):
        assert parameters is not None, "drawn for every random view"
        return RandomCrops.drawn(view, parameters[part])
    return EvaluationCrops(view) if isinstance(view, EvalView) else Squares(view)


def _side(view: View) -> int:
    if isinstance(view, ViewPolicy):
        return view.size
    return view.crop if isinstance(view, EvalView) else view
