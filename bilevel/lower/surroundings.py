"""What may surround a call that differentiates: gradient modes and autocast."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel import tree

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def check_recordable(name: str) -> None:
    """Raise RuntimeError under torch.inference_mode, where no gradient can be recorded."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was called under torch.inference_mode, where nothing can be differentiated; call it outside of "
            "it (torch.no_grad around it is fine)"
        )


def differentiates(function: Callable[P, T]) -> Callable[P, T]:
    """A function that computes second derivatives: it records gradients under torch.no_grad too, is refused under
    torch.inference_mode, and works in the variables' own precision whatever autocast surrounds it."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        check_recordable(function.__qualname__)
        if torch.is_grad_enabled() and not autocasts():
            return function(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for device in autocasts():
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return guarded


def autocasts() -> dict[str, torch.dtype]:
    """Types of devices for which autocast is on, with its dtype."""
    return {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}


@contextmanager
def under_autocasts(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, autocast is on as `autocasts` said."""
    with ExitStack() as stack:
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


def check_batch(argument: str, batches: Iterable[Any]) -> None:
    """Raise TypeError for a batch that is a DataLoader, or that has a tensor of inference mode or of a torch.func
    transform around the call."""
    batches = list(batches)
    if any(isinstance(batch, DataLoader) for batch in batches):
        raise TypeError(f"{argument}: a DataLoader is no batch; pass next(iter(loader)) in its place")
    for index, tensor in enumerate(tree.tensors_in(batches)):
        tree.check_plain(f"{argument}, tensor {index}", tensor)


@contextmanager
def explaining_batches(lower_batches: Sequence[Any]) -> Iterator[None]:
    """Adds to an error from inside how `lower_batches` was read, where the parts of one batch would look the same."""
    try:
        yield
    except Exception as error:
        if len(lower_batches) > 1 and all(isinstance(batch, Tensor) for batch in lower_batches):
            error.add_note(
                f"lower_batches was taken as {len(lower_batches)} batches of one tensor each; if these are the parts "
                f"of one batch, pass {_as_one(lower_batches)}"
            )
        raise


def _are_parts(batches: Sequence[Any]) -> bool:
    """Whether these are tensors of different dtypes or numbers of axes, which no two batches of one objective are."""
    tensors = all(isinstance(batch, Tensor) for batch in batches)
    return tensors and len({(batch.dtype, batch.dim()) for batch in batches}) > 1


def _as_one(parts: Sequence[Any]) -> str:
    """The parts as a list of one batch, in code."""
    names = "X, t" if len(parts) == 2 else ", ".join(f"part_{k}" for k in range(1, len(parts) + 1))
    return f"[({names})]"


def check_batches(lower_batches: Sequence[Any]) -> None:
    """Raise unless these are one or more batches in a sequence."""
    if isinstance(lower_batches, (str, bytes, Mapping, Tensor)) or not isinstance(lower_batches, Sequence):
        remedy = "pass [batch] for a single one"
        if isinstance(lower_batches, (DataLoader, Iterator)):
            remedy = (
                "the linear system is that of a few fixed batches: pass list(itertools.islice(lower_batches, K)) for K "
                "of them"
            )
        elif isinstance(lower_batches, Dataset):
            remedy = (
                "draw batches of it: list(itertools.islice(DataLoader(dataset, batch_size=..., shuffle=True), K)) for "
                "K of them"
            )
        raise TypeError(f"lower_batches must be a sequence of batches, got {type(lower_batches).__name__}; {remedy}")
    if not lower_batches:
        raise ValueError("lower_batches is empty; the lower level needs at least one batch")
    if _are_parts(lower_batches):
        shown = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in lower_batches)
        raise TypeError(
            f"lower_batches must be a sequence of batches that are alike, got tensors of {shown}, which look like the "
            f"parts of one batch; pass [batch] for a single one: {_as_one(lower_batches)}"
        )
    check_batch("lower_batches", lower_batches)
