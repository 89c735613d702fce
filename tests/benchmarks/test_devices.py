"""The comparison of a device with the CPU: rehearsed on the CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import devices


def test_a_quick_run_finds_no_fault_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "devices.json"
    monkeypatch.setattr("sys.argv", ["devices.py", "--quick", f"--json={kept}"])
    assert devices.main() == 0
    figures = json.loads(kept.read_text(encoding="utf-8"))
    assert figures["faults"] == []
    assert len(figures["products"]) == len(devices.PROVIDERS) * len(devices.PRECISIONS)
    assert figures["training"]["resumed to the bit"] is True
    assert "torch.bfloat16" not in figures["training"]["hypergradient under autocast"]
    assert figures["examination"] == {
        "healthy, torch.float32": False,
        "faulty, torch.float32": True,
        "healthy, torch.float64": False,
        "faulty, torch.float64": True,
    }
