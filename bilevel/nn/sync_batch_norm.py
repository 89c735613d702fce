"""Batch normalisation over the samples of all ranks, differentiable any number of times."""

from typing import TypeVar, final

import torch
from torch import Tensor, nn

from bilevel.distributed import gather, rank, world_size

M = TypeVar("M", bound=nn.Module)

_REPLACED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@final
class SyncBatchNorm(nn.SyncBatchNorm):
    r"""Batch normalisation with the statistics of all ranks' samples, in place of torch's layer, which differentiates
    only once and only on GPUs.

    Each rank r counts its values of a channel, :math:`n_r`, and takes their mean :math:`m_r` and sum of squared
    deviations :math:`S_r`. One exchange (`gather`) brings all of them to every rank, where

    .. math:: n = \sum_r n_r, \quad m = \sum_r \tfrac{n_r}{n} m_r, \quad S = \sum_r S_r + n_r (m_r - m)^2, \quad
       y = \frac{x - m}{\sqrt{S / n + \varepsilon}} w + b

    without the cancellation of a mean of squares. Ranks may have different numbers of samples, or none. Inputs are
    ``[N, C, ...]``; half-precision ones are computed with in float32. Running statistics follow m and S / (n - 1), as
    `torch.nn.BatchNorm2d` describes. In eval mode, and where there is one process, it is that layer to the bit.

    Every rank must call it equally often, in the same order, forwards and backwards.

    Raises:
        ValueError: an input of fewer than two dimensions or of other channels than the layer's; in train mode, fewer
            than two values a channel on all ranks together.
        RuntimeError: train mode over several ranks under a torch.func transform (`gather`).

    Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation 2.1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super(nn.SyncBatchNorm, self).forward(input)
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(f"SyncBatchNorm: expected {self.num_features} channels, got shape {tuple(input.shape)}")
        half = input.dtype in (torch.float16, torch.bfloat16)
        return self._normalise(input.float() if half else input).to(input.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        """The formula, in the notation of the class."""
        channels, others = x.shape[1], [0, *range(2, x.dim())]
        count = x.numel() // channels
        centre = x.sum(others, keepdim=True) / max(count, 1)
        centred = x - centre
        own = torch.cat([x.new_full((1,), count), centre.flatten(), centred.square().sum(others)])
        everywhere = gather(own[None], rows=[1] * world_size())
        n_r, m_r, s_r = everywhere.split([1, channels, channels], dim=1)
        n_r = n_r.detach()
        n = n_r.sum()
        # Read only where it may be too few, since a GPU is waited for.
        if count < 2 and float(n) < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} on this rank "
                f"and {int(n)} values on all ranks"
            )
        # From the first rank's mean, so that means far from 0 lose no digits against each other.
        from_first = m_r - m_r[:1]
        shift = (n_r / n * from_first).sum(0)
        apart = from_first - shift
        s = (s_r + n_r * apart.square()).sum(0)
        self._track(m_r[0] + shift, s / (n - 1))
        scale = (s / n + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        offset = apart[rank()] * scale
        if self.bias is not None:
            offset = offset + self.bias
        per_channel = (1, -1, *(1,) * (x.dim() - 2))
        return torch.addcmul(offset.view(per_channel), centred, scale.view(per_channel))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def synchronised(module: M) -> M:
    """The same module with every `torch.nn.BatchNorm1d`, ``2d``, ``3d`` and `torch.nn.SyncBatchNorm` in it, itself
    included, made a `SyncBatchNorm`, in place; subclasses of these and all other layers stay.

    Parameters, buffers, their names, modes, options and hooks are those of before, so that state dicts fit both ways.
    """
    for layer in module.modules():
        if type(layer) in _REPLACED:
            # Another object would lose hooks, and the places that share or hold the layer.
            layer.__class__ = SyncBatchNorm
    return module
