"""The recipe's bilevel problem on 2 and 4 processes against one process on the same global batches, in float64."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, AlternatingSchedule, Implicit, Level, Trainer, hypergradient, linearize
from bilevel.distributed import shard, world_size
from bilevel.lower.derivatives import training_derivatives
from bilevel.nn.sync_batch_norm import synchronised
from bilevel.training import Callback
from bilevel.training.callbacks import Record
from bilevel.tree import map_tensors
from recipes.bissl.tasks.base import Bound, PretextTask
from recipes.bissl.tasks.byol import BYOL
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.tasks.vicreg import VICReg
from recipes.bissl.training.problem import BiSSLProblem
from recipes.vision.networks.backbones import SmallResNet
from recipes.vision.optimizers import LARS
from tests.support.cases import joined, vector
from tests.support.rank_processes import WORLDS, on_ranks

NORM_LIMIT = 0.05
SMALL: dict[str, Any] = {"image_size": 8, "projector_widths": (6, 5)}


class Denoising(PretextTask):
    """A mean over samples, which does not tell its outputs."""

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"decoder": nn.Linear(int(backbone.num_features), 12)})  # type: ignore[arg-type]

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (heads["decoder"](backbone(batch[0])) - batch[1].flatten(1)[:, :12]).square().mean()


TASKS: dict[str, Callable[[], PretextTask]] = {
    "simclr": partial(SimCLR, **SMALL),
    "simclr, joint pass": partial(SimCLR, joint_pass=True, **SMALL),
    "vicreg": partial(VICReg, **SMALL),
    "byol": partial(BYOL, **SMALL, target_decay=0.9),
    "own": partial(Denoising, image_size=8),
}


def group_normed(module: nn.Module) -> nn.Module:
    """BatchNorm replaced by a normalisation within samples."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            group_normed(child)
    return module


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "no batch norm": group_normed,
    "batch norm": lambda module: synchronised(module) if world_size() > 1 else module,
}


def make_problem(task: PretextTask, norm: str) -> BiSSLProblem:
    torch.manual_seed(0)
    downstream = Classification(image_size=8, classes=("a", "b", "c"))  # type: ignore[call-arg]
    lower, upper = SmallResNet((4,)), SmallResNet((4,))
    heads, head = task.build(lower), downstream.build(upper)
    for module in (lower, upper, heads, head):
        NORMS[norm](module).double()
    return BiSSLProblem(task, downstream, lower, upper, heads, head, regularization_weight=0.5, gamma=0.3)


def own_rows(batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor[shard(len(tensor))], batch)


def images(count: int, seed: int) -> Tensor:
    return vector(count * 3 * 64, seed).reshape(count, 3, 8, 8)


def views(count: int, seed: int) -> tuple[Tensor, Tensor]:
    first = images(count, seed)
    return first, first + 0.5 * images(count, seed + 1)


# 2 divides neither 9 nor 7, 4 none but 8.
LOWER = [views(9, 1), views(8, 3), views(6, 5)]
UPPER = [(images(count, 7 + count), torch.arange(count) % 3) for count in (9, 7)]


def at_a_point(task: str, norm: str) -> dict[str, Tensor]:
    """Loss and gradient of a lower step, and a Hessian product."""
    problem = make_problem(TASKS[task](), norm)
    upper, lower = problem.variables()
    batch = own_rows(LOWER[0])
    system = linearize(problem, upper, lower, [batch], damping=1.0)
    along = {name: vector(leaf.numel(), k).reshape(leaf.shape) for k, (name, leaf) in enumerate(lower.items())}
    product = system.operator({name: along[name] for name in system.implicit})
    loss, gradient = training_derivatives(problem, upper, lower, batch, micro_batch=None)
    return {"loss": loss, "gradient": joined(gradient), "product": joined(product), **statistics(problem)}


def statistics(problem: BiSSLProblem) -> dict[str, Tensor]:
    """Running statistics and momentum targets."""
    return {f"{part}.{name}": tensor for part, state in problem.state_dict().items() for name, tensor in state.items()}


