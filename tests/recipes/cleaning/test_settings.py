"""Fields of the configuration, and what a command line makes of them."""

from pathlib import Path

import pytest

from recipes.cleaning.command import COMMAND_LINE
from recipes.cleaning.settings import Config
from recipes.experiment.errors import ConfigError


def parsed(*arguments: str) -> Config:
    return COMMAND_LINE.parse(arguments).config


def test_without_a_source_digits_with_planted_labels_are_taken() -> None:
    assert (parsed().data.source, parsed().data.flips) == ("digits", "pair:0.4")
    assert parsed("--flips", "uniform:0.2").data.flips == "uniform:0.2"
    assert parsed("--data", "digits").data.flips is None
    assert parsed("--truth", "x.csv").data.flips is None
    assert parsed("run", "--data", "folder:x").data.source == "folder:x"


def test_short_names_are_those_of_the_data_section() -> None:
    config = parsed("--data=folder:a", "--trusted", "folder:b", "--truth=t.csv", "--trusted_fraction", "0.2")
    assert config.data.model_dump(include={"source", "trusted", "truth", "trusted_fraction"}) == {
        "source": "folder:a",
        "trusted": "folder:b",
        "truth": "t.csv",
        "trusted_fraction": 0.2,
    }


@pytest.mark.parametrize(
    ("arguments", "kind", "side"),
    [
        ((), "pixels", 8),
        (("--data=folder:x",), "patches", 32),
        (("--data=folder:x", "--model.image-size=16"), "pixels", 16),
        (("--data=folder:x", "--backbone=resnet-tiny"), "backbone", 224),
        (("--data=folder:x", "--model.features=pixels", "--model.image-size=24"), "pixels", 24),
    ],
)
def test_features_that_are_not_named_follow_from_the_pictures(arguments: tuple[str, ...], kind: str, side: int) -> None:
    section = parsed(*arguments).features.section
    assert (section.features, section.image_size) == (kind, side)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--flips", "pair:1.5"], "data.flips: must be uniform:SHARE"),
        (["--flips", "swap:0.1"], "data.flips: must be uniform:SHARE"),
        (["--flips", "pair:0.1", "--truth", "x.csv"], "truth and flips exclude each other"),
        (["--folds", "1"], "folds: Input should be greater than or equal to 2, got '1'"),
        (["--model.init-backbone", "x.pt"], "backbone: name the network"),
        (["--backbone", "nothing"], "nothing"),
        (["--backbone", "resnet-tiny", "--model.features", "patches"], "patches are of no backbone"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["look"], "unknown command 'look'; there is run"),
        (["--nothing"], "--help lists all options"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(*arguments)


def test_a_file_whose_data_is_no_table_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"data": 5}')
    with pytest.raises(ConfigError, match=r"^data: .*, got 5"):
        parsed("--config", str(tmp_path / "mine.json"))


def test_a_resumed_run_has_the_fields_it_was_begun_with(tmp_path: Path) -> None:
    begun = COMMAND_LINE.parse(["--data=digits", "--seed=3", f"--output-dir={tmp_path}"])
    with begun.directory.leased(begun.config, resume=False, overwrite=False):
        (tmp_path / "metrics.jsonl").touch()
    again = COMMAND_LINE.parse([f"--output-dir={tmp_path}", "--resume", "--seeds", "2"]).config
    assert again == begun.config.model_copy(update={"seeds": 2})
