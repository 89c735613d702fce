"""data.cache in a run: the same batches and stages from whole pictures, other stages from reduced ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.outcome.checks import check_data, check_places, dry_data
from recipes.bissl.settings.config import Config
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.datasets import Datasets, resolution
from recipes.experiment.errors import ConfigError
from recipes.vision.pictures.mapped import MappedImages
from tests.support.recipes.image_trees import picture
from tests.support.recipes.small_runs import batches_of, small_config, small_pipeline


def folder_of(root: Path, side: int) -> Path:
    for label in range(2):
        (root / str(label)).mkdir(parents=True)
        for index in range(40):
            picture(100 * label + index, side, side).save(root / str(label) / f"{index:02d}.png")
    return root


def config(folder: Path, *arguments: str) -> Config:
    return small_config(
        "--preset=images",
        f"--data.pretext=folder:{folder}",
        f"--data.downstream=folder:{folder}",
        "--data.image-size=8",
        "--data.storage=stream",
        "--data.num-workers=0",
        "--downstream.batch-size=6",
        "--seeds=1",
        *arguments,
    )


def artifacts(place: Path, settings: Config) -> list[Any]:
    pipeline = small_pipeline(place, settings.with_crops("uint8"))
    repeat = pipeline.at("bissl", 0)
    weights = pipeline.pretext(repeat)
    warmed = pipeline.head(repeat, weights)
    return [weights, warmed, pipeline.bissl(repeat, warmed), pipeline.finetune(repeat, weights)]


def tensors(artifact: Any) -> dict[str, torch.Tensor]:
    return {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in weights(artifact)}


def weights(artifact: Any) -> list[Path]:
    return sorted(artifact.directory.glob("*.safetensors"))


def test_whole_pictures_make_the_same_stages(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", 20)
    plain = artifacts(tmp_path / "plain", config(folder))
    cached = artifacts(tmp_path / "cached", config(folder, f"--data.cache={tmp_path / 'cache'}"))
    assert len(list((tmp_path / "cache").glob("pictures-*"))) == 4
    assert [one.key for one in plain] == [other.key for other in cached]
    for one, other in zip(plain, cached, strict=True):
        assert weights(one)
        found, expected = tensors(one), tensors(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_reduced_pictures_make_other_stages(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", 160)
    plain = artifacts(tmp_path / "plain", config(folder))
    cached = artifacts(tmp_path / "cached", config(folder, f"--data.cache={tmp_path / 'cache'}"))
    assert all(one.key != other.key for one, other in zip(plain, cached, strict=True))
    # The folder's name does not matter, nor who wrote it.
    (tmp_path / "cache").rename(tmp_path / "moved")
    again = artifacts(tmp_path / "again", config(folder, f"--data.cache={tmp_path / 'moved'}"))
    assert [one.key for one in again] == [other.key for other in cached]


def test_each_set_is_kept_as_its_own_views_need(tmp_path: Path) -> None:
    """Working by hand: crops of 0.2 of the area of 160 x 160 px are 62 px long at least, and become 8 px."""
    data = Datasets(config(folder_of(tmp_path / "data", 160), f"--data.cache={tmp_path / 'cache'}"))
    pretext, train = data.pretext.images, data.downstream.train.images
    assert isinstance(pretext, MappedImages)
    assert isinstance(train, MappedImages)
    assert pretext.at(0).shape == (3, 83, 83)
    assert resolution(data.pretext) == resolution(data.downstream.test) != {}
    assert data.downstream.train.labels is not None
    batches = batches_of(small_pipeline(tmp_path, data.config))
    assert batches.pretext(data.config.pretext_task(), "check", 1).next()[0].shape == (24, 3, 8, 8)


@pytest.mark.parametrize("storage", ["memory", "auto"])
def test_sets_in_memory_are_not_cached(storage: str, tmp_path: Path) -> None:
    settings = config(
        folder_of(tmp_path / "data", 20), f"--data.storage={storage}", f"--data.cache={tmp_path / 'cache'}"
    )
    Datasets(settings).read()
    assert not (tmp_path / "cache").exists()


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(Datasets(config(folder_of(tmp_path / "data", 20), "--data.cache=~/cache")).pretext) > 0
    assert list((tmp_path / "home" / "cache").glob("pictures-*"))


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    settings = config(folder_of(tmp_path / "data", 160), f"--data.cache={tmp_path / 'cache' / 'deep'}")
    computing = Computing(settings.with_crops("uint8").compute, torch.device("cpu"))
    notes = check_data(settings, dry_data(settings), computing).notes
    assert sum("decoded pictures of folder:" in note for note in notes) == 4
    assert all("MiB in" in note for note in notes if "decoded" in note)
    assert not (tmp_path / "cache").exists()
    Datasets(settings).read()
    assert not any("decoded" in note for note in check_data(settings, dry_data(settings), computing).notes)


@pytest.mark.parametrize("inside", ["", "0", "0/deep"])
def test_a_cache_in_the_data_folder_is_refused_before_anything_is_read(inside: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", 20)
    with pytest.raises(ConfigError, match=r"data\.cache: .* lies in"):
        check_places(config(folder, f"--data.cache={folder / inside}").data, {})
