"""Steps with and without torch.compile: what is timed is what is said."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compiled_steps
from benchmarks.small_steps import quadratic
from bilevel.hypergradients import SOBA
from tests.support.cases import joined


def test_both_trainers_make_the_same_steps() -> None:
    subject = compiled_steps.small(quadratic(5), 64)
    ends = []
    for choice in (False, "eager"):
        trainer = compiled_steps.trainer(subject, SOBA(compile=choice), 3, 2)
        trainer.run()
        assert trainer.steps == {"upper": 6, "lower": 6}
        ends.append(torch.cat([joined(trainer.upper.params), joined(trainer.lower.params)]))
    assert torch.allclose(*ends, rtol=1e-6)
    assert not torch.equal(ends[0], torch.cat([joined(subject.upper), joined(subject.lower)]))


@pytest.mark.slow
def test_a_quick_run_writes_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled_steps.main(["--quick", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert len(figures["problems"]) == 5
    for row in figures["problems"].values():
        assert row["plain_milliseconds"] > 0.0
        assert row["compiled_milliseconds"] > 0.0
    assert "quadratic, 64 samples" in capsys.readouterr().out
