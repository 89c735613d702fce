"""Atomic, verified checkpoints that load without unpickling arbitrary objects."""

import hashlib
import io
import json
import os
import pickle
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import numpy as np
import torch

from bilevel.checks import check_count
from bilevel.distributed import on_first_rank, rank


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that the file is either the old or the new one, also after a power cut."""
    with _replacing(path) as file:
        file.write(content)


def save_checkpoint(directory: str | Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Save `state` as checkpoint number `step` and delete all but the newest `keep`. One process at a time may do so,
    of several ranks the first: on the others nothing is written.

    The state is written first, then a manifest with its name, size and SHA-256: a checkpoint without a manifest was
    never finished and is not taken for one. A checkpoint of a number that is there already replaces it only once it
    is whole: the two have names of their own.

    Args:
        state: nested dictionaries, lists and tuples of tensors, numbers, strings and None.

    Returns:
        The checkpoint's path, ``step-NNNNNNNN.pt`` or, in place of one of that name, ``step-NNNNNNNN.again.pt``.

    Raises:
        ValueError: a `keep` below 1 or that is no whole number.
        OSError: it cannot be written; earlier checkpoints are as they were.
    """
    check_count("save_checkpoint: keep", keep, least=1)
    folder = Path(directory)
    plain, again = folder / f"step-{step:08d}.pt", folder / f"step-{step:08d}.again.pt"
    if rank() > 0:
        return plain
    folder.mkdir(parents=True, exist_ok=True)
    own = plain.with_suffix(".json")
    path = again if own.exists() and _state_file(own) == plain else plain
    size, digest = _write_state(path, state)
    manifest = {"step": step, "file": path.name, "size": size, "sha256": digest}
    write_atomic(own, json.dumps(manifest).encode())
    _sweep(folder, [own, *[manifest for manifest in _manifests(folder) if manifest != own][: keep - 1]])
    return path


def load_checkpoint(directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (step, state); None where there is none at all.

    A damaged one is named in a warning and the one before it is used. Of several ranks the first reads, and the others
    get what it has read.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    return on_first_rank(lambda: _newest(Path(directory)))


def newest_number(directory: str | Path) -> int | None:
    """The number of the newest checkpoint, whole or damaged; None where there is none."""
    manifests = _manifests(Path(directory))
    return int(manifests[0].stem.removeprefix("step-")) if manifests else None


def random_state() -> dict[str, Any]:
    """State of torch's (CPU and every CUDA device), numpy's and Python's default generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    on_cuda = torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_cuda else [],
        "cuda_device": torch.cuda.current_device() if on_cuda else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of `random_state`.

    CUDA devices take the states of those of their numbers, as far as both have them, and this process's current device
    that of the one that was current then: of several ranks, each with a device of its own, the first one's. What has
    no place is lost, see `lost_generators`.
    """
    torch.set_rng_state(state["torch"])
    saved, count = state["cuda"], torch.cuda.device_count() if state["cuda"] else 0
    for device, generator in enumerate(saved[:count]):
        torch.cuda.set_rng_state(generator, device)
    if count:
        torch.cuda.set_rng_state(saved[state.get("cuda_device", 0)], torch.cuda.current_device())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def lost_generators(state: Mapping[str, Any]) -> str | None:
    """A sentence on the CUDA generators that `set_random_state` cannot continue; None where it continues all."""
    saved = len(state["cuda"])
    here = torch.cuda.device_count() if saved or torch.cuda.is_initialized() else 0
    if saved == here:
        return None
    if not here:
        rest = "random draws that were made there (dropout masks, for example) will be other ones"
    elif not saved:
        rest = "random draws on a GPU begin where its generators stand now"
    elif here < saved:
        rest = f"the device in use goes on as it would have, and those of {_devices(here, saved)} are lost"
    else:
        rest = f"the device in use goes on as it would have, and {_devices(saved, here)} from where they stand now"
    return f"the checkpoint holds the states of {saved} CUDA generator(s), and {here} device(s) are in sight: {rest}"


def _devices(first: int, end: int) -> str:
    """The CUDA devices from `first` to before `end`, in words."""
    return f"cuda:{first}" if end - first == 1 else f"cuda:{first} to cuda:{end - 1}"


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the block's end and is synced, or goes if that fails."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_state(path: Path, state: Mapping[str, Any]) -> tuple[int, str]:
    """Size and SHA-256 of the file that is written, without a copy of the state in memory."""
    written = Event()
    # A thread reads what this one has written: with a core to spare, the digest takes no time of its own.
    with ThreadPoolExecutor(1) as pool, _replacing(path) as file:
        try:
            digest = pool.submit(_digest, os.dup(file.fileno()), written)
            torch.save(dict(state), file)
            file.flush()
            size = file.tell()
        except RuntimeError as error:
            # torch, on its way out, fails again where the file system has refused a write.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        finally:
            written.set()
    return size, digest.result()


def _digest(descriptor: int, written: Event) -> str:
    """SHA-256 of a file that grows until `written` is set; closes the descriptor."""
    digest, position, last = hashlib.sha256(), 0, False
    try:
        while not last:
            written.wait(0.002)
            last = written.is_set()
            while content := os.pread(descriptor, 1 << 16, position):
                digest.update(content)
                position += len(content)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    problems = []
    for manifest in _manifests(folder):
        try:
            step, state = _load_verified(manifest)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using step {step} instead", stacklevel=5)
        return step, state
    if problems:
        raise CheckpointError(
            "; ".join(problems) + f"; no usable checkpoint is left in {folder}: delete its step-* files to begin anew"
        )
    return None


def _manifests(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*.json"), reverse=True)


def _sweep(folder: Path, kept: list[Path]) -> None:
    """Delete all checkpoints but those of the manifests `kept`, and what processes that were killed left unfinished."""
    needed = {*kept, *(_state_file(manifest) for manifest in kept)}
    for pattern in ("step-*.json", "step-*.pt", ".step-*.tmp"):
        for path in folder.glob(pattern):
            if path not in needed:
                path.unlink(missing_ok=True)


def _state_file(manifest: Path) -> Path:
    """Where the state of a manifest is; the plain name where the manifest cannot be read."""
    try:
        again = json.loads(manifest.read_bytes())["file"] == f"{manifest.stem}.again.pt"
    except (OSError, ValueError, KeyError, TypeError):
        again = False
    return manifest.with_suffix(".again.pt" if again else ".pt")


def _load_verified(manifest: Path) -> tuple[int, dict[str, Any]]:
    path = _state_file(manifest)
    try:
        expected = json.loads(manifest.read_bytes())
        step, size, digest = expected["step"], expected["size"], expected["sha256"]
        content = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} or its manifest cannot be read ({error})") from error
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path.name} is damaged: size or SHA-256 differ from its manifest")
    try:
        return step, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path.name} holds something else than tensors and plain values ({reason})") from error
