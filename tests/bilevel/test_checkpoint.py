"""Checkpoints: whole or not there, verified, and safe to load."""

import hashlib
import json
import os
import pickle
import random
import re
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import Level
from bilevel.checkpoint import (
    CheckpointError,
    load_checkpoint,
    lost_generators,
    random_state,
    save_checkpoint,
    set_random_state,
    write_atomic,
)
from bilevel.training import SingleLevelTrainer, gradient_of


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((3,), value), "nested": [{"a": (1, None, "x")}, torch.tensor(2, dtype=torch.int64)]}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    path = save_checkpoint(folder, 7, state(1.5))
    assert path == folder / "step-00000007.pt"
    loaded = load_checkpoint(str(folder))
    assert loaded is not None
    step, content = loaded
    assert step == 7
    assert torch.equal(content["w"], torch.full((3,), 1.5))
    assert content["nested"][0] == {"a": (1, None, "x")}
    assert content["nested"][1].dtype == torch.int64
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize(("keep", "steps"), [(1, [9]), (2, [5, 9]), (3, [3, 5, 9])])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int, steps: list[int]) -> None:
    for step in (1, 3, 5, 9):
        save_checkpoint(tmp_path, step, state(step), keep=keep)
    assert files(tmp_path) == sorted(f"step-{step:08d}.{end}" for step in steps for end in ("pt", "json"))


def test_a_save_never_deletes_what_it_has_just_written(tmp_path: Path) -> None:
    for step in (100, 200):
        save_checkpoint(tmp_path, step, state(step))
    path = save_checkpoint(tmp_path, 1, state(1))
    assert path.exists()
    assert files(tmp_path) == [f"step-{step:08d}.{end}" for step in (1, 200) for end in ("json", "pt")]


def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_checkpoint: keep"):
        save_checkpoint(tmp_path, 1, state(1), keep=0)


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        for step in (1, 2):
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(tmp_path, step, state(step + 1))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == 1


def test_a_checkpoint_without_its_manifest_was_never_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    real = os.replace

    def only_the_first(source: Any, target: Any) -> None:
        if str(target).endswith(".json"):
            raise OSError("power cut")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_the_first)
        with pytest.raises(OSError, match="power cut"):
            save_checkpoint(tmp_path, 2, state(2))
    assert (tmp_path / "step-00000002.pt").exists()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def spoil_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, spoil_manifest, lose])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, damage: Any) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    damage(save_checkpoint(tmp_path, 2, state(2)))
    with pytest.warns(UserWarning, match=r"step-00000002\.pt .*using step 1 instead"):
        loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == 1
    assert torch.equal(loaded[1]["w"], torch.ones(3))


def test_nothing_but_damage_is_an_error_that_names_all(tmp_path: Path) -> None:
    truncate(save_checkpoint(tmp_path, 1, state(1)))
    flip(save_checkpoint(tmp_path, 2, state(2)))
    with pytest.raises(CheckpointError, match=r"step-00000002\.pt.*step-00000001\.pt.*no usable checkpoint is left"):
        load_checkpoint(tmp_path)


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, 3, {"payload": Payload()})
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt holds something else than tensors"):
        load_checkpoint(tmp_path)
    plain = pickle.dumps(Payload(), protocol=2)
    path = save_checkpoint(tmp_path, 4, state(4))
    path.write_bytes(plain)
    manifest = {"step": 4, "size": len(plain), "sha256": hashlib.sha256(plain).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt holds something else"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def draws() -> tuple[Any, ...]:
    return (torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1))


def test_random_state_round_trip_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    # An odd number of normal draws leaves a second one waiting in numpy and in Python.
    np.random.randn()
    random.gauss(0, 1)
    save_checkpoint(tmp_path, 0, {"random": random_state()})
    expected = draws()
    draws()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    set_random_state(loaded[1]["random"])
    assert draws() == expected


class Devices:
    """As many CUDA devices as are asked for, as far as their generators go."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int, current: int = 0, *, in_use: bool = True) -> None:
        self.states = [torch.tensor([100 + device], dtype=torch.uint8) for device in range(count)]
        patch.setattr(torch.cuda, "is_initialized", lambda: in_use and count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "current_device", lambda: current)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
        patch.setattr(torch.cuda, "set_rng_state", self.set)

    def set(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state.clone()

    @property
    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


CUDA = {
    # Devices and the current one then, and now; what the generators hold afterwards (100 and up: as they were); words.
    "the same": ((2, 0), (2, 0), [0, 1], None),
    "each rank its own": ((2, 0), (2, 1), [0, 0], None),
    "fewer": ((4, 0), (2, 0), [0, 1], "the device in use goes on as it would have, and those of cuda:2 to cuda:3 are"),
    "one fewer": ((2, 1), (1, 0), [1], "and those of cuda:1 are lost"),
    "more": ((1, 0), (3, 0), [0, 101, 102], "and cuda:1 to cuda:2 from where they stand now"),
    "none now": ((1, 0), (0, 0), [], r"draws that were made there \(dropout masks, for example\) will be other ones"),
    "none then": ((0, 0), (2, 0), [100, 101], "draws on a GPU begin where its generators stand now"),
    "never": ((0, 0), (0, 0), [], None),
}


@pytest.mark.parametrize("case", CUDA)
def test_cuda_generators_are_restored_or_their_loss_is_said(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then, now, expected, said = CUDA[case]
    devices = Devices(monkeypatch, *then)
    devices.states = [torch.tensor([device], dtype=torch.uint8) for device in range(then[0])]
    save_checkpoint(tmp_path, 0, {"random": random_state()})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    devices = Devices(monkeypatch, *now)
    words = lost_generators(loaded[1]["random"])
    assert (words is None) == (said is None)
    if words is not None and said is not None:
        assert re.search(said, words), words
        assert f"the states of {then[0]} CUDA generator(s), and {now[0]} device(s) are in sight" in words
    set_random_state(loaded[1]["random"])
    assert devices.numbers == expected


def test_a_training_says_which_generators_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer() -> SingleLevelTrainer:
        w = torch.zeros(1, requires_grad=True)
        level = Level({"w": w}, torch.optim.SGD([w], 0.1), [torch.ones(1)])
        return SingleLevelTrainer(gradient_of(lambda batch: (w * batch).sum(), {"w": w}), level, 2)

    state = trainer().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer().load_state_dict(state)
    Devices(monkeypatch, 1)
    with pytest.warns(UserWarning, match="the states of 0 CUDA generator") as said:
        trainer().load_state_dict(state)
    assert len(said) == 1


def test_draws_on_a_device_continue(tmp_path: Path, device: torch.device) -> None:
    torch.rand(1, device=device)
    save_checkpoint(tmp_path, 0, {"random": random_state()})
    expected = torch.rand(5, device=device)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert lost_generators(loaded[1]["random"]) is None
    set_random_state(loaded[1]["random"])
    assert torch.equal(torch.rand(5, device=device), expected)


def test_atomic_writes_replace(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert files(tmp_path) == ["file.txt"]
