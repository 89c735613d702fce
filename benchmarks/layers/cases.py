"""Every layer of torch.nn that has parameters and every parametrization, each small and in float64."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

ROWS = 6
"""Samples of every batch."""

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One layer with its options.

    Attributes:
        names: what of torch the case covers.
        make: the module; called with the batch's tensors it gives outputs with one row per sample.
        batch: the tensors, their first dimension samples.
        modes: of the module; both where they differ.
        fixed: parameter name -> rows that torch holds fixed, along which no direction goes.
    """

    title: str
    names: tuple[str, ...]
    make: Make
    batch: tuple[Tensor, ...]
    modes: tuple[str, ...] = ("train",)
    fixed: dict[str, int] = field(default_factory=dict)


BOTH = ("train", "eval")


class Called(nn.Module):
    """A layer, and how it is called: ``call(layer, *batch)``."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *batch: Tensor) -> Tensor:
        return self.call(self.layer, *batch)


def numbers(*shape: int) -> Tensor:
    """The same normal numbers for every case of these shapes."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def words(length: int) -> Tensor:
    return torch.randint(7, (ROWS, length), generator=torch.Generator().manual_seed(1))


def cases() -> list[Case]:
    """All that this version of torch has."""
    return [*dense(), *convolutions(), *norms(), *embeddings(), *recurrent(), *attention(), *heads(), *weights()]


def of(title: str, make: Make, *batch: Tensor, modes: tuple[str, ...] = ("train",)) -> Case:
    """The part of the title before the first space or comma is the class."""
    return Case(title, (title.replace(",", " ").split()[0],), make, batch, modes)


def dense() -> Iterator[Case]:
    x = numbers(4)
    yield of("Linear", lambda: nn.Linear(4, 3), x)
    yield of("LazyLinear", lambda: called_once(nn.LazyLinear(3), x), x)
    yield of("Bilinear", lambda: nn.Bilinear(4, 2, 3), x, numbers(2))
    yield of("PReLU", lambda: nn.PReLU(4), x)


def convolutions() -> Iterator[Case]:
    for n in (1, 2, 3):
        plain, transposed = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
        x = numbers(4, *[5] * n)
        options = {"stride": 2, "padding": 1, "groups": 2}
        yield of(f"Conv{n}d", lambda plain=plain: plain(4, 4, 3), x)
        yield of(f"Conv{n}d, strided, grouped", lambda plain=plain, o=options: plain(4, 4, 3, **o), x)
        yield of(f"Conv{n}d, reflected", lambda plain=plain: plain(4, 2, 3, padding=1, padding_mode="reflect"), x)
        yield of(f"Conv{n}d, dilated, padding='same'", lambda p=plain: p(4, 2, 3, padding="same", dilation=2), x)
        yield of(f"ConvTranspose{n}d", lambda transposed=transposed: transposed(4, 2, 3), x)
        yield of(f"ConvTranspose{n}d, strided, grouped", lambda t=transposed, o=options: t(4, 4, 3, **o), x)
        for name in (f"LazyConv{n}d", f"LazyConvTranspose{n}d"):
            yield of(name, lambda name=name, x=x: called_once(getattr(nn, name)(2, 3), x), x)


def norms() -> Iterator[Case]:
    for n in (1, 2, 3):
        x = numbers(4, *[3] * n)
        for prefix in ("", "Lazy"):
            batch, instance = f"{prefix}BatchNorm{n}d", f"{prefix}InstanceNorm{n}d"
            size = () if prefix else (4,)
            yield of(batch, lambda k=batch, s=size, x=x: called_once(getattr(nn, k)(*s), x), x, modes=BOTH)
            options = {"affine": True, "track_running_stats": True}
            yield of(
                f"{instance}, affine",
                lambda k=instance, s=size, x=x, o=options: called_once(getattr(nn, k)(*s, **o), x),
                x,
                modes=BOTH,
            )
    x = numbers(4, 3)
    yield of("SyncBatchNorm", lambda: nn.SyncBatchNorm(4), x, modes=BOTH)
    yield of("GroupNorm", lambda: nn.GroupNorm(2, 4), x)
    yield of("LayerNorm", lambda: nn.LayerNorm(3), x)
    yield of("RMSNorm", lambda: nn.RMSNorm(3), x)


