"""Arithmetic on `Params`: a dictionary of tensors treated as one vector.

Functions return new dictionaries and never write to their arguments. Both arguments of a binary operation must have the
same keys. Arithmetic runs on torch's foreach operations, one fused call for all leaves where the backend has one; inner
products, and products with a 0-d tensor, run leaf by leaf.

Leaves may be DTensors of torch.distributed.tensor: vectors stay sharded, and what is one number (an inner product, a
norm, a truth value) is that of the whole vector, a plain tensor on every rank.
"""

# torch has no public name for its foreach operations.
# pyright: reportPrivateImportUsage=false

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from bilevel import sharded
from bilevel.sharded import check_whole, whole

Params = dict[str, Tensor]
"""Named tensors. The names are the caller's; the order of insertion is the order of every operation."""

_WIDE, _SHORT = (torch.float32, torch.float64), 2.0**-30
"""Trees of these dtypes and of a length between this and its inverse have squares in the dtype's range."""

Scalar = float | Tensor | Mapping[str, Tensor]
"""One coefficient for the whole tree, or one per leaf (layer-wise methods)."""


def zeros_like(x: Params) -> Params:
    """Zeros with the shapes, dtypes and devices of `x`."""
    return {name: torch.zeros_like(leaf) for name, leaf in x.items()}


def axpy(alpha: Scalar, x: Params, y: Params) -> Params:
    """``alpha * x + y``; `alpha` is a number, a 0-d tensor or one 0-d tensor per leaf."""
    if not x:
        return {}
    scaled = scale(alpha, x)
    return dict(zip(x, torch._foreach_add(list(scaled.values()), _values(y, x)), strict=True))


def where(flag: Tensor, x: Params, y: Params) -> Params:
    """x where the 0-d `flag` is true, else y; nothing is read from the device."""
    return {name: torch.where(flag, leaf, y[name]) for name, leaf in x.items()}


def scale(alpha: Scalar, x: Params) -> Params:
    """``alpha * x``; `alpha` as in `axpy`."""
    if not x:
        return {}
    leaves = list(x.values())
    if isinstance(alpha, Mapping):
        return dict(zip(x, torch._foreach_mul(leaves, [alpha[name] for name in x]), strict=True))
    if isinstance(alpha, Tensor):
        # The foreach product with a tensor has no derivative with respect to it. A 0-d leaf takes on a wider dtype.
        return {name: (leaf * alpha).to(leaf.dtype) for name, leaf in x.items()}
    return dict(zip(x, torch._foreach_mul(leaves, alpha), strict=True))


def add(x: Params, y: Params) -> Params:
    """``x + y``."""
    return dict(zip(x, torch._foreach_add(list(x.values()), _values(y, x)), strict=True)) if x else {}


def sub(x: Params, y: Params) -> Params:
    """``x - y``."""
    return dict(zip(x, torch._foreach_sub(list(x.values()), _values(y, x)), strict=True)) if x else {}


def leaf_dots(x: Params, y: Params) -> Params:
    """Inner product of each pair of leaves, as 0-d tensors."""
    return {name: whole(sharded.dot(leaf, y[name])) for name, leaf in x.items()}


def dot(x: Params, y: Params) -> Tensor:
    """Inner product over all leaves, 0-d; an empty tree gives 0."""
    if not x:
        return torch.zeros(())
    dots = [sharded.dot(leaf, y[name]) for name, leaf in x.items()]
    return whole(torch.stack(dots).sum() if len(dots) > 1 else dots[0])


def norm(x: Params) -> Tensor:
    """Euclidean norm over all leaves, 0-d."""
    norms = list(torch._foreach_norm(list(x.values()))) if x else [torch.zeros(())]
    return whole(torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0])


def power_of_two(x: Params) -> float:
    """The power of two at or next below ``||x||``; 0 where x = 0, NaN where an entry is not finite.

    Division by it is exact, and the squares of the quotient neither over- nor underflow. It is kept where both it and
    its inverse are normal numbers of every leaf's dtype, so that subnormal x may come out shorter than 1 and x near
    the largest number longer than 2.
    """
    leaves = [leaf for leaf in x.values() if leaf.numel()]
    if all(leaf.dtype in _WIDE for leaf in leaves):
        size = float(norm(x))
        if _SHORT <= size <= 1.0 / _SHORT:
            return 2.0 ** (math.frexp(size)[1] - 1)
    largest = float(whole(torch.stack(torch._foreach_norm(leaves, math.inf)).max())) if leaves else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 0.0 if largest == 0.0 else math.nan
    limit = min(math.frexp(torch.finfo(leaf.dtype).max)[1] for leaf in leaves) - 2
    coarse = min(max(math.frexp(largest)[1], -limit), limit)
    fine = coarse + math.frexp(float(norm(scale(2.0**-coarse, x))))[1] - 1
    return 2.0 ** min(max(fine, -limit), limit)


