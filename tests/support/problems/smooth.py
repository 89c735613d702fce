"""Problems in which everything is coupled, with their variables and batches."""

import torch
from torch import Tensor

from bilevel import Params, Problem, proximal, ridge
from tests.support.cases import vector


class Smooth(Problem):
    """Nothing in it is quadratic, everything is coupled; the regularizer is optional and not quadratic either."""

    def __init__(self, weight: float = 0.0, *, regularized: bool = True) -> None:
        self.regularization_weight, self.regularized = weight, regularized

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = torch.tanh(batch @ lower["w"] + upper["shift"].sum()) * torch.exp(0.5 * lower["v"].sum() * upper["t"])
        return outputs.square().mean() + 0.3 * torch.cosh(lower["v"]).sum() + 0.2 * (lower["w"] ** 4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).sin().mean() + lower["v"].prod() * upper["t"] + upper["shift"].square().sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        if not self.regularized:
            return None
        return proximal(upper, lower, {"w": "w"}) + 0.1 * torch.cosh(lower["v"] * upper["t"]).sum()


def variables() -> tuple[Params, Params]:
    return (
        {"w": vector(3, 10), "t": vector(1, 11)[0], "shift": vector(2, 12)},
        {"w": vector(3, 13), "v": vector(2, 14)},
    )


BATCHES = [vector(12, seed).reshape(4, 3) for seed in (20, 21, 22)]


class Separable(Smooth):
    """The lower loss knows nothing of the upper variables (as in BiSSL), or is linear in them."""

    curvature_depends_on_upper = False

    def __init__(self, weight: float = 0.5, *, linear: bool = False) -> None:
        super().__init__(weight)
        self.linear = linear

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        loss = torch.tanh(batch @ lower["w"]).square().mean() + torch.cosh(lower["v"]).sum()
        return loss + upper["w"].square() @ lower["w"] if self.linear else loss

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return 0.5 * (lower["w"] - upper["w"].sin()).square().sum() + ridge({"v": lower["v"]})
