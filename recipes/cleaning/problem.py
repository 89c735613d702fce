"""The bilevel problem: weights of samples above, a linear model below."""

from torch import Tensor

from bilevel import Params, Problem, ridge

from ..vision.frozen.linear_model import losses, solved

Batch = tuple[Tensor, Tensor, Tensor]
"""Features float32 [n, D], labels int64 [n], and the samples' places among the weights, int64 [n]."""


class WeightedSamples(Problem):
    r"""One weight a sample, such that a linear model fitted by them does well on trusted samples:

    .. math:: \min_s \frac{1}{M} \sum_j \ell(z'_j, t'_j; y^*(s)), \qquad
       y^*(s) = \arg\min_y \frac{1}{N} \sum_i 2 \sigma(s_i)\, \ell(z_i, t_i; y) + \frac{\rho}{2} \|y\|^2

    with features z, given labels t, trusted ones z', t', and the cross-entropy l of a softmax of ``y.w' z + y.b``. By
    the sigmoid a sample's weight lies in (0, 2) whatever the others do, and all start at 1, the plain fit; a softmax
    over all samples would take from the others what it gives to one.

    Args:
        ridge: rho > 0, which keeps the lower Hessian positive definite where weights go to 0.
        samples: all samples, at which `reset_lower` solves the lower level anew; None: it goes on from where it is.
        classes: how many there are.
    """

    def __init__(self, ridge: float, samples: Batch | None = None, classes: int = 0) -> None:
        self.regularization_weight, self.samples, self.classes = ridge, samples, classes

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        z, t, places = batch
        return (sample_weights(upper)[places] * losses(lower, z, t)).mean()

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(lower, *batch).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)

    def reset_lower(self, upper: Params) -> Params | None:
        if self.samples is None:
            return None
        z, t, places = self.samples
        return solved(z, t, sample_weights(upper).detach()[places], self.regularization_weight, self.classes)


def sample_weights(upper: Params) -> Tensor:
    """2 sigmoid(s), [N]."""
    return 2.0 * upper["logits"].sigmoid()
