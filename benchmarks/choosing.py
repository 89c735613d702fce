"""Measures what the page on choosing a method says, and writes its tables.

    python benchmarks/choosing.py --json benchmarks/results/choosing.json --page docs/choosing.md
    python benchmarks/choosing.py --from benchmarks/results/choosing.json --page docs/choosing.md --check

The first line measures everything (some minutes on two cores), keeps the figures and writes the tables into the page,
each between its two markers. The second only compares a page with kept figures. `--quick` makes smaller and fewer runs.
Without `--page` the tables are printed.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import choosing_network, choosing_systems, choosing_tables, choosing_trajectory
from bilevel import __version__


def processor() -> str:
    """The processor's name, where the system tells."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(encoding="utf-8"), re.M)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "bilevel": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }


def measure(*, quick: bool) -> dict[str, Any]:
    return {
        "quick": quick,
        "environment": environment(),
        "systems": choosing_systems.measure(quick=quick),
        "network": choosing_network.measure(quick=quick),
        "trajectory": choosing_trajectory.measure(quick=quick),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller and fewer runs, for a try")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--from", type=Path, dest="source", help="take figures from this file instead of measuring")
    parser.add_argument("--page", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    options = parser.parse_args(arguments)
    if options.check and not options.page:
        parser.error("--check needs --page")
    figures = json.loads(options.source.read_text(encoding="utf-8")) if options.source else measure(quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tables = choosing_tables.tables(figures)
    if not options.page:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        return 0
    old = options.page.read_text(encoding="utf-8")
    new = choosing_tables.insert(old, tables)
    if not options.check:
        options.page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{options.page} does not agree with the figures; run this again without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
