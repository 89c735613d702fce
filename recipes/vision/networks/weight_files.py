"""Files of weights: read without running anything that they hold, or described where they cannot be."""

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...experiment.artifacts import WEIGHTS, read_artifact
from ...experiment.errors import ConfigError
from .pickle_outline import Unmade, outline

FIELD = "model.init_backbone"

Keys = tuple[Any, ...]
"""Where in nested mappings something is, from outside in; () is the outermost mapping itself."""

_COPIES = {"momentum", "target", "ema", "average", "averaged", "k"}
"""Words in the names of networks that follow another one's weights."""


@dataclass(frozen=True)
class ForeignWeights:
    """The tables of tensors by name in a file, by where they are in it, and the SHA-256 of its bytes."""

    path: Path
    sha256: str
    tables: Mapping[Keys, Mapping[str, Tensor]]


def read_weights(path: Path) -> ForeignWeights:
    """The weights in a ``.safetensors`` file, one of ``torch.save``, or the folder of an artifact.

    No code that a file may contain is run (``weights_only=True``).

    Raises:
        ConfigError: there is no such file, it cannot be read safely, or it holds no tensors; for one of ``torch.save``
            with its keys, and how to save the weights alone.
        ArtifactError: the folder holds no whole artifact.
    """
    if path.is_dir():
        artifact = read_artifact(path)
        return ForeignWeights(path / WEIGHTS, artifact.info["sha256"], {(): artifact.tensors()})
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{FIELD}: {path} cannot be read ({error.strerror}); name a file or an artifact") from error
    read = _safetensors if path.suffix == ".safetensors" else _pickled
    return ForeignWeights(path, hashlib.sha256(content).hexdigest(), read(path, content))


def preference(names: Iterable[Any]) -> tuple[int, int]:
    """How a network under `names` ranks among copies of it, lower being better.

    Networks that follow another one come last. A student comes after its teacher, which is what DINO and its relatives
    are used by; of others those with the shortest names come first.
    """
    parts = [part for name in names for part in str(name).lower().split(".")]
    words = {word for part in parts for word in part.split("_")}
    return 2 * (not words.isdisjoint(_COPIES)) + ("student" in words), len(".".join(parts))


def _safetensors(path: Path, content: bytes) -> dict[Keys, dict[str, Tensor]]:
    try:
        return {(): load(content)}
    except SafetensorError as error:
        raise ConfigError(f"{FIELD}: {path} is no whole safetensors file ({error})") from error


def _pickled(path: Path, content: bytes) -> dict[Keys, dict[str, Tensor]]:
    try:
        values: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{FIELD}: {path} {_instead(content)}") from error
    except Exception as error:
        # Whatever bytes that are no such file make the reader stumble over.
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{FIELD}: {path} is no whole file of torch.save ({cause})") from error
    tables = _tables(values, lambda value: isinstance(value, Tensor))
    if not tables:
        raise ConfigError(f"{FIELD}: {path} holds no table of weights by name (a state_dict); {_described(values)}")
    return tables


def _tables(values: Any, is_tensor: Callable[[Any], bool]) -> dict[Keys, dict[str, Any]]:
    """Every mapping that has tensors, at any depth of nested mappings, the outer ones first; each one once."""
    found: dict[Keys, dict[str, Any]] = {}
    waiting: list[tuple[Keys, Any]] = [((), values)]
    seen: set[int] = set()
    for keys, value in waiting:
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        tensors = {str(key): entry for key, entry in value.items() if is_tensor(entry)}
        if tensors:
            found[keys] = tensors
        waiting += [((*keys, key), entry) for key, entry in value.items()]
    return found


def _instead(content: bytes) -> str:
    """What is in a file that was not loaded, and what to make of it."""
    try:
        values = outline(content)
    except ValueError:
        return "is damaged, or no file of torch.save: fetch or save it anew"
    said = f"holds Python objects besides weights, which could run code and are not loaded; {_described(values)}"
    alone = _alone(values)
    if alone is None:
        return f"{said}, and no table of weights by name (a state_dict) is in it"
    return f"{said}. If you trust it, save its weights alone: torch.save({alone}, NEW)"


def _alone(values: Any) -> str | None:
    """In Python, the weights of a file that is not loaded; None where there are none."""
    trusted, module = "torch.load(FILE, weights_only=False)", _module(values)
    if module is not None:
        return f"{trusted}{_indexed(module)}.state_dict()"
    tables = _tables(values, lambda value: isinstance(value, Unmade) and value.is_tensor)
    if not tables:
        return None
    most = max(map(len, tables.values()))
    # A state of an optimizer has few tensors in each of its tables.
    chosen = min((keys for keys, table in tables.items() if 2 * len(table) >= most), key=preference)
    table = values
    for key in chosen:
        table = table[key]
    if len(tables[chosen]) == len(table):
        return f"{trusted}{_indexed(chosen)}"
    return f"{{k: v for k, v in {trusted}{_indexed(chosen)}.items() if torch.is_tensor(v)}}"


def _module(values: Any) -> Keys | None:
    """Where a whole network is: outermost, or one key deep."""
    nested = values.items() if isinstance(values, dict) else ()
    places = [((), values), *(((key,), value) for key, value in nested)]
    found = [keys for keys, value in places if isinstance(value, Unmade) and value.is_module]
    return min(found, key=preference, default=None)


def _described(values: Any) -> str:
    """The keys of a mapping with what they hold, or what else it is."""
    if not isinstance(values, Mapping):
        return f"it is {_kind(values)}"
    if not values:
        return "it is empty"
    shown = [f"{_short(key)} ({_kind(value)})" for key, value in list(values.items())[:12]]
    more = f" and {len(values) - len(shown)} more" if len(values) > len(shown) else ""
    return f"its keys are {', '.join(shown)}{more}"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a table of {len(value)}"
    if isinstance(value, Unmade):
        name = value.name if len(value.name) <= 60 else f"{value.name[:60]}..."
        return "a tensor" if value.is_tensor else f"an object of {name}"
    return "a tensor" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _indexed(keys: Keys) -> str:
    return "".join(f"[{key!r}]" for key in keys)


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 40 else f"{text[:40]}..."
