"""How a run computes: what each field of the section `compute` does, and where it must do nothing."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from bilevel import MINRES, linearize
from bilevel.nn.functional import curvature_pass, in_curvature_pass
from bilevel.products.micro_batch import MicroBatched
from bilevel.training import transfer_to
from bilevel.tree import tensors_in
from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.problem import BiSSLProblem, PretextLoss
from recipes.bissl.training.stages import bissl, pretext
from recipes.experiment.artifacts import Artifact
from recipes.experiment.errors import ConfigError
from recipes.vision.imagesets import ImageSet
from recipes.vision.networks.backbones import SmallResNet
from tests.support.fake_cuda import CUDA, FakeCuda
from tests.support.recipes.image_trees import tree
from tests.support.recipes.small_runs import (
    batches_of,
    execute,
    of_stage,
    part,
    refused,
    run_all,
    run_stage,
    small_config,
    small_pipeline,
)

CPU = torch.device("cpu")
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

WRONG = [
    (("precision=fp8",), "compute.precision: Input should be 'float32' or 'bf16', got 'fp8'"),
    (("tf32=maybe",), "compute.tf32: Input should be a valid boolean"),
    (("channels-last=3",), "compute.channels_last: Input should be a valid boolean"),
    (("compile=fast",), "compute.compile: Input should be a valid boolean"),
    (("crops=gpu",), "compute.crops: Input should be 'auto', 'uint8' or 'float', got 'gpu'"),
    (("micro-batch=1",), "compute.micro_batch: Input should be greater than or equal to 2, got '1'"),
    (("micro-batch=10", "--bissl.hvp=forward"), "compute.micro_batch: .* but bissl.hvp is 'forward'; set bissl.hvp to"),
    (
        ("micro-batch=10", "--pretext.task=tests.support.recipes.plugin_tasks:Colour"),
        "Colour' does not define outputs and output_loss",
    ),
    # Batches of 24 images; and 47 images, whose last batch has 23.
    (("micro-batch=23",), "compute.micro_batch: chunks of 23 leave a single image of a batch of 24"),
    (("micro-batch=22", "--data.pretext-limit=47"), "compute.micro_batch: chunks of 22 .* last one, of 23; BatchNorm"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_fields_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = arguments
    error = refused(capsys, f"--compute.{first}", *others, "--output-dir", str(tmp_path / "run"))
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_fields_are_parsed() -> None:
    names = ("precision=bf16", "tf32=true", "channels-last=true", "compile=true", "crops=float", "micro-batch=10")
    config = small_config(*(f"--compute.{name}" for name in names))
    assert config.compute == ComputeConfig(
        precision="bf16",
        tf32=True,
        channels_last=True,
        compile=True,
        crops="float",
        micro_batch=10,
    )


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    results = []
    for fields in (ComputeConfig(), ComputeConfig(channels_last=True)):
        torch.manual_seed(0)
        computing, net = Computing(fields, CPU), SmallResNet((4, 8)).double()
        images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
        computing.place(net)
        batch = computing.move({"views": [images, (images[0], 3)], "label": torch.arange(6)})
        for tensor in (batch["views"][0], net.conv1.weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) is fields.channels_last
        assert torch.equal(batch["views"][0], images)
        assert torch.equal(batch["label"], torch.arange(6))
        assert batch["views"][1][1] == 3
        loss = net(batch["views"][0]).square().mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)


def small_problem(first_order: Callable[[PretextLoss], PretextLoss]) -> tuple[BiSSLProblem, Any, Any]:
    torch.manual_seed(0)
    task = SimCLR(image_size=8, projector_widths=(6, 5))  # type: ignore[call-arg]
    downstream = Classification(image_size=8, classes=("a", "b"))  # type: ignore[call-arg]
    lower, upper = SmallResNet((4, 8)), SmallResNet((4, 8))
    problem = BiSSLProblem(
        task, downstream, lower, upper, task.build(lower), downstream.build(upper), first_order=first_order
    )
    batch = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    return problem, batch, (torch.randn(8, 3, 8, 8), torch.arange(8) % 2)


def dtypes_of(*modules: Any) -> list[torch.dtype]:
    """A list that grows by the dtype of every output of the modules."""
    seen: list[torch.dtype] = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    return seen


def test_bf16_is_for_first_order_passes_alone() -> None:
    """A lower step runs in bfloat16; products, cross term, right-hand side and hypergradient are float32 to the bit."""
    steps, products, totals = [], [], []
    for precision in ("float32", "bf16"):
        problem, batch, upper_batch = small_problem(
            Computing(ComputeConfig(precision=precision), CPU).first_order  # type: ignore[arg-type]
        )
        seen = dtypes_of(problem.lower_backbone.conv1, problem.upper_backbone.conv1)
        x, y = problem.variables()
        loss = problem.lower_objective(x, y, batch)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert loss.dtype == torch.float32
        steps.append(torch.autograd.grad(loss, list(y.values())))
        assert {g.dtype for g in steps[-1]} == {torch.float32}
        seen.clear()
        options = {"solver": MINRES(3, None), "damping": 10.0}
        system = linearize(problem, x, y, [batch], **options)  # type: ignore[arg-type]
        products.append(system.operator({name: torch.ones_like(y[name]) for name in system.implicit}))
        result = system.hypergradient(upper_batch)
        totals.append({**result.grad, "loss": result.loss})
        # The examination of second derivatives, once a problem, is in float64.
        assert set(seen) == {torch.float32, torch.float64}
    plain, other = (torch.cat([g.flatten() for g in step]) for step in steps)
    assert 1e-4 < float((other - plain).norm() / plain.norm()) < 0.2
    for plain, other in (products, totals):
        assert plain.keys() == other.keys()
        for name in plain:
            assert other[name].dtype == torch.float32
            assert torch.equal(other[name], plain[name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    """A run of all stages with nothing but defaults."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_all(small_pipeline(folder, small_config()))


