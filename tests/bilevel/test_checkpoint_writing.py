"""A checkpoint on its way to the disk: no copy in memory, and the file system's own error wherever it refuses."""

import errno
import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.checkpoint import load_checkpoint, save_checkpoint


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((50_000,), value), "words": ["word"] * 20_000, "v": [torch.full((20,), value)] * 3}


def test_the_manifest_has_the_size_and_digest_of_the_file(tmp_path: Path) -> None:
    content = save_checkpoint(tmp_path, 1, state(1.0)).read_bytes()
    manifest = json.loads((tmp_path / "step-00000001.json").read_bytes())
    assert manifest["size"] == len(content) > 200_000
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_save_takes_no_memory_for_the_bytes(tmp_path: Path) -> None:
    large = {"w": torch.zeros(4_000_000)}
    save_checkpoint(tmp_path, 0, large)
    tracemalloc.start()
    try:
        size = save_checkpoint(tmp_path, 1, large).stat().st_size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 16_000_000
    assert peak < 0.2 * size


class Full:
    """A file that takes no more from a certain length on."""

    def __init__(self, file: Any, length: int) -> None:
        self.file, self.left = file, length

    def write(self, content: Any) -> int:
        self.left -= len(content)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space left")
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_a_full_disk_is_the_file_systems_error_wherever_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = save_checkpoint(tmp_path, 1, state(1.0)).stat().st_size
    before = sorted(path.name for path in tmp_path.iterdir())
    opens = os.fdopen
    for length in (*range(0, size, 20_011), *range(size - 3000, size, 197), size - 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdopen", lambda file, mode, length=length: Full(opens(file, mode), length))
            with pytest.raises(OSError, match="no space left"):
                save_checkpoint(tmp_path, 2, state(2.0))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert float(found[1]["w"][0]) == 1.0
