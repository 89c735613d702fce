"""What a device computes: products, hypergradients and training on it, against float64 on the CPU.

    python benchmarks/devices.py --device cuda --json benchmarks/results/devices.json

- ``products``: relative distance of Hessian products and of hypergradients (CG, 10 iterations) from those of the CPU in
  float64, for each network, provider and precision; what is said where a provider does not work.
- ``examination``: whether lost curvature is found on the device, and nothing where nothing is lost.
- ``training``: a run with a shuffled DataLoader (pinned, two workers) that is stopped and resumed: whether every
  variable is the same to the bit, with torch's deterministic algorithms; and that bfloat16 autocast in training steps
  leaves a hypergradient's passes in float32.

It ends with 1 where one of these is not as it should be.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import environment, parser, show, use_threads, write_json
from bilevel import (
    CG,
    AlternatingSchedule,
    Checkpointing,
    Implicit,
    Level,
    Params,
    Problem,
    Trainer,
    functional_call,
    hypergradient,
    linearize,
    ridge,
)
from bilevel.nn import training_autocast
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse

SIZE, CLASSES = 16, 5
PROVIDERS: dict[str, HVPProvider] = {
    "reverse": ReverseOverReverse(),
    "kept graphs": ReverseOverReverse(keep_graph=True),
    "forward": ForwardOverReverse(),
    "differences": FiniteDifference(),
}
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "TF32": torch.float32}
LIMITS = {"float64": 1e-8, "float32": 1e-2, "TF32": 0.3}
"""Beyond these a relative distance is a fault; that of differences of gradients at ReLU's kinks is none in any."""


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3 * SIZE, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.lstm(images.transpose(1, 2).flatten(2))[0][:, -1])


class Attention(nn.Module):
    """A transformer's layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3 * SIZE, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(3 * SIZE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.layer(images.transpose(1, 2).flatten(2)).mean(1))


def convolutional(norm: Callable[[int], nn.Module], activation: type[nn.Module] = nn.SiLU) -> nn.Module:
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    return nn.Sequential(first, norm(8), activation(), second, norm(8), activation(), *head)


def normed(module: nn.Module) -> nn.Module:
    """Weight norm on every convolution."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(layer)
    return module


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions, batch norm": lambda: convolutional(nn.BatchNorm2d),
    "convolutions, batch norm, ReLU": lambda: convolutional(nn.BatchNorm2d, nn.ReLU),
    "convolutions, weight norm": lambda: normed(convolutional(lambda n: nn.GroupNorm(2, n))),
    "LSTM": Recurrent,
    "transformer layer": Attention,
}


class Weighted(Problem):
    """Sample weights, and a ridge that makes the system positive definite."""

    regularization_weight = 5.0

    def __init__(self, module: nn.Module, *, cast: bool = False) -> None:
        self.module, self.cast, self.seen = module, cast, set[torch.dtype]()

    def losses(self, lower: Params, images: Tensor, labels: Tensor) -> Tensor:
        if self.cast:
            with training_autocast(images.device.type):
                outputs = functional_call(self.module, lower, images)
        else:
            outputs = functional_call(self.module, lower, images)
        self.seen.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs.to(images.dtype), labels, reduction="none")

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        images, labels, rows = batch
        return (upper["weights"][rows].sigmoid() * self.losses(lower, images, labels)).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.losses(lower, *batch[:2]).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)


class Forgetful(torch.autograd.Function):
    """A square whose backward pass takes what it needs from an attribute, and so has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2.0 * ctx.x * gradient


class Faulty(Weighted):
    """A penalty whose curvature is lost."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        penalty = torch.stack([Forgetful.apply(leaf).sum() for leaf in lower.values()]).sum()  # pyright: ignore
        return super().lower_objective(upper, lower, batch) + penalty


def made(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Weighted, Params, Params, Any]:
    """A problem with its variables and a batch: the same numbers everywhere."""
    torch.manual_seed(0)
    module = NETWORKS[name]().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (24,), generator=generator)
    weights = torch.randn(24, generator=generator, dtype=torch.float64)
    module.to(device, dtype)
    lower = {name: p.detach().clone() for name, p in module.named_parameters()}
    batch = (images.to(device, dtype), labels.to(device), torch.arange(24, device=device))
    return Weighted(module), {"weights": weights.to(device, dtype)}, lower, batch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def computed(name: str, provider: HVPProvider, device: torch.device, dtype: torch.dtype) -> list[Params]:
    """A product with the lower variables, and the hypergradient."""
    problem, upper, lower, batch = made(name, device, dtype)
    product = linearize(problem, upper, lower, [batch], hvp=provider).operator(lower)
    method = Implicit(CG(10, rtol=None), hvp=provider)
    result = hypergradient(problem, upper, lower, method, upper_batch=batch, lower_batches=[batch])
    return [{key: leaf.double().cpu() for key, leaf in found.items()} for found in (product, result.grad)]


def distance(found: Params, expected: Params) -> float:
    difference = torch.cat([(found[name] - leaf).flatten() for name, leaf in expected.items()])
    return float(difference.norm() / torch.cat([leaf.flatten() for leaf in expected.values()]).norm())


