"""Weights made elsewhere, found in a file under the names that training code gives to a backbone."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...experiment.artifacts import not_finite
from ...experiment.errors import ConfigError
from .timm_backbones import TimmBackbone
from .weight_files import FIELD, ForeignWeights, Keys, preference

_WRAPPERS = {
    *("module", "model", "_orig_mod", "backbone", "encoder", "network", "net", "trunk", "_feature_blocks"),
    *("online_backbone", "online_encoder", "encoder_q", "base_encoder", "base_model"),
    *("teacher", "teacher_backbone", "student", "student_backbone"),
}
"""What training code puts before a backbone's own names, in any order: DDP, Lightning modules, torch.compile, DINO."""

_LEFT_OUT = {
    *("fc", "classifier", "head", "heads", "linear", "aux", "aux1", "aux2", "auxlogits"),
    *("projector", "projection", "predictor", "prediction", "prototypes", "queue", "loss", "criterion"),
    *("momentum", "teacher", "student", "target", "ema", "upper"),
}
"""Words in the names of heads and of further copies of the backbone, which are not taken."""

_BESIDE = {"bn", "encoder_k"}
"""Names beside a wrapped backbone: Barlow Twins' normalisation of embeddings, and MoCo's copy."""

_PROJECTORS = ("projector.", "projection_head.layers.", "head.projector.", "heads.projector.")


@dataclass(frozen=True)
class _Match:
    """A backbone found in a file.

    Attributes:
        keys: of the table.
        prefix: of its names there.
        found: tensors under the backbone's own names.
        scheme: own names by those in the file, where these are indices.
    """

    keys: Keys = ()
    prefix: str = ""
    found: Mapping[str, Tensor] = field(default_factory=dict)
    scheme: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """In words, where it is in the file."""
        return "".join(f"{key}." for key in self.keys) + self.prefix

    def takes(self, key: str, wanted: Mapping[str, Tensor]) -> bool:
        """Whether a name in the table is one of the backbone."""
        return key.startswith(self.prefix) and _renamed(key.removeprefix(self.prefix), self.scheme) in wanted


