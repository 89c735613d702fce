"""A randomized low-rank model of an operator, and its inverse."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_count, check_number
from bilevel.linear.operators import LinearOperator
from bilevel.linear.solver import product_error
from bilevel.tree import Params

# Of a core with eigenvalues of both signs, this part of the directions is kept (Nakatsukasa and Park 2023, section 4).
_OVERSAMPLING = 1.5


@dataclass(frozen=True)
class Sketch:
    r"""The model :math:`\hat A = \rho I + U \Lambda U^T` of an operator on n variables, U'U = I.

    Attributes:
        names: of the leaves, in the order in which they are flattened.
        vectors: U, n by at most `rank`.
        inverse: eigenvalues of the model's pseudo-inverse along U, ``1 / (rho + Lambda)``.
        rest: the same for everything orthogonal to U, ``1 / rho``.
        magnitude, rest_magnitude: the same for the positive definite ``|A|^-1``.
        ritz_range: smallest and largest eigenvalue of A's compression to the sampled directions.
        norm_a: the largest ``||A w||`` over the orthonormal sampled directions w.
    """

    names: tuple[str, ...]
    vectors: Tensor
    inverse: Tensor
    rest: float
    magnitude: Tensor
    rest_magnitude: float
    ritz_range: tuple[float, float]
    norm_a: float

    def solve(self, b: Params) -> Params:
        """The model's pseudo-inverse times b; n k multiplications, twice."""
        return self._apply(b, self.inverse, self.rest)

    def precondition(self, b: Params) -> Params:
        """``|A|^-1 b``, the same with all eigenvalues made positive."""
        return self._apply(b, self.magnitude, self.rest_magnitude)

    def _apply(self, b: Params, along: Tensor, rest: float) -> Params:
        ordered = {name: b[name] for name in self.names}
        flat = tree.flatten(ordered).to(self.vectors.dtype)
        inside = self.vectors.T @ flat
        product = self.vectors @ (along * inside) + rest * (flat - self.vectors @ inside)
        back = tree.unflatten(product, ordered)
        return {name: back[name] for name in b}


def draw_sketch(operator: LinearOperator, like: Params, rank: int, tikhonov: float | None, seed: int) -> Sketch | None:
    r"""A Gaussian sketch of A, `rank` products (n if that is less); None if one of them is not finite.

    With an orthonormal basis W of the sample, Y = A W and B = A - rho I, the model is the Nystrom approximation of B,

    .. math:: \hat A = \rho I + (B W) (W^T B W)^+ (B W)^T,

    its core W'BW taken by eigenvalues of at least rounding size. Without a `tikhonov`, rho is the smallest eigenvalue
    of W'AW, so that the core is positive semidefinite.
    """
    flat = tree.flatten(like)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    rank = min(rank, flat.numel())
    generator = torch.Generator(device=flat.device).manual_seed(seed)
    sample = torch.randn(flat.numel(), rank, dtype=dtype, device=flat.device, generator=generator)
    sample = torch.linalg.qr(sample).Q
    image = torch.empty_like(sample)
    for index in range(rank):
        image[:, index] = tree.flatten(operator(tree.unflatten(sample[:, index], like)))
    if operator.agree(not bool(torch.isfinite(image).all())):
        return None
    norm_a = float(image.norm(dim=0).max())
    core = _symmetric(sample.T @ image)
    ritz = torch.linalg.eigvalsh(core)
    rho = float(ritz[0]) if tikhonov is None else tikhonov
    error = product_error(operator, like)
    core = core - rho * torch.eye(rank, dtype=core.dtype)
    vectors, values = _nystrom(image.sub_(sample, alpha=rho), core, 10.0 * error * norm_a)
    return _invert(tuple(like), vectors, rho, rho + values, (float(ritz[0]), float(ritz[-1])), norm_a, error)


def check_model(owner: str, rank: int, tikhonov: float | None, seed: int) -> None:
    """Raise ValueError unless `draw_sketch` can work with these."""
    check_count(f"{owner}: rank", rank, least=1)
    check_count(f"{owner}: seed", seed, least=0)
    if tikhonov is not None:
        otherwise = "None for an estimate of the multiple of the identity that A contains"
        check_number(f"{owner}: tikhonov", tikhonov, positive=True, otherwise=otherwise)


def _nystrom(image: Tensor, core: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of ``image core^+ image'``; the core is on the CPU in float64."""
    values, directions = torch.linalg.eigh(core)
    live = (values.abs() > rounding) & _trusted(values)
    image = image @ directions[:, live].to(image)
    if image.shape[1] == 0:
        return image, values[:0]
    basis, triangle = torch.linalg.qr(image)
    triangle = triangle.cpu().to(torch.float64)
    values, directions = torch.linalg.eigh(_symmetric(triangle @ torch.diag(1.0 / values[live]) @ triangle.T))
    return basis @ directions.to(basis), values


def _trusted(values: Tensor) -> Tensor:
    """Which eigenvalues of the core to keep.

    Where it is indefinite, a small one can be the difference of two large ones and its inverse arbitrarily wrong.
    """
    opposite = min(float(values.max()), -float(values.min()))
    if opposite <= 0.0:
        return torch.ones_like(values, dtype=torch.bool)
    kept = math.ceil(len(values) / _OVERSAMPLING)
    return values.abs() >= min(float(values.abs().sort(descending=True).values[kept - 1]), opposite)


def _invert(
    names: tuple[str, ...],
    vectors: Tensor,
    rho: float,
    values: Tensor,
    ritz_range: tuple[float, float],
    norm_a: float,
    error: float,
) -> Sketch:
    whole = torch.cat([values, torch.tensor([rho], dtype=values.dtype)])
    live = whole.abs() > len(whole) * error * max(norm_a, float(whole.abs().max()))
    inverse = torch.where(live, 1.0 / torch.where(live, whole, 1.0), 0.0)
    # Along null vectors the positive definite version is as large as along the others in the mean.
    typical = float(inverse[live].abs().mean()) if bool(live.any()) else 1.0
    magnitude = torch.where(live, inverse.abs(), typical)
    return Sketch(
        names,
        vectors,
        inverse[:-1].to(vectors),
        float(inverse[-1]),
        magnitude[:-1].to(vectors),
        float(magnitude[-1]),
        ritz_range,
        norm_a,
    )


def _symmetric(matrix: Tensor) -> Tensor:
    matrix = matrix.cpu().to(torch.float64)
    return 0.5 * (matrix + matrix.T)
