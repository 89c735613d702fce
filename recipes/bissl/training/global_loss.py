"""A task's loss on the whole batch of a step, of which each of several processes (ranks) holds some rows.

Networks run on a rank's own rows. Where samples meet, in the task's loss, every rank has the outputs of all rows and
computes the loss of one process. Gradients and Hessian products averaged over the ranks are then those of one process.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel.distributed import gather, rows_of_all, world_size
from bilevel.tree import map_tensors, tensors_in

from ...vision.errors import DataError
from ..tasks.base import Bound, DownstreamTask, PretextTask


def pretext_loss(task: PretextTask, backbone: Bound, heads: Mapping[str, Bound], batch: Any) -> Tensor:
    """L_P on the global batch, 0-d.

    A task without `outputs` and `output_loss` is taken for a mean over samples: each rank's loss counts by its rows, in
    the mean over the ranks.
    """
    if world_size() == 1:
        return task.loss(backbone, heads, batch)
    if type(task).outputs is not PretextTask.outputs:
        return pretext_output_loss(task, task.outputs(backbone, heads, batch))
    own = len(next(tensors_in(batch)))
    return task.loss(backbone, heads, batch) * (own * world_size() / sum(rows_of_all(own)))


def pretext_output_loss(task: PretextTask, outputs: Tensor) -> Tensor:
    """L_P as a function of this rank's rows of `outputs`, 0-d."""
    return task.output_loss(gather(outputs))


def downstream_loss(task: DownstreamTask, backbone: Bound, head: Bound, inputs: Any, targets: Any) -> Tensor:
    """L_D on the global batch, 0-d.

    Raises:
        DataError: over several ranks, where a tensor of the outputs has not one row for each sample.
    """
    outputs = task.forward(backbone, head, inputs)
    if world_size() == 1:
        return task.loss(outputs, targets)
    own = len(next(tensors_in(targets)))
    rows = rows_of_all(own)

    def everywhere(x: Tensor) -> Tensor:
        if x.shape[:1] != (own,):
            raise DataError(
                f"{type(task).__name__}: a tensor of shape {tuple(x.shape)} among the outputs or targets of {own} "
                "samples; several processes need one row a sample in each"
            )
        return gather(x, rows)

    return task.loss(map_tensors(everywhere, outputs), map_tensors(everywhere, targets))
