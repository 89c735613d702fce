"""A whole set in one fixed view, and what a frozen network makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..imagesets import ImageSet
from .loader import Loader, UnderWay
from .reduction import View
from .stream import InOrder
from .workers import Workers, cores_to_spare, share_of_budget


def in_one_view(images: ImageSet, view: View, *, batch_size: int, num_workers: int | None = None) -> Iterator[Tensor]:
    """The pictures in order, a batch at a time, as the view makes them, [n, 3, side, side].

    Args:
        num_workers: processes that read streamed pictures; None: one fewer than there are cores.
    """
    workers = Workers(cores_to_spare() if num_workers is None else num_workers, share_of_budget())
    loader = Loader(images.images, (view,), workers)

    def finish(begun: UnderWay) -> Tensor:
        return loader.finish(begun)[0][0].expand(-1, 3, -1, -1)

    try:
        yield from InOrder(len(images), batch_size, loader.begin, finish, loader.give_up)
    finally:
        workers.close()


@torch.no_grad()
def encoded(
    network: nn.Module, images: ImageSet, view: View, device: torch.device, *, batch_size: int, num_workers: int | None
) -> Tensor:
    """What the network, in evaluation mode and on `device` afterwards, makes of a set: float32 [N, D] on the CPU."""
    network.to(device).eval()
    batches = in_one_view(images, view, batch_size=batch_size, num_workers=num_workers)
    return torch.cat([network(batch.to(device)).float().cpu() for batch in batches])
