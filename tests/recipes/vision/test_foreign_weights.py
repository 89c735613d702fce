"""Weights in the naming of other libraries, and the pretext stage that starts from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from recipes.bissl.settings.config import Config
from recipes.bissl.settings.plan import make_plan
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import ResNetBackbone, build_backbone, projector
from recipes.vision.networks.foreign_weights import load_backbone, load_heads, read_weights
from tests.support.recipes.small_runs import events, part, run_stage, small_config, small_pipeline

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """Torchvision's network, every tensor of it random."""
    torch.manual_seed(1)
    network = models.get_model("resnet18", weights=None)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    return network


def small_resnet() -> nn.Module:
    """Torchvision's network as CIFAR recipes change it."""
    network = models.get_model("resnet18", weights=None)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def body(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def other(state: State) -> State:
    """A copy of a backbone that must not be taken."""
    return {key: torch.zeros_like(value) for key, value in body(state).items()}


HEAD = {"0.weight": torch.ones(4, 512), "0.bias": torch.ones(4)}


def as_children(network: nn.Module, *, only_with_weights: bool = False) -> State:
    """What ``nn.Sequential(*children)[:-1]`` saves."""
    children = [child for child in network.children() if not only_with_weights or list(child.parameters())]
    return {key: value.clone() for key, value in nn.Sequential(*children[:-1]).state_dict().items()}


NAMINGS: dict[str, Callable[[nn.Module], Any]] = {
    "torchvision": lambda n: n.state_dict(),
    "torchvision, without counters": lambda n: {k: v for k, v in n.state_dict().items() if "num_batches" not in k},
    "lightly": lambda n: {
        "state_dict": {**under("backbone.", as_children(n)), **under("projection_head.layers.", HEAD)},
        "epoch": 3,
    },
    "lightly BYOL": lambda n: {
        **under("backbone.", as_children(n)),
        **under("backbone_momentum.", other(n.state_dict())),
        **under("projection_head_momentum.layers.", HEAD),
    },
    "lightly's own network": lambda n: {
        key.replace("downsample", "shortcut"): value
        for key, value in under("backbone.", as_children(n, only_with_weights=True)).items()
    },
    "solo-learn": lambda n: {
        "state_dict": {
            **under("momentum_backbone.", other(n.state_dict())),
            **under("backbone.", body(n.state_dict())),
            **under("projector.", HEAD),
            **under("predictor.", HEAD),
            **under("classifier.", HEAD),
            "queue": torch.zeros(3),
            "queue_ptr": torch.zeros(1),
        },
        "optimizer_states": [{"lr": 0.1}],
    },
    "solo-learn, old": lambda n: {
        "state_dict": {**under("encoder.", body(n.state_dict())), **under("projector.", HEAD)}
    },
    "authors": lambda n: body(n.state_dict()),
    "authors, whole model": lambda n: {
        **under("module.backbone.", body(n.state_dict())),
        **under("module.head.projector.", HEAD),
    },
    "wrapped twice": lambda n: {"model": under("module._orig_mod.backbone.", body(n.state_dict()))},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_naming_gives_torchvisions_features(naming: str, resnet: nn.Module, tmp_path: Path) -> None:
    torch.save(NAMINGS[naming](resnet), tmp_path / "weights.pt")
    backbone = ResNetBackbone("resnet18")
    line = load_backbone(read_weights(tmp_path / "weights.pt"), backbone, "resnet18")
    features = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten()).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), features(images))
    # 20 convolutions, and 20 batch norms of five tensors each.
    assert f": {100 if 'counters' in naming else 120} tensors of resnet18 loaded" in line


def test_safetensors_and_the_small_stem(tmp_path: Path) -> None:
    network = small_resnet()
    save_file(under("backbone.", body(network.state_dict())), tmp_path / "weights.safetensors")
    backbone = build_backbone("resnet18-cifar")
    load_backbone(read_weights(tmp_path / "weights.safetensors"), backbone, "resnet18-cifar")
    network.fc = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), network.eval()(images))


def refusal(content: State, name: str, folder: Path) -> str:
    torch.save(content, folder / "weights.pt")
    backbone = build_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ConfigError, match=r"^model.init_backbone: ") as caught:
        load_backbone(read_weights(folder / "weights.pt"), backbone, name)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    return str(caught.value)


