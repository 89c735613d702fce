"""Images a second of the pretext stage: of its input pipeline alone, and of its steps, beside lightly's SimCLR.

    pip install -e ".[bench]"
    python benchmarks/pretext.py --json benchmarks/results/pretext.json
    python benchmarks/pretext.py --device cuda --bf16 --channels-last --json benchmarks/results/pretext-cuda.json

An image counts once, though two views are made of it. Images are synthetic, uint8, of the size of the views, and lie in
memory. Measured, in turns:

- the input pipeline: both views of a batch, crops in uint8 on the host and the rest on the device, as for files once
  they are decoded (`compute.crops=uint8`), and all of it on the device, which holds the images (`compute.crops=float`);
- the step: two forward passes, loss, backward pass and optimizer (LARS), on views that are ready; ours and lightly's
  (its projection head, NTXentLoss and LARS) with the same backbone, widths, batch and views; on CUDA in full float32
  unless `--tf32` or `--bf16` is given, where torch's own default has convolutions in TF32;
- the whole: drawing, views and step, each side with its own input pipeline, ours as `compute.crops=auto` has it (float
  on a GPU, uint8 on a CPU); lightly's is SimCLRTransform on PIL images,
  in this process, with the nearest values that it has (bilinear crop, the same blur chance for both views, no
  solarisation).

lightly comes with the extra `bench`; where it is missing a line says so and ours is measured alone.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.loading.sides import lightly_options
from bilevel.training import transfer_to
from recipes.bissl.settings.sections import ComputeConfig
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.torch_settings import apply_settings
from recipes.vision.networks.backbones import BACKBONES, build_backbone
from recipes.vision.pictures.memory import ArrayImages
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.workers import Workers

Views = tuple[Tensor, Tensor]
Figures = dict[str, Any]
LEARNING_RATE, WEIGHT_DECAY = 0.1, 1e-6


@dataclass(frozen=True)
class Setting:
    """What is measured, on what: of `images`, `batch` make a step and `pipeline_batch` a draw."""

    backbone: str
    size: int
    batch: int
    pipeline_batch: int
    images: int
    repeats: int
    device: torch.device
    bf16: bool = False
    tf32: bool = False
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]


class Source:
    """Synthetic uint8 images, and views of random batches of them, by either way of cropping."""

    def __init__(self, setting: Setting, task: SimCLR) -> None:
        self.setting, self.task = setting, task
        self.generator = torch.Generator().manual_seed(0)
        shape = (setting.images, 3, setting.size, setting.size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        arrays = {"uint8": None, "float": self.images.to(setting.device)}
        self.loaders = {crops: self._loader(array) for crops, array in arrays.items()}

    def batch(self, count: int) -> Tensor:
        """Positions of images."""
        return torch.randint(len(self.images), (count,), generator=self.generator)

    def views(self, rows: Tensor, crops: str | None = None) -> Views:
        """Both views of the images at `rows`; without a way of cropping by the device's own."""
        own = "float" if self.setting.device.type == "cuda" else "uint8"
        seed = int(torch.randint(2**31, (), generator=self.generator))
        first, second = self.loaders[crops or own].make(rows, seed)
        return first, second

    def _loader(self, array: Tensor | None) -> Loader:
        views, transfer = self.task.random_views(), transfer_to(self.setting.device)
        return Loader(ArrayImages(self.images), views, Workers(0), transfer=transfer, array=array)


@dataclass(frozen=True)
class Side:
    """One implementation of the step: its network, loss and optimizer."""

    setting: Setting
    modules: nn.Module
    loss: Callable[[Views], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, views: Views) -> Tensor:
        device = self.setting.device.type
        first, second = (view.contiguous(memory_format=self.setting.memory_format) for view in views)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if self.setting.bf16 else nullcontext():
            loss = self.loss((first, second))
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def our_side(setting: Setting, task: SimCLR, backbone: nn.Module) -> Side:
    modules = setting.place(nn.ModuleDict({"backbone": deepcopy(backbone), "heads": task.build(backbone)}))
    network, heads = modules.get_submodule("backbone"), modules.get_submodule("heads")
    assert isinstance(heads, nn.ModuleDict)
    optimizer = task.optimizer(modules.parameters(), LEARNING_RATE, WEIGHT_DECAY)
    return Side(setting, modules, lambda views: task.loss(network, dict(heads.items()), views), optimizer)


