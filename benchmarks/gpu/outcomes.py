"""A plug-in of pytest that writes a line of JSON for each test as it ends, so that a run cut short has told of most.

    python -m pytest -p benchmarks.gpu.outcomes --outcomes FILE

A line holds the test's ``name``, its ``outcome`` (passed, failed or skipped), ``seconds``, the ``message`` of one that
failed or was skipped, and ``figures``: what it gave to `record_property`.
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="file that gets a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    assert isinstance(path, Path), "pytest asks for it"
    config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """Collects the reports of a test's phases, and writes them as one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)
        if report.when == "teardown":
            self._write(record(self.reports))
            self.reports = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            message = _last_line(report.longreprtext)
            self._write({"name": report.nodeid, "outcome": "failed", "seconds": 0.0, "message": message, "figures": {}})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def record(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """The line of a test: the first phase that did not pass decides."""
    decisive = next((report for report in reports if report.outcome != "passed"), reports[-1])
    message = None
    if decisive.outcome == "failed":
        crash = getattr(decisive.longrepr, "reprcrash", None)
        message = crash.message.splitlines()[0] if crash and crash.message else _last_line(decisive.longreprtext)
    elif decisive.outcome == "skipped":
        message = decisive.longrepr[2] if isinstance(decisive.longrepr, tuple) else decisive.longreprtext
    return {
        "name": reports[0].nodeid,
        "outcome": decisive.outcome,
        "seconds": sum(report.duration for report in reports),
        "message": message,
        "figures": dict(reports[-1].user_properties),
    }


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
