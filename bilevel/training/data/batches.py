"""Where batches come from: stacks without replacement whose order is a function of the seed."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel.checks import check_count, check_function, check_kind
from bilevel.lower import Partition


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class BatchSource(ABC):
    """A resumable stream of batches that is told when a stage of several steps begins.

    Batches must follow from where the stream stands: a trainer that resumes draws some of them a second time.
    """

    @abstractmethod
    def begin_stage(self, steps: int) -> None:
        """Announce that `steps` batches will be drawn in a row."""

    @abstractmethod
    def next(self) -> Any:
        """The next batch."""

    @property
    def last_indices(self) -> Tensor | None:
        """The points of the batch that `next` gave last, int64 [batch]; None where none was drawn or nobody knows."""
        return None

    @property
    def blocks(self) -> Partition | None:
        """The fixed partition that `next` draws from; None where batches are put together anew."""
        return None

    @property
    def last_block(self) -> int | None:
        """The number of the block that `next` gave last; None where there are no blocks."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` says."""

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, where `load_state_dict` could not go on from `state`; a trainer asks
        before it changes anything."""
        return None

    def check_fields(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless `state` has the fields of this kind of source; for `check_state`."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(
                f"{type(self).__name__}: the state, of {sorted(state)}, is of another kind of data, since one of these "
                f"data has {sorted(own)}; resume with the data that the level had then"
            )

    def prepare(self) -> None:
        """Called where a step is queued on the device and the host is about to wait for it: the next batch may be sent
        there meanwhile. What `next` gives and the state do not depend on it."""
        return None

    def close(self) -> None:
        """Let go of what the stream holds open, such as processes; it can be drawn from again. A training's `run` ends
        with it."""
        return None


@final
class BatchStack(BatchSource):
    """Batches drawn without replacement from shuffled points (BiSSL, section 3.3 and Algorithm 1).

    The stack is reshuffled at the start of a stage, and only if fewer batches remain than the stage takes. Where the
    points cannot give that many full batches at all, it is instead reshuffled whenever fewer points than one batch
    remain, so that every stage gets all its batches. Order and random state are functions of (seed, shuffle, position)
    alone.

    Args:
        size: number of points.
        batch_size: points a batch.
        load: ``load(indices, seed) -> batch``; `indices` is int64 [batch], `seed` is for the batch's random draws.
        seed: of the whole stream, >= 0.
        drop_last: never give the smaller batch at the end of a shuffle.

    Raises:
        TypeError: a `load` that cannot be called, a `drop_last` that is no truth value.
        ValueError: sizes below 1, a batch larger than the data, a negative seed, what is no whole number.
    """

    def __init__(
        self, size: int, batch_size: int, load: Callable[[Tensor, int], Any], *, seed: int, drop_last: bool = False
    ) -> None:
        check_count("BatchStack: size", size, least=1)
        check_count("BatchStack: batch_size", batch_size, least=1)
        check_count("BatchStack: seed", seed, least=0)
        check_function(
            "BatchStack: load", load, "a function of the points' indices and a seed that returns their batch"
        )
        check_kind("BatchStack: drop_last", drop_last, bool, "True or False")
        if batch_size > size:
            raise ValueError(f"BatchStack: batch_size={batch_size} is larger than the data ({size} points); reduce it")
        self.size, self.batch_size, self.load, self.seed, self.drop_last = size, batch_size, load, seed, drop_last
        self._shuffle, self._cursor, self._scarce = 0, 0, False
        self._order = self._permutation()

    def __len__(self) -> int:
        """Batches in one shuffle."""
        return self.size // self.batch_size if self.drop_last else math.ceil(self.size / self.batch_size)

    @property
    def last_indices(self) -> Tensor | None:
        """The points of the batch that `next` gave last, int64 [batch]; None where none was drawn of this shuffle."""
        first = (self._cursor - 1) * self.batch_size
        return self._order[first : first + self.batch_size] if self._cursor else None

    def begin_stage(self, steps: int) -> None:
        self._scarce = self.size // self.batch_size < steps
        if not self._scarce and len(self) - self._cursor < steps:
            self._reshuffle()

    def next(self) -> Any:
        if self.size - self._cursor * self.batch_size < (self.batch_size if self.drop_last or self._scarce else 1):
            self._reshuffle()
        first = self._cursor * self.batch_size
        indices = self._order[first : first + self.batch_size]
        batch = self.load(indices, derive_seed(self.seed, "batch", self._shuffle, self._cursor))
        self._cursor += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "cursor": self._cursor,
            "scarce": self._scarce,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.check_fields(state)
        for name, own in (("size", self.size), ("batch_size", self.batch_size), ("seed", self.seed)):
            if state[name] != own:
                raise ValueError(
                    f"BatchStack: the state has {name}={state[name]}, this stack {name}={own}; resume with the same "
                    "data, batch size and seed"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        self._shuffle, self._cursor, self._scarce = state["shuffle"], state["cursor"], state["scarce"]
        self._order = self._permutation()

    def _reshuffle(self) -> None:
        self._shuffle, self._cursor = self._shuffle + 1, 0
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", self._shuffle))
        return torch.randperm(self.size, generator=generator)


@final
class Cycle(BatchSource, Partition):
    """A fixed list of batches, in order, again and again. Each is a block, and all count the same.

    Raises:
        TypeError: neither a list nor a tuple, or what gives batches among them.
        ValueError: no batches; on checking a state, one of another kind of data or of another number of batches.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        check_batches("Cycle: batches", batches)
        self.batches, self._position = tuple(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def block(self, index: int) -> Any:
        return self.batches[index]

    def weight(self, index: int) -> float:
        return 1.0

    @property
    def blocks(self) -> Partition:
        return self

    @property
    def last_block(self) -> int | None:
        return (self._position - 1) % len(self.batches) if self._position else None

    def begin_stage(self, steps: int) -> None:
        return None

    def next(self) -> Any:
        batch = self.batches[self._position % len(self.batches)]
        self._position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"batches": len(self.batches), "position": self._position}

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.check_fields(state)
        if state["batches"] != len(self.batches):
            raise ValueError(
                f"Cycle: the state is of a list of {state['batches']} batches, this one has {len(self.batches)}; "
                "resume with the same batches"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        self._position = state["position"]


def check_batches(argument: str, batches: Sequence[Any]) -> None:
    """Raise unless these are one or more batches in a list or tuple."""
    check_kind(argument, batches, (list, tuple), "a list or tuple of batches")
    if isinstance(batches, tuple) and len(batches) > 1 and all(isinstance(item, Tensor) for item in batches):
        raise TypeError(
            f"{argument} is a tuple of tensors, which looks like one batch; write [batch], or a list where each "
            "tensor is a batch"
        )
    if not batches:
        raise ValueError(f"{argument} is empty; pass at least one batch")
    for index, item in enumerate(batches):
        if isinstance(item, (DataLoader, Dataset, Iterator, BatchSource)):
            raise TypeError(
                f"{argument}[{index}] is a {type(item).__name__}, and each item of a list is a batch; {_remedy(item)}"
            )


def _remedy(item: object) -> str:
    """What to pass instead of a list of such items."""
    if isinstance(item, (DataLoader, BatchSource)):
        return (
            "pass it itself, and for several at once a BatchSource of your own, or a DataLoader of their "
            "torch.utils.data.StackDataset or ConcatDataset"
        )
    if isinstance(item, Dataset):
        return "pass DataLoader(dataset, batch_size=...), for several of a ConcatDataset or StackDataset of them"
    return "it can be gone through once: pass list(...) of it"