def lightly_side(setting: Setting, task: SimCLR, backbone: nn.Module) -> Side:
    """The same backbone under lightly's head, loss and optimizer. Raises ImportError without lightly."""
    loss_module = importlib.import_module("lightly.loss")
    heads = importlib.import_module("lightly.models.modules.heads")
    lars = importlib.import_module("lightly.utils.lars")
    *hidden, outputs = task.projector_widths
    head = heads.SimCLRProjectionHead(
        int(backbone.num_features),  # type: ignore[arg-type]
        hidden[0],
        outputs,
        num_layers=len(task.projector_widths),
    )
    network = setting.place(nn.Sequential(deepcopy(backbone), head))
    criterion = loss_module.NTXentLoss(temperature=task.temperature)
    optimizer = lars.LARS(network.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)
    return Side(setting, network, lambda views: criterion(network(views[0]), network(views[1])), optimizer)


def lightly_views(setting: Setting, source: Source) -> Callable[[Tensor], Views]:
    """lightly's transform of the images at some rows, as PIL images on the CPU, then both batches on the device."""
    module = importlib.import_module("lightly.transforms.simclr_transform")
    first, second = source.task.random_views()
    blur = (first.blur_probability + second.blur_probability) / 2
    transform = module.SimCLRTransform(**lightly_options(first), gaussian_blur=blur)

    def views(rows: Tensor) -> Views:
        pictures = (Image.fromarray(image) for image in source.images[rows].permute(0, 2, 3, 1).numpy())
        first, second = zip(*(transform(picture) for picture in pictures), strict=True)
        return torch.stack(first).to(setting.device), torch.stack(second).to(setting.device)

    return views


def speeds(timings: Mapping[str, measuring.Timing], images: int, base: str) -> Figures:
    """Images a second of each, and how many times those of `base`."""
    return {
        name: {
            "images_per_second": measuring.Timing(tuple(images / t for t in timing.samples)).record(),
            "ratio": timings[base].over(timing).record(),
        }
        for name, timing in timings.items()
    }


def measure_pipeline(setting: Setting, source: Source) -> Figures:
    """Both views of one batch by either way of cropping."""
    batch = source.batch(setting.pipeline_batch)
    functions = {f"{crops} crops": partial(source.views, batch, crops) for crops in source.loaders}
    timings = measuring.interleaved(functions, setting.repeats)
    return speeds(timings, setting.pipeline_batch, "uint8 crops")


def measure_steps(setting: Setting, source: Source) -> Figures:
    """The step on ready views, the whole with each side's own views, peak memory and the last losses."""
    torch.manual_seed(0)
    backbone = build_backbone(setting.backbone)
    sides = {"bilevel": our_side(setting, source.task, backbone)}
    transforms: dict[str, Callable[[Tensor], Views]] = {"bilevel": source.views}
    missing = None
    try:
        sides["lightly"] = lightly_side(setting, source.task, backbone)
        transforms["lightly"] = lightly_views(setting, source)
    except ImportError as error:
        missing = str(error)
    ready = source.views(source.batch(setting.batch))
    functions = {name: lambda side=side: side.step(ready) for name, side in sides.items()}
    warm_up = 3 if setting.device.type == "cuda" else 1
    steps = measuring.interleaved(functions, setting.repeats, warm_up=warm_up)
    wholes = measuring.interleaved(
        {
            name: lambda side=side, name=name: side.step(transforms[name](source.batch(setting.batch)))
            for name, side in sides.items()
            if name in transforms  # lightly's transforms need more packages than its loss
        },
        setting.repeats,
    )
    return {
        "missing": missing,
        "step": speeds(steps, setting.batch, "lightly" if "lightly" in sides else "bilevel"),
        "whole": speeds(wholes, setting.batch, "lightly" if "lightly" in wholes else "bilevel"),
        "peak_memory_mib": {
            name: measuring.peak_memory(function, setting.device) / 2**20 for name, function in functions.items()
        },
        "loss": {name: _finite(name, side.step(ready)) for name, side in sides.items()},
    }


