"""Both sides of a comparison in turn, pair by pair, each in processes of its own."""

import json
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.guard.commands import TIMEOUT, ChildError, Seconds, last_words, run_timed
from benchmarks.measuring import environment_alone

SERVE = Path(__file__).with_name("serve.py")
OLD, NEW = "old", "new"


@dataclass
class Row:
    """What is compared, and what was found.

    Attributes:
        pairs: seconds of the old and of the new side of each pair; several turns within one give their median ratio.
        problem: why there is nothing to compare, by the side that it lies on.
    """

    name: str
    pairs: list[list[tuple[Seconds, Seconds]]] = field(default_factory=list)
    problem: dict[str, str] = field(default_factory=dict)

    def ratios(self, clock: str) -> list[float]:
        """New over old by one of the two kinds of seconds, a number a pair."""
        return [
            statistics.median(getattr(new, clock) / getattr(old, clock) for old, new in turns) for turns in self.pairs
        ]

    def seconds(self) -> float:
        """What the new side takes of the processor, the median of all turns."""
        return statistics.median(new.processor for turns in self.pairs for _, new in turns)


@dataclass(frozen=True)
class Comparison:
    """Two trees, and how they are compared.

    Attributes:
        trees: by side.
        threads: of every child.
        turns: calls of a workload of either side within a pair of processes.
    """

    trees: Mapping[str, Path]
    threads: int = 1
    turns: int = 7

    def starts(self, commands: Mapping[str, Sequence[str]], rows: Mapping[str, Row], number: int) -> None:
        """One pair of starts of each command; `number` -1 fills caches and does not count."""
        for name, command in commands.items():
            row, taken = rows[name], {}
            for side in _order(number):
                if not row.problem:
                    try:
                        taken[side] = run_timed(command, self.trees[side], self.threads)
                    except ChildError as error:
                        row.problem[side] = str(error)
            if number >= 0 and not row.problem:
                row.pairs.append([(taken[OLD], taken[NEW])])

    def workloads(self, files: Sequence[Path], rows: dict[str, Row], number: int) -> None:
        """One pair of processes that take turns at each workload; rows are added as the files name them.

        A file that could not be loaded in a pair before, which may have taken all the time there was, is left out.
        """
        files = [file for file in files if file.stem not in rows]
        if not files:
            return
        with self._server(NEW, files) as new, self._server(OLD, files) as old:
            servers = {OLD: old, NEW: new}
            for name, problem in new.problems.items():
                row = rows.setdefault(name, Row(name))
                # A file that cannot be loaded stands for all of its rows.
                missing = old.problems.get(name, old.problems.get(name.partition(":")[0]))
                row.problem.update({side: why for side, why in ((NEW, problem), (OLD, missing)) if why is not None})
                turns = [] if row.problem else self._turns(servers, row, number)
                if not row.problem:
                    row.pairs.append(turns)

    def _turns(self, servers: "Mapping[str, Server]", row: Row, number: int) -> list[tuple[Seconds, Seconds]]:
        turns = []
        for turn in range(self.turns):
            taken = {}
            for side in _order(number + turn):
                try:
                    taken[side] = servers[side].timed(row.name)
                except ChildError as error:
                    row.problem[side] = str(error)
                    return []
            turns.append((taken[OLD], taken[NEW]))
        return turns

    @contextmanager
    def _server(self, side: str, files: Sequence[Path]) -> "Iterator[Server]":
        tree = self.trees[side]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, "-P", str(SERVE), str(tree), folder, *map(str, files)],
                cwd=tree,
                env={**environment_alone(self.threads), "PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            try:
                yield Server(process, said, [file.stem for file in files])
            finally:
                process.kill()
                process.communicate()


class Server:
    """A child that times the workloads of files; see serve.py.

    Attributes:
        problems: by row why it cannot be timed, None where it can; by file where none of its rows can.
    """

    def __init__(self, process: "subprocess.Popen[str]", said: IO[str], files: Sequence[str]) -> None:
        self.process, self.said, self._hung = process, said, False
        try:
            self.problems: dict[str, str | None] = self._answer()
        except ChildError as error:
            self.problems = dict.fromkeys(files, str(error))

    def timed(self, name: str) -> Seconds:
        """One call.

        Raises:
            ChildError: it failed, did not answer in time, or the process has ended.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended; its last words are the answer
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.flush()
        answer = self._answer()
        if "problem" in answer:
            raise ChildError(answer["problem"])
        return Seconds(**answer)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        # Answers are lines, one for each request, so that none waits in the buffer of the pipe's reader.
        if self._hung or not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self._hung = True
            self.process.kill()
            raise ChildError(f"a workload did not answer within {TIMEOUT:.0f} seconds, and its process was ended")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            raise ChildError(last_words(self.said.read(), code))
        return json.loads(line)


def _order(number: int) -> tuple[str, str]:
    return (OLD, NEW) if number % 2 == 0 else (NEW, OLD)
