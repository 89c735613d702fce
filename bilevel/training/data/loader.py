"""A `torch.utils.data.DataLoader` as a resumable source of batches."""

import copy
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from bilevel.checkpoint import random_state, set_random_state
from bilevel.checks import check_count, check_kind
from bilevel.distributed import from_first_rank, rank
from bilevel.training.data.batches import BatchSource, derive_seed
from bilevel.training.data.fingerprint import fingerprint

Place = tuple[int, int]
"""A pass, from 0, and the batches drawn in it."""

_END = object()


@final
class LoaderSource(BatchSource):
    """The batches of a `torch.utils.data.DataLoader`, pass after pass; ``Level(data=loader)`` stands for it.

    Each pass iterates the loader anew, so that it is shuffled and augmented anew, and draws as it goes. Samplers, batch
    samplers and datasets that have ``set_epoch`` are told the pass, from 0. A pass may be of any length, and endless;
    one without a batch is an error.

    **Order and random draws.** For batch i of pass k torch's, numpy's and Python's default generators, and the
    ``generator`` of the loader and its samplers, are seeded by (seed, k, i), in the workers too: batches depend neither
    on the number of workers nor on whether they persist. The training's own random state is left as it was. On several
    ranks indices are drawn alike everywhere (use a ``DistributedSampler``); what the dataset draws is each rank's own.

    **Resuming.** A state holds the seed, the pass, the number of its batches drawn and a fingerprint of the last one.
    On resume that batch is drawn again and compared; those before it are not loaded where the dataset has indices, and
    loaded where it has none. If it is another one, because the dataset or the sampler draws from a generator of its own
    or keeps a state, a UserWarning says that the order is not that of the first run; so it does for ``in_order=False``.

    Loaders of a class that iterates in a way of its own are iterated as they are: seeded in this process alone, with
    the batches before the place loaded again on resume; a state that such a loader keeps itself is not used.

    Args:
        loader: its workers live while batches are drawn: to the end of a trainer's `run`, or as long as the source.
        seed: of the whole stream, >= 0. By default it is drawn, when the source is made, as the loader draws its own:
            from ``loader.generator``, or torch's default generator (`torch.manual_seed`); on several ranks it is the
            first one's (make the source after ``init_process_group``). A state brings the seed that it was made with.

    Raises:
        TypeError: no DataLoader.
        ValueError: a negative seed; on loading, a state of another source or of another `seed`; on drawing, a pass
            without a batch.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int | None = None) -> None:
        check_kind("LoaderSource: loader", loader, DataLoader, "a torch.utils.data.DataLoader")
        if seed is not None:
            check_count("LoaderSource: seed", seed, least=0, otherwise="None to draw one")
        self.loader, self._given_seed = loader, seed
        self.seed = _drawn_seed(loader) if seed is None else seed
        self._place: Place = (0, 0)
        self._fingerprint: str | None = None
        self._passes: _Passes | None = None
        self._kept: _Drawn | None = None
        self._warned = False

    def begin_stage(self, steps: int) -> None:
        return None

    def next(self) -> Any:
        if self._kept is None or self._kept.before != self._place:
            try:
                self._kept = self._draw()
            except BaseException:
                # A batch may be lost: the next one begins at the place again.
                self._passes = None
                raise
        self._place, self._fingerprint = self._kept.after, self._kept.fingerprint
        return self._kept.batch

    def close(self) -> None:
        """End the worker processes; the next batch starts others."""
        if self.loader.num_workers:
            self._passes = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "pass": self._place[0],
            "drawn": self._place[1],
            "fingerprint": self._fingerprint,
            "rank": rank(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.check_fields(state)
        if self._given_seed not in (None, state["seed"]):
            raise ValueError(
                f"LoaderSource: the state has seed={state['seed']}, this source seed={self._given_seed}; resume with "
                "the same seed"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        if self.seed != state["seed"]:
            self.seed, self._passes, self._kept = state["seed"], None, None
        self._place = state["pass"], state["drawn"]
        # Of several ranks the first writes the state, and the others' batches are others.
        self._fingerprint = state["fingerprint"] if state["rank"] == rank() else None
        if self._kept is not None and self._kept.after == self._place:
            self._compare(self._fingerprint in (None, self._kept.fingerprint))

    def _draw(self) -> "_Drawn":
        if self._passes is None:
            self._passes = _Passes(self.loader, self.seed)
        before, passes = self._place, self._passes
        self._compare(passes.reach(before, self._fingerprint))
        batch = passes.next()
        return _Drawn(before, batch, passes.place, fingerprint(batch))

    def _compare(self, same: bool) -> None:
        if same or self._warned:
            return
        self._warned = True
        number, count = self._place
        warnings.warn(
            "LoaderSource: the order of the batches is not that of the run before, or cannot be told to be: batch "
            f"{count - 1} of pass {number} (both from 0) was drawn again and compared. The data have changed, or the "
            "dataset or sampler draws from a generator of its own or keeps a state, which no seed reaches: draw "
            "from torch's, numpy's or Python's default generators or from the DataLoader's, begin each pass anew, and "
            "leave in_order=True",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Drawn:
    """The last batch, for a step that is undone and made again."""

    before: Place
    batch: Any
    after: Place
    fingerprint: str


class _Passes:
    """Passes over a loader, one of them under way."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        # A copy has persistent workers of its own, and can be given other indices.
        self.loader, self.seed, self.place = copy.copy(loader), seed, (-1, 0)
        self.generators = _generators(loader)
        self.iterator: Iterator[Any] = iter(())
        vars(self.loader)["_iterator"] = None
        self.indices: _Indices | None = None
        # What overrides these does not go by the indices that it is given.
        own = ("__iter__", "_get_iterator", "_index_sampler")
        if all(getattr(type(loader), name) is getattr(DataLoader, name) for name in own):
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            self.indices = _Indices(getattr(loader, name), self.generators, in_workers=loader.num_workers > 0)
            vars(self.loader)[name] = self.indices

    def reach(self, place: Place, expected: str | None) -> bool:
        """Come to a place; whether the batch before it is, as far as can be told, the expected one."""
        number, count = place
        if self.place == place:
            return True
        if self.place[0] == number and self.place[1] < count:
            return self._forward(count, expected)
        # A dataset that draws from a generator of its own in a worker comes to the same state by drawing the same.
        for skip in dict.fromkeys((max(count - 1, 0), 0)) if self._can_skip else (0,):
            self._begin(number, skip)
            if self._forward(count, expected):
                return not count or self._is_ordered
        return False

    def next(self) -> Any:
        """The next batch, of the next pass where this one has no more.

        Raises:
            ValueError: a pass has none.
        """
        while (batch := self._next()) is _END:
            number, count = self.place
            if not count:
                raise ValueError(
                    f"LoaderSource: pass {number} (from 0) of the DataLoader has no batch. "
                    + (
                        "An IterableDataset must begin anew each time that it is iterated, and bring a batch"
                        if isinstance(self.loader.dataset, IterableDataset)
                        else f"Its dataset or sampler is empty, or smaller than a batch with "
                        f"drop_last={self.loader.drop_last}"
                    )
                )
            self._begin(number + 1, 0)
        return batch

    @property
    def _can_skip(self) -> bool:
        """Whether batches can be left out without being loaded."""
        return self.indices is not None and not isinstance(self.loader.dataset, IterableDataset)

    @property
    def _is_ordered(self) -> bool:
        return self.loader.in_order or not self.loader.num_workers

    def _forward(self, count: int, expected: str | None) -> bool:
        batch = None
        while self.place[1] < count and (batch := self._next()) is not _END:
            pass
        return expected is None or (batch is not _END and fingerprint(batch) == expected)

    def _begin(self, number: int, skip: int) -> None:
        self.iterator, self.place = iter(()), (number, skip)
        if self.indices is not None:
            self.indices.seed, self.indices.skip = derive_seed(self.seed, "pass", number), skip
        with self._seeded("start"):
            for told in [*_samplers(self.loader), self.loader.dataset]:
                if isinstance(told, _HasEpochs):
                    told.set_epoch(number)
            self.iterator = iter(self.loader)

    def _next(self) -> Any:
        """The next batch of this pass; `_END` after the last one."""
        number, count = self.place
        with self._seeded(count):
            try:
                batch = next(self.iterator, _END)
            except Exception as error:
                error.add_note(f"LoaderSource: while drawing batch {count} of the DataLoader's pass {number} (from 0)")
                raise
        if batch is not _END:
            self.place = number, count + 1
        return batch

    @contextmanager
    def _seeded(self, part: int | str) -> Iterator[None]:
        """All generators seeded by (seed, pass, part), and afterwards as they were."""
        before, states = random_state(), [generator.get_state() for generator in self.generators]
        _seed(derive_seed(self.seed, "pass", self.place[0], part), self.generators)
        try:
            yield
        finally:
            set_random_state(before)
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)