def _finite(name: str, loss: Tensor) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of {name} is {value}: its times mean nothing")
    return value


def setting_of(options: Any) -> Setting:
    """The defaults of the device (or of --quick), replaced by what was asked for."""
    if options.quick:
        defaults = ("resnet-tiny", 32, 16, 32, 64, 2)
    elif options.device.type == "cuda":
        defaults = ("resnet18", 96, 1024, 1024, 100_000, 20)
    else:
        defaults = ("resnet18", 96, 64, 256, 512, 7)
    names = ("backbone", "size", "batch", "pipeline_batch", "images", "repeats")
    given = {name: getattr(options, name) for name in names}
    values: dict[str, Any] = {
        name: default if given[name] is None else given[name] for name, default in zip(names, defaults, strict=True)
    }
    ways = {name: getattr(options, name) for name in ("bf16", "tf32", "channels_last")}
    return Setting(**values, device=options.device, **ways)


def rows(figures: Figures) -> Iterable[tuple[str, str, str, str, str]]:
    for part in ("pipeline", "step", "whole"):
        for name, row in figures[part].items():
            speed, memory = row["images_per_second"], ""
            if part == "step":
                memory = f"{figures['peak_memory_mib'][name]:.0f}"
            quartiles = f"{speed['q1']:.0f} to {speed['q3']:.0f}"
            yield f"{part}: {name}", f"{speed['median']:.0f}", quartiles, f"{row['ratio']['median']:.2f}", memory


def main(arguments: list[str] | None = None) -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), help="default: resnet18")
    parser.add_argument("--size", type=int, help="side of images and views in px (default: 96)")
    parser.add_argument("--batch", type=int, help="images a step (default: 64 on the CPU, 1024 on a GPU)")
    parser.add_argument("--pipeline-batch", type=int, help="images a draw of the input pipeline (default: 256, 1024)")
    parser.add_argument("--images", type=int, help="images in memory (default: 512, 100000)")
    parser.add_argument("--repeats", type=int, help="repeats of each measurement (default: 7, 20)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 in the forward passes, both sides")
    parser.add_argument("--tf32", action="store_true", help="TF32 products and convolutions on CUDA, both sides")
    parser.add_argument("--channels-last", action="store_true", help="channels-last memory, both sides")
    options = parser.parse_args(arguments)
    measuring.use_threads(options.threads)
    setting = setting_of(options)
    apply_settings(ComputeConfig(tf32=setting.tf32), setting.device)
    task = SimCLR.model_validate({"image_size": setting.size})
    source = Source(setting, task)
    figures = {
        "quick": options.quick,
        "environment": measuring.environment(setting.device),
        "setting": {
            "backbone": setting.backbone,
            "size": setting.size,
            "batch": setting.batch,
            "pipeline_batch": setting.pipeline_batch,
            "images": setting.images,
            "repeats": setting.repeats,
            "bf16": setting.bf16,
            "tf32": setting.tf32,
            "channels_last": setting.channels_last,
        },
        "pipeline": measure_pipeline(setting, source),
        **measure_steps(setting, source),
    }
    measuring.write_json(options.json, figures)
    title = f"{setting.backbone}, {setting.size} px, batch {setting.batch}, {setting.device}"
    measuring.show(title, ("what", "images/s", "quartiles", "ratio", "peak MiB"), list(rows(figures)))
    if figures["missing"]:
        print(f"lightly is left out where it is needed: {figures['missing']}; it comes with the extra bench")
    return 0


if __name__ == "__main__":
    sys.exit(main())
