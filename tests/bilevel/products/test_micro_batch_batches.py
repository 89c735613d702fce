"""What micro-batching asks of batches and problems, and how batches are cut."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Params, Problem, functional_call, linearize
from bilevel.products import GaussNewton
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from tests.support.pairs import Batch, Pairs, conv_net, trainer, upper_point, views
from tests.support.problems.small_modules import parameters


class Undivided(Pairs):
    def lower_outputs(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return Problem.lower_outputs(self, upper, lower, batch)


def test_what_cannot_be_chunked_is_refused_with_the_remedy() -> None:
    upper, batch = upper_point(), views()
    problem = Undivided(conv_net())
    lower = parameters(problem.net)
    with pytest.raises(TypeError, match=r"Undivided does not define lower_outputs, .* define lower_outputs and"):
        trainer(problem, upper, lower, batch, micro_batch=2).run()
    with pytest.raises(TypeError, match="define lower_outputs"):
        linearize(problem, upper, lower, [batch], hvp=MicroBatched(2)).operator(lower)
    for provider in (MicroBatched(2), GaussNewton()):
        with pytest.raises(TypeError, match="needs the outputs and the loss of the lower objective apart"):
            provider.linearize(lambda x, y: y["w"].sum(), {}, {"w": torch.ones(1)})
    for wrong in (0, -1, True, 2.0):
        remedy = f"must be a whole number of at least 1, got {wrong}"
        with pytest.raises(ValueError, match=f"Level: micro_batch {remedy}"):
            trainer(problem, upper, lower, batch, micro_batch=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"MicroBatched: chunk_size {remedy}"):
            MicroBatched(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunks is empty"):
        micro_batched_gradient(lambda y, chunk: y["w"], torch.sum, {"w": torch.ones(1)}, [])


@pytest.mark.parametrize(
    "wrong", [torch.cat, lambda views: torch.stack(views).mean(), lambda views: [*views, views[0].sum()]]
)
def test_outputs_without_a_row_for_each_sample_are_refused(wrong: Any) -> None:
    net = conv_net()

    def outputs(y: Params, chunk: Batch) -> Tensor:
        return wrong([functional_call(net, y, view) for view in chunk])

    chunks = Pairs(net).split_batch(views(), 4)
    with pytest.raises(ValueError, match=r"one row per sample, got shape \(.*lengths \[\[4\]\]"):
        micro_batched_gradient(outputs, torch.sum, parameters(net), chunks)


@dataclass
class Sample:
    image: Tensor
    name: str


Named = namedtuple("Named", ["first", "second"])


def test_batches_are_cut_wherever_tensors_lie_in_them() -> None:
    problem = Pairs(conv_net())
    rows = torch.arange(5)
    batch = {"pair": (rows, [rows * 10]), "sample": Sample(rows * 100, "a"), "named": Named(rows, 2.0), "epoch": 3}
    chunks = problem.split_batch(batch, 2)
    assert [chunk["pair"][0].tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert [chunk["pair"][1][0].tolist() for chunk in chunks] == [[0, 10], [20, 30], [40]]
    assert [chunk["sample"].image.tolist() for chunk in chunks] == [[0, 100], [200, 300], [400]]
    assert all((chunk["epoch"], chunk["sample"].name) == (3, "a") for chunk in chunks)
    assert isinstance(chunks[1]["named"], Named)
    assert (chunks[1]["named"].first.tolist(), chunks[1]["named"].second) == ([2, 3], 2.0)
    with pytest.raises(ValueError, match="tensor 1 of the batch has 4 samples along dimension 0 and tensor 0 has 5"):
        problem.split_batch((rows, rows[1:]), 2)
    with pytest.raises(ValueError, match="tensor 1 of the batch has 0 samples"):
        problem.split_batch((rows, torch.tensor(1.0)), 2)
    with pytest.raises(ValueError, match="no tensor in the batch, a dict"):
        problem.split_batch({"name": "a"}, 2)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors", "ignore:.*quantize")
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("nested", lambda rows: torch.nested.nested_tensor(list(rows), layout=torch.jagged)),
        ("nested", lambda rows: torch.nested.nested_tensor(list(rows))),
        ("sparse_coo", Tensor.to_sparse_coo),
        ("sparse_csr", Tensor.to_sparse_csr),
        ("sparse_bsr", lambda rows: rows.to_sparse_bsr((1, 1))),
        ("qint8", lambda rows: torch.quantize_per_channel(rows, torch.ones(4), torch.zeros(4), 0, torch.qint8)),
    ],
)
def test_tensors_that_torch_does_not_cut_are_named(kind: str, make: Any) -> None:
    rows = torch.eye(4)
    with pytest.raises(ValueError, match=f"split: torch does not cut a {kind} tensor.*define split_batch"):
        Pairs(conv_net()).split_batch({"data": [rows, make(rows)]}, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_chunks_of_nested_tensors_have_a_length() -> None:
    chunks = [torch.nested.nested_tensor([torch.ones(n, 1) for n in sizes]) for sizes in ((1, 2), (3,))]
    variables = {"w": torch.full((1, 1), 2.0)}

    def outputs(y: Params, chunk: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(chunk, 0.0, (len(chunk.unbind()), 3, 1)).sum(1) @ y["w"]

    loss, gradient = micro_batched_gradient(outputs, torch.sum, variables, chunks)
    assert float(loss) == 12.0
    assert float(gradient["w"]) == 6.0
