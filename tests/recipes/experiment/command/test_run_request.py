"""The command line of a recipe without presets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from recipes.experiment.command.run_request import CommandLine, RunRequest
from recipes.experiment.configuration import Section
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.run_folder import RunDirectory


class Inner(Section):
    """A part."""

    batch_size: int = Field(default=2, ge=1, description="rows")


class Settings(Section):
    """A configuration."""

    name: str = Field(default="", description="what")
    inner: Inner = Inner()


def directory(path: Path) -> RunDirectory:
    return RunDirectory(path, frozenset({"name", "inner"}), frozenset())


def example(given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {} if "name" in given else {"name": "example", "inner": {"batch_size": 7}}


LINE = CommandLine(Settings(), "What it does.", Path("runs/x"), directory, {"--size": "--inner.batch-size"}, example)


def parsed(*arguments: str) -> RunRequest[Settings]:
    return LINE.parse(arguments)


def test_fields_are_options_in_any_spelling() -> None:
    for option in ("--inner.batch-size=5", "--inner.batch_size=5", "--size=5"):
        assert parsed("--name", "a", option).config == Settings(name="a", inner=Inner(batch_size=5))


def test_where_and_how() -> None:
    request = parsed("--name=a", "--output-dir", "there", "--artifacts", "kept", "--dry-run", "--overwrite")
    assert (request.directory.path, request.artifacts) == (Path("there"), Path("kept"))
    assert (request.resume, request.overwrite, request.dry_run) == (False, True, True)
    assert parsed("run").artifacts == Path("runs/x/checkpoints")


def test_an_example_fills_what_is_not_given() -> None:
    assert parsed().config == Settings(name="example", inner=Inner(batch_size=7))
    assert parsed("--size=3").config == Settings(name="example", inner=Inner(batch_size=3))
    assert parsed("--name=a").config.inner.batch_size == 2


def test_options_come_before_the_file_and_that_before_what_is_saved(tmp_path: Path) -> None:
    run = directory(tmp_path / "run")
    run.open(Settings(name="saved", inner=Inner(batch_size=4)), resume=False, overwrite=False)
    (run.path / "metrics.jsonl").touch()
    here = ("--output-dir", str(run.path))
    assert parsed(*here, "--resume").config == Settings(name="saved", inner=Inner(batch_size=4))
    (tmp_path / "file.toml").write_text("name = 'file'\n")
    config = ("--config", str(tmp_path / "file.toml"))
    assert parsed(*here, "--resume", *config).config == Settings(name="file", inner=Inner(batch_size=4))
    assert parsed(*config, "--name=option").config.name == "option"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size=0"], r"inner\.batch_size: Input should be greater than or equal to 1, got '0'"),
        (["--nothing"], "unrecognized arguments: --nothing; --help lists all options"),
        (["walk"], "command: unknown command 'walk'; there is run"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--inner", "{"], "--"),
        (["--config", "none.json"], r"none\.json: cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(*arguments)
