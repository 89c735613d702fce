"""Figures as Markdown tables, and tables between the markers of a page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.solvers.curves import COLUMNS
from benchmarks.solvers.systems import verdict
from bilevel.compare import (
    SUCCESSES,
    SUCCESSIVE_HEADER,
    curves_tables,
    names,
    number,
    spread_of,
    successive,
    table,
    words,
)

Figures = dict[str, Any]


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _one(rows: Sequence[Figures], **where: object) -> Figures:
    (found,) = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return found


def _outcome(row: Figures) -> str:
    """Error and products; before them what is no success, and nothing else where there is no solution."""
    remark, error = "" if row["status"] in SUCCESSES else words(row["status"]), row["error"]
    if row["shifted"]:
        remark = f"{remark}, Tikhonov" if remark else "Tikhonov"
    if error is None:
        return remark or f"not noticed ({_products(row)})"
    return f"{remark}{', ' if remark else ''}{number(error)} ({_products(row)})"


def _products(row: Figures) -> str:
    """Of the first right-hand side, and of later ones where they need another number."""
    first, later = row.get("first_products", row["products"]), row["products"]
    return f"{later:g}" if first == later else f"{first:g}, then {later:g}"


def systems(rows: Sequence[Figures], solvers: Sequence[str]) -> str:
    first = rows[0]["provider"]
    body = [
        [case, *(_outcome(_one(rows, case=case, solver=solver, provider=first)) for solver in solvers)]
        for case in names(rows, "case")
    ]
    return table(["system", *solvers], body)


def outcomes(rows: Sequence[Figures]) -> str:
    """Over all providers: how the solves of each case end."""
    solvers = names(rows, "solver")
    body = []
    for case in names(rows, "case"):
        cells = []
        for solver in solvers:
            found = [verdict(row) for row in rows if (row["case"], row["solver"]) == (case, solver)]
            parts = [f"{word} {found.count(word)}" for word in _unique(found)]
            cells.append(found[0] if len(parts) == 1 else ", ".join(parts))
        body.append([case, *cells])
    return table(["system", *solvers], body)


def outcomes_by_solver(rows: Sequence[Figures]) -> str:
    """Every case with every provider, one table a solver."""
    parts = []
    for solver in names(rows, "solver"):
        parts.append(f"### {solver}\n\n{system_providers(rows, solver)}")
    return "\n\n".join(parts)


def system_providers(rows: Sequence[Figures], solver: str) -> str:
    providers = names(rows, "provider")
    body = [
        [case, *(_outcome(_one(rows, case=case, solver=solver, provider=provider)) for provider in providers)]
        for case in names(rows, "case")
    ]
    return table(["system", *(f"`{provider}`" for provider in providers)], body)


def network_systems(figures: Figures) -> str:
    body = [
        [f"{row['c']:g}", f"{row['smallest']:.2f} to {row['largest']:.1f}", number(row["noise"])]
        for row in figures["systems"]
    ]
    return table(["c", "eigenvalues of A", "distance of the exact solutions from two sets of batches"], body)


def network_solvers(figures: Figures) -> str:
    rows = figures["solvers"]
    weights = names(rows, "c")
    body = [
        [f"`{solver}`", *(_outcome(_one(rows, solver=solver, c=c)) for c in weights)]
        for solver in names(rows, "solver")
    ]
    return table(["solver", *(f"c = {c:g}" for c in weights)], body)


def network_providers(rows: Sequence[Figures]) -> str:
    settings = [(activation, dtype) for activation in names(rows, "activation") for dtype in names(rows, "dtype")]
    body = []
    for provider in names(rows, "provider"):
        found = [_one(rows, provider=provider, activation=a, dtype=d) for a, d in settings]
        times, errors = [spread_of(row["gradients"]) for row in found], [number(row["error"]) for row in found]
        body.append([f"`{provider}`", *(f"{error} · {time}" for error, time in zip(errors, times, strict=True))])
    return table(["provider", *(f"{a}, {d}" for a, d in settings)], body)


def trajectory(rows: Sequence[Figures], error: str) -> str:
    steps = names(rows, "steps")
    first = rows[0]["method"]
    norms = [number(_one(rows, method=first, steps=t)["stationarity"]) for t in steps]
    body = [["norm of the lower gradient", *norms, ""]]
    for method in names(rows, "method"):
        found = [_one(rows, method=method, steps=t) for t in steps]
        body.append([method, *(number(row[error]) for row in found), str(found[-1]["evaluations"])])
    return table(["hypergradient", *(f"T = {t}" for t in steps), f"evaluations of L at T = {steps[-1]}"], body)


def conditions(figures: Figures) -> str:
    machine = figures["environment"]
    note = " A quick run, not for reading." if figures["quick"] else ""
    return (
        f"Measured on {machine['date']} with bilevel {machine['bilevel']}, torch {machine['torch']}, Python "
        f"{machine['python']}, {machine['system']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}.{note}"
    )


def tables(figures: Figures) -> dict[str, str]:
    """Every table by the name in its markers."""
    network, solvers = figures["network"], names(figures["systems"], "solver")
    noise = f"Distance of the exact solutions from two disjoint sets of batches: {number(figures['curves']['noise'])}."
    return {
        "conditions": conditions(figures),
        "curves": curves_tables(figures["curves"]["curves"], COLUMNS),
        "successive": f"{table(SUCCESSIVE_HEADER, successive(figures['curves']['successive']))}\n\n{noise}",
        "systems": systems(figures["systems"], solvers[:5]),
        "systems-others": systems(figures["systems"], solvers[5:]),
        "outcomes": outcomes(figures["systems"]),
        "outcomes-by-solver": outcomes_by_solver(figures["systems"]),
        "network-systems": network_systems(network["system"]),
        "network-solvers": network_solvers(network["system"]),
        "network-providers": network_providers(network["providers"]),
        "trajectory": trajectory(figures["trajectory"], "error"),
        "trajectory-loop": trajectory(figures["trajectory"], "error_to_loop"),
    }


def insert(page: str, named: Mapping[str, str]) -> str:
    """The page with every table it has markers for between ``<!-- table NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: no markers, those of an unknown table, or markers that do not enclose one block.
    """
    marked = re.findall(r"^<!-- table (\S+) -->$", page, re.M)
    if not marked or set(marked) - set(named):
        raise ValueError(f"the page has markers for {sorted(marked)}; there are tables {sorted(named)}")
    for name in marked:
        pattern = re.compile(rf"^(<!-- table {re.escape(name)} -->\n).*?^(<!-- end -->)$", re.M | re.S)
        page, count = pattern.subn(lambda m, text=named[name]: f"{m[1]}\n{text}\n\n{m[2]}", page)
        if count != 1:
            raise ValueError(f"the markers of table {name!r} must enclose one block, ended by <!-- end -->")
    return page
