"""Plain training of one level, by the engine that steps bilevel training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from bilevel import tree
from bilevel.checks import check_count
from bilevel.distributed import mean_with_gradients
from bilevel.training.callbacks import Callback
from bilevel.training.engine import Training
from bilevel.training.level import Level
from bilevel.tree import Params

Derivatives = Callable[[Any], tuple[Tensor, Params]]
"""A batch -> loss (0-d) and its gradient over the level's variables, on this rank's samples."""


class Stateful(Protocol):
    """What a checkpoint can hold: modules, and other things with a state."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@final
class SingleLevelTrainer(Training):
    """Trains one level by minibatch steps: pre-training, a head, fine-tuning. Its events are called "train", its units
    are steps.

    Resume, signals, skips of steps that are not finite, callbacks and ranks are those of `Trainer`.

    Args:
        derivatives: loss and gradient on a batch, for example ``gradient_of(loss, params)``; the mean over the ranks is
            taken here.
        level: variables, optimizer, data and schedule.
        steps: of the whole training.
        parts: what else changes and belongs to a checkpoint, by name. Of modules all that the level does not hold:
            buffers, frozen parameters.
        callbacks, nonfinite_skips: as for `Trainer`. A step that is left out changes no buffer of a module either.

    Raises:
        TypeError, ValueError: an argument of another kind or out of its range.
    """

    def __init__(
        self,
        derivatives: Derivatives,
        level: Level,
        steps: int,
        *,
        parts: Mapping[str, Stateful] | None = None,
        callbacks: Sequence[Callback] = (),
        nonfinite_skips: int = 0,
    ) -> None:
        super().__init__({"train": level}, callbacks, nonfinite_skips)
        if level.micro_batch is not None:
            raise ValueError(
                "SingleLevelTrainer: the level's micro_batch is for Trainer; chunk the derivatives by "
                "micro_batched_gradient, and leave it out"
            )
        check_count("SingleLevelTrainer: steps", steps, least=0)
        self.derivatives, self.parts, self._total = derivatives, dict(parts or {}), steps

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self._total

    @property
    def planned(self) -> dict[str, int]:
        return {"train": self._total}

    def _advance(self) -> None:
        buffers = [(buffer, buffer.clone()) for buffer in self._buffers()] if self.nonfinite_skips else []
        loss, gradient = mean_with_gradients(*self.derivatives(self.levels["train"].next_batch()))

        @torch.no_grad()
        def undo() -> None:
            for buffer, before in buffers:
                buffer.copy_(before)

        record = self.apply("train", "train", loss, gradient, undo=undo)
        self.progress += 1
        self.emit(record)

    def _buffers(self) -> list[Tensor]:
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        return [buffer for module in modules for buffer in module.buffers()]

    def place(self, name: str) -> str:
        """In words, the step that is being made."""
        return f"step {self.steps[name] + 1}"

    def kept(self) -> dict[str, Any]:
        return {name: self._rest_of(part) for name, part in self.parts.items()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        super().check_state(state)
        both = self.kept(), state["kept"]
        for name in {**self.parts, **state["kept"]}:
            own, saved = (list(kept[name]) if name in kept else None for kept in both)
            if own != saved:
                raise ValueError(f"parts[{name!r}]: the state's has other content than this training's")

    def load_kept(self, kept: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                part.load_state_dict(kept[name], strict=False)
            else:
                part.load_state_dict(kept[name])

    def _rest_of(self, part: Stateful) -> Any:
        """A part's state; a module's without the variables, which the level saves."""
        if not isinstance(part, nn.Module):
            return part.state_dict()
        own = {id(leaf) for leaf in self.levels["train"].params.values()}
        state = part.state_dict(keep_vars=True)
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
            if id(value) not in own
        }


def gradient_of(loss: Callable[[Any], Tensor], params: Params) -> Derivatives:
    """`Derivatives` of a plain loss that uses the tensors of `params`, for example by calling their module."""

    def derivatives(batch: Any) -> tuple[Tensor, Params]:
        value = loss(batch)
        return value.detach(), tree.gradients(value, params)

    return derivatives
