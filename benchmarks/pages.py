"""Figures as Markdown tables between the markers of a page."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.compare import number as number
from bilevel.compare import table as table


def conditions(figures: Mapping[str, Any]) -> str:
    """Where and when the figures were measured; `figures` has `environment` and `quick`."""
    machine = figures["environment"]
    note = " A quick run, not for reading." if figures["quick"] else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return (
        f"Measured on {machine['date']} with bilevel {machine['bilevel']}, torch {machine['torch']}, Python "
        f"{machine['python']}, {machine['system']}, {machine['processor']}, {machine['cores']} cores, {threads}, "
        f"device {machine['device']}.{note}"
    )


def insert(page: str, named: Mapping[str, str]) -> str:
    """The page with every text between ``<!-- table NAME -->`` and ``<!-- end -->``; other markers stay as they are.

    Raises:
        ValueError: a name that the page has no markers for, or has more than once.
    """
    for name, text in named.items():
        pattern = re.compile(rf"^(<!-- table {re.escape(name)} -->\n).*?^(<!-- end -->)$", re.M | re.S)
        page, count = pattern.subn(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
        if count != 1:
            raise ValueError(f"the page must have one <!-- table {name} --> ended by <!-- end -->, found {count}")
    return page


def update(path: Path, named: Mapping[str, str], *, check: bool) -> int:
    """Write the texts into the page; with `check` change nothing and give exit code 1 where it would change."""
    old = path.read_text(encoding="utf-8")
    new = insert(old, named)
    if not check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{path} does not agree with the figures; run this again without --check", file=sys.stderr)
        return 1
    return 0
