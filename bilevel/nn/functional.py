"""Modules as functions of their parameters, safe in curvature passes."""

import inspect
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from bilevel.distributed import world_size
from bilevel.nn.layers import differentiable_layers, own_parametrization_cache, refuse_layer
from bilevel.nn.seeding import seeded
from bilevel.nn.sync_batch_norm import SyncBatchNorm
from bilevel.sharded import is_sharded

_curvature_pass: ContextVar["_CurvaturePass | None"] = ContextVar("bilevel_curvature_pass", default=None)
_surrounded: ContextVar[bool] = ContextVar("bilevel_curvature_surroundings", default=False)
_buffers_kept: ContextVar[bool] = ContextVar("bilevel_buffers_kept", default=False)

_writers: ContextVar["WeakKeyDictionary[nn.Module, set[str]] | None"] = ContextVar("bilevel_writers", default=None)

_casts: ContextVar[set[str] | None] = ContextVar("bilevel_casts", default=None)

_NORM_LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

_CHECKPOINT_REMEDY = (
    "saved-tensor hooks (activation checkpointing, offloading) cannot run inside a hypergradient's passes: a "
    "recomputed forward would read the module's own parameters instead of those it was called with. Switch "
    "checkpointing off in the objectives, and use ReverseOverReverse(keep_graph=False) or fewer, "
    "smaller batches to save memory"
)


def in_curvature_pass() -> bool:
    """Whether the caller runs within a pass of `hypergradient` or `linearize`.

    For objectives that compute plain training passes otherwise, for example under autocast or compiled.
    """
    return _curvature_pass.get() is not None


class BufferNotes(Protocol):
    """Takes note of the buffers that a pass reads."""

    def note(self, named: Iterable[tuple[str, Tensor]]) -> None: ...


class _CurvaturePass(NamedTuple):
    """What a pass says to `functional_call`: who is told the buffers that are read, and whether buffers are written."""

    notes: BufferNotes | None
    write_buffers: bool


@contextmanager
def curvature_surroundings() -> Iterator[None]:
    """What all curvature passes have around them: attention is twice differentiable, and checkpointing refused.

    Entered around several passes, these need not enter it again. No training pass runs inside.
    """
    if _surrounded.get():
        yield
        return
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINT_REMEDY):
        token = _surrounded.set(True)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            _surrounded.reset(token)


@contextmanager
def curvature_pass(
    seed: int | None = None, notes: BufferNotes | None = None, *, write_buffers: bool = False
) -> Iterator[None]:
    """Inside, `functional_call` writes no buffer, attention is twice differentiable and, with a seed, masks repeat.

    Args:
        seed: seeds the default generators for the length of the pass and restores them afterwards; None leaves them.
        notes: is told the buffers that `functional_call` reads.
        write_buffers: buffers such as running statistics update after all, as in a training step.
    """
    with nullcontext() if seed is None else seeded(seed), curvature_surroundings():
        token = _curvature_pass.set(_CurvaturePass(notes, write_buffers))
        try:
            yield
        finally:
            _curvature_pass.reset(token)


@contextmanager
def training_pass(seed: int, *, write_buffers: bool) -> Iterator[None]:
    """An ordinary pass that can be made twice: inside, random masks are those of `seed`.

    Args:
        write_buffers: False makes `functional_call` write to copies of the buffers.
    """
    token = _buffers_kept.set(not write_buffers)
    try:
        with seeded(seed):
            yield
    finally:
        _buffers_kept.reset(token)


@contextmanager
def noting_writers(modules: "WeakKeyDictionary[nn.Module, set[str]]") -> Iterator[None]:
    """Inside, modules that write to their buffers under `functional_call` are added to `modules`, with the names of
    those that were written first; not with BatchNorm's counts of batches, unless its momentum goes by them."""
    token = _writers.set(modules)
    try:
        yield
    finally:
        _writers.reset(token)


@contextmanager
def _noted_if_written(module: nn.Module) -> Iterator[None]:
    """Adds the module to those of `noting_writers` where one of its buffers is written or replaced inside."""
    writers = _writers.get()
    if writers is None or module in writers:
        yield
        return
    before = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    yield
    after = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    if written := {name for name, mark in after.items() if before.get(name) != mark}:
        for name, layer in module.named_modules():
            mean, variance, count = (
                f"{name}.{of}".removeprefix(".") for of in ("running_mean", "running_var", "num_batches_tracked")
            )
            if isinstance(layer, _NORM_LAYERS) and count in written:
                # torch moves the statistics without a new version.
                written |= {mean, variance}
                written -= {count} if layer.momentum is not None else set()
        writers[module] = written


