"""Runs that go on from a checkpoint equal those that were never interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import AlternatingSchedule
from bilevel.checkpoint import load_checkpoint
from bilevel.training import Callback, Diagnostics
from tests.support.cases import joined
from tests.support.problems.small_net import Net, net_trainer
from tests.support.problems.two_heads import make


class Interrupt(Callback):
    """Stops in the middle of the alternation after number `after`, with steps already made and written down."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        if record["alternation"] == self.after + 1 and record["event"] == "upper" and record["step"] % 3 == 2:
            raise KeyboardInterrupt


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waiting")} for line in lines]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, after: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    torch.manual_seed(9)
    straight = net_trainer(whole, Callback())
    torch.manual_seed(10)
    straight.run()
    end = torch.get_rng_state()
    torch.manual_seed(9)
    first = net_trainer(broken, Interrupt(after))
    torch.manual_seed(10)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(metrics(broken)) > 7 * after + 1
    torch.manual_seed(12345)
    second = net_trainer(broken, Callback())
    loaded = load_checkpoint(broken / "checkpoints")
    assert loaded is not None
    assert loaded[0] == after
    second.load_state_dict(loaded[1])
    second.run()
    for level in ("upper", "lower"):
        ours, theirs = second.levels[level].params, straight.levels[level].params
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert isinstance(second.problem, Net)
    assert isinstance(straight.problem, Net)
    pairs = zip(second.problem.net.buffers(), straight.problem.net.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert metrics(broken) == metrics(whole)
    assert (second.steps, second.failures) == (straight.steps, straight.failures)
    assert torch.equal(torch.get_rng_state(), end)


def test_a_state_in_memory_is_a_copy() -> None:
    trainer = make()
    trainer.advance()
    state = trainer.state_dict()
    one, other, late = make(), make(), make()
    for twin in (one, other):
        twin.load_state_dict(state)
    trainer.advance()
    one.advance()
    other.advance()
    late.load_state_dict(state)
    late.advance()
    for twin in (one, other, late):
        assert torch.equal(joined(twin.upper.params), joined(trainer.upper.params))
        assert torch.equal(joined(twin.lower.params), joined(trainer.lower.params))


def test_a_state_of_another_trainer_is_refused() -> None:
    state = make().state_dict()
    make(callbacks=[Callback()]).load_state_dict(state)
    with pytest.raises(ValueError, match="callbacks: the state has one of Diagnostics that this training lacks"):
        make().load_state_dict(make(callbacks=[Callback(), Diagnostics()]).state_dict())
    with pytest.raises(ValueError, match=r"schedule: the state is of 4 lower and 3 upper steps .* has 2 and 3"):
        make(schedule=AlternatingSchedule(5, 2, 3)).load_state_dict(state)
    adam = make()
    adam.lower.optimizer = torch.optim.Adam(adam.lower.params.values())
    with pytest.raises(ValueError, match=r"lower: optimizer: the state is of SGD with 1 parameter group\(s\), .* Adam"):
        adam.load_state_dict(state)
    state["levels"]["lower"]["variables"] = {"backbone": torch.ones(3)}
    with pytest.raises(ValueError, match="lower: the state's variables have other names or shapes"):
        make().load_state_dict(state)
