"""What a changed tensor looks like, and what may change unnoticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bilevel import Params, Problem, hypergradient, linearize
from bilevel.lower import BufferWatch, StaleSystemError
from bilevel.lower.staleness import check_marks, take_marks
from bilevel.tree import tensors_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse", "ignore:The PyTorch API of nested tensors", "ignore:.*quantize"
)


NUMBERS = torch.arange(12.0).reshape(3, 4)
WAVE = torch.complex(NUMBERS, NUMBERS + 1.0)
RAGGED = [torch.ones(2), torch.ones(3)]
ODD: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: WAVE.clone().conj(),
    "adjoint": lambda: WAVE.mH,
    "empty conjugate": lambda: WAVE[:0].conj(),
    "imaginary part": lambda: torch.complex(NUMBERS, NUMBERS + 1.0).conj().imag,
    "nested": lambda: torch.nested.nested_tensor(RAGGED),
    "jagged": lambda: torch.nested.nested_tensor(RAGGED, layout=torch.jagged),
    "nested, empty": lambda: torch.nested.nested_tensor([]),
    "quantised": lambda: torch.quantize_per_tensor(NUMBERS, 0.1, 0, torch.quint8),
    "quantised by channel": lambda: torch.quantize_per_channel(NUMBERS, torch.ones(3), torch.zeros(3), 0, torch.qint8),
    "a part, quantised": lambda: torch.quantize_per_tensor(NUMBERS, 0.1, 0, torch.quint8)[1:],
    "a part, conjugate": lambda: WAVE[1:].conj(),
    "coo": lambda: NUMBERS.to_sparse_coo(),
    "coo, complex": lambda: WAVE.to_sparse_coo().conj(),
    "coo, uncoalesced": lambda: torch.sparse_coo_tensor(torch.zeros(1, 2, dtype=torch.int64), torch.ones(2), (3,)),
    "csr": lambda: NUMBERS.to_sparse_csr(),
    "csc": lambda: NUMBERS.to_sparse_csc(),
    "bsr": lambda: NUMBERS.to_sparse_bsr((1, 2)),
    "bsc": lambda: NUMBERS.to_sparse_bsc((1, 2)),
    "mkldnn": lambda: NUMBERS.to_mkldnn(),
    "unsigned": lambda: torch.ones(2, dtype=torch.uint8),
    "eight bits": lambda: NUMBERS.to(torch.float8_e4m3fn),
    "booleans": lambda: NUMBERS > 3.0,
    "nothing": lambda: NUMBERS[:0],
}
"""Tensors of layouts, views and dtypes that arithmetic does not take as they are."""


class First(Problem):
    """Takes no notice of its batch."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return (lower["y"] - upper["x"]).square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].sum()


@pytest.mark.parametrize("name", ODD)
def test_a_batch_may_hold_odd_tensors_anywhere(name: str) -> None:
    tensor = ODD[name]()
    variables = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    for batch in (tensor, {"data": [(tensor, 1), None]}):
        result = hypergradient(First(), *variables, upper_batch=batch, lower_batches=[batch])
        torch.testing.assert_close(result.grad["x"], torch.ones(2))


class Writing(First):
    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        rows = functional.embedding(torch.tensor([0, 1]), lower["y"], max_norm=1.0)
        return (rows - upper["x"]).square().sum()


def test_an_objective_that_writes_to_its_variables_is_told_so() -> None:
    system = linearize(Writing(), {"x": torch.ones(2)}, {"y": torch.full((2, 2), 3.0)}, [None])
    system.gradient()
    with pytest.raises(StaleSystemError, match=r"lower\['y'\] changed.*keep the objectives from writing to it"):
        system.hypergradient(None)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("coo", Tensor._values),
        ("csr", Tensor.values),
        ("csc", Tensor.values),
        ("bsr", Tensor.values),
        ("jagged", Tensor.values),
        ("conjugate", Tensor.detach),
        ("imaginary part", Tensor.detach),
    ],
)
def test_a_write_to_the_numbers_of_an_odd_tensor_is_seen(name: str, values: Callable[[Tensor], Tensor]) -> None:
    tensor = ODD[name]()
    before = marks([tensor])
    values(tensor).data.fill_(7.0)
    with pytest.raises(StaleSystemError, match="tensor 0 changed after linearize"):
        check_marks(before, named([tensor]))


def strange() -> list[Tensor]:
    """Tensors of every layout and dtype that a batch may hold."""
    with torch.inference_mode():
        inference = torch.ones(2)
    return [
        *(torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bfloat16)),
        *(torch.tensor([True, False]), torch.tensor(3), torch.ones(0, 2), inference),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1, 3).expand(2, 3),
        torch.full((2,), torch.nan),
    ]


