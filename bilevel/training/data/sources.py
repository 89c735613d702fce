"""What can stand for a source of batches."""

from collections.abc import Iterable, Iterator, Mapping, Sized

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bilevel.training.data.batches import BatchSource, Cycle, check_batches
from bilevel.training.data.loader import LoaderSource


def as_source(argument: str, data: object) -> BatchSource:
    """The source that an argument stands for: itself, a `Cycle` of a list or tuple of batches, a `LoaderSource` of a
    DataLoader.

    Raises:
        TypeError: anything else.
        ValueError: no batches.
    """
    if isinstance(data, BatchSource):
        return data
    if isinstance(data, DataLoader):
        return LoaderSource(data)
    if isinstance(data, (list, tuple)):
        check_batches(argument, data)
        return Cycle(data)
    shown = f"the class {data.__name__}" if isinstance(data, type) else type(data).__name__
    raise TypeError(
        f"{argument} must be a torch.utils.data.DataLoader, a list of batches or a BatchSource, got {shown}; "
        f"{_remedy(data)}"
    )


def _remedy(data: object) -> str:
    """What to pass instead."""
    if isinstance(data, type):
        return "pass an instance"
    if isinstance(data, (Tensor, np.ndarray)):
        return (
            "[tensor] is one batch for every step, and DataLoader(TensorDataset(tensor), batch_size=..., shuffle=True) "
            "cuts its rows into batches"
        )
    if isinstance(data, Mapping):
        return "[batch] is one batch for every step"
    if isinstance(data, IterableDataset):
        return "wrap it: DataLoader(dataset, batch_size=...), or batch_size=None where it gives whole batches"
    if isinstance(data, Dataset):
        return "wrap it: DataLoader(dataset, batch_size=..., shuffle=True)"
    if isinstance(data, Iterator):
        return (
            "it can be gone through once: pass the DataLoader that it came from, list(...) of it where the batches fit "
            "into memory, or an IterableDataset that begins anew each time, in DataLoader(dataset, batch_size=None)"
        )
    if isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes)):
        return (
            "DataLoader(data, batch_size=..., shuffle=True) draws batches of its items, and list(data) makes each item "
            "a batch"
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return (
            "make its class an IterableDataset and pass DataLoader(data, batch_size=None), or list(data) where the "
            "batches fit into memory"
        )
    return "a list is cycled through, and a DataLoader draws its batches anew in each pass"
