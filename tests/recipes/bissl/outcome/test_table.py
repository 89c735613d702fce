"""Table 1 from finished runs: numbers, correction over the rows, files, escaping, and what is refused."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from recipes.bissl.commands.table import FILES, main
from recipes.bissl.outcome.summary import ArmResult, assemble
from recipes.experiment.errors import ConfigError
from tests.support.recipes.small_runs import execute, small_config

DTD = {"bissl": [52.1, 51.4, 52.9, 51.0], "baseline": [49.5, 49.0, 50.3, 48.6]}
PETS = {"bissl": [67.8, 66.1, 68.0, 67.2], "baseline": [67.1, 66.9, 67.5, 66.2], "identity": [67.9, 66.0, 67.5, 67.1]}
VOC = {"bissl": [60.1, 60.6, 60.2, 60.4], "baseline": [60.0, 60.3, 60.4, 60.1]}


def write_run(folder: Path, dataset: str, scores: dict[str, list[float]], **changes: Any) -> Path:
    """A run directory with a config and the results that `assemble` makes of the scores."""
    options = {"repeats": "finetune", "primary_metric": "top1", "notes": [], "environment": {}, **changes}
    notes, metric = options.pop("notes"), options["primary_metric"]
    costs = {"bissl": (59_000, 10_720, 7200.0)}
    arms = {
        name: ArmResult({metric: values}, *costs.get(name, (58_800, 6_400, 3600.0))) for name, values in scores.items()
    }
    results = assemble("x", range(4), arms=arms, higher_is_better={metric: True}, **options)
    folder.mkdir(parents=True)
    config = {"preset": "x", "data": {"downstream": dataset}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({**results, "notes": notes}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    voc = write_run(tmp_path / "c", "voc2007", VOC, primary_metric="map11", repeats="pipeline")
    dtd = write_run(tmp_path / "a", "dtd", DTD, notes=["a random crop of 0.5 to 1 of the image's area"])
    return [str(voc), str(dtd), str(write_run(tmp_path / "b", "pets", PETS))]


def records(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def make(runs: list[str], folder: Path, *options: str) -> dict[str, str]:
    assert main([*runs, "--to", str(folder), *options]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_text() for name in FILES}


def p_of(test: Any) -> float:
    return float(test.pvalue)


def holm_by_hand(p_values: list[float]) -> list[float]:
    """The smallest level at which Holm's procedure rejects each hypothesis, tried one level after another."""
    levels = [sum(other >= p for other in p_values) * p for p in p_values]
    return [min(1.0, max(level for level, q in zip(levels, p_values, strict=True) if q <= p)) for p in p_values]


def test_rows_are_the_papers_order_and_holm_is_over_the_table(runs: list[str], tmp_path: Path) -> None:
    make(runs, tmp_path / "t")
    rows = records(tmp_path / "t" / "table.csv")
    assert [(row["dataset"], row["metric"]) for row in rows] == [
        ("dtd", "top1"),
        ("pets", "top1"),
        ("voc2007", "map11"),
    ]
    expected = [
        p_of(stats.ttest_ind(DTD["bissl"], DTD["baseline"], equal_var=False)),
        p_of(stats.ttest_ind(PETS["bissl"], PETS["baseline"], equal_var=False)),
        p_of(stats.ttest_rel(VOC["bissl"], VOC["baseline"])),
    ]
    assert [float(row["p_value"]) for row in rows] == pytest.approx(expected)
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(holm_by_hand(expected))
    assert float(rows[0]["p_holm"]) == pytest.approx(3 * expected[0])
    assert [row["test"] for row in rows] == ["welch (fine-tuning noise only)"] * 2 + ["paired t"]
    dtd = rows[0]
    assert float(dtd["bissl_mean"]) == pytest.approx(51.85)
    assert float(dtd["difference"]) == pytest.approx(51.85 - 49.35)
    assert (dtd["paper_bissl_mean"], dtd["paper_baseline_std"]) == ("51.8", "0.5")
    assert (rows[2]["paper_bissl_mean"], rows[2]["paper_baseline_mean"]) == ("60.4", "58.6")


