"""The sections of a configuration: fields with defaults, units and checks."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from bilevel import CG, MINRES, Identity, Neumann, Nystrom
from bilevel.linear import Escalating, Solver
from bilevel.products import Automatic, FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse

from ...vision.networks.backbones import BACKBONES, check_backbone
from ...vision.sources.loading import Storage
from .arms import BASELINE, METHOD, arm_of

V = TypeVar("V")


def _json_values(options: dict[str, Any]) -> dict[str, Any]:
    """The options as JSON gives them back (tuples become lists), so that a saved config equals the one that ran."""
    try:
        return json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold JSON values: {error}") from error


Options = Annotated[dict[str, Any], AfterValidator(_json_values)]


class Section(BaseModel):
    """A part of the configuration; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where images come from and how they are split."""

    pretext: str = Field(description='source of pretext images: "digits", "stl10", "folder:PATH" or "module:Class"')
    downstream: str = Field(description="source of labelled images, as for pretext")
    root: str = Field(default="data", description="folder of downloaded sets")
    download: bool = Field(default=True, description="fetch a set that is not below root, where the network allows it")
    image_size: int = Field(
        ge=4, le=4096, description="side of a view, unless a task's options say otherwise (px); cut from the original"
    )
    storage: Storage = Field(
        default="auto",
        description="files read into memory at the start, or streamed, read when they are needed; auto: streamed where "
        "they have more than 32 MiB. Batches are the same to the bit",
    )
    num_workers: int | None = Field(
        default=None,
        ge=0,
        le=512,
        description="processes that read and crop streamed images, for all stages together; 0: this process does; "
        "null: one fewer than there are cores, shared by the processes on this machine",
    )
    prefetch_factor: int = Field(
        default=2, ge=1, le=64, description="batches of each level that are made before they are used, while room lasts"
    )
    pretext_limit: int | None = Field(default=None, ge=1, description="use at most this many pretext images; null: all")
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


HOW_READ = {"root", "download", "storage", "num_workers", "prefetch_factor"}
"""Fields of the section `data` that change no batch."""


class ModelConfig(Section):
    """The network."""

    backbone: str = Field(
        description=f"{', '.join(BACKBONES)}, any classification network of torchvision by its name in "
        "torchvision.models, or module:Class of an own one (docs/weights.md)"
    )
    init_backbone: str | None = Field(
        default=None,
        description="weights to start from instead of random ones: a .safetensors or torch.save file, or an artifact's "
        "folder, in the naming of torchvision, lightly, solo-learn or the BiSSL authors; null: random weights",
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


class BilevelConfig(Section):
    """Stage 3: Algorithm 1."""

    alternations: int = Field(ge=1, description="T, number of alternations")
    lower_steps: int = Field(default=20, ge=1, description="N_L, pretext steps an alternation")
    upper_steps: int = Field(default=8, ge=1, description="N_U, hypergradient steps an alternation")
    adaptation_every: int | None = Field(
        default=100, ge=1, description="N_a, alternations between adaptations; null: never"
    )
    adaptation_strength: float = Field(
        default=0.1, ge=0, le=1, description="alpha of theta_D <- (1-alpha) theta_D + alpha theta_P"
    )
    regularization_weight: float = Field(default=0.001, ge=0, description="lambda of lambda/2 ||theta_P - theta_D||^2")
    damping: float = Field(default=10.0, ge=0, description="added to lambda in the linear system (appendix B.3)")
    gamma: float = Field(default=0.01, ge=0, description="weight of the downstream loss of theta_D itself")
    pretext_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the pretext images that the lower level draws from, chosen by data.split_seed",
    )
    hessian_batches: int = Field(default=5, ge=1, description="K, lower batches in the Hessian's mean")
    solver: Literal["cg", "minres", "neumann", "nystrom", "identity"] = Field(
        default="cg", description="solver of the linear system"
    )
    nystrom_rank: int = Field(
        default=20, ge=1, description="with solver nystrom: products for its model, made once an alternation"
    )
    solver_iterations: int = Field(default=5, ge=1, description="N_c, most iterations of the solver")
    solver_rtol: Annotated[float, Field(ge=0, lt=1)] | Literal["noise"] | None = Field(
        default=None,
        description='relative residual to stop at; "noise" (cg): what other stored batches would change; '
        "null: all iterations",
    )
    recycle: int = Field(
        default=0,
        ge=0,
        description="search directions of cg kept for the later solves of an alternation (two vectors of memory each)",
    )
    aggregate: bool = Field(
        default=False,
        description="one solve an alternation, for the sum of its upper steps' right-hand sides, in the last of them",
    )
    implicit_head: bool = Field(
        default=False,
        description="let phi_P respond to the upper level too (the paper holds it fixed)",
    )
    head_tikhonov: float = Field(
        default=1.0,
        ge=0,
        description="with implicit_head: Tikhonov term of phi_P's block (multiples of lambda + damping)",
    )
    layerwise: bool = Field(
        default=False, description="CG with step lengths per tensor, the paper's variant (not exact)"
    )
    through_negative_curvature: bool = Field(
        default=False,
        description="with layerwise: make all iterations through directions of negative curvature, as the paper's "
        "algorithm does, instead of stopping there",
    )
    escalate: bool = Field(
        default=False,
        description="answer a breakdown of the solver (negative curvature, ...) by a growing Tikhonov term",
    )
    hvp: Literal["auto", "reverse", "reverse-kept", "forward", "finite-difference"] = Field(
        default="reverse",
        description="Hessian-vector products; reverse-kept keeps graphs in memory, auto takes what is measured fastest "
        "(timings decide, so that the last digits may differ between runs)",
    )
    graph_memory: float | None = Field(
        default=None,
        gt=0,
        description="with hvp=reverse-kept or auto: memory for the kept graphs of a system's K batches (GiB); null: no "
        "limit for reverse-kept, none kept by auto",
    )
    max_grad_norm: float | None = Field(
        default=10.0, gt=0, description="norm limit of each level's gradient; null: none"
    )
    lower_lr: float = Field(default=1.0, gt=0, description="peak learning rate of the lower level")
    lower_warmup_epochs: float = Field(
        default=10.0, ge=0, description="linear warm-up of the lower level (pretext epochs)"
    )
    upper_lr: float = Field(gt=0, description="initial learning rate of the upper level (SGD, momentum 0.9, cosine)")
    upper_weight_decay: float = Field(ge=0, description="weight decay of the upper level")
    checkpoint_every: int = Field(default=5, ge=1, description="alternations between two checkpoints")

    @model_validator(mode="after")
    def _consistent(self) -> "BilevelConfig":
        if self.layerwise and self.solver != "cg":
            raise ValueError(f"layerwise is a variant of cg, but solver is {self.solver!r}; set solver to cg")
        if self.solver in ("minres", "neumann", "nystrom") and (self.solver_rtol == "noise" or self.recycle):
            raise ValueError(
                f"solver_rtol=noise and recycle belong to cg, but solver is {self.solver!r}; set solver to cg, or give "
                "a number for solver_rtol and 0 for recycle"
            )
        if self.layerwise and (self.solver_rtol == "noise" or self.recycle):
            raise ValueError(
                "layerwise keeps no conjugate directions and no true residual: it takes neither recycle "
                "nor solver_rtol=noise"
            )
        if self.through_negative_curvature and not self.layerwise:
            raise ValueError(
                "through_negative_curvature belongs to layerwise, the paper's variant of cg, which is off; set "
                "through_negative_curvature to false too"
            )
        if self.through_negative_curvature and self.escalate:
            raise ValueError(
                "escalate answers negative curvature by a Tikhonov term and through_negative_curvature passes it by; "
                "set one of the two to false"
            )
        if self.solver_rtol == "noise" and self.hessian_batches < 2:
            raise ValueError("solver_rtol=noise compares Hessian batches: hessian_batches must be at least 2, got 1")
        if self.escalate and self.solver == "identity":
            raise ValueError("escalate answers breakdowns, and solver identity has none; set escalate to false")
        if self.graph_memory is not None and self.hvp not in ("reverse-kept", "auto"):
            raise ValueError(
                f"graph_memory limits kept graphs, and hvp={self.hvp} keeps none; set hvp to reverse-kept or auto, or "
                "graph_memory to null"
            )
        if self.hessian_batches > self.lower_steps:
            raise ValueError(
                f"hessian_batches={self.hessian_batches} exceeds lower_steps={self.lower_steps}, whose first batches "
                "are used; reduce hessian_batches"
            )
        if self.regularization_weight + self.damping == 0.0:
            raise ValueError("regularization_weight + damping must be positive; the system divides by their sum")
        return self

    def make_solver(self) -> Solver:
        """The solver that the fields describe."""
        return Escalating(self._plain_solver()) if self.escalate else self._plain_solver()

    def _plain_solver(self) -> Solver:
        if self.solver == "identity":
            return Identity()
        if self.solver == "minres":
            return MINRES(self.solver_iterations, self._number())
        if self.solver == "neumann":
            return Neumann(self.solver_iterations, self._number())
        if self.solver == "nystrom":
            # The regularizer's identity is known to be in A, but has no part in phi_P's block.
            identity = None if self.implicit_head else 1.0
            return Nystrom(self.nystrom_rank, identity, self.solver_iterations, self._number())
        return CG(
            self.solver_iterations,
            self.solver_rtol,
            self.layerwise,
            recycle=self.recycle,
            through_negative_curvature=self.through_negative_curvature,
        )

    def _number(self) -> float | None:
        assert self.solver_rtol != "noise", "checked with the fields"
        return self.solver_rtol

    def make_hvp(self) -> HVPProvider:
        """The provider that the fields describe."""
        budget = None if self.graph_memory is None else int(self.graph_memory * 2**30)
        return {
            "auto": Automatic(budget),
            "reverse": ReverseOverReverse(),
            "reverse-kept": ReverseOverReverse(keep_graph=True, memory_budget=budget),
            "forward": ForwardOverReverse(),
            "finite-difference": FiniteDifference(),
        }[self.hvp]


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
    validate_every: int = Field(default=1, ge=1, description="epochs between two validations; the last one always is")
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


def _first(value: V | None, fallback: V) -> V:
    return fallback if value is None else value
