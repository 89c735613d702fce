"""How a run computes: precision, memory layout, compilation, and where its data lie."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.distributed import mean_over_ranks, replicate, world_size
from bilevel.nn import SyncBatchNorm, own_draws, synchronised
from bilevel.training import Callback, Transfer, transfer_to
from bilevel.tree import map_tensors

from ...experiment.errors import ConfigError
from ...vision.imagesets import ImageSet
from ..settings.sections import ComputeConfig

Loss = Callable[..., Tensor]
"""A loss as a function of whatever a stage gives it, 0-d."""

MIB = 2**20


@dataclass(frozen=True)
class Computing:
    """What the section `compute` means for modules, batches and losses on a device."""

    fields: ComputeConfig
    device: torch.device

    def place(self, module: nn.Module) -> nn.Module:
        """The same module, its tensors on the device and its 4-d ones in the memory layout of batches.

        Over several ranks its weights are rank 0's, and its BatchNorms synchronised where the fields say so.

        Raises:
            ConfigError: one of them cannot be, being of a kind of its own.
        """
        replicate((*module.parameters(), *module.buffers()))
        if world_size() > 1 and self.fields.batch_norm == "synchronised":
            _check_kinds(synchronised(module))
        if self.fields.channels_last:
            return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.to(self.device)

    @torch.no_grad()
    def join_buffers(self, *modules: nn.Module) -> None:
        """Give running statistics that each rank has taken on its share the ranks' mean."""
        if world_size() == 1:
            return
        layers = [layer for module in modules for layer in module.modules() if not isinstance(layer, SyncBatchNorm)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False) if buffer.is_floating_point()]
        means = mean_over_ranks({str(index): buffer for index, buffer in enumerate(buffers)})
        for buffer, mean in zip(buffers, means.values(), strict=True):
            buffer.copy_(mean)

    def move(self, batch: Any) -> Any:
        """The same nested structure with its tensors on the device, 4-d ones in the memory layout of modules."""

        def laid_out(tensor: Tensor) -> Tensor:
            return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        there = self.transfer(batch)
        return map_tensors(laid_out, there) if self.fields.channels_last else there

    @property
    def transfer(self) -> Transfer:
        """What brings tensors to the device."""
        return transfer_to(self.device)

    def first_order(self, loss: Loss) -> Loss:
        """`loss` as first-order steps evaluate it: compiled and under autocast where the fields say so, else itself.

        Over several ranks each draws random masks of its own in it.

        Only for losses that are differentiated once. At most one stage's result is in use at a time: making the next
        one forgets what was compiled before.

        Raises:
            ConfigError: when the result is called and cannot be compiled.
        """
        evaluate = _compiled(loss) if self.fields.compile else loss
        if world_size() > 1:
            evaluate = own_draws()(evaluate)
        if self.fields.precision == "float32":
            return evaluate

        def under_autocast(*args: Any) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return evaluate(*args)

        return under_autocast

    def on_device(self, images: ImageSet) -> Tensor | None:
        """The pictures on the device, where crops are made there; None where they are not, or have several sizes.

        Raises:
            ConfigError: the device has not as much memory left.
        """
        array = images.images.array
        if self.fields.crops != "float" or array is None:
            return None
        if self.device.type == "cuda":
            free, needed = torch.cuda.mem_get_info(self.device)[0], array.nbytes
            if needed >= free:
                raise ConfigError(
                    f"compute.crops: {images.name} takes {needed // MIB} MiB, but {self.device} has {free // MIB} MiB "
                    "left; set it to uint8, or use fewer images"
                )
        return array.to(self.device)


class JoinBuffers(Callback):
    """After every step, gives running statistics the ranks' mean."""

    def __init__(self, computing: Computing, *modules: nn.Module) -> None:
        self.computing, self.modules = computing, modules

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.computing.join_buffers(*self.modules)


def _check_kinds(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            raise ConfigError(
                f"compute.batch_norm: {name} is a {type(layer).__name__}, a BatchNorm of its own kind, which cannot be "
                "synchronised over processes; set it to local, or build the network with torch's"
            )


def _compiled(loss: Loss) -> Loss:
    # Every stage and seed compiles the same code for other modules, and torch allows few versions of one code.
    torch.compiler.reset()
    # A run has few shapes: whole batches and an epoch's last one.
    compiled = torch.compile(loss, dynamic=False)

    def evaluate(*args: Any) -> Tensor:
        try:
            return compiled(*args)
        except RuntimeError as error:
            # An error of the loss itself comes out here, as it would without compilation.
            loss(*args)
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"compute.compile: torch.compile failed ({cause}); it needs a C++ compiler on a CPU and Triton on a "
                "GPU. Set it to false"
            ) from error

    return evaluate
