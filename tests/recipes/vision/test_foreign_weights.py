"""Weights in the naming of other libraries, and the pretext stage that starts from them."""

import argparse
import collections
import copy
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
from recipes.vision.networks.foreign_weights import load_backbone, load_heads
from recipes.vision.networks.weight_files import read_weights
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


def other_network(network: nn.Module) -> nn.Module:
    """The same one with other weights."""
    changed = copy.deepcopy(network)
    changed.load_state_dict({key: torch.zeros_like(value) for key, value in network.state_dict().items()})
    return changed


def optimizer_of(network: nn.Module) -> dict[str, Any]:
    """The state of an optimizer that has made a step: tensors of the weights' shapes by number."""
    parameters = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


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
    "MoCo": lambda n: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **under("module.encoder_q.", body(n.state_dict())),
            **under("module.encoder_q.fc.", HEAD),
            **under("module.encoder_k.", other(n.state_dict())),
            **under("module.encoder_k.fc.", HEAD),
            "module.queue": torch.zeros(4, 8),
            "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
        },
        "optimizer": optimizer_of(n),
    },
    "MoCo v3": lambda n: {
        "state_dict": {
            **under("module.base_encoder.", body(n.state_dict())),
            **under("module.base_encoder.fc.", HEAD),
            **under("module.momentum_encoder.", other(n.state_dict())),
            **under("module.predictor.", HEAD),
        },
        "optimizer": optimizer_of(n),
        "scaler": {"scale": 65536.0},
    },
    "SimSiam": lambda n: {
        "state_dict": {
            **under("module.encoder.", body(n.state_dict())),
            **under("module.encoder.fc.", HEAD),
            **under("module.predictor.", HEAD),
        }
    },
    "lightly, teacher and student": lambda n: {
        "state_dict": {
            **under("student_backbone.", as_children(other_network(n))),
            **under("student_head.layers.", HEAD),
            **under("teacher_backbone.", as_children(n)),
            **under("teacher_head.layers.", HEAD),
            "criterion.center": torch.zeros(1, 4),
        }
    },
    "lightly, student alone": lambda n: {
        "state_dict": {**under("student_backbone.", as_children(n)), **under("student_projection_head.layers.", HEAD)}
    },
    "lightly, DINO's backbone and student": lambda n: {
        "state_dict": {
            **under("student_backbone.", as_children(other_network(n))),
            **under("student_projection_head.layers.", HEAD),
            **under("backbone.", as_children(n)),
            **under("projection_head.layers.", HEAD),
        }
    },
    "DINO": lambda n: {
        "student": {**under("module.backbone.", other(n.state_dict())), **under("module.head.mlp.", HEAD)},
        "teacher": {**under("backbone.", body(n.state_dict())), **under("head.mlp.", HEAD)},
        "optimizer": optimizer_of(n),
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 4)},
    },
    "BYOL in PyTorch": lambda n: {
        **under("net.", n.state_dict()),
        **under("online_encoder.net.", n.state_dict()),
        **under("online_encoder.projector.", HEAD),
        **under("online_predictor.", HEAD),
        **under("target_encoder.net.", other(n.state_dict())),
        **under("target_encoder.projector.", HEAD),
    },
    "BYOL in PyTorch, online encoder": lambda n: {
        **under("module.online_encoder.net.", n.state_dict()),
        **under("module.online_encoder.projector.", HEAD),
        **under("module.online_predictor.", HEAD),
    },
    "a plain net": lambda n: under("net.", n.state_dict()),
    "Barlow Twins, VICReg": lambda n: {
        "epoch": 1000,
        "model": {
            **under("module.backbone.", body(n.state_dict())),
            **under("module.projector.", HEAD),
            "module.bn.running_mean": torch.zeros(8),
            "module.bn.running_var": torch.ones(8),
            "module.bn.num_batches_tracked": torch.tensor(9),
        },
        "optimizer": optimizer_of(n),
    },
    "VISSL": lambda n: {
        "phase_idx": 99,
        "classy_state_dict": {
            "train": True,
            "base_model": {
                "model": {
                    "trunk": under("_feature_blocks.", body(n.state_dict())),
                    "heads": under("0.clf.", HEAD),
                },
                "meters": {},
            },
            "optimizer": {"optim": optimizer_of(n)},
            "loss": {"queue": torch.zeros(3)},
        },
    },
    "VISSL, DDP": lambda n: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("module._feature_blocks.", body(n.state_dict())), "heads": {}}}
        }
    },
    "an average beside it": lambda n: {
        "model_ema": other(n.state_dict()),
        "model": n.state_dict(),
        "ema": under("module.", other(n.state_dict())),
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


def refusal(content: Any, name: str, folder: Path) -> str:
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


def line_of(content: Any, folder: Path) -> str:
    torch.save(content, folder / "weights.pt")
    return load_backbone(read_weights(folder / "weights.pt"), build_backbone("resnet18"), "resnet18")


def test_what_was_taken_of_several_copies_is_said(resnet: nn.Module, tmp_path: Path) -> None:
    line = line_of(NAMINGS["lightly, teacher and student"](resnet), tmp_path)
    assert "after 'state_dict.teacher_backbone.'" in line
    assert "copies under 'state_dict.student_backbone.' left out" in line
    line = line_of(NAMINGS["DINO"](resnet), tmp_path)
    assert "after 'teacher.backbone.'" in line
    assert "copies under 'student.module.backbone.' left out" in line
    line = line_of(NAMINGS["VISSL"](resnet), tmp_path)
    assert "after 'classy_state_dict.base_model.model.trunk._feature_blocks.'" in line
    assert "copies" not in line
    assert "copies under 'online_encoder.net.' left out" in line_of(NAMINGS["BYOL in PyTorch"](resnet), tmp_path)


def test_no_table_of_several_fits(resnet: nn.Module, tmp_path: Path) -> None:
    tables = {"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1), "b": torch.ones(1)}}
    message = refusal(tables, "resnet18", tmp_path)
    assert "it holds the tables ['teacher'] of 2 tensors, ['student'] of 1 tensors" in message
    # A copy of another network is not passed over.
    wide = models.get_model("resnet34", weights=None)
    both = {**under("net.", resnet.state_dict()), **under("online_encoder.net.", wide.state_dict())}
    assert "known kind of head: online_encoder.net.layer1.2" in refusal(both, "resnet18", tmp_path)


BAD_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda x: torch.full_like(x, float("nan")),
    "one NaN": lambda x: torch.cat((torch.tensor([float("nan")]), x.flatten()[1:])).view(x.shape),
    "infinity": lambda x: torch.cat((x.flatten()[:-1], torch.tensor([float("inf")]))).view(x.shape),
    "minus infinity": lambda x: torch.cat((x.flatten()[:-1], torch.tensor([float("-inf")]))).view(x.shape),
    "in half precision": lambda x: x.half() * float("inf"),
    "in bfloat16": lambda x: x.bfloat16() + float("nan"),
    "in float64": lambda x: x.double() + float("nan"),
    "beyond float32": lambda x: x.double() + 1e300,
}


@pytest.mark.parametrize("key", ["conv1.weight", "layer4.1.bn2.bias", "layer2.0.bn1.running_var"])
@pytest.mark.parametrize("kind", BAD_NUMBERS)
def test_numbers_that_are_not_finite_are_refused_by_name(
    kind: str, key: str, resnet: nn.Module, tmp_path: Path
) -> None:
    state = dict(resnet.state_dict())
    state[key] = BAD_NUMBERS[kind](state[key])
    message = refusal({"state_dict": under("module.", state)}, "resnet18", tmp_path)
    assert f"{tmp_path / 'weights.pt'} holds NaN or infinity in {key} after 'state_dict.module.'" in message
    if kind != "beyond float32":
        save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(ConfigError, match=rf"weights\.safetensors holds NaN or infinity in {re.escape(key)}"):
            load_backbone(read_weights(tmp_path / "weights.safetensors"), build_backbone("resnet18"), "resnet18")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_finite_numbers_of_other_types_load(dtype: torch.dtype, resnet: nn.Module, tmp_path: Path) -> None:
    # Their sum is beyond the largest number of the type.
    state = {k: v if v.dtype == torch.int64 else v.to(dtype).fill_(60000.0) for k, v in resnet.state_dict().items()}
    assert "120 tensors of resnet18 loaded" in line_of(state, tmp_path)


def test_what_is_left_out_may_be_anything(resnet: nn.Module, tmp_path: Path) -> None:
    state = {**resnet.state_dict(), "fc.weight": torch.full((1000, 512), float("nan"))}
    assert "120 tensors of resnet18 loaded" in line_of(state, tmp_path)


class Masked(nn.Module):
    """A network with infinities of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([[0.0, float("-inf")], [0.0, 0.0]]))


def test_infinities_by_design_load(tmp_path: Path) -> None:
    given = Masked().state_dict()
    torch.save(given, tmp_path / "weights.pt")
    load_backbone(read_weights(tmp_path / "weights.pt"), Masked(), "masked")
    torch.save({**given, "mask": given["mask"].flip(0)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="NaN or infinity in mask"):
        load_backbone(read_weights(tmp_path / "weights.pt"), Masked(), "masked")


def test_tensors_that_hold_no_plain_numbers_are_refused(resnet: nn.Module, tmp_path: Path) -> None:
    state = resnet.state_dict()
    for odd in (state["conv1.weight"].to_sparse(), state["conv1.weight"].to(torch.complex64)):
        message = refusal({**state, "conv1.weight": odd}, "resnet18", tmp_path)
        assert "holds conv1.weight in sparse, quantized, complex or empty form" in message


def test_heads_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    given = projector(512, (8, 8)).state_dict()
    last = next(reversed([key for key in given if key.endswith("weight")]))
    given[last] = torch.full_like(given[last], float("nan"))
    torch.save(under("projector.", given), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=rf"weights.pt holds NaN or infinity in projector\.{last}"):
        load_heads(read_weights(tmp_path / "weights.pt"), nn.ModuleDict({"projector": projector(512, (8, 8))}))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm.txt"),))


class Settings:
    """An object that a checkpoint holds beside its weights."""

    def __init__(self) -> None:
        self.rate = 0.1


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
    torch.save({"epoch": 3, "args": [1]}, "numbers.pt")
    for name, message in (
        ("cut.pt", "no whole file|damaged"),
        ("empty.pt", "no whole file|damaged"),
        ("cut.safetensors", "no whole safetensors file"),
        ("list.pt", "no table of weights by name .a state_dict.; it is of type list"),
        ("numbers.pt", r"its keys are 'epoch' \(of type int\), 'args' \(of type list\)"),
        ("nowhere.pt", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_weights(Path(name))


STATE = {"conv1.weight": torch.ones(2, 3), "bn1.bias": torch.ones(2)}
STEPS = {"state": {0: {"exp_avg": torch.ones(2)}, 1: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
UNREADABLE: dict[str, tuple[Any, str, str]] = {
    # What the file holds, what is said of it, and what to save.
    "teacher and student": (
        {
            "student": under("module.", STATE),
            "teacher": STATE,
            "optimizer": STEPS,
            "args": argparse.Namespace(arch="r"),
        },
        "its keys are 'student' (a table of 2), 'teacher' (a table of 2), 'optimizer' (a table of 2), "
        "'args' (an object of argparse.Namespace)",
        "['teacher'], NEW)",
    ),
    "Lightning": (
        {"epoch": 3, "state_dict": collections.OrderedDict(STATE), "hyper_parameters": Settings()},
        "'state_dict' (a table of 2), 'hyper_parameters' (an object of tests.recipes.vision.test_foreign_weights.Set",
        "['state_dict'], NEW)",
    ),
    "VISSL": (
        {"classy_state_dict": {"base_model": {"model": {"trunk": STATE, "heads": {}}}}, "config": Settings()},
        "its keys are 'classy_state_dict' (a table of 1)",
        "['classy_state_dict']['base_model']['model']['trunk'], NEW)",
    ),
    "an average": ({"ema": dict(STATE), "model": STATE, "args": Settings()}, "'ema' (a table of 2)", "['model'], NEW)"),
    "a table at once": (
        {**STATE, "args": Settings()},
        "'conv1.weight' (a tensor)",
        "weights_only=False).items() if torch.is_tensor(v)}, NEW)",
    ),
    "a whole network": (
        nn.Sequential(nn.Linear(2, 2)),
        "it is an object of torch.nn.modules.container.Sequential",
        "weights_only=False).state_dict(), NEW)",
    ),
    "a network by name": (
        {"epoch": 1, "model": nn.Linear(2, 2)},
        "'model' (an object of torch.nn.modules.linear.Linear)",
        "['model'].state_dict(), NEW)",
    ),
    "no weights": ({"args": Settings()}, "'args' (an object of tests", "and no table of weights by name"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_is_not_loaded_is_described_with_what_to_save(kind: str, zipped: bool, tmp_path: Path) -> None:
    content, description, remedy = UNREADABLE[kind]
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError) as caught:
        read_weights(tmp_path / "weights.pt")
    message = str(caught.value)
    assert "could run code and are not loaded" in message
    assert description in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [kind for kind in UNREADABLE if kind != "no weights"])
def test_what_is_advised_can_be_done_and_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(UNREADABLE[kind][0], "weights.pt")
    with pytest.raises(ConfigError) as caught:
        read_weights(Path("weights.pt"))
    advice = str(caught.value).partition("weights alone: ")[2].replace("FILE", "'weights.pt'")
    eval(advice.replace("NEW", "'new.pt'"), {"torch": torch})
    assert set(STATE) <= set(next(iter(read_weights(Path("new.pt")).tables.values()))) or "network" in kind


def test_mappings_that_hold_each_other_are_gone_through_once(tmp_path: Path) -> None:
    around: dict[str, Any] = {"state_dict": dict(STATE)}
    around["self"] = around
    deep: dict[str, Any] = {"leaf": torch.ones(1)}
    for _ in range(60):
        # By way of names there are 2 ** 60 of them.
        deep = {"a": deep, "b": deep}
    torch.save({"around": around, "deep": deep}, tmp_path / "weights.pt")
    assert len(read_weights(tmp_path / "weights.pt").tables) == 2
    torch.save({"around": around, "deep": deep, "args": Settings()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"\['around'\]\['state_dict'\], NEW"):
        read_weights(tmp_path / "weights.pt")


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
