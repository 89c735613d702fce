"""Three hundred and more wrong or odd configurations and command lines: each refused by one message, or understood.

A case is made from its number alone, so that one that fails can be made again. Nothing is trained: all are dry runs.
"""

import contextlib
import copy
import functools
import hashlib
import json
import operator
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from recipes.bissl.commands.main import main
from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome import estimate
from recipes.bissl.outcome.report import write_report
from recipes.bissl.outcome.summary import ArmResult, assemble
from recipes.bissl.settings.presets import PRESETS
from recipes.vision.sources.published.catalog import DATASETS
from tests.support.odd_inputs import BROKEN, JUNK, LINES, TOOL_LINES
from tests.support.recipes.small_runs import files

Case = tuple[list[str], dict[str, bytes]]
"""A command line, and the files that it finds in the current folder."""

DIGITS = PRESETS["digits"]("v2").model_dump(mode="json")


def leaves(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields, those of sections included."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))


FIELDS = [path for path in leaves(DIGITS) if path != ("preset",)]
OPTIONS = [path for path in FIELDS if path[-1] != "options" and "options" not in path]


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def file_of_wrong_values(draw: random.Random) -> Case:
    path = draw.choice(FIELDS)
    return ["--config", "c.json"], {"c.json": json.dumps(nested(path, draw.choice(JUNK))).encode()}


def file_of_unknown_fields(draw: random.Random) -> Case:
    path = draw.choice([(), *FIELDS])
    name = draw.choice(
        ["x", "", "seeds ", "SEED", "__class__", "pretext.lr", "ß", "a\nb", "[red]", "x" * 3000, "\ud800"]
    )
    return ["--config", "c.json"], {"c.json": json.dumps(nested((*path, name), draw.choice(JUNK))).encode()}


def whole_file_mutated(draw: random.Random) -> Case:
    """A saved config with bytes flipped, cut out or doubled."""
    content = bytearray(json.dumps(DIGITS, indent=1).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content))
        match draw.randrange(4):
            case 0:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at : at + draw.randint(1, 60)]
            case 2:
                content[at:at] = content[at : at + draw.randint(1, 60)]
            case _:
                del content[at:]
                content += b" "
    return ["--config", "c.json"], {"c.json": bytes(content)}


def broken_file(draw: random.Random) -> Case:
    name = draw.choice(["c.json", "c.toml", "c", "c.txt"])
    return ["--config", name], {name: draw.choice(BROKEN)}


def option_of_wrong_value(draw: random.Random) -> Case:
    name = ".".join(draw.choice(OPTIONS))
    value = text(draw.choice(JUNK))
    return draw.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"--{name}={value}"] * 2]), {}


def whole_line(draw: random.Random) -> Case:
    return list(draw.choice(LINES)), {}


def tool_line(draw: random.Random) -> Case:
    return list(draw.choice(TOOL_LINES)), {}


KINDS: dict[Callable[[random.Random], Case], int] = {
    file_of_wrong_values: 70,
    file_of_unknown_fields: 30,
    whole_file_mutated: 40,
    broken_file: 60,
    option_of_wrong_value: 70,
}


def cases(kind: Callable[[random.Random], Case], count: int) -> list[Case]:
    return [kind(random.Random(f"{kind.__name__} {number}")) for number in range(count)]


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(str(stop.code))