def embeddings() -> Iterator[Case]:
    x, weights = words(5), numbers(5)
    for options in ("", "sparse=True", "padding_idx=2", "max_norm=1.0", "scale_grad_by_freq=True"):
        keywords = parsed(options)
        fixed = {"weight": 2} if "padding_idx" in keywords else {}
        title = f"Embedding, {options}" if options else "Embedding"
        yield Case(title, ("Embedding",), lambda k=keywords: nn.Embedding(7, 3, **k), (x,), fixed=fixed)
    for mode in ("sum", "mean", "max"):
        for options in ("", "padding_idx=2", "sparse=True", "max_norm=1.0", "scale_grad_by_freq=True"):
            if mode == "max" and options in ("sparse=True", "scale_grad_by_freq=True"):
                continue  # Not in torch.
            keywords = {"mode": mode, **parsed(options)}
            title = f"EmbeddingBag, {mode}" + (f", {options}" if options else "")
            yield of(title, lambda k=keywords: nn.EmbeddingBag(7, 3, **k), x)
    yield of(
        "EmbeddingBag, sum, per_sample_weights",
        lambda: Called(nn.EmbeddingBag(7, 3, mode="sum"), lambda bag, x, w: bag(x, per_sample_weights=w)),
        *(x, weights),
    )


def recurrent() -> Iterator[Case]:
    x, lengths = numbers(4, 3), torch.tensor([4, 2, 3, 1, 4, 2])
    for name in ("RNN", "LSTM", "GRU"):
        kind = getattr(nn, name)
        for options in ("", "num_layers=2", "bidirectional=True", "proj_size=2", "num_layers=2, dropout=0.4"):
            if "proj_size" in options and name != "LSTM":
                continue  # Not in torch.
            keywords = {"batch_first": True, **parsed(options)}
            title = f"{name}, {options}" if options else name
            yield of(title, lambda kind=kind, k=keywords: Called(kind(3, 4, **k), first_output), x)
        packed = {"batch_first": True, "bidirectional": True}
        yield of(f"{name}, packed", lambda kind=kind, k=packed: Called(kind(3, 4, **k), packed_output), x, lengths)
        yield of(f"{name}Cell", lambda name=name: Called(getattr(nn, f"{name}Cell")(3, 4), two_steps), x)
    yield of("RNN, relu", lambda: Called(nn.RNN(3, 4, nonlinearity="relu", batch_first=True), first_output), x)
    yield of("RNNCell, relu", lambda: Called(nn.RNNCell(3, 4, nonlinearity="relu"), two_steps), x)


def attention() -> Iterator[Case]:
    x, memory = numbers(3, 4), numbers(2, 4)
    mask = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask[::2, 2] = True
    for options in ("", "dropout=0.3", "add_bias_kv=True, add_zero_attn=True", "kdim=4, vdim=4"):
        keywords = {"batch_first": True, **parsed(options)}
        title = f"MultiheadAttention, {options}" if options else "MultiheadAttention"
        yield of(title, lambda k=keywords: Called(nn.MultiheadAttention(4, 2, **k), attended), x, modes=BOTH)
    yield of(
        "MultiheadAttention, masked",
        lambda: Called(
            nn.MultiheadAttention(4, 2, batch_first=True),
            lambda m, x, mask: m(x, x, x, key_padding_mask=mask, need_weights=False)[0],
        ),
        *(x, mask),
        modes=BOTH,
    )
    sizes = {"d_model": 4, "nhead": 2, "dim_feedforward": 5, "batch_first": True}
    yield of("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(**sizes), x, modes=BOTH)
    yield of(
        "TransformerEncoderLayer, norm_first, gelu",
        lambda: nn.TransformerEncoderLayer(**sizes, norm_first=True, activation="gelu", dropout=0.0),
        x,
        modes=BOTH,
    )
    yield of("TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(**sizes), x, memory, modes=BOTH)
    yield of(
        "TransformerEncoder, masked",
        lambda: Called(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2),
            lambda m, x, mask: m(x, src_key_padding_mask=mask),
        ),
        *(x, mask),
        modes=BOTH,
    )
    yield of(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 2),
        *(x, memory),
        modes=BOTH,
    )
    yield of(
        "Transformer",
        lambda: nn.Transformer(**sizes, num_encoder_layers=1, num_decoder_layers=1),
        *(memory, x),
        modes=BOTH,
    )