def test_the_stem_is_checked_both_ways(resnet: nn.Module, tmp_path: Path) -> None:
    message = refusal(resnet.state_dict(), "resnet18-cifar", tmp_path)
    assert "is 7x7, that of resnet18-cifar is 3x3" in message
    assert message.endswith("Set model.backbone to resnet18")
    message = refusal(small_resnet().state_dict(), "resnet18", tmp_path)
    assert "is 3x3, that of resnet18 is 7x7" in message
    assert "Set model.backbone to resnet18-cifar" in message


def test_misfits_are_named(resnet: nn.Module, tmp_path: Path) -> None:
    state = resnet.state_dict()
    assert "no name in" in refusal({"a.weight": torch.ones(2)}, "resnet18", tmp_path)
    lacking = {key: value for key, value in state.items() if key != "layer3.0.bn2.running_var"}
    assert "missing: layer3.0.bn2.running_var." in refusal(lacking, "resnet18", tmp_path)
    wider = {**state, "layer4.1.conv2.weight": torch.zeros(512, 256, 3, 3)}
    assert "layer4.1.conv2.weight 512x256x3x3 instead of 512x512x3x3" in refusal(wider, "resnet18", tmp_path)
    more = {**state, "layer5.0.conv1.weight": torch.zeros(1)}
    assert "known kind of head: layer5.0.conv1.weight." in refusal(more, "resnet18", tmp_path)
    # Every name of a ResNet-18 is in a ResNet-34, but not the other way round.
    message = refusal(models.get_model("resnet34", weights=None).state_dict(), "resnet18", tmp_path)
    assert re.search(r"known kind of head: layer1.2.bn1.bias, .* and \d+ more", message)
    assert "missing: layer1.2.bn1" in refusal(state, "resnet34", tmp_path)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm.txt"),))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "hyper_parameters": Payload()}, "payload.ckpt")
    with pytest.raises(ConfigError, match="could run code and are not loaded"):
        read_weights(Path("payload.ckpt"))
    assert not Path("harm.txt").exists()
    Path("cut.pt").write_bytes(Path("payload.ckpt").read_bytes()[:200])
    Path("cut.safetensors").write_bytes(b"\x10")
    Path("empty.pt").touch()
    torch.save([1, 2], "list.pt")
    for name, message in (
        ("cut.pt", "no whole file|damaged"),
        ("empty.pt", "no whole file|damaged"),
        ("cut.safetensors", "no whole safetensors file"),
        ("list.pt", "no table of weights"),
        ("nowhere.pt", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_weights(Path(name))


@pytest.mark.parametrize(
    "prefix", ["projector.", "module.head.projector.", "projection_head.layers.", "heads.projector."]
)
def test_a_projector_that_comes_along_is_taken(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given, heads = projector(512, (8, 8)), nn.ModuleDict({"projector": projector(512, (8, 8))})
    torch.save({**under(prefix, given.state_dict()), "backbone.x": torch.ones(1)}, tmp_path / "weights.pt")
    assert load_heads(read_weights(tmp_path / "weights.pt"), heads)
    for key, value in given.state_dict().items():
        assert torch.equal(heads.state_dict()[f"projector.{key}"], value)
    assert not load_heads(read_weights(tmp_path / "weights.pt"), nn.ModuleDict({"projector": projector(512, (8, 9))}))


def start(tmp_path: Path, *options: str) -> tuple[Config, Path]:
    """A small config that starts from a file, and the file."""
    torch.manual_seed(7)
    backbone = build_backbone("resnet-tiny")
    file = tmp_path / "weights.pt"
    torch.save(under("module.backbone.", backbone.state_dict()), file)
    return small_config(f"--model.init-backbone={file}", "--model.projector-epochs=3", *options), file


def test_the_projector_is_fitted_first_on_the_frozen_backbone(tmp_path: Path) -> None:
    config, file = start(tmp_path, "--pretext.epochs=0")
    made = run_stage(small_pipeline(tmp_path, config), "pretext")
    given = torch.load(file)
    for key, value in part(made, "backbone").items():
        assert torch.equal(value, given[f"module.backbone.{key}"]), key
    losses = [line["loss"] for line in events(tmp_path) if line["event"] == "train"]
    assert len(losses) == 6 == made.info["pretext_steps"]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert made.info["initial_weights"]["file"] == "weights.pt"


def test_pretext_steps_follow_and_a_projector_is_not_fitted_twice(tmp_path: Path) -> None:
    config, file = start(tmp_path)
    first = run_stage(small_pipeline(tmp_path, config), "pretext")
    assert first.info["pretext_steps"] == 10
    given = torch.load(file)
    assert not torch.equal(part(first, "backbone")["conv1.weight"], given["module.backbone.conv1.weight"])
    # An artifact brings its projector along.
    again = small_config(f"--model.init-backbone={first.directory}")
    second = run_stage(small_pipeline(tmp_path, again), "pretext")
    assert second.info["pretext_steps"] == 4
    assert second.key != first.key


def test_the_content_of_the_file_decides_the_artifact(tmp_path: Path) -> None:
    config, file = start(tmp_path, "--pretext.epochs=0", "--model.projector-epochs=1")
    first = run_stage(small_pipeline(tmp_path, config), "pretext").key
    moved = tmp_path / "moved.pt"
    moved.write_bytes(file.read_bytes())
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"init_backbone": str(moved)})})
    assert run_stage(small_pipeline(tmp_path, elsewhere), "pretext").key == first
    changed = {key: value + 1 for key, value in torch.load(file).items()}
    torch.save(changed, file)
    assert run_stage(small_pipeline(tmp_path, config), "pretext").key != first


