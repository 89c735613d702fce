"""The contrastive loss of the pretext stage and a measure of collapse."""

import math

import torch
from torch import Tensor

_SHORTEST = 1e-12


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.5) -> Tensor:
    """NT-Xent loss of two views of one batch.

    With ``z`` the `2N` embeddings of both views scaled to unit length, ``s_ij = z_i . z_j / temperature`` and ``p(i)``
    the other view of the example behind ``z_i``::

        loss = 1/(2N) sum_i ( log sum_{j != i} exp s_ij  -  s_{i p(i)} )

    Every embedding is an anchor once, with one positive and `2N - 2` negatives. The loss is at least
    ``log(1 + (2N - 2) exp(-2 / temperature))`` and equals ``log(2N - 1)`` when all embeddings coincide. It is smooth
    wherever no embedding is zero, and differentiable twice in reverse and in forward mode. An embedding shorter than
    1e-12 has no direction: it counts as the zero vector and receives no gradient. Half-precision embeddings are
    compared in float32, under autocast too.

    Args:
        first: Embeddings of view 1, ``[N, d]``, N at least 2.
        second: Embeddings of view 2, ``[N, d]``; row i belongs to the same example as row i of `first`.
        temperature: Divisor of the cosine similarities, above 0.

    Returns:
        The loss in nats, 0-d.

    Raises:
        ValueError: The shapes differ, are not ``[N, d]`` or have N below 2, or `temperature` is not a number above 0.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), equation 1.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[0] < 2:
        raise ValueError(
            f"first and second must be embeddings of one shape [N, d] with N >= 2, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}; with fewer than two examples a batch has no negatives"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    # Autocast would round the similarities to half precision again.
    with torch.autocast(first.device.type, enabled=False):
        z1, z2 = _unit_rows(first), _unit_rows(second)
        positive = (z1 * z2).sum(dim=1) / temperature
        z = torch.cat([z1, z2])
        s = z @ z.T / temperature
        # Finite, so that every intermediate of a derivative stays finite; exp still turns it into 0.
        itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
        s = s.masked_fill(itself, torch.finfo(s.dtype).min)
        return torch.logsumexp(s, dim=1).mean() - positive.mean()


def embedding_spread(embeddings: Tensor) -> float:
    """How far embeddings are from collapse: 1 when spread evenly over the sphere, 0 when they all coincide.

    With ``z_i`` the rows scaled to unit length::

        spread = sqrt(d) * mean over dimensions k of std_i(z_ik)

    where std divides by N. Directions spread evenly have a standard deviation of ``1/sqrt(d)`` in each dimension, so
    the measure is near 1 for any `d`; it never exceeds 1.

    Args:
        embeddings: ``[N, d]``, N at least 2.

    Raises:
        ValueError: `embeddings` is not ``[N, d]`` with N at least 2.

    Source: Chen and He, "Exploring Simple Siamese Representation Learning" (2021), section 4.1.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(f"embeddings must have shape [N, d] with N >= 2, got {tuple(embeddings.shape)}")
    z = _unit_rows(embeddings.detach())
    return math.sqrt(z.shape[1]) * z.std(dim=0, correction=0).mean().item()


def _unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to unit length, rows without a direction to zero, in float32 or better."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # Dividing by a clamped norm (as F.normalize does) gives gradients of 1e12 at zero and NaN in the next derivative.
    square = x.square().sum(dim=1, keepdim=True)
    scale = torch.where(square > _SHORTEST**2, square.clamp_min(_SHORTEST**2).rsqrt(), 0.0)
    return x * scale
