"""The report and the final table, from run directories written by hand."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bilevel import Status
from recipes.bissl.outcome.console_table import comparison_lines, results_table
from recipes.bissl.outcome.report import write_report
from recipes.experiment.records import read_run
from tests.support.html_page import Page


def metrics(*, alternations: int = 6, seeds: int = 2, arms: tuple[str, ...] = ("bissl", "baseline")) -> list[dict]:
    """Every event of every stage, with smooth made-up values and the nulls that real runs contain."""
    rows: list[dict[str, Any]] = []

    def add(stage: str, arm: str, seed: int, event: str, step: int, **values: Any) -> None:
        rows.append({"stage": stage, "variant": arm, "seed": seed, "event": event, "step": step, **values})

    for arm in arms:
        for step in range(10 * alternations):
            add("pretext", arm, 0, "train", step, loss=5 / (step + 1), lr=0.1)
            if step % 20 == 0:
                knn = None if step == 0 else 30.0 + step
                add("pretext", arm, 0, "monitor", step, knn_top1=knn, embedding_spread=0.8, epoch=step // 20)
        for seed in range(seeds):
            for epoch in range(5):
                scores = {"val_loss": 1 / (epoch + 1), "val_top1": 50.0 + epoch + seed, "train_loss": 0.5}
                add("finetune", arm, seed, "epoch", epoch * 10, epoch=epoch, **scores)
    for step in range(10):
        add("head", "bissl", 0, "train", step, loss=2.0 - step / 10, lr=0.1)
    add("head", "bissl", 0, "epoch", 10, val_loss=1.0, val_top1=40.0, epoch=1)
    for alternation in range(1, alternations + 1):
        for k in range(4):
            step = 4 * (alternation - 1) + k
            level = {"loss": 4.0 / (step + 1), "lr": 0.1, "grad_norm": 2.0, "alternation": alternation}
            add("bissl", "bissl", 0, "lower", step, **level)
            solve = {"status": "CONVERGED" if k else "NEGATIVE_CURVATURE", "residual": 10.0 ** -(k + 1)}
            solve |= {"relative_change": 0.2, "cosine": 0.98, "stationarity": 0.3, "num_hvps": 7, "iterations": 5}
            solve |= {"residual_curve": [0.5, 0.1, 10.0 ** -(k + 1)]}
            spectrum = {"ritz_min": 0.9, "ritz_max": 2.0 + k, "stationarity_over_noise": 10.0 * (k + 1)}
            add("bissl", "bissl", 0, "upper", step, **level, **solve, **spectrum, min_curvature=None if k else -0.1)
        add("bissl", "bissl", 0, "alternation", alternation, seconds=1.5)
    add("bissl", "bissl", 0, "adaptation", alternations)
    return rows


def results() -> dict[str, Any]:
    def arm(mean: float, per_seed: list[float], seconds: float) -> dict[str, Any]:
        top1 = {"mean": mean, "std": 1.25, "per_seed": per_seed, "higher_is_better": True}
        loss = {"mean": 0.0123, "std": None, "per_seed": [0.0123], "higher_is_better": False}
        return {"nll": loss, "top1": top1, "pretext_steps": 12345, "label_steps": 678, "seconds": seconds}

    return {
        "preset": "digits",
        "seeds": [0, 1],
        "repeats": "finetune",
        "primary_metric": "top1",
        "variants": {"baseline": arm(81.5, [80.25, 82.75], 99.5), "bissl": arm(84.75, [83.875, 85.625], 100.25)},
        "comparisons": [
            {
                "a": "bissl",
                "b": "baseline",
                "metric": "top1",
                "difference": 3.25,
                "ci95": [-1.5, 8.0],
                "test": "welch",
                "p_value": 0.0421,
                "p_holm": 0.0842,
            }
        ],
        "notes": ["crop: area scale (0.5, 1)"],
        "environment": {"torch": "2.11.0", "device": "cpu"},
    }


def write_run(
    folder: Path, *, rows: list[dict] | None = None, outcome: dict | None = None, config: dict | None = None
) -> Path:
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if outcome is not None:
        (folder / "results.json").write_text(json.dumps(outcome), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = {"preset": "digits", "pretext": {"task": "module:Class", "epochs": 3}}
    folder = write_run(tmp_path_factory.mktemp("run"), rows=metrics(), outcome=results(), config=config)
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_report_asks_nothing_of_the_network(finished: str) -> None:
    page = Page(finished)
    assert not page.open
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "://" not in finished
    assert "@import" not in finished
    assert all(target.startswith("#") for target in finished.split("url(")[1:])
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)


def test_identifiers_in_the_page_are_unique_and_resolve(finished: str) -> None:
    page = Page(finished)
    assert len(page.identifiers) == len(set(page.identifiers))
    referred = {address[1:] for address in page.addresses} | {
        part.split(")")[0][1:] for part in finished.split("url(")[1:]
    }
    assert referred <= set(page.identifiers)


def test_report_holds_the_numbers(finished: str) -> None:
    page = Page(finished)
    rows = {tuple(row[:2]): row[2:] for row in page.cells if len(row) == 7 and row[0] in ("bissl", "baseline")}
    assert rows["bissl", "top1 ↑"] == ["84.75 ± 1.25", "83.88, 85.62", "12,345", "678", "100.2"]
    assert rows["baseline", "nll ↓"] == ["0.0123", "0.0123", "12,345", "678", "99.5"]
    comparison = next(row for row in page.cells if row and row[0] == "bissl − baseline")
    assert comparison == ["bissl − baseline", "top1", "welch", "+3.25", "[−1.50, +8.00]", "0.042", "0.084"]
    assert ["bissl", "0", "NEGATIVE_CURVATURE", Status.NEGATIVE_CURVATURE.value, "6"] in page.cells
    assert ["bissl", "0", "CONVERGED", Status.CONVERGED.value, "18"] in page.cells
    assert ["bissl", "168", "120", "1", "9.0", "25.00"] in page.cells
    assert ["torch", "2.11.0"] in page.cells
    for phrase in ("preset digits", "fine-tuning noise alone", "crop: area scale (0.5, 1)", '"task": "module:Class"'):
        assert phrase in page.text
    assert "Run not finished" not in page.text
    assert page.tags.count("svg") == 5


def test_every_panel_of_a_complete_run_is_drawn(finished: str) -> None:
    assert "not recorded" not in Page(finished).text


def test_data_never_becomes_markup(tmp_path: Path) -> None:
    def hostile(place: str) -> str:
        return f"</pre></td><script>alert('{place}')</script>&amp;"

    rows, outcome = metrics(alternations=1), results()
    rows += [
        row | {"variant": hostile("arm"), "status": hostile("status")} for row in rows if row["variant"] == "bissl"
    ]
    outcome["variants"][hostile("result arm")] = {hostile("metric"): {"mean": hostile("mean")}}
    outcome |= {"preset": hostile("preset"), "primary_metric": hostile("primary"), "seeds": [hostile("seed")]}
    outcome["comparisons"][0] |= {"a": hostile("a"), "metric": hostile("compared"), "test": hostile("test")}
    outcome["notes"].append(hostile("note"))
    outcome["environment"] = {hostile("variable"): hostile("value")}
    config = {"classes": [hostile("class")], hostile("field"): 1}
    source = write_report(write_run(tmp_path, rows=rows, outcome=outcome, config=config)).read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source
    assert "script" not in page.tags
    assert not page.open
    places = [
        "arm",
        "status",
        "result arm",
        "metric",
        "mean",
        "preset",
        "primary",
        "seed",
        "a",
        "compared",
        "test",
        "note",
    ]
    for place in [*places, "variable", "value", "class", "field"]:
        assert hostile(place) in page.text


def test_names_are_no_formulas(tmp_path: Path) -> None:
    rows = [row | {"variant": r"$\frac{$ & x_1"} for row in metrics(alternations=1)]
    assert r"$\frac{$ & x_1" in Page(write_report(write_run(tmp_path, rows=rows)).read_text(encoding="utf-8")).text


def test_unfinished_run(tmp_path: Path) -> None:
    rows = [row for row in metrics() if row["stage"] in ("pretext", "head") and row["event"] != "monitor"]
    page = Page(write_report(write_run(tmp_path, rows=rows, config={"preset": "digits"})).read_text(encoding="utf-8"))
    assert "Run not finished" in page.text
    assert "preset digits" in page.text
    # Two pretext panels, BiSSL's figures and statuses, fine-tuning, and the four sections from results.json.
    assert page.text.count("not recorded") == 10
    assert page.tags.count("svg") == 2


def test_empty_run_directory(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Run not finished" in page.text
    assert "preset not recorded" in page.text


@pytest.mark.parametrize("missing", sorted(results()))
def test_results_with_a_piece_missing(tmp_path: Path, missing: str) -> None:
    outcome = {name: value for name, value in results().items() if name != missing}
    page = Page(write_report(write_run(tmp_path, outcome=outcome)).read_text(encoding="utf-8"))
    assert "not recorded" in page.text
    results_table(outcome)
    comparison_lines(outcome)


def test_null_statistics_of_one_seed(tmp_path: Path) -> None:
    outcome = results()
    outcome["seeds"] = [0]
    for entry in outcome["variants"].values():
        entry["top1"] |= {"std": None, "per_seed": [entry["top1"]["mean"]]}
    outcome["comparisons"][0] |= {"ci95": None, "p_value": None, "p_holm": None}
    page = Page(write_report(write_run(tmp_path, outcome=outcome)).read_text(encoding="utf-8"))
    comparison = next(row for row in page.cells if row and row[0] == "bissl − baseline")
    assert comparison[3:] == ["+3.25", "not recorded", "not recorded", "not recorded"]
    assert comparison_lines(outcome)[0].startswith("bissl − baseline, top1: +3.25; 95% interval not recorded; welch")


def test_cut_off_last_line_is_left_out_and_mentioned(tmp_path: Path) -> None:
    rows = metrics(alternations=1)
    write_run(tmp_path, rows=rows)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"stage": "pretext", "variant": "é'.encode()[:-1])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert f"Line {len(rows) + 1} of metrics.jsonl" in page.text
    assert read_run(tmp_path).events == tuple(rows)


def test_complete_last_line_without_its_line_end_counts(tmp_path: Path) -> None:
    rows = metrics(alternations=1)
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.partial_line is None
    assert run.events == tuple(rows)


@pytest.mark.parametrize(
    "broken",
    [
        '{"stage": "pre',
        "[1, 2]",
        '{"stage": "pretext"}',
        '{"stage":"a","variant":"b","seed":"0","event":"c","step":1}',
        "\\",
    ],
)
def test_broken_line_names_its_number(tmp_path: Path, broken: str) -> None:
    lines = [json.dumps(row) for row in metrics(alternations=1)[:3]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], broken, lines[2]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], broken]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        write_report(tmp_path)


def test_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    rows = [metrics(alternations=1)[0] | {"loss": "high"}]
    with pytest.raises(ValueError, match=r"'loss' is 'high' at stage 'pretext', event 'train', step 0"):
        write_report(write_run(tmp_path, rows=rows))


@pytest.mark.parametrize("name", ["results.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_artifact_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        write_report(tmp_path)


def test_run_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_dir"):
        write_report(tmp_path / "nowhere")


def test_missing_matplotlib_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "bilevel\[demo\]"'):
        write_report(write_run(tmp_path, rows=metrics(alternations=1)))


def test_console_table() -> None:
    outcome = results()
    outcome["variants"]["[red]odd"] = {"top1": outcome["variants"]["bissl"]["top1"]}
    console = Console(file=io.StringIO(), width=200, color_system=None, record=True)
    console.print(results_table(outcome))
    lines = console.export_text().splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    assert cells["bissl"] == ["84.75 ± 1.25", "0.0123", "12,345", "678", "100.2"]
    assert cells["baseline"][0] == "81.50 ± 1.25"
    assert cells["[red]odd"] == ["84.75 ± 1.25"] + ["not recorded"] * 4
    assert list(cells).index("bissl") < list(cells).index("baseline")


def test_comparison_lines() -> None:
    first, meaning = comparison_lines(results())
    assert first == (
        "bissl − baseline, top1: +3.25; 95% interval [−1.50, +8.00]; welch; p = 0.042; "
        "after Holm's correction p = 0.084"
    )
    assert "fine-tuning noise alone" in meaning
    assert "fine-tuning noise" not in comparison_lines(results() | {"repeats": "pipeline"})[1]
    assert comparison_lines(results() | {"comparisons": []}) == []