def products(device: torch.device, names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table, and the faults among them."""
    rows, faults = [], []
    for name in names:
        expected = computed(name, PROVIDERS["reverse"], torch.device("cpu"), torch.float64)
        for label, provider in PROVIDERS.items():
            for precision, dtype in PRECISIONS.items():
                row: dict[str, Any] = {"network": name, "provider": label, "precision": precision}
                try:
                    with tf32(precision == "TF32"), warnings.catch_warnings():
                        warnings.simplefilter("ignore", UserWarning)
                        found = computed(name, provider, device, dtype)
                except RuntimeError as error:
                    rows.append({**row, "said": str(error).splitlines()[0]})
                    continue
                row["product"], row["hypergradient"] = (distance(*pair) for pair in zip(found, expected, strict=True))
                rows.append(row)
                worst = max(row["product"], row["hypergradient"])
                if label != "differences" and not worst <= LIMITS[precision]:
                    faults.append(f"{name}, {label}, {precision}: off by {worst:.1e}")
    return rows, faults


def examination(device: torch.device) -> tuple[dict[str, bool], list[str]]:
    """Whether a lost curvature is a failure on the device, in float32 and float64."""
    found: dict[str, bool] = {}
    for dtype in (torch.float32, torch.float64):
        healthy, upper, lower, batch = made("convolutions, batch norm", device, dtype)
        for name, problem in (("healthy", healthy), ("faulty", Faulty(healthy.module))):
            result = hypergradient(problem, upper, lower, upper_batch=batch, lower_batches=[batch], on_failure="ignore")
            found[f"{name}, {dtype}"] = "lost curvature" in (result.failure or "")
    return found, [key for key, lost in found.items() if lost != key.startswith("faulty")]


def training(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Whether a resumed run is the same to the bit, and the precisions that objectives met."""

    def run(alternations: int, folder: Path | None, *, cast: bool = False) -> tuple[Trainer, set[torch.dtype]]:
        problem, upper, lower, batch = made("convolutions, batch norm", device, torch.float32)
        problem.cast = cast
        data = TensorDataset(*(tensor.cpu() for tensor in batch))
        moved = Moved(problem, device)
        loader = DataLoader(data, 6, shuffle=True, num_workers=2, pin_memory=device.type == "cuda")
        trainer = Trainer(
            moved,
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [batch]),
            Level(lower, torch.optim.Adam(lower.values(), lr=1e-2), loader),
            AlternatingSchedule(alternations, 3, 2),
            CG(5, rtol=None),
            callbacks=[] if folder is None else [Checkpointing(folder)],
        )
        if folder is not None:
            trainer.resume(folder)
        trainer.run()
        return trainer, problem.seen

    torch.manual_seed(0)
    whole, _ = run(4, None)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        run(2, Path(folder))
        resumed, _ = run(4, Path(folder))
    equal = all(
        torch.equal(resumed.levels[level].params[name], leaf)
        for level in whole.levels
        for name, leaf in whole.levels[level].params.items()
    )
    _, seen = run(1, None, cast=True)
    problem, upper, lower, batch = made("convolutions, batch norm", device, torch.float32)
    problem.cast = True
    hypergradient(problem, upper, lower, upper_batch=batch, lower_batches=[batch], on_failure="ignore")
    record = {
        "resumed to the bit": equal,
        "training under autocast": sorted(map(str, seen)),
        "hypergradient under autocast": sorted(map(str, problem.seen)),
    }
    faults = [] if equal else ["a resumed training has other variables"]
    went_right = torch.bfloat16 in seen and torch.bfloat16 not in problem.seen
    faults += [] if went_right else ["autocast went elsewhere"]
    return record, faults


class Moved(Problem):
    """A problem whose lower batches come from the host."""

    def __init__(self, problem: Weighted, device: torch.device) -> None:
        self.problem, self.module, self.device = problem, problem.module, device
        self.regularization_weight = problem.regularization_weight

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        batch = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        return self.problem.lower_objective(upper, lower, batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return self.problem.upper_objective(upper, lower, batch)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)


def main() -> int:
    options = parser(__doc__)
    chosen = options.parse_args()
    use_threads(chosen.threads)
    # Read by cuBLAS when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    names = list(NETWORKS)[: 1 if chosen.quick else None]
    rows, faults = products(chosen.device, names)
    examined, more = examination(chosen.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        trained, most = training(chosen.device)
    finally:
        torch.use_deterministic_algorithms(False)
    faults += more + most
    cells = [[r["network"], r["provider"], r["precision"], *_cells(r)] for r in rows]
    show("Distance from the CPU's float64", ["network", "provider", "precision", "product", "hypergradient"], cells)
    print(examined, trained, "faults:", faults or "none", sep="\n")
    figures = {"products": rows, "examination": examined, "training": trained, "faults": faults}
    write_json(chosen.json, {"environment": environment(chosen.device), **figures})
    return 1 if faults else 0


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["said"][:60], ""] if "said" in row else [f"{row['product']:.1e}", f"{row['hypergradient']:.1e}"]


if __name__ == "__main__":
    sys.exit(main())
