"""Layers and parametrizations that torch differentiates once, or that write while they are called.

In a curvature pass each is replaced by the same function in operations that differentiate twice, or refused.
"""

# torch has no public name for its weight normalisation.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

_ABSENT = object()


@contextmanager
def differentiable_layers(module: nn.Module) -> Iterator[None]:
    """Inside, a call of `module` differentiates twice where torch's own layers would not; afterwards nothing is left of
    it, nor of what hooks of the call stored."""
    with ExitStack() as stack:
        computed = False
        for layer in module.modules():
            hooks = layer._forward_pre_hooks
            computed |= bool(hooks) or "parametrizations" in layer._modules or isinstance(layer, nn.EmbeddingBag)
            if hooks or isinstance(layer, _REPLACED):
                for owner, name, value in _replacements(layer):
                    stack.enter_context(_set(owner, name, value))
            if hooks:
                # Hooks of the older kind keep the weight that they compute, with its graph.
                kept = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
                stack.callback(vars(layer).update, kept)
        if computed:
            # Not for every module: the mode takes a microsecond for each call of torch's.
            stack.enter_context(_Elementary())
        yield


@contextmanager
def own_parametrization_cache() -> Iterator[None]:
    """Inside, `parametrize.cached` knows no weight that was computed from other parameters."""
    with ExitStack() as stack:
        if parametrize._cache_enabled:
            stack.enter_context(_set(parametrize, "_cache", {}))
        yield


def refuse_layer(layer: nn.Module, module: nn.Module) -> None:
    """Raise TypeError for a layer of `module` whose gradients are those of no function of its parameters."""
    if not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return
    name = next(name for name, each in module.named_modules() if each is layer)
    where = f"layer {name!r} ({type(layer).__name__})" if name else f"the module {type(layer).__name__}"
    if layer.max_norm is not None:
        raise TypeError(
            f"functional_call: {where} writes to its weight while it is called (max_norm={layer.max_norm}), so "
            "that the objective is no function of it; build it with max_norm=None and bound the rows in the "
            "objective, for example by a penalty or by rows / rows.norm(dim=-1, keepdim=True).clamp(min=1.0)"
        )
    if layer.scale_grad_by_freq:
        raise TypeError(
            f"functional_call: {where} has scale_grad_by_freq=True, so that its gradients are not those of the "
            "objective; build it with scale_grad_by_freq=False and weight the samples in the objective"
        )


@final
class _Elementary(TorchFunctionMode):
    """Inside, what torch computes by kernels without a (right) second derivative is computed by operations that have
    derivatives of every order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # -1 stands for the norm of the whole, as in torch.
    others = None if dim == -1 else [d for d in range(v.dim()) if d != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    # For torch's own checks of its arguments; the layer's max_norm and scale_grad_by_freq were refused before.
    functional.embedding_bag(
        *(input, weight.detach(), offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse),
        *(per_sample_weights, include_last_offset, padding_idx),
    )
    indices, starts = _bags(input, offsets, include_last_offset)
    if mode == "max":
        parts = torch.embedding_bag(weight.detach(), indices, starts, False, 2, False, None, False, padding_idx)
        return weight.gather(0, parts[3]) * (parts[2] > 0).unsqueeze(1)
    bag = torch.searchsorted(starts, torch.arange(len(indices), device=indices.device), right=True) - 1
    share = weight.new_ones(len(indices)) if per_sample_weights is None else _flat(per_sample_weights)
    if padding_idx is not None:
        share = share * (indices != padding_idx % len(weight))
    if mode == "mean":
        share = share / share.new_zeros(len(starts)).index_add(0, bag, share).clamp(min=1.0)[bag]
    rows = functional.embedding(indices, weight) * share.unsqueeze(1)
    return rows.new_zeros(len(starts), weight.shape[1]).index_add(0, bag, rows)


def _bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """All indices in one row, and where each bag starts."""
    if offsets is not None:
        return input, offsets[:-1] if include_last_offset else offsets
    lengths = torch.tensor([len(bag) for bag in input.unbind()], device=input.device)
    return _flat(input), lengths.cumsum(0) - lengths


def _flat(bags: Tensor) -> Tensor:
    return torch.cat(bags.unbind()) if bags.is_nested else bags.reshape(-1)


_ELEMENTARY: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    functional.embedding_bag: _embedding_bag,
}


_REPLACED = (nn.Embedding, _SpectralNorm, nn.RNNBase)


def _replacements(layer: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, value) of what a curvature pass sets for one layer."""
    if isinstance(layer, nn.Embedding) and layer.sparse:
        yield layer, "sparse", False
    elif isinstance(layer, _SpectralNorm) and layer.training:
        yield layer, "forward", partial(_parametrized_spectral_norm, layer)
    elif isinstance(layer, nn.RNNBase):
        yield layer, "forward", partial(_by_own_kernels, layer.forward)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and layer.training:
            yield hook, "compute_weight", partial(_hooked_spectral_norm, hook)


def _parametrized_spectral_norm(norm: _SpectralNorm, weight: Tensor) -> Tensor:
    if weight.dim() == 1:
        return type(norm).forward(norm, weight)
    return weight / _largest_singular_value(norm._reshape_weight_to_matrix(weight))


def _hooked_spectral_norm(hook: SpectralNorm, layer: nn.Module, do_power_iteration: bool) -> Tensor:
    weight = getattr(layer, f"{hook.name}_orig")
    return weight / _largest_singular_value(hook.reshape_weight_to_matrix(weight))


def _largest_singular_value(matrix: Tensor) -> Tensor:
    r"""The largest singular value of W, with its first three derivatives; not finite where it is a double one.

    torch's power iterations hold the singular vectors fixed, and with them lose the second derivative. Here they take
    one Newton step from the exact ones, which has their first derivative, and the value is Rayleigh's quotient
    ``2 u'Wv / (u'u + v'v)``, whose error is the fourth power of what the step leaves.
    """
    with torch.no_grad():
        left, values, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
    u, v, top = left[:, 0], right[0], values[0]
    rest_u, rest_v = matrix @ v - top * u, matrix.mT @ u - top * v
    p, q = left.mT @ rest_u, right @ rest_v
    inverse = torch.cat([torch.zeros_like(values[:1]), 1.0 / (top.square() - values[1:].square())])
    u = u + left @ (inverse * (top * p + values * q)) + (rest_u - left @ p) / top
    v = v + right.mT @ (inverse * (values * p + top * q)) + (rest_v - right.mT @ q) / top
    return 2.0 * torch.dot(u, matrix @ v) / (torch.dot(u, u) + torch.dot(v, v))


def _by_own_kernels(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """cuDNN's recurrent layers have no second derivative and oneDNN's no forward mode; torch's own have both."""
    backends = torch.backends.cudnn, torch.backends.mkldnn
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return forward(*args, **kwargs)
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute of this one object, put back or taken away afterwards."""
    before = vars(owner).get(name, _ABSENT)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
