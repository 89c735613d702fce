"""DTensors on two and on four ranks, where some shards are empty: right or refused, never wrong without a word."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from benchmarks.sharding import with_bilevel
from benchmarks.sharding.trials import Case
from bilevel import Params, tree
from bilevel.distributed import mean_over_ranks, rank, world_size
from bilevel.linear import CG, FunctionOperator, MeanOperator, Status, mean_and_error
from bilevel.sharded import is_sharded, whole
from tests.support.rank_processes import WORLDS, on_ranks

Outcomes = list[dict[str, str]]

TORCHS_OWN = {
    "hypergradient of a module of fully_shard: torch.func.functional_call",
    "hypergradient of a module of parallelize_module: torch.func.functional_call",
    "hypergradient of a module of parallelize_module: a direct call",
    "hypergradient of a module of DistributedDataParallel: torch.func.functional_call",
}
"""Where torch itself raises, before anything here could."""


def tried() -> Outcomes:
    warnings.simplefilter("ignore")
    case = Case(init_device_mesh("cpu", (world_size(),)))
    trials = [*with_bilevel.arithmetic(case), *with_bilevel.solves(case), with_bilevel.by_hand(case)]
    trials += [*with_bilevel.entries(case), with_bilevel.shards_itself(case), *with_bilevel.modules(case)]
    return [{"what": trial.what, "answer": trial.answer, "message": trial.message} for trial in trials]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcomes]]:
    return on_ranks(tried, tmp_path_factory.mktemp("ranks"), seconds=480.0)


@pytest.mark.parametrize("world", WORLDS)
def test_arithmetic_and_solves_are_right(outcomes: dict[int, list[Outcomes]], world: int) -> None:
    for here in outcomes[world]:
        found = {trial["what"]: trial["answer"] for trial in here if trial["what"].startswith(("tree", "solve", "a "))}
        refused = {what for what, answer in found.items() if answer == "refused"}
        assert refused == {
            "tree: flatten",
            "solve: CG(60, 1e-13, preconditioner=Diagonal())",
            "solve: Dense()",
            "solve: Nystrom(3)",
        }
        assert all(answer == "right" for what, answer in found.items() if what not in refused), found


@pytest.mark.parametrize("world", WORLDS)
def test_what_takes_variables_or_modules_refuses(outcomes: dict[int, list[Outcomes]], world: int) -> None:
    entries = ("hypergradient", "linearize", "System", "Level")
    for here in outcomes[world]:
        found = {trial["what"]: trial for trial in here if trial["what"].startswith(entries)}
        assert len(found) == 19
        others = {what: trial for what, trial in found.items() if trial["answer"] != "refused"}
        assert set(others) <= TORCHS_OWN, others
        assert all(trial["answer"] == "error" for trial in others.values()), others
        for what, trial in found.items():
            if "that are DTensors" in what:
                assert "pass its full_tensor()" in trial["message"]


def placed() -> list[float]:
    """Trees of leaves that are placed in different ways, beside plain ones, against plain ones."""
    mesh = init_device_mesh("cpu", (world_size(),))
    generator = torch.Generator().manual_seed(3)
    shapes = {"rows": (5, 3), "columns": (3, 5), "copies": (4,), "plain": (2, 2), "number": ()}
    places = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()], "number": [Replicate()]}

    def drawn() -> Params:
        return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}

    def cut(x: Params) -> Params:
        return {n: distribute_tensor(leaf, mesh, places[n]) if n in places else leaf for n, leaf in x.items()}

    x, y = drawn(), drawn()
    a, b = ({n: leaf for n, leaf in cut(z).items() if n != "plain"} for z in (x, y))
    p, q = ({n: z[n] for n in a} for z in (x, y))
    numbers = [tree.dot(a, b) - tree.dot(p, q), tree.norm(a) - tree.norm(p)]
    numbers += [tree.leaf_dots(a, b)[n] - value for n, value in tree.leaf_dots(p, q).items()]
    assert all(not is_sharded(number) for number in numbers)
    # A DTensor is of all ranks; the plain leaf is this rank's, 1 + rank times y.
    mixed = mean_over_ranks({**cut(x), "plain": (1.0 + rank()) * y["plain"]})
    assert list(mixed) == list(shapes)
    numbers.append((mixed["plain"] - (world_size() + 1) / 2 * y["plain"]).abs().max())
    numbers += [(whole(mixed[n]) - x[n]).abs().max() for n in places]
    operator = MeanOperator([FunctionOperator(lambda v, k=k: tree.scale(float(k), v)) for k in (2, 4)])
    numbers += [(whole(leaf) - 3.0 * p[n]).abs().max() for n, leaf in operator(a).items()]
    errors = [error for parts in ([a, b], [p, q]) if (error := mean_and_error(parts)[1]) is not None]
    numbers.append(errors[0] - errors[1])
    solution = CG(5, "noise").solve(operator, a)
    numbers += [(whole(leaf) - p[n] / 3.0).abs().max() for n, leaf in solution.value.items()]
    assert solution.status in (Status.CONVERGED, Status.AT_THE_NOISE)
    return [float(number) for number in numbers]


def test_leaves_in_different_places(tmp_path: Path) -> None:
    for ranks in on_ranks(placed, tmp_path).values():
        for here in ranks:
            assert max(map(abs, here)) < 1e-12