def test_arms_with_their_cost(runs: list[str], tmp_path: Path) -> None:
    make(runs, tmp_path / "t")
    rows = records(tmp_path / "t" / "arms.csv")
    found = [(row["dataset"], row["arm"], row["pretext_steps"], row["label_steps"], row["hours"]) for row in rows]
    plain, ours = ("58800", "6400", "1.0"), ("59000", "10720", "2.0")
    assert found == [
        *(("dtd", "bissl", *ours), ("dtd", "baseline", *plain)),
        *(("pets", "bissl", *ours), ("pets", "baseline", *plain), ("pets", "identity", *plain)),
        *(("voc2007", "bissl", *ours), ("voc2007", "baseline", *plain)),
    ]
    identity = rows[4]
    expected = p_of(stats.ttest_ind(PETS["bissl"], PETS["identity"], equal_var=False))
    assert float(identity["p_value"]) == pytest.approx(expected)
    own = rows[2]
    assert (own["difference"], own["p_value"], own["p_holm"]) == ("", "", "")
    tested = [row for row in rows if row["p_value"]]
    corrected = holm_by_hand([float(row["p_value"]) for row in tested])
    assert [float(row["p_holm"]) for row in tested] == pytest.approx(corrected)


def test_markdown_is_printed_and_says_what_the_numbers_are(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make(runs, tmp_path / "t", "--paper-version", "v1")
    shown = capsys.readouterr().out
    assert texts["table.md"] in shown
    cells = [cell.strip() for cell in texts["table.md"].splitlines()[4].split("|")[1:-1]]
    assert cells[:6] == ["dtd", "top1", "welch (fine-tuning noise only)", "51.85 ± 0.83", "49.35 ± 0.73", "+2.50"]
    assert cells[-4:] == ["4", "52.1 ± 0.5", "49.3 ± 0.5", "+2.8"]
    for said in (
        "dtd: a random crop of 0.5 to 1 of the image's area",
        "Table 1 of version 1",
        "corrected over all rows of its table",
        "measure fine-tuning noise alone",
        "The whole pipeline was repeated",
    ):
        assert said in texts["table.md"]
    widths = [line.count(" | ") for line in texts["table.md"].splitlines() if line.startswith("| ")]
    assert widths == [12] * 5 + [10] * 9


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_names_are_escaped_in_every_format(tmp_path: Path) -> None:
    hostile = "folder:<b>a_b & 50%</b>|#$^~{x}\\"
    run = write_run(tmp_path / "r", hostile, DTD, notes=["<script>1</script>\nnext_line"])
    texts = make([str(run)], tmp_path / "t")
    page = Cells()
    page.feed(texts["table.html"])
    assert hostile in page.text
    assert not {"b", "script", "x"} & set(page.tags)
    row = next(line for line in texts["table.md"].splitlines() if "folder" in line)
    assert r"folder:\<b>a_b & 50%\</b>\|#$^~{x}\\ |" in row
    assert r"- folder:\<b>a_b & 50%\</b>|#$^~{x}\\: \<script>1\</script> next_line" in texts["table.md"]
    latex = next(line for line in texts["table.tex"].splitlines() if line.startswith("folder"))
    assert r"\& 50\%" in latex
    assert r"\#\$\textasciicircum{}\textasciitilde{}\{x\}\textbackslash{}" in latex
    assert "±" not in texts["table.tex"]
    assert r"$<$script$>$1$<$/script$>$ next\_line" in texts["table.tex"]


def test_every_table_has_the_runs_notes_and_says_whose_hours_they_are(tmp_path: Path) -> None:
    crop = "a random crop of 0.5 to 1 of the area"
    gpu = {"device": "cuda", "device_name": "Some GPU"}
    first = str(write_run(tmp_path / "a", "dtd", DTD, notes=[crop], environment=gpu))
    second = str(write_run(tmp_path / "b", "pets", PETS, environment={"device": "cpu", "device_name": "Some CPU"}))
    texts = make([str(first)], tmp_path / "gpu")
    assert all(crop in text and "made on Some GPU" in text for text in texts.values())
    assert r"\item dtd: " + crop in texts["table.tex"]
    mixed = make([first, second], tmp_path / "mixed")
    for name in ("table.md", "table.tex", "table.html"):
        assert "GPU hours" in texts[name]
        assert "GPU hours" not in mixed[name]
    assert [row["notes"] for row in records(tmp_path / "mixed" / "table.csv")] == [
        f"{crop}; made on Some GPU",
        "made on Some CPU",
    ]


def test_an_unknown_set_and_a_single_seed_have_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "digits", {"bissl": [80.0], "baseline": [79.0]})
    texts = make([str(run)], tmp_path / "t")
    cells = [cell.strip() for cell in texts["table.md"].splitlines()[4].split("|")[1:-1]]
    assert cells[2] == "welch (undefined: a single value has no spread) (fine-tuning noise only)"
    assert cells[3:7] == ["80.00", "79.00", "+1.00", "not recorded"]
    assert cells[7:9] == ["–", "–"]
    assert cells[-3:] == ["–"] * 3


