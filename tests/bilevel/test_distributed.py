"""Two processes against one on the same global batch."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.measuring import free_port
from bilevel import (
    CG,
    AlternatingSchedule,
    Hypergradient,
    Implicit,
    Level,
    Neumann,
    OneStep,
    Params,
    Penalty,
    Problem,
    Trainer,
    Unrolled,
    hypergradient,
    linearize,
    proximal,
)
from bilevel.distributed import (
    agree,
    from_first_rank,
    gather,
    largest_over_ranks,
    mean_over_ranks,
    on_first_rank,
    rank,
    replicate,
    rows_of_all,
    shard,
    world_size,
)
from bilevel.hypergradients import SAMA
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate
from bilevel.nn import own_draws
from bilevel.products import ForwardOverReverse, ReverseOverReverse
from bilevel.products.automatic import Automatic
from recipes.experiment.ranks.processes import Launch, Ranks
from tests.support.cases import joined, vector

WORLD = 2
POINTS = vector(8 * 3, 70).reshape(8, 3)


class Contrastive(Problem):
    """Every embedding against all of the global batch, which is gathered over the ranks."""

    regularization_weight = 0.3

    def __init__(self, *, weighted: bool = False) -> None:
        self.weighted = weighted

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        local = torch.tanh(batch @ lower["w"]) * lower["scale"]
        if self.weighted:
            local = local * torch.exp(upper["tilt"])
        everywhere = gather(local)
        similar = everywhere @ everywhere.T
        return (similar.logsumexp(dim=1) - similar.roll(1, dims=0).diagonal()).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean() + lower["scale"] * upper["w"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {"w": "w"}) + 0.5 * lower["scale"].square()


def variables() -> tuple[Params, Params]:
    upper = {"w": vector(6, 71).reshape(3, 2), "tilt": vector(2, 72)}
    return upper, {"w": vector(6, 73).reshape(3, 2), "scale": torch.tensor(0.8, dtype=torch.float64)}


def own_part(points: Tensor) -> Tensor:
    return points.chunk(world_size())[dist.get_rank()] if world_size() > 1 else points


def products() -> dict[str, Tensor]:
    """What one process and several must agree on, for the batches' local shards."""
    found: dict[str, Tensor] = {}
    upper, lower = variables()
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    loss = Contrastive().lower_objective(upper, y, own_part(POINTS))
    gradient = mean_over_ranks(dict(zip(y, torch.autograd.grad(loss, list(y.values())), strict=True)))
    found["gradient"] = joined(gradient)
    for weighted in (False, True):
        problem = Contrastive(weighted=weighted)
        batches = [own_part(POINTS), own_part(POINTS.flip(0) * 1.5)]
        for keep in (False, True):
            system = linearize(problem, upper, lower, batches, hvp=ReverseOverReverse(keep_graph=keep), damping=4.0)
            direction = {"w": vector(6, 74).reshape(3, 2), "scale": vector(1, 75)[0]}
            found[f"product {weighted} {keep}"] = joined(system.operator(direction))
            found[f"cross {weighted} {keep}"] = joined(system.cross(direction))
        for solver in (CG(20, rtol=1e-12), CG(3, layerwise=True), Neumann(3)) if weighted else (CG(3, rtol=None),):
            result = hypergradient(
                problem,
                upper,
                lower,
                Implicit(solver, damping=4.0),
                upper_batch=own_part(POINTS * 2.0),
                lower_batches=batches,
                on_failure="ignore",
            )
            name = f"{type(solver).__name__} {getattr(solver, 'layerwise', '')} {weighted}"
            found[f"hypergradient {name}"] = joined(result.grad)
            found[f"numbers {name}"] = torch.tensor([float(result.loss), result.stationarity], dtype=torch.float64)
        found[f"noise {weighted}"] = stopped_at_the_noise(problem, upper, lower, batches)
        for name, result in without_a_solve(problem, upper, lower, batches).items():
            found[f"{name} {weighted}"] = joined(result.grad)
            found[f"{name} {weighted} lower"] = joined(result.lower or {"none": torch.zeros(0)})
            found[f"{name} {weighted} numbers"] = torch.tensor(
                [float(result.loss), result.stationarity], dtype=torch.float64
            )
    return found