def finite(x: Params) -> Tensor:
    """Whether no leaf holds a NaN or an infinity, 0-d; nothing is read from the device."""
    found = [torch.isfinite(leaf).all() for leaf in x.values()] or [torch.ones((), dtype=torch.bool)]
    return whole(torch.stack(found).all() if len(found) > 1 else found[0])


def all_finite(x: Params) -> bool:
    """Whether no leaf holds a NaN or an infinity."""
    # One number tells, unless the squares overflow.
    return math.isfinite(norm(x).detach()) or bool(finite(x))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no wider numbers, such as those of Apple (MPS)."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in the widest dtype of its device."""
    return x.to(widest(x.device))


def read(*scalars: Tensor) -> list[float]:
    """The numbers of 0-d tensors, in one transfer from the device of the first."""
    first = scalars[0]
    return torch.stack([scalar.detach().to(first.device) for scalar in scalars]).tolist()


def size(x: Params) -> int:
    """Number of entries over all leaves."""
    return sum(leaf.numel() for leaf in x.values())


def flatten(x: Params) -> Tensor:
    """All leaves as one vector, in the order of insertion; TypeError for DTensors."""
    check_whole(x)
    return torch.cat([leaf.reshape(-1) for leaf in x.values()]) if x else torch.zeros(0)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Inverse of `flatten` for the shapes and dtypes of `like`."""
    parts = torch.split(vector, [leaf.numel() for leaf in like.values()])
    pairs = zip(like.items(), parts, strict=True)
    return {name: part.reshape(leaf.shape).to(leaf.dtype) for (name, leaf), part in pairs}


def detach(x: Params) -> Params:
    """The same storage without autograd history."""
    return {name: leaf.detach() for name, leaf in x.items()}


def as_variables(x: Params) -> Params:
    """The same storage as fresh leaf tensors that require gradients."""
    return {name: leaf.detach().requires_grad_() for name, leaf in x.items()}


def gradients(loss: Tensor, wrt: Params, *, create_graph: bool = False, retain_graph: bool | None = None) -> Params:
    """Gradient of a 0-d `loss`; variables that the loss does not use get zeros."""
    return joint_gradients(loss, [wrt], create_graph=create_graph, retain_graph=retain_graph)[0]


def joint_gradients(
    loss: Tensor, wrt: Sequence[Params], *, create_graph: bool = False, retain_graph: bool | None = None
) -> tuple[Params, ...]:
    """`gradients` with respect to several trees, one for each of `wrt`, by one backward pass."""
    return _backward([loss] if loss.requires_grad else [], None, wrt, retain_graph, create_graph)


def pullback(
    outputs: Params,
    vector: Params,
    wrt: Sequence[Params],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Params, ...]:
    """``d <outputs, vector> / d wrt``, one tree for each of `wrt`; variables that the outputs do not use get zeros.

    `vector` has at least the names of `outputs`. Outputs without a graph contribute nothing.
    """
    live = [name for name, leaf in outputs.items() if leaf.requires_grad]
    along = [vector[name] for name in live]
    return _backward([outputs[name] for name in live], along, wrt, retain_graph or create_graph, create_graph)


def _backward(
    outputs: Sequence[Tensor],
    vector: Sequence[Tensor] | None,
    wrt: Sequence[Params],
    retain_graph: bool | None,
    create_graph: bool,
) -> tuple[Params, ...]:
    """One backward pass from outputs with a graph; zeros where there are none."""
    inputs = [leaf for variables in wrt for leaf in variables.values()]
    if not outputs or not inputs:
        return tuple(map(zeros_like, wrt))
    found = iter(torch.autograd.grad(outputs, inputs, vector, retain_graph, create_graph, allow_unused=True))

    def dense(leaf: Tensor) -> Tensor:
        gradient = next(found)
        if gradient is None:
            return torch.zeros_like(leaf, requires_grad=create_graph)
        # Those of a sparse embedding's weight are sparse, which the arithmetic here does not take.
        return gradient if gradient.layout is torch.strided else gradient.to_dense()

    return tuple([{name: dense(leaf) for name, leaf in variables.items()} for variables in wrt])


def tensors_in(batch: object) -> Iterator[Tensor]:
    """Every tensor inside nested dictionaries, lists, tuples and dataclasses, in a fixed order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors_in(item)
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors_in(item)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_in(getattr(batch, field.name))


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same structure with `function` of each of `tensors_in`; mappings that are no dicts become dicts.

    Dataclasses are made anew from the fields that their constructor takes, and compute the others again.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(function, item) for key, item in batch.items()}
        if type(batch) is dict or not isinstance(batch, dict):
            return items
        # A kind of dict may have more than its items: attributes, a default.
        same = copy.copy(batch)
        for key, item in items.items():
            same[key] = item
        return same
    if isinstance(batch, (list, tuple)):
        # A named tuple's own constructor takes its fields one by one.
        make = getattr(batch, "_make", type(batch))
        return make([map_tensors(function, item) for item in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        taken = [field.name for field in fields(batch) if field.init]
        return replace(batch, **{name: map_tensors(function, getattr(batch, name)) for name in taken})
    return batch


def check_params(argument: str, value: object, *, may_be_sharded: bool = False) -> None:
    """Raise TypeError unless `value` is a dictionary of named, dense floating-point tensors that can be differentiated.

    Refused with them: tensors made under torch.inference_mode, and those of a torch.func transform (vmap, grad, jvp)
    or of forward-mode differentiation around the call, whose outer derivative would be lost; and DTensors, unless they
    may be sharded.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{argument} must be a dict of named tensors (Params), got {type(value).__name__}")
    for name, leaf in value.items():
        if not isinstance(name, str) or not isinstance(leaf, Tensor):
            raise TypeError(f"{argument}[{name!r}] must be a tensor under a string name, got {type(leaf).__name__}")
        if not may_be_sharded:
            sharded.check_variable(f"{argument}[{name!r}]", leaf)
        _check_storage(f"{argument}[{name!r}]", leaf)
        check_plain(f"{argument}[{name!r}]", leaf)


def _check_storage(argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is dense, of floating-point numbers that torch calculates with."""
    if is_lazy(tensor):
        raise TypeError(f"{argument} has no shape yet: it is of a lazy module; call the module once on a batch first")
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(
            f"{argument} must be a dense tensor, got {layout}; take its to_dense(), or the tensor of its values, and "
            "build the other from it in the objectives"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{argument} must be real floating point, got {tensor.dtype}; convert it first")
    if tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{argument} must have at least 16 bits a number, got {tensor.dtype}, in which torch does not calculate; "
            "keep the variable in float32 and convert it in the objectives"
        )


def check_plain(argument: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor of inference mode, of a torch.func transform or of forward-mode differentiation."""
    if tensor.is_inference():
        raise TypeError(
            f"{argument} was made under torch.inference_mode, where nothing can be differentiated; pass its clone() "
            "made outside of it, or make it under torch.no_grad"
        )
    if torch.func.debug_unwrap(tensor) is not tensor or forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{argument} belongs to a torch.func transform (vmap, grad, jacrev, jvp) or to forward-mode "
            "differentiation around this call, which gives plain numbers that nothing differentiates or batches "
            "further; call it in a loop, once a sample or direction, or state the outer problem as a Problem"
        )


def overlapping(variables: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two strided tensors that have an element in common, None where all are apart.

    Views of one buffer are told apart by the bytes that they really cover.
    """
    met: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in variables:
        # Tensors without memory (of the meta device) are the same where they are the same object.
        storage = tensor.untyped_storage().data_ptr() or -id(tensor)
        for other, former in met.setdefault(storage, []):
            if tensor is former or _share_bytes(tensor, former):
                return other, name
        met[storage].append((name, tensor))
    return None


def overlaps_itself(x: Tensor) -> bool:
    """Whether two entries of a strided tensor are the same memory."""
    axes = sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1)
    if x.numel() == 0 or any(step == 0 for step, _ in axes):
        return x.numel() > 0
    reach = 0
    for step, n in axes:
        if step <= reach:
            break
        reach += step * (n - 1)
    else:
        return False
    first, last = _span(x)
    covered = torch.zeros(last - first, dtype=torch.bool)
    _bytes_of(x, covered, first).fill_(True)
    return int(covered.sum()) < x.numel() * x.element_size()


def _share_bytes(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one storage cover a byte in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (first, last), (start, end) = _span(x), _span(y)
    low, high = max(first, start), min(last, end)
    if low >= high:
        return False
    if _is_dense(x) and _is_dense(y):
        return True
    base = min(first, start)
    covered = torch.zeros(max(last, end) - base, dtype=torch.bool)
    _bytes_of(x, covered, base).fill_(True)
    return bool(_bytes_of(y, covered, base).any())


def _span(x: Tensor) -> tuple[int, int]:
    """First byte of the storage that a tensor covers, and the one after its last."""
    last = int(x.storage_offset()) + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset()) * x.element_size(), (int(last) + 1) * x.element_size()


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor covers its span without a gap."""
    first, last = _span(x)
    return last - first == x.numel() * x.element_size()


def _bytes_of(x: Tensor, covered: Tensor, base: int) -> Tensor:
    """The entries of `covered`, one a byte from `base` on, that belong to a tensor."""
    size = x.element_size()
    strides = [step * size for step in x.stride()]
    return covered.as_strided([*x.shape, size], [*strides, 1], x.storage_offset() * size - base)


def _values(x: Params, order: Iterable[str]) -> list[Tensor]:
    return [x[name] for name in order]
