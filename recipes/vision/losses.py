"""The losses of the pretext tasks and a measure of collapse."""

import math

import torch
from torch import Tensor

_SHORTEST = 1e-12
_VICREG_EPSILON = 1e-4


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
    _check_pair(first, second, 2, "with fewer than two examples a batch has no negatives")
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


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of embeddings scaled to unit length, row by row.

    With ``u_i, v_i`` the rows of the two arguments::

        loss = 1/N sum_i || u_i / ||u_i||  -  v_i / ||v_i|| ||^2  =  1/N sum_i ( 2 - 2 cos(u_i, v_i) )

    between 0 and 4. It is smooth wherever no embedding is zero, and differentiable twice in reverse and in forward
    mode. An embedding shorter than 1e-12 has no direction: its cosine counts as 0 and it receives no gradient.
    Half-precision embeddings are compared in float32.

    Args:
        first: Embeddings, ``[N, d]``, N at least 1.
        second: Embeddings, ``[N, d]``, to which those of `first` are compared.

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: The shapes differ, are not ``[N, d]`` or have N = 0.

    Source: Grill et al., "Bootstrap Your Own Latent" (2020), equation 2.
    """
    _check_pair(first, second, 1, "nothing to compare")
    return 2 - 2 * (_unit_rows(first) * _unit_rows(second)).sum(dim=1).mean()


def vicreg(
    first: Tensor, second: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg loss of two views of one batch: invariance, and variance and covariance of each view.

    With ``z, z'`` the embeddings of the views, ``C(z)`` their covariance matrix (divisor N - 1)::

        loss = invariance * s(z, z') + variance * ( v(z) + v(z') ) + covariance * ( c(z) + c(z') )
        s(z, z') = 1/(N d) sum_ik (z_ik - z'_ik)^2
        v(z)     = 1/d sum_k max( 0, 1 - sqrt(C(z)_kk + 1e-4) )
        c(z)     = 1/d sum_{k != l} C(z)_kl^2

    The loss is finite with all its derivatives for any embeddings, coinciding ones too, and differentiable twice in
    reverse and in forward mode off the hinge's kink. Half-precision embeddings are compared in float32, under autocast
    too.

    Args:
        first: Embeddings of view 1, ``[N, d]``, N at least 2.
        second: Embeddings of view 2, ``[N, d]``; row i belongs to the same example as row i of `first`.
        invariance, variance, covariance: Weights of the three terms, at least 0.

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: The shapes differ, are not ``[N, d]`` or have N below 2, or a weight is not a number of at least 0.

    Source: Bardes, Ponce and LeCun, "VICReg" (2022), algorithm 1 and equations 1 to 4 and 6. Equation 5 has no 1/d in
    s; the authors' released code halves v, which is ``variance=12.5`` here.
    """
    _check_pair(first, second, 2, "the variance of a single example is undefined")
    for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight!r}")
    # Autocast would round the covariances to half precision again.
    with torch.autocast(first.device.type, enabled=False):
        z1, z2 = _single_precision(first), _single_precision(second)
        (v1, c1), (v2, c2) = _spread_terms(z1), _spread_terms(z2)
        return invariance * (z1 - z2).square().mean() + variance * (v1 + v2) + covariance * (c1 + c2)


def _spread_terms(z: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg's v and c of one view."""
    n, d = z.shape
    centred = z - z.mean(dim=0)
    squares = centred.square().sum(dim=0) / (n - 1)
    hinge = (1 - (squares + _VICREG_EPSILON).sqrt()).clamp_min(0)
    # Masked instead of the diagonal's squares taken off the sum, which would cancel where they dominate it.
    itself = torch.eye(d, dtype=torch.bool, device=z.device)
    between = (centred.T @ centred / (n - 1)).masked_fill(itself, 0.0)
    return hinge.mean(), between.square().sum() / d


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
    x = _single_precision(x)
    # Dividing by a clamped norm (as F.normalize does) gives gradients of 1e12 at zero and NaN in the next derivative.
    square = x.square().sum(dim=1, keepdim=True)
    scale = torch.where(square > _SHORTEST**2, square.clamp_min(_SHORTEST**2).rsqrt(), 0.0)
    return x * scale


def _single_precision(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_pair(first: Tensor, second: Tensor, least: int, reason: str) -> None:
    """Raise unless both are ``[N, d]`` with N at least `least`."""
    if first.shape != second.shape or first.ndim != 2 or first.shape[0] < least:
        raise ValueError(
            f"first and second must be embeddings of one shape [N, d] with N >= {least}, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}; {reason}"
        )