def test_every_first_order_stage_takes_bf16(plain: tuple[Path, dict[str, Artifact]], tmp_path: Path) -> None:
    """The first step of each stage, from the same weights, by both precisions: near and not the same."""
    folder, made = plain
    pipeline = small_pipeline(tmp_path, small_config("--compute.precision=bf16"))
    run_stage(pipeline, "pretext")
    run_stage(pipeline, "head", made["pretext"])
    run_stage(pipeline, "bissl", made["head"])
    run_stage(pipeline, "finetune", made["bissl"])
    for stage, event in (("pretext", "train"), ("head", "train"), ("bissl", "lower"), ("finetune", "train")):
        before, after = (of_stage(place, stage, event)[0]["loss"] for place in (folder, tmp_path))
        assert after != before
        assert after == pytest.approx(before, rel=0.05)


def test_in_curvature_pass() -> None:
    assert not in_curvature_pass()
    with curvature_pass():
        assert in_curvature_pass()
    assert not in_curvature_pass()


def test_compiled_losses_are_those_of_plain_steps_alone(
    plain: tuple[Path, dict[str, Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def watched(loss: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
        number = len(compiled)
        compiled.append(0)

        def call(*args: Any) -> Tensor:
            assert not in_curvature_pass()
            compiled[number] += 1
            return loss(*args)

        return call

    monkeypatch.setattr(torch, "compile", watched)
    made = run_all(small_pipeline(tmp_path, small_config("--compute.compile=true")))
    # 4 pretext, 4 head and 8 fine-tuning steps; 2 x 2 lower steps, whose outputs alone are never asked for.
    assert sorted(compiled) == [0, 4, 4, 4, 8]
    for stage, artifact in plain[1].items():
        before, after = artifact.tensors(), made[stage].tensors()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), stage


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_compiled_loss_is_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    names = set(net.state_dict())

    def loss(x: Tensor) -> Tensor:
        return net(x).tanh().square().mean()

    compiled = Computing(ComputeConfig(compile=True), CPU).first_order(loss)
    ours, reference = (
        (value.detach(), *torch.autograd.grad(value, list(net.parameters()))) for value in (compiled(x), loss(x))
    )
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)
    assert set(net.state_dict()) == names


def test_a_compilation_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("No working C++ compiler\nwith details")

    monkeypatch.setattr(torch, "compile", lambda loss, *, dynamic: broken)
    assert execute("--compute.compile=true", "--output-dir", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: error: compute.compile: torch.compile failed (No working C++ compiler); ")
    assert error.count("\n") == 1
    # What is wrong with the loss is not blamed on compilation.
    step = Computing(ComputeConfig(compile=True), CPU).first_order(lambda x: x @ x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(torch.ones(2, 3))


def images(count: int) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 2, ("a", "b"), "noise")


def batches(pipeline: Pipeline) -> list[Tensor]:
    config, made = pipeline.config, batches_of(pipeline)
    tasks = config.pretext_task(), config.downstream_task(pipeline.data.downstream.train.classes)
    stacks = made.pretext(tasks[0], "test", 3), made.labelled(tasks[1], "test", 3)
    return [tensor for stack in stacks for _ in range(3) for tensor in stack.next()]


# No colour, which would enlarge differences.
STILL = {
    **{"crop_scale": [0.5, 1.0], "rotation": 0.0, "translation": 0.0, "zoom": [1.0, 1.0], "blur_probability": 0.0},
    **{"jitter_probability": 0.0, "grey_probability": 0.0, "solarize_probability": 0.0},
    **{"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
}
CROPS_ALONE = (
    f"--pretext.options={json.dumps({'view1': STILL, 'view2': STILL})}",
    f"--downstream.options={json.dumps({'view': STILL})}",
)


class Elsewhere(Computing):
    """Moves pictures to a copy, as to a device."""

    def on_device(self, images: ImageSet) -> Tensor | None:
        there = super().on_device(images)
        return None if there is None else there.clone()


def test_crops_on_the_device_are_those_of_the_host(tmp_path: Path) -> None:
    away = batches(small_pipeline(tmp_path, small_config(*CROPS_ALONE)))
    resident = small_pipeline(tmp_path, small_config(*CROPS_ALONE, "--compute.crops=float"))
    resident = replace(resident, computing=Elsewhere(resident.config.compute, torch.device("cpu")))
    here = batches(resident)
    for a, b in zip(here, away, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.dim() == 1:
            assert torch.equal(a, b)
            continue
        assert 0 < float((a - b).abs().max()) <= 2.01 / 255
    # Moved once, and drawn from there.
    for images in (resident.data.pretext, resident.data.downstream.train):
        moved = resident.data.on_device(images, resident.computing)
        assert moved is not None
        assert moved is resident.data.on_device(images, resident.computing)
        moved.zero_()
    again = batches(resident)
    assert not any(bool(tensor.any()) for tensor in again if tensor.dim() == 4)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("images"), {"a": 12, "b": 12})


SOURCES = {
    "in memory": (),
    "streamed": ("--data.storage=stream", "--data.num-workers=0"),
    "channels last": ("--compute.channels-last=true",),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("prepares", [False, True])
def test_everything_goes_to_a_device_by_pinned_copies_beside_the_computation(
    source: str, prepares: bool, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training batches, labels, the monitor's sample and evaluation, to the bit; the stand-in refuses other copies."""

    def everything(computing: Computing) -> list[Tensor]:
        options = "--compute.crops=uint8", f"--data.pretext=folder:{image_folder}", *SOURCES[source]
        options = (*options, f"--data.downstream=folder:{image_folder}", "--pretext.batch-size=4")
        pipeline = small_pipeline(tmp_path, small_config(*options, "--downstream.batch-size=4"))
        pipeline = replace(pipeline, computing=replace(computing, fields=pipeline.config.compute))
        config, made, sets = pipeline.config, batches_of(pipeline), pipeline.data.downstream
        tasks = config.pretext_task(), config.downstream_task(sets.train.classes)
        found: list[Any] = []
        for stack in (made.pretext(tasks[0], "test", 5), made.labelled(tasks[1], "test", 5)):
            for _ in range(5):
                found.append(stack.next())
                if prepares:
                    stack.prepare()
            stack.close()
        found += [made.pretext_sample(tasks[0], 6), made.evaluation_inputs(sets.val, tasks[1], torch.arange(2))]
        found += [(rows.inputs, targets) for rows, targets in made.evaluation(sets.test, tasks[1])]
        assert pipeline.data.workers.in_flight == 0
        return list(tensors_in(found))

    expected = everything(Computing(ComputeConfig(), CPU))
    with monkeypatch.context() as patch:
        cuda = FakeCuda(patch)
        transfer_to.cache_clear()
        found = everything(Computing(ComputeConfig(), CUDA))
        transfer_to.cache_clear()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert cuda.copies
    assert cuda.all_recorded()


def test_batches_that_were_sent_ahead_are_those_of_the_cpu(tmp_path: Path, device: torch.device) -> None:
    made: list[list[Any]] = []
    for place, ahead in ((CPU, False), (device, True)):
        config = small_config(f"--device={place.type}", "--compute.crops=uint8")
        stack = batches_of(small_pipeline(tmp_path, config)).labelled(
            config.downstream_task(tuple("0123456789")), "test", 6
        )
        made.append([])
        for _ in range(6):
            made[-1].append(stack.next())
            if ahead:
                stack.prepare()
    for (expected, classes), (views, labels) in zip(*made, strict=True):
        assert views.device.type == labels.device.type == device.type
        assert torch.equal(labels.cpu(), classes)
        torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=1e-4)


def test_batches_from_the_device_are_those_of_the_cpu(tmp_path: Path, device: torch.device) -> None:
    away = batches(small_pipeline(tmp_path, small_config("--compute.crops=float")))
    here = batches(small_pipeline(tmp_path, small_config(f"--device={device.type}", "--compute.crops=float")))
    for a, b in zip(here, away, strict=True):
        assert a.device.type == device.type
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0.05)


@pytest.mark.parametrize(("crops", "device"), [("uint8", "cuda"), ("auto", "cuda"), ("float", "cpu")])
def test_pictures_stay_where_nothing_is_cropped_on_the_device(
    crops: Literal["uint8", "auto", "float"], device: str
) -> None:
    sample = images(4)
    moved = Computing(ComputeConfig(crops=crops), torch.device(device)).on_device(sample)
    assert moved is (sample.images.array if crops == "float" else None)


def test_data_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**20, 80 * 2**30))
    with pytest.raises(ConfigError, match=r"compute.crops: noise takes 3 MiB, but cuda has 2 MiB left; set it to"):
        Computing(ComputeConfig(crops="float"), torch.device("cuda")).on_device(images(20_000))


@dataclass
class Labelled:
    images: Tensor
    name: str


Pair = namedtuple("Pair", ["first", "second"])


def test_batches_of_every_kind_are_moved() -> None:
    computing = Computing(ComputeConfig(channels_last=True), CPU)
    images = torch.arange(96.0).reshape(2, 3, 4, 4)
    labelled = computing.move(Labelled(images, "a"))
    pair = computing.move(Pair(images, [3]))
    assert (type(labelled), labelled.name, type(pair), pair.second) == (Labelled, "a", Pair, [3])
    for tensor in (labelled.images, pair.first):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(tensor, images)


class Plain(nn.Module):
    """A backbone whose samples do not meet."""

    def __init__(self, name: str, *, image_size: int | None = None, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.num_features, self.conv = 4, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        x = self.conv(x).tanh()
        return x if feature_map else x.mean(dim=(2, 3))


def test_micro_batches_of_pretext_steps_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretext, "build_backbone", Plain)
    sizes: list[int] = []
    forward = Plain.forward

    def counted(self: Plain, x: Tensor, *args: Any) -> Tensor:
        if self.training:
            sizes.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(Plain, "forward", counted)
    made = []
    for size in ("null", "10"):
        (tmp_path / size).mkdir()
        sizes.clear()
        options = '--pretext.options={"projector_widths": [5]}', f"--compute.micro-batch={size}"
        made.append(part(run_stage(small_pipeline(tmp_path / size, small_config(*options)), "pretext"), "backbone"))
        assert set(sizes) == ({24} if size == "null" else {10, 4})
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_the_bilevel_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_pipeline(tmp_path, small_config("--compute.micro-batch=10"))
    parent = run_stage(pipeline, "head", run_stage(pipeline, "pretext"))
    given: list[Any] = []

    def stop(problem: Any, upper: Any, lower: Any, schedule: Any, method: Any, **options: Any) -> None:
        given.extend((method.hvp, lower.micro_batch, upper.micro_batch))
        raise KeyboardInterrupt

    monkeypatch.setattr(bissl, "Trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(pipeline, "bissl", parent)
    assert given == [MicroBatched(10), 10, None]