def problem(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with how the command line ends; None where it is refused by one message or well understood."""
    before = files(Path())
    capsys.readouterr()
    try:
        code = exit_code(arguments)
    except Exception:
        return traceback.format_exc(limit=-4)
    output = capsys.readouterr()
    # Terminals take these for commands; a value is shown by its escapes instead.
    if any(not (c.isprintable() or c in "\n\t") for c in output.err + output.out):
        return f"raw control characters: {output.err[:300]!r}"
    if code == 0:
        return understood(Path())
    if arguments[0] == "data" and code == 2 and not output.err:
        # What is wrong with sets is what `data verify` is asked for: a line a problem, on standard output.
        return None if all(line.startswith(tuple(DATASETS)) for line in output.out.splitlines()) else output.out
    if code != 2 or files(Path()) != before:
        return f"exit code {code}, files {sorted(files(Path()).keys() ^ before.keys())}: {output.err[:300]}"
    if sum("error: " in line for line in output.err.splitlines()[:1]) + output.err.count("\nrun.py") != 1:
        return f"not one message: {output.err[:400]}"
    return None


def understood(folder: Path) -> str | None:
    """What a dry run wrote must be a whole config, which gives the same config again."""
    for file in folder.glob("runs/*/config.json"):
        saved = json.loads(file.read_bytes())
        again = parse(["--config", str(file)]).config.model_dump_json()
        shutil.rmtree(folder / "runs")
        if json.loads(again) != saved:
            return f"another config comes back: {again[:300]}"
    return None


def problems_of(some: list[Case], capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = []
    for arguments, contents in some:
        for name, content in contents.items():
            Path(name).write_bytes(content)
        said = problem(arguments, capsys)
        if said is not None:
            shown = {name: content[:200] for name, content in contents.items()}
            found.append(f"{[a[:200] for a in arguments]} {shown}\n{said}")
            shutil.rmtree("runs", ignore_errors=True)
    return found


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to stand in, and no time measured in dry runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "_seconds_per_image", lambda *_: 1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutated_configs(kind: Callable[[random.Random], Case], capsys: pytest.CaptureFixture[str]) -> None:
    some = [(["--dry-run", *arguments], contents) for arguments, contents in cases(kind, KINDS[kind])]
    found = problems_of(some, capsys)
    assert not found, "\n\n".join(found)


def test_odd_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    found = problems_of([(["--dry-run", *line], {}) for line in LINES], capsys)
    assert not found, "\n\n".join(found)


def test_odd_command_lines_of_tools(capsys: pytest.CaptureFixture[str]) -> None:
    found = problems_of([([*line, *["--dry-run"] * (line[0] == "search")], {}) for line in TOOL_LINES], capsys)
    assert not found, "\n\n".join(found)


def test_mutated_run_folders(capsys: pytest.CaptureFixture[str]) -> None:
    """One field of a finished run's files exchanged or taken out: tables, exports and reports are made or refused."""
    arms = {name: ArmResult({"top1": [50.0, 51.0]}, 3, 4, 5.0) for name in ("bissl", "baseline")}
    results = assemble("digits", range(2), "finetune", "top1", arms, {}, higher_is_better={"top1": True})
    content = save({"backbone.x": torch.ones(1)})
    facts = {
        "format": 1,
        "stage": "finetune",
        "key": "k",
        "sha256": hashlib.sha256(content).hexdigest(),
        "arm": "bissl",
    }
    facts |= {"seed": 0, "test": {"top1": 50.0}, "pretext_steps": 1, "label_steps": 1, "seconds": 1.0}
    event = {"stage": "finetune", "variant": "bissl", "seed": 0, "event": "epoch", "step": 1, "loss": 0.5}
    whole = {"config.json": DIGITS, "results.json": results, "a/b/artifact.json": facts, "metrics.jsonl": event}
    Path("run/a/b").mkdir(parents=True)
    Path("run/a/b/weights.safetensors").write_bytes(content)
    commands = (["table", "run", "--to", "table"], ["export", "run/a/b", "--to", "card", "--run", "run"])
    found = []
    for number in range(32):
        draw = random.Random(f"run {number}")
        changed, name = copy.deepcopy(whole), draw.choice(list(whole))
        *above, last = draw.choice(list(leaves(changed[name])))
        section = functools.reduce(operator.getitem, above, changed[name])
        section[last] = draw.choice(JUNK)
        if number % 4 == 0:
            del section[last]
        for file, values in changed.items():
            Path("run", file).write_text(json.dumps(values) + "\n")
        for command in commands:
            said = problem(command, capsys)
            for folder in ("table", "card"):
                shutil.rmtree(folder, ignore_errors=True)
            if said is not None:
                found.append(f"{number}, {name}, {(*above, last)}: {said}")
        with contextlib.suppress(ValueError):
            write_report(Path("run"))
            Path("run/report.html").unlink()
    assert not found, "\n\n".join(found)


def test_there_are_three_hundred() -> None:
    assert sum(KINDS.values()) + len(LINES) + len(TOOL_LINES) >= 300
