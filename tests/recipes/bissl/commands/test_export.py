"""Exported backbones: the card's own lines load them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.bissl.commands.export import main
from recipes.bissl.settings.config import Config, build_config
from recipes.experiment.artifacts import ArtifactError, ArtifactStore
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import build_backbone
from recipes.vision.networks.timm_backbones import TimmBackbone
from tests.support.recipes.small_runs import small_config

FINETUNED = {"variant": "bissl", "test": {"top1": 61.234, "loss": None}}
RESULTS = {"variants": {"bissl": {"top1": {"mean": 60.5, "std": 0.75, "per_seed": [60.0, 61.0]}, "seconds": 3.0}}}


def make_run(folder: Path, name: str, *seeds: int) -> Config:
    """A run folder with a pretext artifact and a fine-tuned one for each seed, of random weights."""
    size = {"vit_b_32": 32}.get(name, 64)
    config = build_config(small_config(), {"model": {"backbone": name}, "data": {"image_size": size}})
    store = ArtifactStore(folder / "checkpoints")
    facts = {"pretext_steps": 12, "label_steps": 34, "seconds": 5.6}
    for seed in seeds:
        torch.manual_seed(seed)
        modules = {"backbone": build_backbone(name, image_size=size), "head": torch.nn.Linear(2, 2)}
        store.save("pretext", f"p{seed}", modules, {**facts, "label_steps": 0, "seed": seed})
        store.save("finetune", f"f{seed}", modules, {**facts, **FINETUNED, "seed": seed})
    (folder / "config.json").write_text(config.model_dump_json())
    return config


def snippet_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet18-cifar", "resnet-tiny", "shufflenet_v2_x0_5", "mnasnet0_5", "timm:test_vit"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "vit_b_32", "convnext_tiny", "googlenet")],
)
def test_the_cards_lines_load_the_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm's networks are in the extra timm")
    config = make_run(tmp_path, name, 0)
    assert main([str(tmp_path), "--to", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "out")
    scope: dict = {}
    lines = snippet_of(Path("MODEL_CARD.md").read_text())
    exec(lines, scope)
    assert name != "resnet18" or len(lines.splitlines()) == 5
    network, size = scope["network"].eval(), config.data.image_size
    torch.manual_seed(0)
    expected = build_backbone(name, image_size=size)
    state = expected.network.state_dict() if isinstance(expected, TimmBackbone) else expected.state_dict()
    for key, value in network.state_dict().items():
        if key in state:
            assert torch.equal(value, state[key]), key
    if name.startswith(("resnet", "mnasnet", "timm")):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(network(images), expected.eval()(images))


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run(tmp_path, "resnet-tiny", 0, 1)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    out = tmp_path / "out"
    assert main([str(tmp_path), "--to", str(out), "--seed", "1", "--licence", "CC-BY-4.0"]) == 0
    assert str(out / "backbone.safetensors") in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["MODEL_CARD.md", "backbone.safetensors", "config.json"]
    torch.manual_seed(1)
    for key, value in build_backbone("resnet-tiny").state_dict().items():
        assert torch.equal(load_file(out / "backbone.safetensors")[key], value)
    assert json.loads((out / "config.json").read_text()) == json.loads(config.model_dump_json())
    card = (out / "MODEL_CARD.md").read_text()
    digest = hashlib.sha256((out / "backbone.safetensors").read_bytes()).hexdigest()
    for fact in (
        *("CC-BY-4.0", digest, "seed 1", "arm bissl", "`simclr` on `digits`, 12 steps", "34 labelled steps"),
        *("| Initial weights | random |", "| top1 | 61.23 | 60.5 ± 0.75 (n = 2) |", "| loss | not finite |"),
    ):
        assert fact in card, fact


def test_other_stages_and_single_artifacts(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet-tiny", 3)
    source = str(tmp_path)
    assert main([source, "--stage", "pretext", "--seed", "3", "--to", str(tmp_path / "a")]) == 0
    assert "not tested by itself" in (tmp_path / "a" / "MODEL_CARD.md").read_text()
    assert main([str(tmp_path / "checkpoints" / "finetune-f3"), "--to", str(tmp_path / "b")]) == 0
    assert "not stated" in (tmp_path / "b" / "MODEL_CARD.md").read_text()


def test_arms_are_told_apart_and_those_with_the_same_start_share_it(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet-tiny")
    store, backbone = ArtifactStore(tmp_path / "checkpoints"), build_backbone("resnet-tiny")
    made = [("pretext", "bissl"), ("pretext", "baseline"), ("bissl", "bissl"), ("bissl", "identity")]
    for number, (stage, arm) in enumerate(made):
        with torch.no_grad():
            next(backbone.parameters()).fill_(number)
        facts = {"pretext_steps": number, "label_steps": 0, "seconds": 1.0, "seed": 0, "variant": arm}
        store.save(stage, f"k{number}", {"backbone": backbone}, facts)
    asked = [*made, ("pretext", "identity"), ("pretext", "baseline-labels")]
    for (stage, arm), expected in zip(asked, (0, 1, 2, 3, 0, 1), strict=True):
        out = tmp_path / f"{stage}-{arm}"
        assert main([str(tmp_path), "--stage", stage, "--arm", arm, "--to", str(out)]) == 0
        assert load_file(out / "backbone.safetensors")["conv1.weight"].eq(expected).all(), (stage, arm)
    with pytest.raises(ArtifactError, match="no finished artifact of stage bissl, arm gentle"):
        main([str(tmp_path), "--stage", "bissl", "--arm", "gentle", "--to", str(tmp_path / "new")])


def test_refusals(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet-tiny", 0)
    source, full = str(tmp_path), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    with pytest.raises(ArtifactError, match=r"--to: .*full exists already"):
        main([source, "--to", str(full)])
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    target = str(tmp_path / "new")
    with pytest.raises(ArtifactError, match=r"arm bissl and seed 7; there are:\n.*finetune, arm bissl, seed 0"):
        main([source, "--to", target, "--seed", "7"])
    store = ArtifactStore(tmp_path / "checkpoints")
    facts = {"pretext_steps": 99, "label_steps": 0, "seconds": 1.0, "seed": 0}
    store.save("pretext", "longer", {"backbone": build_backbone("resnet-tiny")}, facts)
    with pytest.raises(ArtifactError, match=r"several artifacts.*\n.*99 pretext steps\n.*12 pretext steps"):
        main([source, "--to", target, "--stage", "pretext"])
    with (tmp_path / "checkpoints" / "finetune-f0" / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        main([source, "--to", target])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config of a run"):
        main([source, "--to", target])
    assert not Path(target).exists()
