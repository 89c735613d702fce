"""The rounds of the evidence: what they can detect, what their configurations hold, and how rates are chosen."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import rates, run
from benchmarks.evidence.rounds import FIRST, ROUNDS, SECOND, Round, smallest_effect
from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.arms import ARMS
from recipes.bissl.settings.config import Config

IMAGES = ("--data.pretext=folder:x", "--data.downstream=folder:x")


def config_of(made: Round, *options: str) -> Config:
    return parse(["--config", str(made.config), *IMAGES, *options]).config


@pytest.mark.parametrize(("pairs", "level"), [(5, 0.05), (6, 0.05), (10, 0.05), (10, 0.05 / 8)])
def test_the_smallest_effect_is_found_four_times_in_five(pairs: int, level: float) -> None:
    generator = np.random.default_rng(0)
    effect = smallest_effect(pairs, 2.0, level=level)
    differences = generator.normal(effect, 2.0, size=(40_000, pairs))
    t = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / np.sqrt(pairs))
    p = 2.0 * stats.t.sf(np.abs(t), pairs - 1)
    # The sum of two quantiles is the usual approximation to the noncentral t; it is off by a few points for few pairs.
    assert np.mean(p < level) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("made", ROUNDS.values(), ids=ROUNDS)
def test_the_configuration_has_the_arms_that_are_compared(made: Round) -> None:
    config = config_of(made)
    assert {name for pair in made.family for name in pair} == set(config.arms)
    assert set(config.arms) <= ARMS.keys() | config.variants.keys()
    assert made.spreads.keys() == set(made.family)
    assert made.seeds == config.pipeline_seeds
    assert made.seeds >= 5
    assert config.data.image_size == 32


def test_the_first_round_varies_the_damping() -> None:
    config = config_of(FIRST)
    assert config.bissl.damping == 10.0
    assert config.for_arm("bissl-low-damping").bissl.damping < config.bissl.damping
    assert config.for_arm("identity").bissl.solver == "identity"


def test_the_second_round_varies_the_solve_and_gamma_and_nothing_else() -> None:
    config = config_of(SECOND)
    sections = {name: config.for_arm(name).bissl for name in SECOND.search.arms} if SECOND.search else {}
    found = {name: (section.solver, section.gamma) for name, section in sections.items()}
    assert found == {
        "bissl": ("cg", 0.01),
        "bissl-gamma-1": ("cg", 1.0),
        "identity-gamma-0.01": ("identity", 0.01),
        "identity-gamma-1": ("identity", 1.0),
    }
    others = [section.model_dump(exclude={"solver", "gamma"}) for section in sections.values()]
    assert all(other == others[0] for other in others)
    assert not config.bissl.aggregate


def test_the_search_has_other_seeds_and_tries_every_rate_of_every_arm() -> None:
    search = SECOND.search
    assert search is not None
    config = config_of(SECOND, *rates.search_options(SECOND))
    assert config.seed >= SECOND.seeds
    assert (config.seed, config.pipeline_seeds) == search.seeds
    assert config.data.val_per_class == search.val_per_class
    tried = {(b.solver, b.gamma, b.upper_lr) for b in (config.for_arm(a).bissl for a in config.arms if a != "baseline")}
    plain = [config_of(SECOND).for_arm(arm).bissl for arm in search.arms]
    assert tried == {(b.solver, b.gamma, rate) for b in plain for rate in search.rates}
    assert len(config.arms) == len(tried) + 1


def epoch(variant: str, seed: int, step: int, score: float) -> dict[str, Any]:
    return {"stage": "finetune", "event": "epoch", "variant": variant, "seed": seed, "step": step, "val_top1": score}


def candidates(scores: dict[tuple[str, float], float]) -> list[dict[str, Any]]:
    """Events of two seeds, a point above and below; the best epoch is the first of two."""
    search, events = SECOND.search, []
    assert search is not None
    for arm in search.arms:
        for rate in search.rates:
            own = arm == "bissl" and rate == search.rates[0]
            name, score = ("bissl" if own else rates.candidate(arm, rate)), scores.get((arm, rate), 30.0)
            for seed, offset in ((100, 1.0), (101, -1.0)):
                events += [epoch(name, seed, 8, score + offset), epoch(name, seed, 16, score - 5.0)]
    return events


def test_the_rate_of_the_best_mean_is_chosen_and_the_lower_one_of_equals() -> None:
    assert SECOND.search is not None
    first, middle, last = SECOND.search.rates[0], SECOND.search.rates[1], SECOND.search.rates[-1]
    best = {("bissl", last): 40.0, ("bissl-gamma-1", middle): 31.0}
    found = rates.choose(SECOND, candidates(best))
    assert {arm: each["chosen"] for arm, each in found["arms"].items()} == {
        "bissl": last,
        "bissl-gamma-1": middle,
        "identity-gamma-0.01": first,
        "identity-gamma-1": first,
    }
    assert found["arms"]["bissl"]["per_seed"][f"{last:g}"] == [41.0, 39.0]
    assert found["arms"]["bissl"]["mean"][f"{last:g}"] == pytest.approx(40.0)
    assert found["seeds"] == [100, 101]


def test_the_result_is_run_at_the_rates_that_were_chosen() -> None:
    chosen = {"bissl": 0.3, "bissl-gamma-1": 0.02, "identity-gamma-0.01": 0.3, "identity-gamma-1": 0.04}
    config = config_of(SECOND, *rates.chosen_options(SECOND, chosen))
    assert {arm: config.for_arm(arm).bissl.upper_lr for arm in chosen} == chosen
    assert config.for_arm("bissl-gamma-1").bissl.gamma == 1.0
    assert config.for_arm("identity-gamma-0.01").bissl.solver == "identity"
    assert config.arms == config_of(SECOND).arms
    assert config.seed + SECOND.seeds <= 100


@dataclass
class Run:
    """Stands for the process of a run: `waits` are what waiting for it gives, one after the other."""

    waits: list[int | type[BaseException]]

    def wait(self) -> int:
        found = self.waits.pop(0)
        if isinstance(found, int):
            return found
        raise found


def test_the_search_is_run_before_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def record(command: list[str]) -> Run:
        commands.append(command)
        folder = Path(command[command.index("--output-dir") + 1])
        folder.mkdir()
        lines = candidates({("identity-gamma-1", 0.1): 50.0})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        return Run([0])

    monkeypatch.setattr(subprocess, "Popen", record)
    run.run_all(SECOND, "folder:x", tmp_path, 2)
    requests = [parse(command[2:]) for command in commands]
    assert [request.config.seed for request in requests] == [100, 0]
    assert requests[1].config.for_arm("identity-gamma-1").bissl.upper_lr == 0.1
    assert all(request.resume and request.config.jobs == 2 for request in requests)
    assert requests[0].artifacts == requests[1].artifacts


@pytest.mark.parametrize(
    ("waits", "code", "said"),
    [
        ([2], 2, ""),
        ([KeyboardInterrupt, KeyboardInterrupt, 75], 75, ""),
        ([-9], 137, "the run was ended by signal 9; the same command goes on\n"),
    ],
)
def test_a_run_that_ends_early_ends_the_round(
    waits: list[int | type[BaseException]],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After Ctrl-C, which the run gets too, it is waited for until it has saved."""
    commands: list[list[str]] = []

    def fail(command: list[str]) -> Run:
        commands.append(command)
        return Run(list(waits))

    monkeypatch.setattr(subprocess, "Popen", fail)
    kept = tmp_path / "kept.json"
    assert run.main(["second", "--images", "folder:x", "--output-dir", str(tmp_path), "--json", str(kept)]) == code
    assert len(commands) == 1
    assert not kept.exists()
    assert capsys.readouterr() == ("", said)


def test_the_design_is_printed_without_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["second", "--design"]) == 0
    assert f"{SECOND.seeds} seeds" in capsys.readouterr().out
