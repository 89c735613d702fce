"""The record of ``make gpu`` as tables, on an HTML page or in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import conditions, number
from benchmarks.pages import table as markdown_table
from recipes.experiment.html import Block, Listing, Section, Text, render_page
from recipes.experiment.tables import Table

Record = Mapping[str, Any]
REHEARSED = "A rehearsal on a CPU: not run on a GPU, and no figure here says anything of one."


def html(record: Record) -> str:
    """One file that needs no other."""
    opening: list[Block] = [Text(conditions(record))]
    if record["rehearsal"]:
        opening.append(Text(REHEARSED, "warning"))
    opening += [_properties(record)] if "compute_capability" in record["environment"] else []
    failed = [part for part in record["parts"].values() if part["outcome"] != "ok"]
    told = [Listing(f"{part['title']}: {part['message']}", part["written"]) for part in failed]
    sections = [
        Section("Parts", [_parts(record), *told]),
        *(Section(table.title, [Table(table.headings, table.rows, table.left)]) for table in tables(record)),
    ]
    return render_page(f"What {record['environment']['device']} computes, and how fast", opening, sections)


def markdown(record: Record) -> str:
    """The parts and their tables, for a page of the documentation."""
    shown = [_parts(record), *tables(record)]
    texts = [f"{table.title}:\n\n{markdown_table(table.headings, _plain(table.rows))}" for table in shown]
    return "\n\n".join([*([f"**{REHEARSED}**"] if record["rehearsal"] else []), conditions(record), *texts])


def _plain(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[cell.replace("|", r"\|") for cell in row] for row in rows]


def tables(record: Record) -> list[Table]:
    """Those of the parts that left figures."""
    figures = {name: part["figures"] for name, part in record["parts"].items() if part["figures"]}
    found = []
    if "tests" in figures:
        found += [_failures(figures["tests"]), _errors(figures["tests"])]
    pretext = {name: value for name, value in figures.items() if name.startswith("pretext-")}
    if pretext:
        found.append(_speeds({record["parts"][name]["title"].partition(", ")[2]: pretext[name] for name in pretext}))
    if "alternation" in figures:
        found.append(_alternation(figures["alternation"]))
    if "files" in figures:
        found.append(_files(figures["files"]))
    return [table for table in found if table.rows]


def _properties(record: Record) -> Table:
    names = ("device_memory_mib", "multiprocessors", "compute_capability", "cuda", "cudnn", "nccl", "gpus")
    return Table(
        ("property", "value"), [(name.replace("_", " "), str(record["environment"][name])) for name in names], 2
    )


def _parts(record: Record) -> Table:
    rows = [
        (part["title"], part["outcome"], part["message"] or "", f"{part['seconds']:.0f}")
        for part in record["parts"].values()
    ]
    return Table(("part", "outcome", "message", "seconds"), rows, 3, "Parts")


def _failures(figures: Record) -> Table:
    rows = [(test["name"], test["message"] or "") for test in figures["tests"] if test["outcome"] == "failed"]
    return Table(("test", "message"), rows, 2, "Tests that failed")


def _errors(figures: Record) -> Table:
    """The largest share of its limit that an error has reached, for each test over all its parameters."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for test in figures["tests"]:
        if test["figures"].keys() >= {"error", "limit"}:
            groups.setdefault(_kind(test["name"]), []).append(test["figures"])
    rows = []
    for name, each in groups.items():
        worst = max(each, key=lambda figure: figure["error"] / figure["limit"])
        rows.append((name, str(len(each)), number(worst["error"]), number(worst["limit"])))
    return Table(("computed", "cases", "error", "limit"), rows, 1, "Errors against float64, where nearest to the limit")


def _kind(name: str) -> str:
    """The test's words with its format and what was computed, the other parameters left out."""
    words, _, parameters = name.rpartition("::")[2].removesuffix("]").partition("[")
    kept = [word for word in ("float64", "float32", "TF32") if f"-{word}-" in f"-{parameters}-"]
    kept += [word for word in ("hypergradient", "product") if parameters.endswith(f"-{word}")]
    return ", ".join([words.removeprefix("test_").replace("_", " "), *kept])


def _speeds(figures: Mapping[str, Record]) -> Table:
    rows = []
    for way, found in figures.items():
        for part in ("pipeline", "step", "whole"):
            for name, row in found[part].items():
                speed = row["images_per_second"]
                memory = f"{found['peak_memory_mib'][name]:.0f}" if part == "step" else ""
                rows.append((way, f"{part}, {name}", *(f"{speed[key]:.0f}" for key in ("median", "q1", "q3")), memory))
    setting = next(iter(figures.values()))["setting"]
    title = f"Pretext training: {setting['backbone']}, {setting['size']} px, batches of {setting['batch']}"
    return Table(("computed in", "what", "images/s", "first quartile", "third quartile", "peak MiB"), rows, 2, title)


def _alternation(figures: Record) -> Table:
    rows = [
        (
            name,
            *(f"{value:.2f}" for value in (row["ratio"], *row["quartiles"])),
            _each(row["error"]),
            ", ".join(map(str, row["hvps"])),
            f"{row['peak_memory_mib']:.0f}",
        )
        for name, row in figures["overhead"].items()
    ]
    plain = figures["plain"]
    seconds = number(plain["seconds"]["median"])
    rows.append(("plain training", "1.00", "", "", "", "", f"{plain['peak_memory_mib']:.0f}"))
    title = (
        f"An alternation in multiples of the plain training in it, which takes {seconds} s; noise floor of the error "
        f"{_each(figures['noise_floor'])}"
    )
    headings = ("setting", "times plain", "first quartile", "third quartile", "error", "HVPs", "peak MiB")
    return Table(headings, rows, 1, title)


def _each(values: Sequence[float]) -> str:
    """One number for each alternation."""
    return ", ".join(number(value) for value in values)


def _files(figures: Record) -> Table:
    rows = [
        (name, f"{row['images_per_second']:.0f}", f"{row['images_per_core_second']:.0f}", str(figures["cores"][name]))
        for name, row in figures["speed"].items()
    ]
    return Table(
        ("way", "images/s", "images/s and core", "cores for 15,000/s"), rows, 1, "Views from files, on the host"
    )