@contextmanager
def noting_casts(devices: set[str]) -> Iterator[None]:
    """Inside, types of devices for which an ordinary pass casts are added to `devices`: by `training_autocast`, or by
    autocast around `functional_call`."""
    token = _casts.set(devices)
    try:
        yield
    finally:
        _casts.reset(token)


def functional_call(
    module: nn.Module,
    params: Mapping[str, Tensor],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool | None = None,
) -> Any:
    """Call `module` with `params` in place of its own parameters; as `torch.func.functional_call`.

    In an ordinary pass buffers update as always. In every pass that `hypergradient` and `linearize` make, nothing is
    written: BatchNorm and InstanceNorm in train mode use batch statistics without touching running statistics or
    counters (eval mode stays eval), and every other buffer is replaced by a copy for the length of the call. There
    attention takes torch's plain kernel, since the fused ones do not differentiate twice: slower, and with memory that
    grows with the square of the sequence length. The logger "bilevel" says so once a process, at level INFO, where the
    module holds an `nn.MultiheadAttention`; direct calls of ``scaled_dot_product_attention`` are switched unannounced.
    Weight normalisation, `nn.EmbeddingBag` and recurrent layers are computed by operations that differentiate twice,
    sparse embeddings with dense gradients, and spectral normalisation in train mode by the exact singular value in
    place of a power iteration, whose vectors torch holds fixed.

    Args:
        params: parameter or buffer name -> tensor; names that are left out keep the module's own tensors.
        args: positional arguments; a single non-tuple is taken as the only one.
        training: True calls the module in train mode, False in eval mode (dropout off, running statistics); every
            layer gets its own mode back afterwards. None leaves the modes as they are: the same in both levels.

    Raises:
        ValueError: `params` names something the module does not have; a lazy module that has not been called yet.
        TypeError: the module cannot be differentiated twice as it is (wrapped by DistributedDataParallel, sharded by
            FSDP or with DTensors for parameters, compiled, torch's SyncBatchNorm over several ranks, embeddings with
            `max_norm` or `scale_grad_by_freq`); the message gives the remedy.
        RuntimeError: activation checkpointing or another saved-tensor hook in a hypergradient's pass.
    """
    curvature = _curvature_pass.get()
    _refuse_wrappers(module, curvature is not None)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    cut = [name for name, parameter in parameters.items() if is_sharded(parameter)]
    if cut:
        raise TypeError(
            f"functional_call: parameter {cut[0]!r} of {type(module).__name__} is a DTensor (fully_shard, "
            "parallelize_module), whose exchanges do not all differentiate twice; pass a module whose parameters are "
            "whole on every rank"
        )
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    unknown = [name for name in params if name not in parameters and name not in buffers]
    if unknown:
        raise ValueError(
            f"functional_call: {type(module).__name__} has no parameter or buffer named {unknown[0]!r} "
            f"({len(unknown)} such names); it has {sorted(parameters)[:5]}..."
        )
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"functional_call: parameter {lazy[0]!r} of {type(module).__name__} has no shape yet; call the module once "
            "on a batch first"
        )
    keywords = dict(kwargs) if kwargs else None
    with ExitStack() as stack:
        stack.enter_context(own_parametrization_cache())
        if training is not None:
            stack.enter_context(_in_mode(module, training))
        casts = _casts.get()
        if casts is not None and curvature is None:
            casts |= {device for device in {t.device.type for t in params.values()} if _is_cast(device)}
        if curvature is None and not _buffers_kept.get():
            stack.enter_context(_noted_if_written(module))
            return torch.func.functional_call(module, dict(params), args, keywords)
        if curvature is not None:
            _warn_of_autocast(params)
            if any(isinstance(layer, nn.MultiheadAttention) for layer in module.modules()):
                _announce_plain_attention()
            stack.enter_context(differentiable_layers(module))
            stack.enter_context(_without_reentrant_checkpoints(module))
            if curvature.write_buffers:
                stack.enter_context(_noted_if_written(module))
                return torch.func.functional_call(module, dict(params), args, keywords)
            stack.enter_context(_without_running_statistics(module))
        read = [(name, buffer) for name, buffer in module.named_buffers() if name not in params]
        if curvature is not None and curvature.notes is not None:
            curvature.notes.note(read)
        copies = {name: buffer.detach().clone() for name, buffer in read}
        given = {name: tensor.clone() if name in buffers else tensor for name, tensor in params.items()}
        return torch.func.functional_call(module, {**copies, **given}, args, keywords)


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in train or eval mode; afterwards every layer has its own mode back."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def training_autocast(device_type: str, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """`torch.autocast` in the passes of training steps, and none in the passes of a hypergradient.

    For objectives of mixed precision: their first derivatives in steps are cheap, while second derivatives, on which a
    linear solve builds, stay in the variables' own precision.

    Args:
        device_type: as for torch.autocast, for example "cuda".
        dtype: of the casts. float16 needs a scaled loss, which no step here has: bfloat16.
    """
    casts = _casts.get()
    if casts is not None and not in_curvature_pass():
        casts.add(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=not in_curvature_pass())


def _is_cast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _warn_of_autocast(params: Mapping[str, Tensor]) -> None:
    for device in {tensor.device.type for tensor in params.values()}:
        if _is_cast(device):
            warnings.warn(
                f"autocast ({torch.get_autocast_dtype(device)}) is on in a pass of a hypergradient, whose second "
                "derivatives then have its precision; write `with bilevel.nn.training_autocast(device_type)` in the "
                "objective, which leaves these passes in the variables' own",
                stacklevel=3,
            )


@cache
def _announce_plain_attention() -> None:
    """The cache lets it speak once."""
    logging.getLogger("bilevel").info(
        "attention takes torch's plain (MATH) kernel in the passes of a hypergradient: the fused kernels have no "
        "second derivative; training passes keep them"
    )


@contextmanager
def _without_running_statistics(module: nn.Module) -> Iterator[None]:
    """Normalisation layers in train mode lose their running statistics inside, and get the same objects back."""
    saved = []
    for layer in module.modules():
        if isinstance(layer, _NORM_LAYERS) and layer.training and layer.track_running_stats:
            saved.append((layer, layer.running_mean, layer.running_var, layer.num_batches_tracked))
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, mean, variance, count in saved:
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, variance, count
            layer.track_running_stats = True


@contextmanager
def _without_reentrant_checkpoints(module: nn.Module) -> Iterator[None]:
    """Refuses the kind of checkpointing that needs no saved-tensor hook: it cuts the parameters out of the graph."""

    def check(layer: nn.Module, args: Any) -> None:
        frame = None if torch.is_grad_enabled() else inspect.currentframe()
        while frame is not None:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise RuntimeError(_CHECKPOINT_REMEDY)
            frame = frame.f_back

    with ExitStack() as stack:
        if torch.is_grad_enabled():
            for layer in module.modules():
                stack.callback(layer.register_forward_pre_hook(check).remove)
        yield


def _refuse_wrappers(module: nn.Module, curvature: bool) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "functional_call: the module is wrapped in DistributedDataParallel, whose hooks do not run twice; "
                "pass the bare module (wrapper.module): gradients and products are averaged over ranks by bilevel"
            )
        if _is_fully_sharded(layer):
            raise TypeError(
                f"functional_call: {type(layer).__name__} is a module of FSDP (fully_shard, FullyShardedDataParallel), "
                "which computes with the parameters that it gathers itself, once differentiable, whatever it is called "
                "with; pass the module from before, with parameters that are whole on every rank"
            )
        if not curvature:
            continue
        refuse_layer(layer, module)
        # torch.compile's wrapper has no public type: it keeps the bare module as the child `_orig_mod`, and
        # Module.compile() its call in `_compiled_call_impl`.
        if "_orig_mod" in layer._modules or layer._compiled_call_impl is not None:
            raise TypeError(
                "functional_call: a compiled module does not support double backward; pass the module from before "
                "torch.compile in the objectives that a hypergradient differentiates"
            )
        torchs = isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, SyncBatchNorm)
        if torchs and layer.training and world_size() > 1:
            raise TypeError(
                "functional_call: torch's SyncBatchNorm has no double backward; build the module with BatchNorm "
                "and call bilevel.nn.synchronised(module), whose layers have one, or put the layer in "
                "eval mode"
            )


def _is_fully_sharded(layer: nn.Module) -> bool:
    """Nothing is imported: without FSDP's module there is none of its layers."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(layer, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
