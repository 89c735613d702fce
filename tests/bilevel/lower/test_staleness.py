"""What a changed tensor looks like, and what may change unnoticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.lower import BufferWatch, StaleSystemError, check_marks, take_marks
from bilevel.tree import tensors_in


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