def test_an_interrupted_fit_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = start(tmp_path)
    whole = run_stage(small_pipeline(tmp_path, config), "pretext")
    (tmp_path / "again").mkdir()
    pipeline = small_pipeline(tmp_path / "again", config)
    # In the steps that fit heads, and in those after them.
    for stop in (3, 7):
        calls = [0]

        def interrupt(
            self: Any, backbone: nn.Module, heads: nn.ModuleDict, step: int, stop: int = stop, calls: list[int] = calls
        ) -> None:
            calls[0] += 1
            if calls[0] == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(config.pretext_task()), "after_step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_stage(pipeline, "pretext")
    resumed = run_stage(pipeline, "pretext")
    for key, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[key]), key


def test_the_plan_counts_these_steps_for_every_arm_that_uses_them(tmp_path: Path) -> None:
    config, _ = start(tmp_path)
    plans = {arm: make_plan(config, arm, 48, 30) for arm in ("bissl", "baseline", "scratch")}
    # Two batches an epoch: 3 epochs of the projector, 2 of the warm-up, 2 alternations of 2 lower steps.
    assert [plan.pretext_steps for plan in plans.values()] == [6 + 4 + 4, 6 + 4 + 4, 0]
    assert make_plan(small_config(), "bissl", 48, 30).projector == 0


def test_the_rate_that_heads_are_fitted_at_is_part_of_the_key(tmp_path: Path) -> None:
    keys = set()
    for rate in (0.5, 1.0):
        options = f"--pretext.lr={rate}", "--pretext.baseline-lr=2.0", "--model.projector-epochs=1"
        pipeline = small_pipeline(tmp_path, start(tmp_path, *options)[0])
        keys.add(pipeline.pretext(pipeline.at("baseline", 0)).key)
    assert len(keys) == 2


def test_byols_target_is_the_fitted_projector_in_the_end(tmp_path: Path) -> None:
    config, _ = start(tmp_path, "--pretext.task=byol", "--pretext.epochs=0")
    made = run_stage(small_pipeline(tmp_path, config), "pretext")
    heads = part(made, "heads")
    fitted = {key: value for key, value in heads.items() if key.startswith("projector.")}
    torch.manual_seed(0)
    fresh = config.pretext_task().build(build_backbone("resnet-tiny")).state_dict()
    for key, value in fitted.items():
        assert torch.equal(value, heads[f"target.1.{key.removeprefix('projector.')}"]), key
    assert any(not torch.equal(value, fresh[key]) for key, value in fitted.items())
    for key, value in part(made, "backbone").items():
        assert torch.equal(value, heads[f"target.0.{key}"]), key


def test_heads_before_the_backbone_are_fitted_too(tmp_path: Path) -> None:
    task = "--pretext.task=examples.masked_autoencoder:MaskedAutoencoder"
    config, file = start(tmp_path, task, "--pretext.epochs=0", "--pretext.lr=0.003")
    made = run_stage(small_pipeline(tmp_path, config), "pretext")
    # It starts at 0 and is what stands in hidden places, before the backbone.
    assert part(made, "heads")["token.patch"].abs().max() > 0
    given = torch.load(file)
    for key, value in part(made, "backbone").items():
        assert torch.equal(value, given[f"module.backbone.{key}"]), key
