"""What forward mode cannot do, in words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bilevel import distributed


@contextmanager
def forward_mode(provider: str, in_reverse: Callable[[], object]) -> Iterator[None]:
    """Raises an error of forward mode as one that names the provider, the layer and the remedy.

    Args:
        in_reverse: a product of the same objective without forward mode; where it fails too, the objective is at fault
            and its error is raised as it is. Not called with several ranks, which might not all come to it.

    Raises:
        RuntimeError: forward mode cannot do what `in_reverse` can.
    """
    try:
        yield
    except (distributed.CollectiveError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if distributed.world_size() == 1 and not _works(in_reverse):
            raise
        where, (what, *_) = _layer(error), [*str(error).splitlines(), type(error).__name__]
        raise RuntimeError(
            f"{provider}: forward mode does not go through {where or 'an operation of the objective'}: {what}; take "
            "ReverseOverReverse(), or hvp='auto', which tries both"
        ) from error


def _works(function: Callable[[], object]) -> bool:
    try:
        function()
    except Exception:
        return False
    return True


def _layer(error: Exception) -> str:
    """The innermost module that was called when the error came up, empty outside of modules."""
    called: list[nn.Module] = []
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        called += [owner] if isinstance(owner, nn.Module) else []
        trace = trace.tb_next
    if not called:
        return ""
    name = next((name for name, module in called[0].named_modules() if module is called[-1]), "")
    kind = type(called[-1]).__name__
    return f"layer {name!r} ({kind})" if name else f"the module {kind}"
