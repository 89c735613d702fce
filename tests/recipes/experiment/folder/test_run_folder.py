"""The folder of a run: what may be written where, and what is left alone."""

from pathlib import Path
from typing import Any

import pytest

from recipes.bissl.settings.config import Config, build_config
from recipes.bissl.settings.presets import PRESETS
from recipes.bissl.settings.run_directory import SAFE_TO_CHANGE, run_directory
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.run_folder import CHECKPOINTS, CONFIG, METRICS, RunDirectory
from tests.recipes.bissl.settings.test_config import FIELDS, value_of
from tests.support.recipes.small_runs import files

CONFIG_NOW = PRESETS["digits"]("v2")
OPTIONS = pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])


def open_run(path: Path, config: Config = CONFIG_NOW, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
    directory = run_directory(path)
    directory.open(config, resume=resume, overwrite=overwrite)
    return directory


def started(path: Path) -> RunDirectory:
    directory = open_run(path)
    for name in directory.files:
        if name != CONFIG:
            (path / name).write_text(f"content of {name}")
    (path / CHECKPOINTS / "pretext-0").mkdir(parents=True)
    (path / CHECKPOINTS / "pretext-0" / "weights.safetensors").write_bytes(b"weights")
    return directory


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def test_a_new_folder_gets_the_config(tmp_path: Path) -> None:
    directory = open_run(tmp_path / "deep" / "run")
    assert files(tmp_path).keys() == {f"deep/run/{CONFIG}"}
    assert not directory.started
    saved = directory.saved_config()
    assert saved is not None
    assert Config.model_validate(saved) == CONFIG_NOW
    # A config alone, as a dry run leaves it, is no run: it may be replaced.
    other = build_config(CONFIG_NOW, {"seeds": 7})
    open_run(directory.path, other)
    assert Config.model_validate(directory.saved_config()) == other


def test_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    assert run_directory(tmp_path / "run").saved_config() is None
    open_run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / CONFIG).exists()


def test_a_run_is_not_touched_unasked(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    assert directory.started
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=r"run holds a run already; continue it with --resume, replace it with"):
        open_run(directory.path)
    assert files(tmp_path) == before


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    (directory.path / "notes.txt").write_text("mine")
    open_run(directory.path, overwrite=True)
    assert files(directory.path).keys() == {CONFIG, "notes.txt"}
    assert not (directory.path / CHECKPOINTS).exists()


def test_resume_refuses_every_field_that_decides_results(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    before = files(tmp_path)
    changed = {
        "preset": "images",
        "seed": 5,
        "pipeline_seeds": 2,
        "data.split_seed": 77,
        "model.backbone": "resnet-small",
        "pretext.epochs": 7,
        "pretext.options": {"temperature": 0.1},
        "downstream.batch_size": 3,
        "head.batch_norm": "train",
        "bissl.gamma": 0.5,
        "finetune.lr": 0.123,
        "finetune.validate_every": 5,
        "compute.precision": "bf16",
        "compute.tf32": True,
        "compute.deterministic": True,
        "compute.channels_last": True,
        "compute.compile": True,
        "compute.crops": "float",
        "compute.micro_batch": 5,
    }
    for name, value in changed.items():
        # Products in chunks have a method of their own.
        beside = [nested("bissl.hvp", "reverse")] if name == "compute.micro_batch" else []
        config = build_config(CONFIG_NOW, *beside, nested(name, value))
        with pytest.raises(ConfigError, match=rf"(?s)--resume: .*\n  {name}.*: .* -> .*\nLeave these fields"):
            open_run(directory.path, config, resume=True)
        assert files(tmp_path) == before


def test_resume_takes_changes_that_decide_nothing(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    values = {
        "seeds": 9,
        "arms": ["bissl", "baseline", "scratch"],
        "device": "cpu",
        "threads": 2,
        "jobs": 3,
        "nonfinite_skips": 2,
        "rank_timeout": 5.0,
        "tracking": ["wandb"],
        "compute.cudnn_benchmark": True,
        "data.root": "elsewhere",
        "data.download": True,
        "data.storage": "stream",
        "data.num_workers": 3,
        "data.cache": "kept",
        "data.prefetch_factor": 4,
        "downstream.eval_batch_size": 7,
        "pretext.monitor_every": 3,
        "pretext.checkpoint_every": 3,
        "bissl.checkpoint_every": 3,
        "finetune.checkpoint_every": 3,
    }
    assert set(values) == SAFE_TO_CHANGE <= set(FIELDS)
    config = build_config(CONFIG_NOW, *(nested(name, value) for name, value in values.items()))
    for name in values:
        assert value_of(config, name) != value_of(CONFIG_NOW, name)
    open_run(directory.path, config, resume=True)
    assert Config.model_validate(directory.saved_config()) == config
    assert (directory.path / METRICS).read_text() == f"content of {METRICS}"


@pytest.mark.parametrize("name", [name for name in (*run_directory(Path()).files, CHECKPOINTS) if name != CONFIG])
@OPTIONS
def test_files_of_something_else_are_left_alone(tmp_path: Path, name: str, resume: bool, overwrite: bool) -> None:
    if name == CHECKPOINTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(b"precious")
    else:
        (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=rf"holds {name}, but no config.json of a run"):
        open_run(tmp_path, resume=resume, overwrite=overwrite)
    assert b"precious" in files(tmp_path).values()
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("content", ['{"name": "somebody\'s package"}', "[1]", "{"])
@OPTIONS
def test_a_foreign_config_is_left_alone(tmp_path: Path, content: str, resume: bool, overwrite: bool) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_run(tmp_path, resume=resume, overwrite=overwrite)
    assert (tmp_path / CONFIG).read_text() == content


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output-dir: .*file is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"output-dir: .* cannot be written to \(Not a directory\)"):
        open_run(tmp_path / "file" / "below")


def test_json_files_are_replaced_whole(tmp_path: Path) -> None:
    directory = open_run(tmp_path)
    directory.write_json("results.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.write_json("results.json", {"a": float("nan")})
    assert files(tmp_path)["results.json"] == b'{\n "a": 1\n}'
    assert files(tmp_path).keys() == {CONFIG, "results.json"}
