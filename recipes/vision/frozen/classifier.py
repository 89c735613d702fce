"""A classifier of features with a ridge and a weight a sample: softmax regression, or a network of one hidden layer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Params, ridge
from bilevel.linear import FunctionOperator, spectrum_bounds
from bilevel.products import ReverseOverReverse

STEPS, STEPS_OF_A_NETWORK = 60, 300
"""Iterations of L-BFGS at most."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Of which one is chosen, for features of variance 1 on average."""
TOLERANCE = 1e-5
"""Largest entry of a gradient at which L-BFGS is done, unless its steps change next to nothing before."""


@dataclass(frozen=True)
class Classifier:
    """Scores ``h w + b`` [n, C] of features z [n, D]; h is z itself, or ``tanh(z w0 + b0)``.

    Attributes:
        width: D.
        classes: C.
        hidden: units of h; 0: z itself, a linear model.
        seed: of w0 where a fit begins; everything else begins at 0.
    """

    width: int
    classes: int
    hidden: int = 0
    seed: int = 0

    def scores(self, model: Params, z: Tensor) -> Tensor:
        """Class scores, [n, C]."""
        seen = (z @ model["w0"] + model["b0"]).tanh() if self.hidden else z
        return seen @ model["w"] + model["b"]

    def losses(self, model: Params, z: Tensor, t: Tensor) -> Tensor:
        """Cross-entropies of the labels t under the model, [n]."""
        return cross_entropy(self.scores(model, z), t, reduction="none")

    def start(self, z: Tensor) -> Params:
        """Where a fit to features like z begins: entries of w0 of variance 1 / D, zeros."""
        shapes = {"w": (self.hidden or self.width, self.classes), "b": (self.classes,)}
        if self.hidden:
            shapes |= {"w0": (self.width, self.hidden), "b0": (self.hidden,)}
        model = {name: z.new_zeros(shape) for name, shape in shapes.items()}
        if self.hidden:
            drawn = torch.randn(shapes["w0"], generator=torch.Generator().manual_seed(self.seed))
            model["w0"].copy_(drawn / self.width**0.5)
        return model

    @torch.enable_grad()
    def solved(self, z: Tensor, t: Tensor, weights: Tensor, ridge_weight: float) -> Params:
        """Near a minimiser of ``mean_i weights_i l_i + ridge_weight / 2 |y|^2``, by L-BFGS; a linear model has one."""
        model = {name: leaf.requires_grad_() for name, leaf in self.start(z).items()}
        optimizer = torch.optim.LBFGS(
            model.values(),
            max_iter=STEPS_OF_A_NETWORK if self.hidden else STEPS,
            tolerance_grad=TOLERANCE,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = (weights * self.losses(model, z, t)).mean() + ridge_weight * ridge(model)
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        return {name: leaf.detach() for name, leaf in model.items()}

    def chosen_ridge(self, samples: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]) -> float:
        """The largest of `RIDGES` by which a fit to all `samples` (features, labels) does on `unseen` ones as well as
        by the best, within one standard error of that mean (Breiman et al. 1984): wrong labels are not fitted.
        """
        ones = torch.ones(len(samples[1]), device=samples[0].device)
        values = [self.losses(self.solved(*samples, ones, ridge_weight), *unseen) for ridge_weight in RIDGES]
        best = min(values, key=lambda value: float(value.mean()))
        limit = float(best.mean() + best.std() / math.sqrt(len(best)))
        return max(one for one, value in zip(RIDGES, values, strict=True) if float(value.mean()) <= limit)

    def steepest(self, model: Params, z: Tensor, t: Tensor, heaviest: float) -> float:
        """A largest curvature of ``mean_i weights_i l_i``, by which to choose a step.

        Of a linear model a bound everywhere, for all weights up to `heaviest`: the Hessian of the cross-entropy is at
        most half of the second moments of the features and the constant. Of a network that at `model` where all weights
        are `heaviest`, by Lanczos, and no bound.
        """
        if not self.hidden:
            return 0.5 * heaviest * (float(torch.linalg.matrix_norm(z.T @ z / len(z), 2)) + 1.0)
        point = ReverseOverReverse().linearize(lambda _, y: self.losses(y, z, t).mean(), {}, model)
        found = spectrum_bounds(FunctionOperator(point.hessian), model)
        assert found is not None, "the losses of a fitted model are finite"
        return heaviest * max(found[1], 0.0)
