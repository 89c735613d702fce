"""A linear model of features: softmax regression with a ridge and a weight a sample."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Params, ridge

STEPS = 60
"""Iterations of L-BFGS at most."""
TOLERANCE = 1e-5
"""Largest entry of a gradient at which L-BFGS is done."""


def losses(model: Params, z: Tensor, t: Tensor) -> Tensor:
    """Cross-entropies of the labels t under the model, [n]."""
    return cross_entropy(scores(model, z), t, reduction="none")


def scores(model: Params, z: Tensor) -> Tensor:
    """Class scores, [n, C]."""
    return z @ model["w"] + model["b"]


@torch.enable_grad()
def solved(z: Tensor, t: Tensor, weights: Tensor, ridge_weight: float, classes: int) -> Params:
    """The minimiser of ``mean_i weights_i l_i + ridge_weight / 2 |y|^2``, by L-BFGS from zero."""
    shapes = {"w": (z.shape[1], classes), "b": (classes,)}
    model = {name: torch.zeros(shape, device=z.device, requires_grad=True) for name, shape in shapes.items()}
    optimizer = torch.optim.LBFGS(
        model.values(), max_iter=STEPS, tolerance_grad=TOLERANCE, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (weights * losses(model, z, t)).mean() + ridge_weight * ridge(model)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return {name: leaf.detach() for name, leaf in model.items()}
