"""Weights made elsewhere, found in a file under the names of torchvision, lightly, solo-learn, the authors, or ours."""

import hashlib
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ...experiment.artifacts import WEIGHTS, read_artifact
from ...experiment.errors import ConfigError

FIELD = "model.init_backbone"

_WRAPPERS = {"module", "model", "_orig_mod", "backbone", "encoder", "network", "online_backbone", "online_encoder"}
"""What training code puts before a backbone's own names, in any order: DDP, Lightning modules, torch.compile."""

_NESTED = ("state_dict", "model_state_dict", "model")
"""Entries of a checkpoint under which its weights are."""

_LEFT_OUT = {
    *("fc", "classifier", "head", "heads", "linear", "aux", "aux1", "aux2", "auxlogits"),
    *("projector", "projection", "predictor", "prediction", "prototypes", "queue", "loss", "criterion"),
    *("momentum", "teacher", "target", "ema", "upper"),
}
"""Words in the names of heads and of further copies of the backbone, which are not taken."""

_PROJECTORS = ("projector.", "projection_head.layers.", "head.projector.", "heads.projector.")


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors of a file, by their names there, and the SHA-256 of its bytes."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]


def read_weights(path: Path) -> ForeignWeights:
    """The weights in a ``.safetensors`` file, one of ``torch.save``, or the folder of an artifact.

    No code that a file may contain is run (``weights_only=True``).

    Raises:
        ConfigError: there is no such file, it cannot be read safely, or it holds no tensors.
        ArtifactError: the folder holds no whole artifact.
    """
    if path.is_dir():
        artifact = read_artifact(path)
        return ForeignWeights(path / WEIGHTS, artifact.info["sha256"], artifact.tensors())
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{FIELD}: {path} cannot be read ({error.strerror}); name a file or an artifact") from error
    read = _safetensors if path.suffix == ".safetensors" else _pickled
    return ForeignWeights(path, hashlib.sha256(content).hexdigest(), read(path, content))


def load_backbone(weights: ForeignWeights, backbone: nn.Module, name: str) -> str:
    """Load the backbone's weights and buffers from `weights`; one line that says what was loaded.

    Args:
        name: of the backbone in the configuration, for messages.

    Raises:
        ConfigError: no name matches, the stem or another shape differs, weights are missing, or some are unknown.
    """
    wanted = backbone.state_dict()
    prefix, found, scheme = _best_match(weights, backbone, wanted)
    if not found.keys() & wanted.keys():
        raise ConfigError(
            f"{FIELD}: no name in {weights.path} is one of {name}; it holds {_some(weights.tensors)}, and "
            f"{name} has {_some(wanted)}. Known are the names of torchvision, lightly, solo-learn, the BiSSL authors "
            "and artifacts; set model.backbone to the network of the file"
        )
    _check_stem(weights, found, wanted, name)
    wrong = [f"{key} {_shape(found[key])} instead of {_shape(wanted[key])}" for key in _differing(found, wanted)]
    missing = [key for key in wanted.keys() - found.keys() if not key.endswith("num_batches_tracked")]
    if wrong or missing:
        problems = [f"shapes differ: {_some(wrong)}"] * bool(wrong) + [f"missing: {_some(missing)}"] * bool(missing)
        raise ConfigError(
            f"{FIELD}: {weights.path} does not fit {name}: {'; '.join(problems)}. Set model.backbone to the network "
            "that the file is of"
        )
    others = _others(weights.tensors, prefix, scheme, wanted)
    unknown = [key for key in others if not _left_out(key)]
    if unknown:
        raise ConfigError(
            f"{FIELD}: {weights.path} holds weights that belong neither to {name} nor to a known kind of head: "
            f"{_some(unknown)}. Set model.backbone to the network that the file is of, or take them out"
        )
    # Counters, which files of old versions lack, decide nothing at BatchNorm's fixed momentum.
    backbone.load_state_dict({key: found.get(key, value) for key, value in wanted.items()})
    return (
        f"{weights.path}: {len(found.keys() & wanted.keys())} tensors of {name} loaded (names: "
        f"{'indices of children' if scheme else 'torchvision'}{f', after {prefix!r}' if prefix else ''}), "
        f"{len(others)} of heads and other branches left out; SHA-256 {weights.sha256[:12]}"
    )


