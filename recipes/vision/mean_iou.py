"""Mean intersection over union, the metric of a segmentation."""

import torch
from torch import Tensor

from .imagesets import IGNORED
from .metrics import Metric, State


def mean_iou(classes: int) -> Metric:
    """Intersection over union in percent, the mean over classes, of the whole set's pixels.

    Outputs are ``[N, classes, H, W]`` scores, targets int64 ``[N, H, W]``. With n_cd the number of pixels of class c
    that have their highest score for class d, those whose target is `IGNORED` left out::

        IoU_c = n_cc / (sum_d n_cd + sum_d n_dc - n_cc)

    A class that is neither true nor predicted anywhere has none and is left out of the mean. Accumulating raises
    ValueError when the shapes do not fit; computing does when no pixel has a class.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective" (2015), section 4.1.
    """

    def accumulate(state: State | None, outputs: Tensor, targets: Tensor) -> State:
        if outputs.shape != (len(targets), classes, *targets.shape[1:]) or targets.ndim != 3:
            raise ValueError(
                f"mean IoU needs outputs [N, {classes}, H, W] and targets [N, H, W], got {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}"
            )
        known = targets != IGNORED
        # Pixels left out have a place of their own, so that nobody waits to know how many they are.
        pairs = torch.where(known, classes * targets + outputs.argmax(dim=1), classes**2).flatten()
        pixels = pairs.new_zeros(classes**2 + 1).scatter_add(0, pairs, torch.ones_like(pairs))[:-1]
        pixels = pixels.view(classes, classes)
        return (pixels,) if state is None else (state[0] + pixels,)

    return Metric(accumulate, _mean_iou)


def _mean_iou(state: State) -> float:
    pixels = state[0].cpu()
    both = pixels.diagonal()
    either = pixels.sum(dim=0) + pixels.sum(dim=1) - both
    there = either > 0
    if not there.any():
        raise ValueError("mean IoU is undefined: no pixel of the set has a class")
    return 100.0 * torch.mean(both[there].double() / either[there]).item()
