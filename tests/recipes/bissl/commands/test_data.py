"""``run.py data list | verify | download``: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.bissl.commands.data import main
from recipes.vision.errors import DataError
from recipes.vision.sources.published.catalog import DATASETS
from recipes.vision.sources.published.verify import verify
from tests.support.recipes.dataset_trees import small


def test_list_shows_every_set_and_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    small("pets", tmp_path, monkeypatch)
    small("dtd", tmp_path, monkeypatch)
    (tmp_path / "dtd/dtd/labels/val1.txt").unlink()
    assert main(["list", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    printed = {line.split()[1]: line for line in shown if line.startswith("│")}
    assert set(DATASETS) <= set(printed)
    assert printed["pets"].split()[-2] == "yes"
    assert "2,946 / 734 / 3,669" in printed["pets"]
    assert "in part: 1 of 4 missing" in printed["dtd"]
    assert "no, by hand" in printed["cars"]
    assert "100,000" in printed["stl10"]
    by_hand = {line.partition(": ")[0]: line for line in shown if "official download is gone" in line}
    assert list(by_hand) == ["cars", "sun397"]
    assert "unpack them inside stanford_cars, so that" in by_hand["cars"]
    assert f"so that {tmp_path} holds SUN397/ClassName.txt, SUN397/Training_01.txt" in by_hand["sun397"]


def test_verify_says_that_a_set_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("voc2007", tmp_path, monkeypatch)
    assert main(["verify", "voc2007", "--root", str(tmp_path), "--sample", "7"]) == 0
    assert capsys.readouterr().out == "voc2007: whole; 60 images counted, 7 decoded\n"
    assert main(["verify", "--root", str(tmp_path), "--all"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "voc2007: whole; 60 images counted, 60 decoded" in printed
    assert "stl10: not on disk" in printed
    assert len(printed) == 14


def test_verify_finds_every_broken_image_and_a_sample_only_those_it_meets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, expected = small("food101", tmp_path, monkeypatch)
    broken = [expected["train"][1][0], expected["train"][8][0], expected["test"][3][0]]
    for file in broken:
        file.write_bytes(file.read_bytes()[:300])
    assert main(["verify", "food101", "--root", str(tmp_path), "--all"]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    for line, file in zip(printed, broken, strict=True):
        assert line.startswith("food101: ")
        assert f"{file} cannot be decoded" in line
    seen = {len(verify(dataset, tmp_path, sample=5, seed=seed).problems) for seed in range(6)}
    assert seen <= {0, 1, 2, 3}
    assert len(seen) > 1
    assert verify(dataset, tmp_path, sample=5, seed=3) == verify(dataset, tmp_path, sample=5, seed=3)


def test_verify_of_a_named_set_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "cars", "sun397", "--root", str(tmp_path)]) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"cars: missing are 5 of 5 files and folders: {tmp_path}/stanford_cars/devkit/cars_meta.mat, "
    )
    assert "cars_test.tgz" in first
    assert second.startswith(f"sun397: missing are 4 of 4 files and folders: {tmp_path}/SUN397/ClassName.txt, ")
    assert "Partitions.zip" in second


def test_verify_names_everything_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("dtd", tmp_path, monkeypatch)
    labels = tmp_path / "dtd/dtd/labels"
    (labels / "val1.txt").unlink()
    (labels / "test1.txt").unlink()
    assert main(["verify", "dtd", "--root", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"dtd: missing are 2 of 4 files and folders: {labels}/val1.txt, {labels}/test1.txt; download"
    )


def test_verify_without_names_fails_on_a_broken_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("sun397", tmp_path, monkeypatch)
    (tmp_path / "SUN397/a/abbey/sun_train0.jpg").unlink()
    assert main(["verify", "--root", str(tmp_path)]) == 2
    assert "Training_01.txt names 1 image(s) that are missing" in capsys.readouterr().out


def test_download_of_a_whole_set_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", never)
    small("cub200", tmp_path, monkeypatch)
    assert main(["download", "cub200", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "cub200: whole; 20 images counted, 20 decoded\n"
    with pytest.raises(DataError, match="Stanford Cars cannot be downloaded"):
        main(["download", "cars", "--root", str(tmp_path)])


@pytest.mark.parametrize("command", ["verify", "download"])
def test_unknown_names_and_numbers(command: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no published data set 'fashion_mnist'; there are: stl10, .*fashion-mnist"):
        main([command, "fashion_mnist", "--root", str(tmp_path)])
    with pytest.raises(DataError, match="--sample must be at least 1, got 0"):
        main(["verify", "--sample", "0", "--root", str(tmp_path)])
