"""The bilevel problem: weights of samples above, a classifier of features below."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Params, Problem, ridge

from ..vision.frozen.classifier import Classifier

Batch = tuple[Tensor, Tensor, Tensor]
"""Features float32 [n, D], labels int64 [n], and the samples' places among the weights, int64 [n]."""


class WeightedSamples(Problem):
    r"""One weight a sample, such that a classifier fitted by them does well on trusted samples:

    .. math:: \min_s \frac{1}{M} \sum_j \ell(z'_j, t'_j; y^*(s)), \qquad
       y^*(s) = \arg\min_y \frac{1}{N} \sum_i 2 \sigma(s_i)\, \ell(z_i, t_i; y) + \frac{\rho}{2} \|y\|^2

    with features z, given labels t, trusted ones z', t', and the cross-entropy l of the classifier y. By the sigmoid a
    sample's weight lies in (0, 2) whatever the others do, and all start at 1, the plain fit; a softmax over all samples
    would take from the others what it gives to one.

    Args:
        model: the classifier.
        ridge: rho > 0, which keeps the lower Hessian of a linear model, and the Gauss-Newton matrix of any other,
            positive definite where weights go to 0.
        samples: all samples, at which `reset_lower` solves the lower level anew; None: it goes on from where it is.
    """

    def __init__(self, model: Classifier, ridge: float, samples: Batch | None = None) -> None:
        self.model, self.regularization_weight, self.samples = model, ridge, samples

    def lower_outputs(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.model.scores(lower, batch[0])

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Batch) -> Tensor:
        _, t, places = batch
        return (sample_weights(upper)[places] * cross_entropy(outputs, t, reduction="none")).mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Batch) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model.losses(lower, *batch).mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower)

    def reset_lower(self, upper: Params) -> Params | None:
        if self.samples is None:
            return None
        z, t, places = self.samples
        return self.model.solved(z, t, sample_weights(upper).detach()[places], self.regularization_weight)


def sample_weights(upper: Params) -> Tensor:
    """2 sigmoid(s), [N]."""
    return 2.0 * upper["logits"].sigmoid()
