"""The sections of a configuration: fields with defaults, units and checks."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from ...experiment.configuration import Section
from ...vision import reading_section
from ...vision.networks.backbones import BACKBONES, check_backbone, check_residual
from .arms import BASELINE, METHOD, arm_of

V = TypeVar("V")


def _json_values(options: dict[str, Any]) -> dict[str, Any]:
    """The options as JSON gives them back (tuples become lists), so that a saved config equals the one that ran."""
    try:
        return json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold JSON values: {error}") from error


Options = Annotated[dict[str, Any], AfterValidator(_json_values)]


class DataConfig(reading_section.ReadingSection):
    """Where images come from and how they are split."""

    pretext: str = Field(
        description='source of pretext images: "digits", "stl10", "folder:PATH", "hf:PATH", "webdataset:PATH" or '
        '"module:Class" (docs/datasets.md)'
    )
    downstream: str = Field(description="source of labelled images, as for pretext")
    image_size: int = Field(
        ge=4, le=4096, description="side of a view, unless a task's options say otherwise (px); cut from the original"
    )
    prefetch_factor: int = Field(
        default=2, ge=1, le=64, description="batches of each level that are made before they are used, while room lasts"
    )
    cache: str | None = Field(
        default=None,
        description="folder of decoded pictures, one for all runs, written before the stages of sets that are streamed "
        "and read from then on; large pictures are reduced there as far as their views allow; null: none",
    )
    pretext_limit: int | None = Field(default=None, ge=1, description="use at most this many pretext images; null: all")
    train_list: str | None = Field(
        default=None,
        description="text file that names the labelled images to train on, one a line, as the 1% and 10% lists of "
        "ImageNet do; validation and test stay whole; null: all",
    )
    labels_per_class: int | None = Field(default=None, ge=1, description="training images a class; null: all")
    val_per_class: int | None = Field(
        default=None, ge=1, description="validation images a class; null: all of the split"
    )
    val_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="validation share where the set has no split of its own"
    )
    test_fraction: float = Field(
        default=0.25, gt=0, lt=1, description="test share where the set has no split of its own"
    )
    split_seed: int = Field(default=0, ge=0, description="seed of the splits")


HOW_READ = {*reading_section.HOW_READ, "prefetch_factor", "cache"}
"""Fields of the section `data` that change no batch; a cache of reduced pictures does, see `datasets.resolution`."""


class ModelConfig(Section):
    """The network."""

    backbone: str = Field(
        description=f"{', '.join(BACKBONES)}, any classification network of torchvision by its name in "
        "torchvision.models, timm:NAME of one of timm's, or module:Class of an own one (docs/weights.md)"
    )
    zero_init_residual: bool = Field(
        default=False,
        description="random weights of a residual network start with 0 in each block's last norm, as timm's do; "
        "torchvision's start with 1",
    )
    init_backbone: str | None = Field(
        default=None,
        description="weights to start from instead of random ones: a .safetensors or torch.save file, or an artifact's "
        "folder, in any of the layouts that docs/weights.md lists; null: random weights",
    )
    projector_epochs: int = Field(
        default=10,
        ge=0,
        description="with init_backbone: pretext epochs in which heads that the file lacks are fitted to the frozen "
        "backbone first",
    )

    @field_validator("backbone")
    @classmethod
    def _known(cls, backbone: str) -> str:
        check_backbone(backbone)
        return backbone

    @model_validator(mode="after")
    def _has_blocks(self) -> "ModelConfig":
        if self.zero_init_residual:
            check_residual(self.backbone)
        return self


class PretextConfig(Section):
    """Stage 1: self-supervised training on unlabelled images."""

    task: str = Field(default="simclr", description='"simclr", "byol", "vicreg" or module:Class of a PretextTask')
    options: Options = Field(default_factory=dict, description="the task's own fields, as JSON or key=value")
    epochs: int = Field(
        ge=0, description="length of the BiSSL arm's warm-up (epochs); 0 only where model.init_backbone is given"
    )
    batch_size: int = Field(ge=2, description="images a step")
    lr: float = Field(gt=0, description="peak learning rate of the BiSSL arm's warm-up")
    weight_decay: float = Field(default=1e-6, ge=0, description="weight decay, also in the lower level")
    warmup_epochs: float = Field(default=10.0, ge=0, description="linear warm-up of the learning rate (epochs)")
    lr_floor: float = Field(
        default=0.0, ge=0, le=1, description="where the cosine ends, also in the lower level (fraction of the peak)"
    )
    baseline_epochs: int | None = Field(
        default=None, ge=1, description="length of the baseline (epochs); null: exactly the BiSSL arm's pretext steps"
    )
    baseline_lr: float | None = Field(default=None, gt=0, description="peak learning rate of the baseline; null: as lr")
    monitor_every: int = Field(default=10, ge=1, description="epochs between two k-NN and embedding-spread checks")
    checkpoint_every: int = Field(default=10, ge=1, description="epochs between two checkpoints")

    def step_settings(self) -> dict[str, Any]:
        """What shapes a pretext step besides its rate; a floor of 0 is left out, as older artifacts know none."""
        kept = self.model_dump(include={"task", "options", "batch_size", "weight_decay"})
        return kept | self.model_dump(include={"lr_floor"}, exclude_defaults=True)


class DownstreamConfig(Section):
    """The downstream task, shared by stages 2 to 4."""

    task: str = Field(
        default="classification",
        description='"classification", "multilabel", "regression" or module:Class of a DownstreamTask',
    )
    options: Options = Field(default_factory=dict, description="the task's own fields, as JSON or key=value")
    batch_size: int = Field(ge=2, description="labelled images a step; at most the labelled set")
    eval_batch_size: int = Field(default=512, ge=1, description="images a pass in evaluation")


class HeadConfig(Section):
    """Stage 2: the downstream head on the frozen backbone."""

    epochs: int = Field(default=20, ge=1, description="length (epochs of the labelled set)")
    lr: float = Field(gt=0, description="constant learning rate")
    weight_decay: float = Field(ge=0, description="weight decay")
    batch_norm: Literal["eval", "train"] = Field(default="eval", description="mode of the frozen backbone's BatchNorm")


class FinetuneConfig(Section):
    """Stage 4: fine-tuning of backbone and a fresh head, the best validation epoch being tested."""

    epochs: int = Field(ge=1, description="length (epochs of the labelled set)")
    lr: float = Field(gt=0, description="initial learning rate after BiSSL (SGD, momentum 0.9, cosine to 0)")
    weight_decay: float = Field(ge=0, description="weight decay after BiSSL")
    baseline_lr: float | None = Field(default=None, gt=0, description="as lr, after plain pre-training; null: as lr")
    baseline_weight_decay: float | None = Field(
        default=None, ge=0, description="as weight_decay, after plain pre-training"
    )
    scratch_lr: float | None = Field(
        default=None, gt=0, description="as lr, from random weights; null: as the baseline's"
    )
    scratch_weight_decay: float | None = Field(default=None, ge=0, description="as weight_decay, from random weights")
    lr_floor: float = Field(
        default=0.0, ge=0, le=1, description="where the cosine ends in every arm (fraction of its learning rate)"
    )
    validate_every: int = Field(default=1, ge=1, description="epochs between two validations; the last one always is")
    ties: Literal["first", "lower-loss"] = Field(
        default="first",
        description="which epoch of the best validation score is tested: the first, as in the paper, or the one "
        "of the lowest validation loss, for validation sets so small that many epochs tie",
    )
    checkpoint_every: int = Field(default=50, ge=1, description="epochs between two checkpoints")

    def rates(self, arm: str) -> tuple[float, float]:
        """(learning rate, weight decay) of an arm."""
        whose = arm_of(arm).rates
        if whose == METHOD:
            return self.lr, self.weight_decay
        baseline = _first(self.baseline_lr, self.lr), _first(self.baseline_weight_decay, self.weight_decay)
        if whose == BASELINE:
            return baseline
        return _first(self.scratch_lr, baseline[0]), _first(self.scratch_weight_decay, baseline[1])


class ComputeConfig(Section):
    """How losses, products and views are computed; the defaults are plain float32."""

    precision: Literal["float32", "bf16"] = Field(
        default="float32",
        description="forward passes of first-order steps (stages 1, 2, 4, lower steps); bf16: bfloat16 autocast. The "
        "upper level, Hessian products and evaluation are float32 always",
    )
    tf32: bool = Field(
        default=False,
        description="TF32 products and convolutions in every pass on CUDA; false: full float32, also where torch's "
        "own default is TF32",
    )
    channels_last: bool = Field(default=False, description="modules and image batches in channels_last memory layout")
    compile: bool = Field(
        default=False,
        description="torch.compile the losses of first-order steps; never those of Hessian products and the upper "
        "level, which are differentiated twice",
    )
    crops: Literal["auto", "uint8", "float"] = Field(
        default="auto",
        description="where random crops of images in memory at one size are resized: uint8, on the host, as those of "
        "other images always are; float, on the compute device, which then holds the set (within 2/255); auto: float "
        "on a GPU. A run keeps what it began with",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=2,
        description="images a chunk of pretext steps, lower steps and Hessian products, whose memory is then a "
        "chunk's; exact but for BatchNorm, which takes each chunk's statistics; null: whole batches",
    )

    batch_norm: Literal["synchronised", "local"] = Field(
        default="synchronised",
        description="over several processes: BatchNorm by the statistics of the global batch, or by each process's "
        "share of it (another model for each number of processes); no difference in one process",
    )
    cudnn_benchmark: bool = Field(
        default=False,
        description="cuDNN tries its convolutions on the first batch of each shape and keeps the fastest, which may be "
        "another one in every run; not with deterministic",
    )
    deterministic: bool = Field(
        default=False,
        description="only algorithms that give the same bits again on the same device and installation: torch's "
        "deterministic ones, and cuBLAS buffers of a fixed size; what has none is refused. Slower on a GPU",
    )

    @model_validator(mode="after")
    def _one_choice(self) -> "ComputeConfig":
        if self.cudnn_benchmark and self.deterministic:
            raise ValueError(
                "cudnn_benchmark: cuDNN's fastest convolution may be another one in every run, which deterministic "
                "rules out; set one of them to false"
            )
        return self

    def decisive(self, *left_out: str) -> dict[str, Any]:
        """The fields that belong to a stage's key, but for those `left_out`.

        What cuDNN's search chooses is no property of a result, as little as a number of threads; what was made by any
        algorithm has another key than what only deterministic ones may have made.
        """
        fields = self.model_dump(exclude={"cudnn_benchmark", *left_out})
        return fields if self.deterministic else {n: value for n, value in fields.items() if n != "deterministic"}


def _first(value: V | None, fallback: V) -> V:
    return fallback if value is None else value
