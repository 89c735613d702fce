"""What is told of a pickle without making its objects: every protocol, damage, and pickles that are out to harm."""

import argparse
import collections
import contextlib
import io
import pickle
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.vision.networks import pickle_outline
from recipes.vision.networks.pickle_outline import Unmade, outline

VALUES: dict[str, Any] = {
    "numbers": [0, 1, -1, 255, 65536, 2**40, -(2**80), 0.5, True, False, None],
    "text": {"a": "b" * 300, "long": "c" * 70000, "none": ""},
    "nested": {"a": {"b": [{"c": (1,)}, (1, 2), (1, 2, 3), (1, 2, 3, 4), ()]}},
    "shared": [(shared := {"x": 1}), shared, shared],
    "ordered": collections.OrderedDict(a=1, b=collections.OrderedDict()),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", VALUES)
def test_plain_values_are_told_as_they_are(kind: str, protocol: int) -> None:
    value = VALUES[kind]
    assert outline(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_objects_are_named_and_not_made(protocol: int) -> None:
    values = {"args": argparse.Namespace(lr=1), "layer": nn.Linear(1, 1), "counts": collections.Counter("aab")}
    found = outline(pickle.dumps(values, protocol))
    names = [value.name for value in found.values()]
    assert names == ["argparse.Namespace", "torch.nn.modules.linear.Linear", "collections.Counter"]
    assert [value.is_module for value in found.values()] == [False, True, False]
    assert found["args"].state == {"lr": 1}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_told_from_other_objects(zipped: bool) -> None:
    values = {
        "plain": torch.ones(2),
        "half": torch.ones(2, dtype=torch.float16),
        "parameter": nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(),
        "storage": torch.ones(2).untyped_storage(),
        "number": 3,
    }
    stored = io.BytesIO()
    torch.save(values, stored, _use_new_zipfile_serialization=zipped)
    found = outline(stored.getvalue())
    tensors = [key for key, value in found.items() if isinstance(value, Unmade) and value.is_tensor]
    assert tensors == ["plain", "half", "parameter", "sparse"]


class Harmful:
    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_that_a_file_names_is_called_or_imported(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    harm = {"a": Harmful(exec, "open('harm', 'w')"), "b": Harmful(Path.touch, Path("harm")), "c": torch.nn.Linear(1, 1)}
    found = outline(pickle.dumps(harm, protocol))
    assert all(isinstance(value, Unmade) for value in found.values())
    assert outline(b"cnowhere_to_be_found\nattribute\n(S'x'\ntR.").name == "nowhere_to_be_found.attribute"
    assert outline(b"(S'x'\nios\nsystem\n.").name == "os.system"
    assert not list(tmp_path.iterdir())


BOMBS = {
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes": b"\x80\x05\x8e" + (2**62).to_bytes(8, "little") + b".",
    "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "frame": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "depth": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_few_bytes_cost_no_more(kind: str) -> None:
    """An instruction with a huge number, or very many of them: told, or refused, in the memory of the file."""
    with contextlib.suppress(ValueError):
        outline(BOMBS[kind])


def test_long_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_outline, "MOST_BYTES", 1000)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 10_000 + b".")
    for content in (pickle.dumps(list(range(1000))), zipped.getvalue()):
        with pytest.raises(ValueError, match="too long to be gone through"):
            outline(content)


def test_damage_is_a_value_error_whatever_it_is() -> None:
    stored = io.BytesIO()
    torch.save({"model": nn.Linear(2, 2), "args": argparse.Namespace(a=[1])}, stored)
    contents = [stored.getvalue(), pickle.dumps({"a": [1, (2, 3)], "b": argparse.Namespace(x=1)}, 4)]
    for content in contents:
        for number in range(300):
            draw = random.Random(number)
            changed = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            with contextlib.suppress(ValueError):
                outline(bytes(changed[: draw.randint(0, len(changed))] if number % 3 == 0 else changed))
    for nothing in (b"", b".", b"\x80", b"PK\x03\x04", b"\0" * 50):
        with pytest.raises(ValueError, match="no file of torch"):
            outline(nothing)


def test_every_instruction_is_known() -> None:
    """Those that are not named push their argument; none that has another effect may be missing."""
    pushing = {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE"),
        *("BINUNICODE", "BINUNICODE8", "NEXT_BUFFER"),
    }
    named = {*pickle_outline._EMPTY, *pickle_outline._PLAIN, *pickle_outline._FROM_MARK}
    elsewhere = {*("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"), "GLOBAL", "INST"}
    assert {*pushing, *named, *elsewhere, "PROTO", "FRAME", "STOP"} == {code.name for code in pickletools.opcodes}