def test_two_runs_on_one_set_are_told_apart_and_one_given_twice_counts_once(tmp_path: Path) -> None:
    first, second = (str(write_run(tmp_path / name, "dtd", DTD)) for name in ("first", "second"))
    make([first, second, first], tmp_path / "t")
    assert [row["dataset"] for row in records(tmp_path / "t" / "table.csv")] == ["dtd (first)", "dtd (second)"]


DAMAGES = {
    "no run": (lambda run: (run / "config.json").unlink(), "holds no run, there is no config.json"),
    "unfinished": (lambda run: (run / "results.json").unlink(), "not finished, there is no results.json"),
    "cut off": (lambda run: (run / "results.json").write_text('{"seeds": ['), "results.json: damaged (config file "),
    "no arm": (lambda run: change(run, "variants", {}), "damaged, variants: 'bissl' has no 'top1', the primary metric"),
    "no repeats": (lambda run: change(run, "repeats", "often"), "damaged, repeats: "),
    "bad p": (lambda run: change(run, "comparisons", [{"p_value": 2.0}]), "comparisons.0.p_value: "),
    "no set": (
        lambda run: (run / "config.json").write_text('{"data": {}}'),
        "data.downstream must be a name, got None",
    ),
}


def change(run: Path, field: str, value: Any) -> None:
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**content, field: value}))


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_bad_runs_are_named_or_left_out(
    damage: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, message = DAMAGES[damage]
    harm(Path(runs[1]))
    with pytest.raises(ConfigError) as refused:
        main([*runs, "--to", str(tmp_path / "t")])
    assert message in str(refused.value)
    assert runs[1] in str(refused.value)
    assert "--skip-unfinished" in str(refused.value)
    assert not (tmp_path / "t").exists()
    make(runs, tmp_path / "t", "--skip-unfinished")
    assert f"left out: {runs[1]}" in capsys.readouterr().err
    assert [row["dataset"] for row in records(tmp_path / "t" / "table.csv")] == ["pets", "voc2007"]
    with pytest.raises(ConfigError, match="none of the runs is finished"):
        main([runs[1], "--skip-unfinished", "--to", str(tmp_path / "u")])


def test_nothing_is_overwritten_unasked(runs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "t"
    before = make(runs, folder)
    with pytest.raises(ConfigError, match=r"--to: .* holds table.md, .*; replace them with --overwrite"):
        main([runs[0], "--to", str(folder)])
    assert {name: (folder / name).read_text() for name in FILES} == before
    assert make([runs[0]], folder, "--overwrite") != before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        main([runs[0], "--to", str(tmp_path / "file")])


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("RUN_DIR", "--to", "--skip-unfinished", "--overwrite", "--paper-version"))


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.bissl.outcome.side_by_side.all_stages.write_report", lambda folder: None)
    folder = tmp_path / "run"
    assert execute("--output-dir", str(folder), "--finetune.epochs", "2") == 0
    texts = make([str(folder)], tmp_path / "t")
    results = json.loads((folder / "results.json").read_text())
    rows = records(tmp_path / "t" / "arms.csv")
    assert [row["arm"] for row in rows] == ["bissl", "baseline"]
    for row in rows:
        arm = results["variants"][row["arm"]]
        assert float(row["arm_mean"]) == arm["top1"]["mean"]
        assert float(row["hours"]) == pytest.approx(arm["seconds"] / 3600)
    crop = small_config().pretext_task().describe_views()[0]
    assert f"digits: {crop}" in texts["table.md"]


def test_the_paper_s_version_is_that_of_the_runs(runs: list[str], tmp_path: Path) -> None:
    """Without the option; runs of both versions need it."""
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        shutil.copytree(runs[0], folder)
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "paper_version": "v1"}))
    assert "Paper: Table 1 of version 1." in make([str(first)], tmp_path / "tables 1")["table.md"]
    assert "Paper: Table 1 of version 2." in make([str(second)], tmp_path / "tables 2")["table.md"]
    with pytest.raises(ConfigError, match="--paper-version: the runs were made with values of both versions"):
        make([str(first), str(second)], tmp_path / "tables 3")
    assert "version 2" in make([str(first), str(second)], tmp_path / "tables 3", "--paper-version", "v2")["table.md"]
