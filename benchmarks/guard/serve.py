"""The child of a comparison: it makes workloads of files ready, and times one call of one of them a line.

    python -P serve.py TREE FOLDER FILE...

A file has ``ROWS``: by name, a function that takes FOLDER, to write to, and returns what is to be timed. The first
answer says of each row, by its file's name and its own, why it cannot be timed, null where it can; of a file that
cannot be loaded, by its name alone. Then a row's name on the standard input is answered by the seconds of one call, of
the processor and of the clock, or by the problem. `bilevel` must come from TREE.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Step = Callable[[], object]


def prepared(files: Sequence[str], folder: Path) -> tuple[dict[str, Step], dict[str, str | None]]:
    """What can be timed, each called once, and of every row why it cannot."""
    steps: dict[str, Step] = {}
    problems: dict[str, str | None] = {}
    for file in map(Path, files):
        try:
            rows = runpy.run_path(str(file))["ROWS"]
        except Exception as error:
            problems[file.stem] = _said(error)
            continue
        for row, make in rows.items():
            name = f"{file.stem}: {row}"
            try:
                step = make(folder)
                step()
            except Exception as error:
                # The interface of another commit: its row is left out, the others stay.
                problems[name] = _said(error)
            else:
                steps[name], problems[name] = step, None
    return steps, problems


def timed(step: Step) -> dict[str, Any]:
    """One call."""
    used, began = time.process_time(), time.perf_counter()
    try:
        step()
    except Exception as error:
        return {"problem": _said(error)}
    clock = time.perf_counter() - began
    return {"processor": time.process_time() - used, "clock": clock}


def main(arguments: Sequence[str]) -> None:
    tree, folder, *files = arguments
    # What a workload prints is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import bilevel

    if not Path(str(bilevel.__file__)).resolve().is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"bilevel was imported from {bilevel.__file__}, not from {tree}")

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    steps, problems = prepared(files, Path(folder))
    answer(problems)
    for line in sys.stdin:
        answer(timed(steps[line.strip()]))


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1:])