def heads() -> Iterator[Case]:
    x, targets = numbers(4), torch.tensor([0, 5, 2, 7, 3, 1])
    yield of(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: Called(nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2, 5], div_value=2.0), lambda m, x, t: m(x, t).output),
        *(x, targets),
    )
    if hasattr(nn, "LinearCrossEntropyLoss"):
        yield of(
            "LinearCrossEntropyLoss",
            lambda: nn.LinearCrossEntropyLoss(4, 8, bias=True, reduction="none"),
            *(x, targets),
        )


def weights() -> Iterator[Case]:
    """Parametrizations, and masks of pruning, on a layer each."""
    x, image = numbers(4), numbers(2, 4, 4)

    def linear(function: Callable[..., nn.Module], **options: Any) -> Make:
        return lambda: function(nn.Linear(4, 5), **options)

    def row(name: str, function: Callable[..., Any], options: str = "", modes: tuple[str, ...] = ("train",)) -> Case:
        title = f"{name}, {options}" if options else name
        return Case(title, (name,), linear(function, **parsed(options)), (x,), modes)

    for prefix, weight_norm in (("parametrizations", parametrizations.weight_norm), ("utils", nn.utils.weight_norm)):
        name = f"{prefix}.weight_norm"
        yield row(name, weight_norm)
        yield row(name, weight_norm, "dim=1")
        yield row(name, weight_norm, "dim=None")
        yield Case(f"{name}, Conv2d", (name,), lambda f=weight_norm: f(nn.Conv2d(2, 3, 3)), (image,))
        yield Case(
            f"{name}, LSTM",
            (name,),
            lambda f=weight_norm: Called(f(nn.LSTM(4, 3, batch_first=True), "weight_hh_l0"), first_output),
            (numbers(3, 4),),
        )
    for prefix, function in (("parametrizations", parametrizations.spectral_norm), ("utils", nn.utils.spectral_norm)):
        name = f"{prefix}.spectral_norm"
        yield row(name, function, modes=BOTH)
        yield row(name, function, "dim=1", modes=BOTH)
        yield Case(f"{name}, Conv2d", (name,), lambda f=function: f(nn.Conv2d(2, 3, 3)), (image,), BOTH)
    for orthogonal_map in ("matrix_exp", "cayley", "householder"):
        for trivialization in (False, True):
            options = f"orthogonal_map='{orthogonal_map}', use_trivialization={trivialization}"
            yield row("parametrizations.orthogonal", parametrizations.orthogonal, options)
    mask = torch.ones(5, 4)
    mask[1, 2] = mask[3, 0] = 0.0
    for name, keywords in {
        "identity": {},
        "random_unstructured": {"amount": 0.3},
        "l1_unstructured": {"amount": 0.3},
        "random_structured": {"amount": 0.4, "dim": 0},
        "ln_structured": {"amount": 0.4, "n": 2, "dim": 0},
        "custom_from_mask": {"mask": mask},
    }.items():
        make = linear(getattr(prune, name), name="weight", **keywords)
        yield Case(f"prune.{name}", (f"prune.{name}",), make, (x,))
    yield Case("prune.global_unstructured", ("prune.global_unstructured",), globally_pruned, (x,))


def globally_pruned() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    layers = [(module[0], "weight"), (module[2], "weight")]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.3)
    return module


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]


def first_output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def packed_output(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def two_steps(cell: nn.Module, x: Tensor) -> Tensor:
    """The second hidden state; an LSTM's cell state passes on too."""
    state = cell(x[:, 1], cell(x[:, 0]))
    return state[0] if isinstance(state, tuple) else state


def called_once(layer: nn.Module, *batch: Tensor) -> nn.Module:
    """With shapes for what is lazy, and running statistics that are not the first ones."""
    layer.double()(*batch)
    return layer


def parsed(options: str) -> dict[str, Any]:
    """``"a=1, b=True"`` as keywords."""
    call = ast.parse(f"f({options})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