def named(tensors: Any) -> list[tuple[str, Tensor]]:
    return [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors_in(tensors))]


def marks(tensors: Any) -> Any:
    return take_marks(named(tensors))


def test_any_tensor_is_equal_to_itself() -> None:
    tensors = strange()
    check_marks(marks(tensors), named(tensors))


@pytest.mark.parametrize("index", [1, 2, 4, 7])
def test_a_write_that_no_version_counter_sees_changes_the_sum(index: int) -> None:
    tensors = strange()
    before, version = marks(tensors), tensors[index]._version
    tensors[index].data[(0,) * tensors[index].dim()] = 5
    assert tensors[index]._version == version
    with pytest.raises(StaleSystemError, match=f"tensor {index} changed after linearize .version {version} ->"):
        check_marks(before, named(tensors))


def test_a_write_that_leaves_the_sum_changes_the_version() -> None:
    tensor = torch.tensor([1.0, 2.0])
    before = marks([tensor])
    tensor.copy_(tensor.flip(0))
    with pytest.raises(StaleSystemError, match="version 0 -> 1"):
        check_marks(before, named([tensor]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors[0].clone(), "tensor 0 is another tensor than at linearize; call linearize again"),
        (lambda tensors: tensors, None),
    ],
    ids=["a copy", "the same"],
)
def test_an_equal_copy_is_another_tensor(change: Callable[[Any], Any], match: str | None) -> None:
    tensors = [torch.ones(2)]
    before, now = marks(tensors), named([change(tensors)])
    if match is None:
        check_marks(before, now)
        return
    with pytest.raises(StaleSystemError, match=match):
        check_marks(before, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.int64])
@pytest.mark.parametrize("part", [slice(0, 3), slice(1, 6, 2)], ids=["a slice", "a stride"])
@pytest.mark.parametrize("detached", [False, True])
def test_writes_beside_a_view_leave_it_as_it_was(dtype: torch.dtype, part: slice, detached: bool) -> None:
    buffer = torch.arange(8).to(dtype)
    view = buffer[part].detach() if detached else buffer[part]
    before, version = marks([view]), view._version
    buffer[7] = 5
    assert view._version > version  # The counter is the buffer's.
    check_marks(before, named([view]))
    first, second = view[1].clone(), view[2].clone()
    view[1], view[2] = second, first  # The plain sum stays.
    with pytest.raises(StaleSystemError, match="tensor 0 changed after linearize"):
        check_marks(before, named([view]))


def test_one_tensor_more_or_less() -> None:
    tensors = [torch.ones(2), torch.zeros(1)]
    for other in (tensors[:1], [*tensors, torch.ones(1)]):
        with pytest.raises(StaleSystemError, match="added or taken away after linearize"):
            check_marks(marks(tensors), named(other))


def test_a_watch_knows_a_buffer_as_it_was_when_first_read() -> None:
    watch, read, late = BufferWatch(), torch.ones(2), torch.ones(3)
    watch.check()
    watch.note([("mean", read)])
    late.add_(1.0)
    watch.note([("mean", read), ("late", late)])
    watch.check()
    read.add_(1.0)
    watch.note([("mean", read)])
    with pytest.raises(StaleSystemError, match="buffer 'mean' changed after linearize"):
        watch.check()


@pytest.mark.parametrize("part", [False, True])
def test_a_batch_that_the_upper_objective_writes_to_is_noticed(part: bool) -> None:
    """Within a single hypergradient, too, and where the batch is a slice of the data."""

    class Writing(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"] * batch - upper["x"]).square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (lower["y"] * batch.mul_(1.5)).square().sum()

    data = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    batch = data[:3] if part else data[:3].clone()
    x, y = ({name: torch.ones(3, dtype=torch.float64)} for name in "xy")
    with pytest.raises(StaleSystemError, match=r"lower_batches\[0\], tensor 0 changed after linearize"):
        hypergradient(Writing(), x, y, upper_batch=batch, lower_batches=[batch])


def test_a_write_beside_the_batch_is_none_to_it() -> None:
    data = torch.linspace(1.0, 2.0, 6)
    named = [("batch", data[:3])]
    marks = take_marks(named, sums=False)
    data[3:].add_(1.0)
    check_marks(marks, named)
    data[0] = 7.0
    with pytest.raises(StaleSystemError, match="batch changed"):
        check_marks(marks, named)
