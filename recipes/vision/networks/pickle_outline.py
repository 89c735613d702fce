"""What a file of torch.save holds, told without making any object of it."""

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 64 * 2**20
"""Of a table of objects, tensors' numbers left out, that is gone through."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MARK = object()
_MAPPINGS = {"builtins.dict", "collections.OrderedDict", "collections.defaultdict"}


@dataclass(eq=False)
class Unmade:
    """An object that the file asks to be made, and that is not.

    Attributes:
        name: of its class or function, with the module.
        state: what it would be given to restore itself from.
    """

    name: str
    state: Any = None

    @property
    def is_tensor(self) -> bool:
        """Whether torch makes a tensor or parameter of it."""
        module, _, function = self.name.rpartition(".")
        return module.partition(".")[0] == "torch" and function.startswith("_rebuild_")

    @property
    def is_module(self) -> bool:
        """Whether it is an ``nn.Module``, by what it restores itself from."""
        return isinstance(self.state, dict) and {"_modules", "_parameters"} <= self.state.keys()


def outline(content: bytes) -> Any:
    """The object in the bytes of a file of torch.save, of either format: mappings, lists, numbers, text, `Unmade`.

    The instructions of the pickle are followed on a stack of plain values; none of them calls or names anything.

    Raises:
        ValueError: they are no such file, or longer than `MOST_BYTES`.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            return _follow(io.BytesIO(_objects(content)))
        stream = io.BytesIO(content)
        # The older format begins with a number that marks it, its version, and the machine's properties.
        first = _follow(stream)
        return [_follow(stream) for _ in range(3)][-1] if first == _LEGACY_MAGIC else first
    except Exception as error:
        # Whatever bytes that are no such file make the readers stumble over.
        raise ValueError(f"no file of torch.save ({error})") from error


def _objects(content: bytes) -> bytes:
    """The pickle in the archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (record,) = (record for record in archive.infolist() if record.filename.endswith("data.pkl"))
        if record.file_size > MOST_BYTES:
            raise ValueError("too long to be gone through")
        return archive.read(record)


def _follow(stream: io.BytesIO) -> Any:
    """The object of the next pickle in `stream`."""
    start = stream.tell()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(stream):
        if stream.tell() - start > MOST_BYTES:
            raise ValueError("too long to be gone through")
        _do(operation.name, argument, stack, memo)
    return stack.pop()


def _do(operation: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction."""
    if operation in _FROM_MARK:
        _FROM_MARK[operation](stack, _since_mark(stack))
    elif operation in _PLAIN:
        _PLAIN[operation](stack)
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif operation == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif operation == "GLOBAL":
        stack.append(Unmade(argument.replace(" ", ".")))
    elif operation == "INST":
        _since_mark(stack)
        stack.append(Unmade(argument.replace(" ", ".")))
    elif operation not in ("PROTO", "FRAME", "STOP"):
        # Without an empty value of its own: a number, text or bytes.
        stack.append(_EMPTY[operation]() if operation in _EMPTY else argument)


def _since_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _set(target: Any, values: list[Any]) -> None:
    if isinstance(target, dict):
        pairs = zip(values[::2], values[1::2], strict=True)
        target.update({key if isinstance(key, (str, int)) else id(key): value for key, value in pairs})


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)


def _made(stack: list[Any], count: int) -> None:
    """What a call would give: `count` values, the first of which is called."""
    called = stack[-count]
    del stack[-count:]
    name = called.name if isinstance(called, Unmade) else type(called).__name__
    stack.append({} if name in _MAPPINGS else Unmade(name))


def _restore(stack: list[Any]) -> None:
    state = stack.pop()
    if isinstance(stack[-1], Unmade):
        stack[-1].state = state


def _name(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(Unmade(f"{module}.{name}"))


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def make(stack: list[Any]) -> None:
        values = tuple(stack[-count:])
        del stack[-count:]
        stack.append(values)

    return make


def _dictionary(stack: list[Any], values: list[Any]) -> None:
    made: dict[Any, Any] = {}
    _set(made, values)
    stack.append(made)


def _set_one(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set(stack[-1], [key, value])


def _append_one(stack: list[Any]) -> None:
    value = stack.pop()
    _extend(stack[-1], [value])


def _persistent(stack: list[Any]) -> None:
    # Numbers of a tensor; a whole module in the older format.
    known = stack.pop()
    is_module = isinstance(known, tuple) and known[:1] == ("module",)
    stack.append(known[1] if is_module else Unmade("a storage"))


_EMPTY: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list},
    **{"PERSID": lambda: Unmade("a storage"), "EXT1": lambda: Unmade("an extension")},
    **{"EXT2": lambda: Unmade("an extension"), "EXT4": lambda: Unmade("an extension")},
}
_PLAIN: dict[str, Callable[[list[Any]], Any]] = {
    "POP": lambda stack: stack.pop(),
    "DUP": lambda stack: stack.append(stack[-1]),
    **{"TUPLE1": _tuple(1), "TUPLE2": _tuple(2), "TUPLE3": _tuple(3)},
    **{"SETITEM": _set_one, "APPEND": _append_one, "BUILD": _restore, "STACK_GLOBAL": _name},
    **{"REDUCE": lambda stack: _made(stack, 2), "NEWOBJ": lambda stack: _made(stack, 2)},
    **{"NEWOBJ_EX": lambda stack: _made(stack, 3), "BINPERSID": _persistent, "READONLY_BUFFER": lambda stack: None},
}
_FROM_MARK: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "POP_MARK": lambda stack, values: None,
    "TUPLE": lambda stack, values: stack.append(tuple(values)),
    "LIST": lambda stack, values: stack.append(values),
    "FROZENSET": lambda stack, values: stack.append(values),
    "DICT": _dictionary,
    "SETITEMS": lambda stack, values: _set(stack[-1], values),
    "APPENDS": lambda stack, values: _extend(stack[-1], values),
    "ADDITEMS": lambda stack, values: _extend(stack[-1], values),
    "OBJ": lambda stack, values: stack.append(Unmade(getattr(values[0], "name", "an object"))),
}