class _Indices:
    """What a sampler gives in one pass after its first `skip`, each with the random state that it is loaded in."""

    def __init__(self, sampler: Iterable[Any], generators: list[torch.Generator], *, in_workers: bool) -> None:
        self.sampler, self.generators, self.in_workers = sampler, generators, in_workers
        self.seed, self.skip = 0, 0

    def __iter__(self) -> Iterator[Any]:
        # The pass's own values, also where the next pass begins before this iterator has gone.
        return self._pass(self.seed, self.skip)

    def _pass(self, seed: int, skip: int) -> Iterator[Any]:
        _seed(derive_seed(seed, 0, "index"), self.generators)
        iterator, number = iter(self.sampler), 0
        while (index := next(iterator, _END)) is not _END:
            if number >= skip:
                loading = derive_seed(seed, number, "batch", rank())
                if self.in_workers:
                    yield _Task(index, loading)
                else:
                    _seed(loading, self.generators)
                    yield index
            number += 1
            _seed(derive_seed(seed, number, "index"), self.generators)


@dataclass(frozen=True)
class _Task:
    """Indices on their way to a worker; unpickling them there, right before they are loaded, seeds its generators."""

    index: Any
    seed: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.index, self.seed)


def _arrived(index: Any, seed: int) -> Any:
    _seed(seed, [])
    return index


def _seed(seed: int, generators: Iterable[torch.Generator]) -> None:
    """Seed the default generators, each by a number of its own, and `generators`."""
    # Not torch.manual_seed, which would seed GPUs that are not in use when they first are.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    random.seed(derive_seed(seed, "python"))
    for generator in generators:
        generator.manual_seed(derive_seed(seed, "generator"))


@runtime_checkable
class _HasEpochs(Protocol):
    def set_epoch(self, epoch: int, /) -> Any: ...


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """The loader's samplers, and those that they wrap under the usual names."""
    found: list[Any] = []
    waiting = [loader.sampler, loader.batch_sampler]
    while waiting:
        sampler = waiting.pop(0)
        if sampler is not None and all(sampler is not other for other in found):
            found.append(sampler)
            waiting += [getattr(sampler, name, None) for name in ("sampler", "batch_sampler")]
    return found


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Those that the loader and its samplers hold, each once."""
    held = [getattr(owner, "generator", None) for owner in [loader, *_samplers(loader)]]
    return list({id(each): each for each in held if isinstance(each, torch.Generator)}.values())


def _drawn_seed(loader: DataLoader[Any]) -> int:
    return from_first_rank(int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator)))
