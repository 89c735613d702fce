"""The figures of start-up: what is in them, the aims that they are held to, and the page that shows them."""

import json
from pathlib import Path

import pytest

from benchmarks.guard import startup
from benchmarks.guard.commands import COMMANDS, ChildError, Seconds, run_timed
from benchmarks.pages import insert
from tests.support.paths import ROOT

KEPT, PAGE = ROOT / "benchmarks" / "results" / "startup.json", ROOT / "docs" / "cost.md"
AIMS = {"import bilevel": 1.2, "bilevel.compare --help": 2.0, "run.py --help": 2.0, "run.py --dry-run": 2.0}


def test_every_command_is_a_multiple_of_torchs_import_in_its_own_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def timed(command: tuple[str, ...], tree: Path, threads: int) -> Seconds:
        assert (tree, threads) == (ROOT, 3)
        calls.append(command)
        # The machine is slower from repeat to repeat, and the first round, which fills caches, slower than any.
        repeat = (len(calls) - 1) // (len(COMMANDS) + 1)
        slow = 100.0 if repeat == 0 else float(repeat)
        index = [startup.IMPORT_TORCH, *COMMANDS.values()].index(command)
        return Seconds(processor=slow * (index + 1), clock=slow * (index + 1) ** 2)

    monkeypatch.setattr(startup, "run_timed", timed)
    path = tmp_path / "figures.json"
    arguments = ["--repeats", "5", "--threads", "3", "--json", str(path)]
    monkeypatch.setattr(startup, "use_threads", lambda threads: None)
    assert startup.main(arguments) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert len(calls) == 6 * (len(COMMANDS) + 1)
    assert figures["seconds"]["processor"]["median"] == 3.0
    assert "2.00 (2.00 to 2.00)" in insert(PAGE.read_text(encoding="utf-8"), startup.tables(figures))
    for index, name in enumerate(COMMANDS, start=2):
        row = figures["ratios"][name]
        assert row["processor"] == {"median": index, "q1": index, "q3": index}
        assert row["clock"]["median"] == index**2


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--device", "cuda"]])
def test_bad_input(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        startup.main(options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_command_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"^ValueError: no$"):
        run_timed(("-c", "raise ValueError('no')"), tmp_path, 1)
    with pytest.raises(ChildError, match="exit code 3 and no word"):
        run_timed(("-c", "raise SystemExit(3)"), tmp_path, 1)


def test_processor_time_is_the_commands_own(tmp_path: Path) -> None:
    busy = run_timed(("-c", "import time\nwhile time.process_time() < 0.5: pass"), tmp_path, 1)
    waiting = run_timed(("-c", "import time; time.sleep(0.5)"), tmp_path, 1)
    assert busy.processor >= 0.5
    assert waiting.clock >= 0.5
    assert waiting.processor < busy.processor


def test_a_command_imports_from_its_tree_with_its_threads(tmp_path: Path) -> None:
    (tmp_path / "bilevel.py").write_text("here = 1", encoding="utf-8")
    run_timed(
        ("-c", "import bilevel, os; assert bilevel.here; assert os.environ['OMP_NUM_THREADS'] == '2'"), tmp_path, 2
    )


def test_the_kept_figures_keep_the_aims_and_are_those_of_the_page() -> None:
    figures = json.loads(KEPT.read_text(encoding="utf-8"))
    assert set(figures["ratios"]) == set(COMMANDS) == set(AIMS)
    for name, aim in AIMS.items():
        assert figures["ratios"][name]["processor"]["median"] <= aim, name
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, startup.tables(figures)) == page