def stopped_at_the_noise(problem: Problem, upper: Params, lower: Params, batches: list[Tensor]) -> Tensor:
    """What the batches' differences decide: they are those of global batches, however many ranks have a share."""
    result = hypergradient(
        *(problem, upper, lower),
        Implicit(CG(10, rtol="noise"), damping=4.0),
        upper_batch=own_part(POINTS * 2.0),
        lower_batches=batches,
        on_failure="ignore",
    )
    assert result.solution is not None
    assert result.noise is not None
    numbers = [result.noise, float(result.solution.noise or 0.0), float(result.solution.iterations)]
    return torch.cat([torch.tensor(numbers, dtype=torch.float64), joined(result.grad)])


def without_a_solve(problem: Problem, upper: Params, lower: Params, batches: list[Tensor]) -> dict[str, Hypergradient]:
    adam = AdamUpdate(0.1, eps=0.1)
    methods = {
        "unrolled": Unrolled(lambda x: AdamUpdate(x["tilt"].exp().mean() * 0.1, eps=0.1)),
        "recomputed": Unrolled(SGDUpdate(0.1, momentum=0.9), recompute=True),
        "one step": OneStep(0.1, hvp=ReverseOverReverse()),
        "sama": SAMA(adam, hvp=ReverseOverReverse()),
        "penalty": Penalty(adam, 5.0),
    }
    upper_batch = own_part(POINTS * 2.0)
    return {
        name: hypergradient(problem, upper, lower, method, upper_batch=upper_batch, lower_batches=batches)
        for name, method in methods.items()
    }


def trained() -> Tensor:
    upper, lower = variables()
    trainer = Trainer(
        Contrastive(),
        Level(
            upper, torch.optim.SGD(upper.values(), lr=0.1, momentum=0.9), [own_part(POINTS * 2.0)], max_grad_norm=0.5
        ),
        Level(
            lower,
            torch.optim.SGD(lower.values(), lr=0.1, momentum=0.9),
            [own_part(POINTS), own_part(POINTS * 0.5)],
            max_grad_norm=0.5,
        ),
        AlternatingSchedule(2, 2, 2),
        Implicit(CG(3, rtol=None), damping=4.0, hessian_batches=2),
    )
    trainer.run()
    return torch.cat([joined(upper), joined(lower)])


def refusals() -> list[str]:
    """What must be refused, on all ranks alike."""
    upper, lower = variables()
    messages = []
    try:
        system = linearize(Contrastive(), upper, lower, [own_part(POINTS)], hvp=ForwardOverReverse())
        system.operator(lower)
    except RuntimeError as error:
        messages.append(str(error))
    broken = own_part(POINTS) * (float("nan") if dist.get_rank() == 1 else 1.0)
    result = hypergradient(
        Contrastive(), upper, lower, upper_batch=own_part(POINTS), lower_batches=[broken], on_failure="ignore"
    )
    assert result.solution is not None
    messages.append(result.solution.status.name)
    return messages


def chosen_by_time(rank: int) -> str:
    """What "auto" chooses where rank 0 is slow in reverse mode, and the other ranks in forward mode."""

    def objective(upper: Params, lower: Params) -> Tensor:
        forward = torch.func.debug_unwrap(lower["w"], recurse=True) is not lower["w"]
        time.sleep(0.02 if forward == (rank == 1) else 0.0)
        return lower["w"].square().sum()

    upper, lower = variables()
    automatic = Automatic()
    automatic.linearize(objective, upper, lower)
    return str(automatic.chosen)


def uneven(rank: int) -> dict[str, Tensor]:
    """A loss of rows of which ranks have different numbers, with its first two derivatives."""
    rows = vector(7 * 2, 90).reshape(7, 2)
    w = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    everywhere = gather(torch.tanh(rows[shard(7)] * w))
    loss = (everywhere @ everywhere.T).logsumexp(dim=1).mean()
    (slope,) = torch.autograd.grad(loss, w, create_graph=True)
    direction = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (product,) = torch.autograd.grad(slope, w, direction)
    found = mean_over_ranks({"slope": slope.detach(), "product": product})
    return {"loss": loss.detach(), **found}


