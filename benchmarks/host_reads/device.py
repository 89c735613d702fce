"""A simulated device: tensors that are not on the CPU, have their numbers all the same, and count what crosses over.

torch's meta device keeps no numbers, and whatever reads one ends there. Here tensors of the meta device carry theirs
in a CPU tensor behind them: all operations, autograd and `torch.func` included, run as they would on an accelerator,
adaptive ones too, and whatever an accelerator would have to wait for or refuse is seen.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from unittest.mock import patch
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from bilevel import tree

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = tuple(f"{_ROOT / package}/" for package in ("bilevel", "recipes"))
# By name: an environment may lie inside the checkout too.
_CALLERS = tuple(f"{_ROOT / folder}/" for folder in ("benchmarks", "examples", "tests"))
_DEVICE, _CPU = torch.device("meta"), torch.device("cpu")
_NUMBERS = (torch.float64, torch.int64, torch.bool, torch.complex128)
"""Dtypes in which Python's numbers come into operations, as 0-d tensors of the CPU."""
_MASKS = (torch.bool, torch.uint8)
_WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class DeviceError(RuntimeError):
    """An operation whose tensors are of two devices."""


class DeviceTensor(Tensor):
    """A tensor of the meta device with its numbers in a tensor of the CPU."""

    numbers: Tensor
    is_meta = False  # pyright: ignore[reportAssignmentType]
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=_DEVICE,
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a simulated device outside of `with SimulatedDevice()`")

    def __repr__(self, **options: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()


_torch_autocast = torch.autocast


def _autocast(device_type: str, **options: Any) -> AbstractContextManager[Any]:
    """torch knows of no autocast of the meta device."""
    return nullcontext() if device_type == _DEVICE.type else _torch_autocast(device_type, **options)


class _Generator(torch.Generator):
    """A generator of the device draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


@dataclass(frozen=True)
class Crossing:
    """Something that a device path should do without, or do rarely.

    Attributes:
        kind: "read", the host waits for numbers of the device; "copy", numbers of the host go to the device; "made", a
            tensor of the CPU is made.
        operation: of torch.
        place: file and line of this repository's packages.
    """

    kind: str
    operation: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation} at {self.place}"


@final
class SimulatedDevice(TorchDispatchMode):
    """Inside ``with``, what `put` has put on the device is calculated with, and `crossings` grows.

    Operations on tensors of the device and of the CPU together raise `DeviceError`; a number of Python's is no tensor.

    Args:
        float64: whether the device has it; without, an operation that makes numbers of it there raises TypeError.
    """

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.crossings: list[Crossing] = []
        self._host: dict[int, ref[Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SimulatedDevice":
        for name in ("tensor", "as_tensor"):
            self._stack.enter_context(patch.object(torch, name, self._from_data(getattr(torch, name))))
        self._stack.enter_context(patch.object(torch, "Generator", _Generator))
        self._stack.enter_context(patch.object(torch, "autocast", _autocast))
        if not self.float64:
            self._stack.enter_context(patch.object(tree, "widest", _widest))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._stack.close()

    def put(self, given: Any) -> Any:
        """A copy on the device of a tensor, a module or a structure of tensors; modules are moved themselves."""
        if isinstance(given, nn.Module):
            for module in given.modules():
                for name, own in module._parameters.items():
                    if own is not None:
                        module._parameters[name] = nn.Parameter(self.put(own), own.requires_grad)
                for name, own in module._buffers.items():
                    module._buffers[name] = None if own is None else self.put(own)
            return given
        with _disable_current_modes():
            return tree_map(lambda x: DeviceTensor(x.detach().clone()) if isinstance(x, Tensor) else x, given)

    def count(self, kind: str = "read") -> int:
        """How many crossings of a kind there were so far."""
        return sum(crossing.kind == kind for crossing in self.crossings)

    @contextmanager
    def watched(self) -> Iterator[list[Crossing]]:
        """Gives a list that holds, afterwards, the crossings inside."""
        before, inside = len(self.crossings), []
        yield inside
        inside += self.crossings[before:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        there = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        target = kwargs.get("device")
        if not here and target != _DEVICE:
            return self._on_host(func, args, kwargs, there)
        name = func._schema.name.removeprefix("aten::")
        copies = name in ("_to_copy", "copy_")
        down = bool(here) and copies and (target == _CPU or (name == "copy_" and not isinstance(args[0], DeviceTensor)))
        if down or _reads(func, name, args):
            self._add("read", name)
        elif there and copies:
            self._add("copy", name)
        elif any(self._is_tensor(tensor) for tensor in there):
            raise DeviceError(f"{name} takes tensors of the device and of the CPU at {_place()}")
        if name == "_efficientzerotensor":
            # It has no memory, which only torch's own dispatch knows to leave alone.
            func = torch.ops.aten.zeros.default
        if target == _DEVICE:
            kwargs = {**kwargs, "device": _CPU}
        args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, DeviceTensor) else x, (args, kwargs))
        found = func(*args, **kwargs)
        if down:
            return self._noted(found)
        # What is written in place is the tensor that was given.
        given = {id(tensor.numbers): tensor for tensor in here}
        return tree_map(lambda x: given[id(x)] if id(x) in given else self._wrapped(x, name), found)

    def _on_host(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """An operation of the CPU alone."""
        name, found = func._schema.name.removeprefix("aten::"), func(*args, **kwargs)
        if (not tensors or name == "lift_fresh") and any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
            self._add("made", name)
        return self._noted(found)

    def _noted(self, found: Any) -> Any:
        """Keeps in mind the tensors of the CPU that come about."""
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._host[id(leaf)] = ref(leaf)
        return found

    def _wrapped(self, value: Any, name: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64 and not self.float64:
            raise TypeError(f"{name} makes float64 on a device that has none at {_place()}")
        return DeviceTensor(value)

    def _is_tensor(self, tensor: Tensor) -> bool:
        """Whether a tensor of the CPU is more than a number of Python's in an operation."""
        known = self._host.get(id(tensor))
        return tensor.dim() > 0 or tensor.dtype not in _NUMBERS or (known is not None and known() is tensor)

    def _from_data(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`torch.tensor` and the like, which make no numbers on the meta device."""

        def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
            if device is None or torch.device(device) != _DEVICE:
                return make(data, *args, device=device, **options)
            return make(data, *args, **options).to(_DEVICE)

        return made

    def _add(self, kind: str, operation: str) -> None:
        self.crossings.append(Crossing(kind, operation, _place()))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device == _DEVICE else torch.float64


def _reads(func: Any, name: str, args: Any) -> bool:
    """Whether the host must know numbers of the device to go on."""
    if name.startswith("index"):
        # With a mask it takes places that have to be found first.
        return len(args) > 1 and any(isinstance(i, Tensor) and i.dtype in _MASKS for i in tree_leaves(args[1]))
    return name == "_linalg_check_errors" or any(tag in func.tags for tag in _WAITING)


def _place() -> str:
    """Where in the packages of this repository, or in the file that calls them, the operation comes from."""
    frame = sys._getframe(1)
    caller = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGES):
            return f"{Path(file).relative_to(_ROOT)}:{frame.f_lineno}"
        if caller == "?" and file.startswith(_CALLERS) and file != __file__:
            caller = f"{Path(file).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return caller
