"""Linear operators that are not symmetric, on two leaves."""

import torch
from torch import Tensor

from bilevel import Params
from bilevel.linear import FunctionOperator

SHAPES = {"first": (3,), "second": (2, 2)}


def split(x: Tensor) -> Params:
    first, second = x.split([3, 4])
    return {"first": first, "second": second.reshape(2, 2)}


def joined(x: Params) -> Tensor:
    return torch.cat([x["first"], x["second"].reshape(-1)])


def operator(matrix: Tensor) -> FunctionOperator:
    return FunctionOperator(lambda x: split(matrix.to(x["first"].dtype) @ joined(x)), symmetric=False)


def matrix(seed: int, radius: float) -> Tensor:
    """I - M with a random M of this spectral radius, far from normal."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    return torch.eye(7, dtype=torch.float64) - radius * m / float(torch.linalg.eigvals(m).abs().max())


def right(seed: int) -> Tensor:
    return torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))