def load_backbone(weights: ForeignWeights, backbone: nn.Module, name: str) -> str:
    """Load the backbone's weights and buffers from `weights`; one line that says what was loaded, and from where.

    Names are those of torchvision or, for a network of timm, timm's. Of several copies in a file the first by
    `preference` is taken: of a teacher and a student the teacher.

    Args:
        name: of the backbone in the configuration, for messages.

    Raises:
        ConfigError: no name matches, the stem or another shape differs, weights are missing or not finite, or some are
            unknown.
    """
    backbone, names = (backbone.network, "timm") if isinstance(backbone, TimmBackbone) else (backbone, "torchvision")
    wanted = backbone.state_dict()
    match, copies = _best_match(weights, backbone, wanted)
    found = match.found
    if not found.keys() & wanted.keys():
        raise ConfigError(
            f"{FIELD}: no name in {weights.path} is one of {name}; it holds {_contents(weights)}, and {name} has "
            f"{_some(wanted)}. docs/weights.md lists the layouts that are known; set model.backbone to the network of "
            "the file"
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
    others = [key for key in weights.tables[match.keys] if not match.takes(key, wanted)]
    unknown = [key for key in others if not _left_out(key, match, wanted)]
    if unknown:
        raise ConfigError(
            f"{FIELD}: {weights.path} holds weights that belong neither to {name} nor to a known kind of head: "
            f"{_some(unknown)}. Set model.backbone to the network that the file is of, or take them out"
        )
    taken = {key: found[key] for key in wanted if key in found}
    _check_numbers(weights, taken, wanted, f" after {match.place!r}" if match.place else "")
    # Counters, which files of old versions lack, decide nothing at BatchNorm's fixed momentum.
    backbone.load_state_dict({**wanted, **taken})
    further = f"; copies under {', '.join(map(repr, copies))} left out" if copies else ""
    return (
        f"{weights.path}: {len(taken)} tensors of {name} loaded (names: "
        f"{'indices of children' if match.scheme else names}{f', after {match.place!r}' if match.place else ''}"
        f"), {len(others)} of heads and other branches left out{further}; SHA-256 {weights.sha256[:12]}"
    )


def load_heads(weights: ForeignWeights, heads: nn.ModuleDict) -> bool:
    """Load pretext heads that the file brings along, where names and shapes are exactly those of `heads`.

    Returns:
        Whether nothing is left to fit: they were loaded, or there are none.

    Raises:
        ConfigError: they are not finite.
    """
    wanted = heads.state_dict()
    if not wanted:
        return True
    for keys, prefix in _places(weights, "heads."):
        own = _below(weights.tables[keys], prefix)
        for start in ("", *_PROJECTORS):
            # A projector by any of its names, or all heads as they are.
            named = {f"projector.{key}": value for key, value in _below(own, start).items()} if start else own
            if named.keys() == wanted.keys() and not _differing(named, wanted):
                _check_numbers(weights, named, wanted, f" after {prefix + start!r}")
                heads.load_state_dict(named)
                return True
    return False


def _places(weights: ForeignWeights, *further: str) -> list[tuple[Keys, str]]:
    """Tables with prefixes of names in them, in the order of `preference`."""
    places = [(keys, prefix) for keys, table in weights.tables.items() for prefix in {*further, *_prefixes(table)}]
    return sorted(places, key=lambda place: (preference([*place[0], place[1]]), place[1]))


def _best_match(weights: ForeignWeights, backbone: nn.Module, wanted: Mapping[str, Tensor]) -> tuple[_Match, list[str]]:
    """The table, prefix and naming with most matches, and where others match as well."""
    best, highest, copies = _Match(), 0, list[str]()
    for keys, prefix in _places(weights):
        below = _below(weights.tables[keys], prefix)
        for scheme in ({}, *_index_schemes(backbone)):
            renamed = {_renamed(key, scheme): value for key, value in below.items()}
            fitting = len((renamed.keys() & wanted.keys()) - set(_differing(renamed, wanted)))
            # A matching name with another shape counts, but less: the message is then about the shape.
            score, match = 2 * fitting + len(renamed.keys() & wanted.keys()), _Match(keys, prefix, renamed, scheme)
            if score > highest:
                best, highest, copies = match, score, []
            elif score == highest > 0 and match.place not in (best.place, *copies):
                copies.append(match.place)
    return best, copies


def _check_numbers(
    weights: ForeignWeights, taken: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: str
) -> None:
    """Refuse tensors that cannot be copied as they are, and numbers that are not finite as the network holds them."""
    odd = [key for key, value in taken.items() if not _is_plain(value)]
    if odd:
        raise ConfigError(
            f"{FIELD}: {weights.path} holds {_some(odd)}{place} in sparse, quantized, complex or empty form; save them "
            "as plain tensors"
        )
    wrong = not_finite(taken, wanted)
    if wrong:
        raise ConfigError(
            f"{FIELD}: {weights.path} holds NaN or infinity in {_some(wrong)}{place}: the training that made it went "
            "wrong; name an earlier checkpoint of it"
        )


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and not (value.is_meta or value.is_quantized or value.is_complex())


def _contents(weights: ForeignWeights) -> str:
    """Names in the file, or its tables where there are several."""
    if len(weights.tables) == 1:
        return _some(*weights.tables.values())
    sizes = {"".join(f"[{key!r}]" for key in keys) or "outermost": len(t) for keys, t in weights.tables.items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return "the tables " + ", ".join(f"{name} of {sizes[name]} tensors" for name in largest)


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


def _left_out(key: str, match: _Match, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a name beside the backbone is one of a known kind of head or of a further copy of the backbone."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    if _renamed(".".join(parts), match.scheme) in wanted:
        return True
    first = parts[0].lower()
    return (first in _BESIDE and not key.startswith(match.prefix)) or not _LEFT_OUT.isdisjoint(first.split("_"))


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