def load_heads(weights: ForeignWeights, heads: nn.ModuleDict) -> bool:
    """Load pretext heads that the file brings along, where names and shapes are exactly those of `heads`.

    Returns:
        Whether nothing is left to fit: they were loaded, or there are none.
    """
    wanted = heads.state_dict()
    if not wanted:
        return True
    for prefix in {"heads.", *_prefixes(weights.tensors)}:
        own = _below(weights.tensors, prefix)
        for start in ("", *_PROJECTORS):
            # A projector by any of its names, or all heads as they are.
            named = {f"projector.{key}": value for key, value in _below(own, start).items()} if start else own
            if named.keys() == wanted.keys() and not _differing(named, wanted):
                heads.load_state_dict(named)
                return True
    return False


def _safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except SafetensorError as error:
        raise ConfigError(f"{FIELD}: {path} is no whole safetensors file ({error})") from error


def _pickled(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        values: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{FIELD}: {path} is damaged, or holds Python objects besides weights, which could run code and are not "
            "loaded. If you trust it, save its weights alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from error
    except Exception as error:
        # Whatever bytes that are no such file make the reader stumble over.
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{FIELD}: {path} is no whole file of torch.save ({cause})") from error
    for name in _NESTED:
        if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
            values = values[name]
    entries = values.items() if isinstance(values, Mapping) else ()
    tensors = {str(key): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"{FIELD}: {path} holds no table of weights by name (a state_dict)")
    return tensors


def _best_match(
    weights: ForeignWeights, backbone: nn.Module, wanted: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The prefix and naming with most matches, and the tensors under the backbone's own names."""
    best: tuple[int, str, dict[str, Tensor], dict[str, str]] = (-1, "", {}, {})
    for prefix in sorted(_prefixes(weights.tensors), key=len):
        below = _below(weights.tensors, prefix)
        for scheme in ({}, *_index_schemes(backbone)):
            renamed = {_renamed(key, scheme): value for key, value in below.items()}
            fitting = len((renamed.keys() & wanted.keys()) - set(_differing(renamed, wanted)))
            # A matching name with another shape counts, but less: the message is then about the shape.
            score = 2 * fitting + len(renamed.keys() & wanted.keys())
            if score > best[0]:
                best = score, prefix, renamed, scheme
    return best[1:]


def _index_schemes(backbone: nn.Module) -> Iterator[dict[str, str]]:
    """New names by index: of ``nn.Sequential(*children)``, of torchvision's network and of lightly's own ResNet."""
    children = list(backbone.named_children())
    yield {str(index): name for index, (name, _) in enumerate(children)}
    with_weights = [name for name, child in children if any(True for _ in child.parameters())]
    yield {str(index): name for index, name in enumerate(with_weights)}


def _renamed(key: str, scheme: Mapping[str, str]) -> str:
    first, dot, rest = key.partition(".")
    if first not in scheme:
        return key
    # lightly's own ResNet calls torchvision's downsampling a shortcut.
    return scheme[first] + dot + rest.replace("shortcut.", "downsample.")


def _prefixes(keys: Iterable[str]) -> set[str]:
    """Every chain of wrappers that a name begins with, the empty one included."""
    found = {""}
    for key in keys:
        chain = ""
        for part in key.split(".")[:-1]:
            if part not in _WRAPPERS:
                break
            chain += f"{part}."
            found.add(chain)
    return found


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _others(
    tensors: Mapping[str, Tensor], prefix: str, scheme: Mapping[str, str], wanted: Mapping[str, Tensor]
) -> list[str]:
    """Names in the file that are not of the backbone."""
    return [
        key for key in tensors if not (key.startswith(prefix) and _renamed(key.removeprefix(prefix), scheme) in wanted)
    ]


def _left_out(key: str) -> bool:
    """Whether a name is one of a known kind of head or of a further copy of the backbone."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return not _LEFT_OUT.isdisjoint(parts[0].lower().split("_"))


def _check_stem(weights: ForeignWeights, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    """Say which backbone fits where the first convolution has another size of kernel."""
    key = "conv1.weight"
    if key not in found or key not in wanted or found[key].shape[2:] == wanted[key].shape[2:]:
        return
    there, here = (f"{tensor.shape[-1]}x{tensor.shape[-1]}" for tensor in (found[key], wanted[key]))
    remedy = name.removesuffix("-cifar") if name.endswith("-cifar") else "resnet18-cifar, if it is a ResNet-18"
    raise ConfigError(
        f"{FIELD}: the stem ({key}) of {weights.path} is {there}, that of {name} is {here}: one is for large images, "
        f"the other for small ones. Set model.backbone to {remedy}"
    )


def _differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [key for key in wanted if key in found and found[key].shape != wanted[key].shape]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = sorted(names)
    rest = len(listed) - 4
    return ", ".join(listed[:4]) + (f" and {rest} more" if rest > 0 else "")
