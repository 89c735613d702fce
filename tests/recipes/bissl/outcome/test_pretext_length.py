"""The command `figure2`: configurations of each length, equal steps, numbers, resuming, refusals."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg

from recipes.bissl.commands import figure2
from recipes.bissl.outcome.pretext_length import curve
from recipes.bissl.outcome.pretext_length.curve import length_curve_png
from recipes.bissl.outcome.pretext_length.runs import config_at, warmup_cut
from recipes.bissl.outcome.side_by_side import all_stages
from recipes.bissl.outcome.wording import shown_name
from recipes.bissl.settings.config import Config
from recipes.bissl.settings.plan import make_plan
from recipes.bissl.settings.presets import PRESETS
from recipes.experiment.errors import ConfigError
from tests.support.recipes.small_runs import SMALL_OPTIONS, files, results, small_config

IMAGES = 100_000


def never() -> int:
    raise AssertionError("the number of images is not needed")


@pytest.mark.parametrize("epochs", [101, 200, 600, 1000])
def test_the_papers_warm_up_is_100_epochs_shorter(epochs: int) -> None:
    preset = PRESETS["paper-flowers"]("v2")
    cut = warmup_cut(preset, never)
    assert cut == 100
    config = config_at(preset, epochs, cut)
    assert (config.pretext.epochs, config.pretext.baseline_epochs) == (epochs - 100, epochs)
    # 98 batches of 1024 in 100,000 images.
    assert make_plan(config, "baseline", IMAGES, 1020).pretext == 98 * epochs
    assert make_plan(config, "bissl", IMAGES, 1020).pretext == 98 * (epochs - 100)
    assert config_at(preset, 600, cut) == preset


@pytest.mark.parametrize(("lower_steps", "cut"), [(2, 2), (3, 3), (4, 4)])
def test_both_arms_make_equal_pretext_steps_by_default(lower_steps: int, cut: int) -> None:
    # Two batches an epoch, two alternations.
    config = small_config(f"--bissl.lower-steps={lower_steps}")
    assert warmup_cut(config, lambda: 48) == cut
    for epochs in (cut + 1, 9):
        plans = [make_plan(config_at(config, epochs, cut), arm, 48, 30) for arm in ("bissl", "baseline")]
        assert [plan.pretext_steps for plan in plans] == [2 * epochs, 2 * epochs]


def test_parts_of_an_epoch_are_rounded() -> None:
    # 2 * 2 steps of 5 batches an epoch are 0.8 epochs: the lengths differ by less than half an epoch.
    config = small_config()
    cut = warmup_cut(config, lambda: 120)
    assert cut == 1
    plans = [make_plan(config_at(config, 6, cut), arm, 120, 30) for arm in ("bissl", "baseline")]
    assert [plan.pretext_steps for plan in plans] == [29, 29]


def test_what_is_too_short_or_reversed_is_refused() -> None:
    config = small_config()
    with pytest.raises(ConfigError, match=r"--epochs: 2 is too short: .* counts for 2 .* would have 0; the least is 3"):
        config_at(config, 2, 2)
    reversed_ = small_config("--pretext.epochs=8", "--pretext.baseline-epochs=7")
    with pytest.raises(ConfigError, match=r"pretext\.baseline_epochs: 7 is less than pretext\.epochs, 8"):
        warmup_cut(reversed_, never)


def sweep(folder: Path, *options: str) -> int:
    return figure2.main([*SMALL_OPTIONS, "--finetune.epochs=2", "--output-dir", str(folder), *options])


def test_a_sweep_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fig"
    # Drawn for seconds, and tested elsewhere.
    monkeypatch.setattr(all_stages, "write_report", lambda path: None)
    assert sweep(folder, "--epochs", "5,3") == 0
    content = json.loads((folder / "figure2.json").read_text())
    rows = list(csv.DictReader(io.StringIO((folder / "figure2.csv").read_text())))
    assert [point["epochs"] for point in content["points"]] == [3, 5]
    assert (content["metric"], content["warmup_shorter_by"]) == ("top1", 2)
    for point in content["points"]:
        outcome = results(folder / point["run"])
        for arm in ("bissl", "baseline"):
            values = outcome["variants"][arm]["top1"]["per_seed"]
            entry = point["arms"][arm]
            assert entry["per_seed"] == values
            assert entry["mean"] == pytest.approx(np.mean(values))
            assert entry["std"] == pytest.approx(np.std(values, ddof=1))
            assert entry["pretext_steps"] == outcome["variants"][arm]["pretext_steps"] == 2 * point["epochs"]
            own = [row for row in rows if (row["epochs"], row["arm"]) == (str(point["epochs"]), arm)]
            assert [float(row["value"]) for row in own] == values
            assert {float(row["mean"]) for row in own} == {entry["mean"]}
        saved = Config.model_validate_json((folder / point["run"] / "config.json").read_text())
        assert saved == config_at(small_config("--finetune.epochs=2"), point["epochs"], 2)
    # BiSSL's warm-up to 5 epochs is the baseline's training of 3.
    assert len(list((folder / "artifacts").glob("pretext-*/artifact.json"))) == 3

    before = files(folder)
    with pytest.raises(ConfigError, match="holds finished runs already; go on with --resume"):
        sweep(folder, "--epochs", "3,5")
    # An interrupted run goes on from its finished stages; a finished one is not touched.
    (folder / "epochs-5" / "results.json").unlink()
    (folder / "figure2.json").unlink()
    capsys.readouterr()
    assert sweep(folder, "--epochs", "3,5", "--resume") == 0
    assert f"3 pretext epochs: found in {folder / 'epochs-3'}" in capsys.readouterr().out
    after = files(folder)
    assert after == before
    # More seeds are another figure, although the folder's configuration may change to them.
    monkeypatch.setattr(figure2, "run_whole", lambda pipeline, directory: pytest.fail(str(directory.path.name)))
    with pytest.raises(pytest.fail.Exception, match="epochs-3"):
        sweep(folder, "--epochs", "3", "--resume", "--seeds=3")
    with pytest.raises(pytest.fail.Exception, match="epochs-3"):
        sweep(folder, "--epochs", "3", "--resume", "--seeds=3")
    with pytest.raises(ConfigError, match=r"bissl\.gamma"):
        sweep(folder, "--epochs", "5", "--resume", "--bissl.gamma=0.02")


REFUSED = {
    "too short": (["--epochs", "2,9"], "--epochs: 2 is too short"),
    "no numbers": (["--epochs", "3,x"], "--epochs: must be whole numbers separated by commas, got '3,x'"),
    "zero": (["--epochs", "0,3"], "--epochs: must be above 0, each given once"),
    "twice": (["--epochs", "3,3"], "--epochs: must be above 0, each given once"),
    "a stage": (["pretext", "--epochs", "3"], "figure2: runs whole pipelines, not the stage 'pretext'"),
    "overwrite": (["--epochs", "3", "--overwrite"], "--overwrite: figure2 replaces no runs"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_options_write_nothing(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path / "fig", *options)
    assert message in str(caught.value)
    assert not (tmp_path / "fig").exists()


def test_a_folder_is_shown_by_its_last_part() -> None:
    names = (
        "folder:/a/b/c",
        "folder:c/",
        "hf:/a/b?image=photo",
        "webdataset:/a/x-{0..9}.tar",
        "flowers",
        "own.set:Own",
    )
    assert [shown_name(name) for name in names] == ["c", "c", "b", "x-{0..9}.tar", "flowers", "own.set:Own"]


def test_a_runs_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is the folder of a single run"):
        sweep(tmp_path, "--epochs", "3")


def test_a_dry_run_tells_steps_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "fig", "--epochs", "3,5", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "epochs-3: 3 pretext epochs" in shown
    assert "pretext 6 + lower 4 = 10 pretext steps" in shown
    assert "baseline: pretext 10 + lower 0 = 10 pretext steps" in shown
    assert not (tmp_path / "fig").exists()


def test_a_long_note_is_not_cut_off_and_bars_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    real = curve.matplotlib_parts

    def remembering(what: str) -> Any:
        figure_class, context = real(what)

        def make(**options: Any) -> Any:
            drawn.append(figure_class(**options))
            return drawn[-1]

        return make, context

    monkeypatch.setattr(curve, "matplotlib_parts", remembering)
    lines = {arm: [(4.0, 50.0, 5.0), (12.0, 60.0, 5.0)] for arm in ("bissl", "baseline", "scratch")}
    length_curve_png(lines, title="t", metric="top1 (%)", note="a word or two " * 15)
    (figure,) = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 < figure.axes[0].get_tightbbox(renderer).y0
    starts = sorted(container.lines[0].get_xdata()[0] for container in figure.axes[0].containers)
    assert len(set(starts)) == 3
    assert max(abs(x - 4.0) for x in starts) < 0.1


@pytest.mark.parametrize("epochs", [(3,), (10, 20, 40), (10, 20, 30, 50, 100, 200, 400, 600, 601)])
def test_the_figure_is_repeatable_and_not_empty(epochs: tuple[int, ...]) -> None:
    lines = {arm: [(float(e), 50.0 + e / 20 + i, 2.0) for e in epochs] for i, arm in enumerate(("bissl", "$base_"))}
    first, second = (length_curve_png(lines, title="$x_1", metric="top1 (%)", note="note") for _ in range(2))
    assert first == second
    pixels = image.imread(io.BytesIO(first))[..., :3]
    blue, orange = (
        np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02 for colour in ((47, 127, 208), (224, 115, 43))
    )
    assert blue.sum() > 50
    assert orange.sum() > 50