def whole_hypergradient(norm: str) -> dict[str, Any]:
    problem = make_problem(TASKS["simclr, joint pass"](), norm)
    upper, lower = problem.variables()
    result = hypergradient(
        problem,
        upper,
        lower,
        Implicit(CG(100, rtol=1e-11), damping=1000.0),
        upper_batch=own_rows(UPPER[0]),
        lower_batches=[own_rows(LOWER[0])],
    )
    assert result.solution is not None
    return {
        "grad": joined(result.grad),
        "implicit": joined(result.implicit),
        "numbers": torch.tensor([float(result.loss), result.stationarity], dtype=torch.float64),
        "status": result.solution.status.name,
    }


class Norms(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_event(self, trainer: Trainer, record: Record) -> None:
        self.found += [record["grad_norm"]] if "grad_norm" in record else []


def trained(norm: str, fresh: bool = False) -> dict[str, Any]:
    """Three alternations with adaptation, momentum, a norm limit, and systems of two batches."""
    problem = make_problem(TASKS["simclr, joint pass"](), norm)
    upper, lower = problem.variables()
    norms = Norms()
    Trainer(
        problem,
        Level(
            upper,
            torch.optim.SGD(list(upper.values()), lr=0.1, momentum=0.9),
            [own_rows(batch) for batch in UPPER],
            max_grad_norm=NORM_LIMIT,
        ),
        Level(
            lower,
            LARS(list(lower.values()), lr=0.1, momentum=0.9, trust_coefficient=0.1),
            [own_rows(batch) for batch in LOWER],
            max_grad_norm=NORM_LIMIT,
        ),
        AlternatingSchedule(
            3, 2, 1, 1, 0.2, adaptation_pairs={name: name for name in upper if name.startswith("backbone.")}
        ),
        Implicit(CG(2, rtol=None), damping=1000.0, hessian_batches=2, fresh_batches=fresh),
        callbacks=[norms],
    ).run()
    return {
        "upper": joined(upper).detach(),
        "lower": joined(lower).detach(),
        "norms": torch.tensor(norms.found, dtype=torch.float64),
        **statistics(problem),
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"{task}, batch norm": partial(at_a_point, task, "batch norm") for task in TASKS},
    "simclr, no batch norm": partial(at_a_point, "simclr", "no batch norm"),
    **{f"hypergradient, {norm}": partial(whole_hypergradient, norm) for norm in NORMS},
    **{f"trained, {norm}": partial(trained, norm) for norm in NORMS},
    "trained, fresh Hessian batches": partial(trained, "batch norm", fresh=True),
}


def everything() -> dict[str, Any]:
    return {name: case() for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return on_ranks(everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return everything()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_several_ranks_equal_one_process(
    world: int, name: str, ranks: dict[int, list[dict[str, Any]]], reference: dict[str, Any]
) -> None:
    first = ranks[world][0][name]
    assert first.keys() == reference[name].keys()
    for key, expected in reference[name].items():
        if isinstance(expected, str):
            assert all(rank[name][key] == expected == "CONVERGED" for rank in ranks[world])
            continue
        assert all(torch.equal(rank[name][key], first[key]) for rank in ranks[world]), key
        size = float(expected.double().norm())
        error = float((first[key] - expected).double().norm())
        assert error < 1e-10 * max(size, 1.0), f"{key}: {error} of {size}"
        assert "." in key or size > 1e-3, key


@pytest.mark.parametrize("norm", NORMS)
def test_the_training_compared_has_limited_steps_and_moved_far(norm: str, reference: dict[str, Any]) -> None:
    found, problem = reference[f"trained, {norm}"], make_problem(TASKS["simclr, joint pass"](), norm)
    assert float(found["norms"].min()) > NORM_LIMIT
    for level, variables in zip(("upper", "lower"), problem.variables(), strict=True):
        start = joined(variables).detach()
        assert float((found[level] - start).norm()) > 1e-3 * float(start.norm())
