"""Finished stages on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recipes.experiment.artifacts import INFO, WEIGHTS, Artifact, ArtifactError, ArtifactStore, make_key, read_artifact

COSTS = {"steps": 3, "seconds": 1.5}
KINDS = {"steps": int}


def make_modules(width: int = 3) -> dict[str, nn.Module]:
    backbone = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    backbone(torch.randn(5, 2))
    return {"backbone": backbone, "backbone_two": nn.Linear(2, 2), "heads": nn.ModuleDict({"p": nn.Linear(width, 2)})}


def saved(folder: Path, modules: dict[str, nn.Module] | None = None) -> Artifact:
    return ArtifactStore(folder, KINDS).save("head", "abc", modules or make_modules(), COSTS)


def test_weights_and_facts_come_back(tmp_path: Path) -> None:
    original, other = make_modules(), make_modules()
    artifact = saved(tmp_path, original)
    assert artifact.directory == tmp_path / "head-abc"
    stored = load_file(artifact.directory / WEIGHTS)
    assert stored.keys() == {f"{name}.{key}" for name, module in original.items() for key in module.state_dict()}
    found = ArtifactStore(tmp_path, KINDS).find("head", "abc")
    assert found == artifact == read_artifact(artifact.directory)
    assert found is not None
    assert {key: found.info[key] for key in COSTS} == COSTS
    # One name is the beginning of the other.
    found.load_into(other)
    for name, module in original.items():
        for key, value in module.state_dict().items():
            assert torch.equal(other[name].state_dict()[key], value)
    assert not list(artifact.directory.glob(".*"))


def test_only_finished_artifacts_are_found(tmp_path: Path) -> None:
    store, artifact = ArtifactStore(tmp_path), saved(tmp_path)
    assert store.find("head", "other") is None
    assert store.find("pretext", "abc") is None
    (artifact.directory / INFO).unlink()
    assert store.find("head", "abc") is None
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        read_artifact(artifact.directory)
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        read_artifact(artifact.directory / WEIGHTS)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "one bit"])
def test_damaged_weights_are_refused(tmp_path: Path, kind: str) -> None:
    artifact, modules = saved(tmp_path), make_modules()
    before = {key: value.clone() for key, value in modules["backbone"].state_dict().items()}
    damage(artifact.directory / WEIGHTS, kind)
    with pytest.raises(ArtifactError, match=r"head-abc/weights.safetensors .*delete the folder"):
        read_artifact(artifact.directory).load_into(modules)
    assert all(torch.equal(before[key], value) for key, value in modules["backbone"].state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is damaged: format, key"),
        ('{"stage": "head", "key": "abc", "format": 1}', "is damaged: seconds, sha256, steps missing"),
        (
            json.dumps({**COSTS, "stage": "head", "key": "abc", "sha256": "", "format": 1, "steps": "3"}),
            "is damaged: steps is",
        ),
        (json.dumps({**COSTS, "stage": "head", "key": "abc", "sha256": "", "format": 99}), "has format 99"),
    ],
)
def test_damaged_facts_are_refused(tmp_path: Path, content: str, message: str) -> None:
    artifact = saved(tmp_path)
    (artifact.directory / INFO).write_text(content)
    with pytest.raises(ArtifactError, match=rf"artifact.json {message}"):
        ArtifactStore(tmp_path, KINDS).find("head", "abc")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    artifact = saved(tmp_path)
    with pytest.raises(ArtifactError, match=r"(?s)head-abc: the weights of 'backbone' do not fit.*size mismatch"):
        artifact.load_into({"backbone": make_modules(width=4)["backbone"]})
    with pytest.raises(ArtifactError, match=r"the weights of 'unknown' do not fit"):
        artifact.load_into({"unknown": nn.Linear(1, 1)})


def test_facts_that_are_not_finite_become_null(tmp_path: Path) -> None:
    info = {**COSTS, "test": {"loss": float("nan"), "top1": 50.0}, "best": {"loss": float("inf")}}
    artifact = ArtifactStore(tmp_path).save("finetune", "x", make_modules(), info)
    assert artifact.info["test"] == {"loss": None, "top1": 50.0}
    assert read_artifact(artifact.directory).info["best"] == {"loss": None}


def test_keys_depend_on_everything_given(tmp_path: Path) -> None:
    parent = Artifact("pretext", "k1", tmp_path, {})
    other_parent = Artifact("pretext", "k2", tmp_path, {})
    keys = [
        make_key("head", 0, parent, {"lr": 0.1, "wd": 0.2}, [1, 2]),
        make_key("bissl", 0, parent, {"lr": 0.1, "wd": 0.2}, [1, 2]),
        make_key("head", 1, parent, {"lr": 0.1, "wd": 0.2}, [1, 2]),
        make_key("head", 0, other_parent, {"lr": 0.1, "wd": 0.2}, [1, 2]),
        make_key("head", 0, None, {"lr": 0.1, "wd": 0.2}, [1, 2]),
        make_key("head", 0, parent, {"lr": 0.1, "wd": 0.3}, [1, 2]),
        make_key("head", 0, parent, {"lr": 0.1, "wd": 0.2}, [2, 1]),
    ]
    assert len(set(keys)) == len(keys)
    # Order of fields and the kind of sequence say nothing.
    assert make_key("head", 0, parent, {"wd": 0.2, "lr": 0.1}, (1, 2)) == keys[0]
    assert all(key.isalnum() and len(key) == 12 for key in keys)