def replicated(rank: int) -> dict[str, Any]:
    """What rank 0 gives to all, and what random draws of ranks' own leave alike."""
    images = torch.full((2, 3, 4, 4), float(rank)).to(memory_format=torch.channels_last)
    count = torch.tensor(rank)
    replicate([images, count])
    calls: list[int] = []

    def read() -> dict[str, Any]:
        calls.append(rank)
        return {"weights": torch.arange(3), "facts": [1, "x", None]}

    value = on_first_rank(read)
    torch.manual_seed(5)
    with own_draws():
        own = torch.rand(3 + rank)
    return {
        "images": images.clone(),
        "count": int(count),
        "value": value,
        "calls": len(calls),
        "own": own[:3],
        "random": torch.get_rng_state(),
        "rows": list(rows_of_all(10 + rank)),
        "largest": largest_over_ranks(3 - rank),
    }


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    Ranks(Launch(rank, WORLD, rank, "127.0.0.1", port)).join(torch.device("cpu"), 100.0)
    gathered = gather(vector(6, 80 + rank).reshape(3, 2))
    votes = [agree(False), agree(rank == 1), agree(True)]
    chosen = from_first_rank(3 + rank)
    mixed = mean_over_ranks({"a": torch.full((2,), float(rank)), "b": torch.tensor(float(rank), dtype=torch.float64)})
    torch.save(
        {
            "products": products(),
            "trained": trained(),
            "gathered": gathered,
            "votes": votes,
            "chosen": chosen,
            "provider": chosen_by_time(rank),
            "mixed": mixed,
            "refusals": refusals(),
            "uneven": uneven(rank),
            "replicated": replicated(rank),
        },
        Path(folder) / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Public by its documentation, if not by its module's list of names.
    context = torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        worker, (free_port(), str(tmp_path)), nprocs=WORLD, join=False
    )
    assert context is not None
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not come to an end together"
    finally:
        for process in context.processes:
            assert process is not None
            process.kill()
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"rank{number}.pt") for number in range(WORLD)]
    reference = products()
    for name, value in reference.items():
        for found in ranks:
            torch.testing.assert_close(
                found["products"][name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert torch.equal(ranks[0]["products"][name], ranks[1]["products"][name])
    assert torch.equal(ranks[0]["trained"], ranks[1]["trained"])
    torch.testing.assert_close(ranks[0]["trained"], trained(), rtol=1e-12, atol=1e-12)
    expected = torch.cat([vector(6, 80 + number).reshape(3, 2) for number in range(WORLD)])
    for found in ranks:
        assert torch.equal(found["gathered"], expected)
        assert found["votes"] == [False, True, True]
        assert found["chosen"] == 3
        assert found["provider"] == str(ForwardOverReverse())
        assert torch.equal(found["mixed"]["a"], torch.full((2,), 0.5))
        assert (found["mixed"]["b"].item(), found["mixed"]["b"].dtype) == (0.5, torch.float64)
        assert found["mixed"]["a"].dtype == torch.float32
        assert "use hvp=ReverseOverReverse()" in found["refusals"][0]
        assert found["refusals"][1] == "NON_FINITE"
        for name, value in uneven(0).items():
            torch.testing.assert_close(found["uneven"][name], value, rtol=1e-13, atol=1e-13)
    first, second = (found["replicated"] for found in ranks)
    for found in (first, second):
        assert not found["images"].any()
        assert (found["count"], found["rows"], found["largest"]) == (0, [10, 11], 3)
        assert torch.equal(found["value"]["weights"], torch.arange(3))
        assert found["value"]["facts"] == [1, "x", None]
    assert (first["calls"], second["calls"]) == (1, 0)
    assert not torch.equal(first["own"], second["own"])
    assert torch.equal(first["random"], second["random"])


def test_one_process_is_its_own_mean() -> None:
    x = {"a": torch.ones(2)}
    assert world_size() == 1
    assert mean_over_ranks(x) is x
    assert gather(x["a"]) is x["a"]
    assert agree(True)
    assert not agree(False)
    assert from_first_rank(5) == 5
    assert on_first_rank(lambda: x) is x
    assert rows_of_all(4) == (4,)
    assert rank() == 0
    assert shard(7) == slice(0, 7)
    with own_draws():
        drawn = torch.rand(2)
    assert drawn.numel() == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 9])
def test_shares_are_the_batch_in_order(ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    sizes = []
    for own in range(ranks):
        monkeypatch.setattr("bilevel.distributed.world_size", lambda: ranks)
        monkeypatch.setattr("bilevel.distributed.rank", lambda own=own: own)
        part = list(range(count))[shard(count)]
        rows += part
        sizes.append(len(part))
    assert rows == list(range(count))
    assert max(sizes) - min(sizes) <= 1
