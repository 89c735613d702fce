"""Linear operators on `Params`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import final

import torch
from torch import Tensor

from bilevel import distributed, tree
from bilevel.tree import Params


class LinearOperator(ABC):
    """A linear map on trees of one structure.

    Attributes:
        exact: whether products are linear to rounding; False for finite differences, whose residuals a solver
            then measures instead of updating them.
        symmetric: whether the map is its own transpose, as the Hessian of an objective is; solvers that rest on it
            refuse the others.
    """

    exact: bool = True
    symmetric: bool = True

    @abstractmethod
    def __call__(self, vector: Params) -> Params:
        """The product ``A v``; the argument is not written to."""

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        """The product, and its standard error as a mean over batches: the Euclidean norm, in the product's units, of
        what another choice of as many batches would typically change, 0-d. None where there are not two batches."""
        return self(vector), None

    @property
    def batches(self) -> int:
        """Over how many batches it is a mean."""
        return 1

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        """The product with the mean over some of the batches, by their numbers from 0."""
        return self(vector)

    def agree(self, flag: bool) -> bool:
        """Whether any rank that takes part in this operator's products sets `flag` (one process: the flag itself)."""
        return flag


@final
class FunctionOperator(LinearOperator):
    """A plain function as an operator."""

    def __init__(self, function: Callable[[Params], Params], *, exact: bool = True, symmetric: bool = True) -> None:
        self.function, self.exact, self.symmetric = function, exact, symmetric

    def __call__(self, vector: Params) -> Params:
        return self.function(vector)


@final
class MeanOperator(LinearOperator):
    """``(1/K) sum_k A_k``, averaged over the ranks: the Hessian of a mean over batches.

    Args:
        operators: the A_k.
        products: gives all products ``A_k v``, in order, where that is cheaper than by the operators one by one.
    """

    def __init__(
        self,
        operators: Sequence[LinearOperator],
        products: Callable[[Params], Iterable[Params]] | None = None,
    ) -> None:
        if not operators:
            raise ValueError("MeanOperator: the mean over no operators is not defined")
        self.operators = tuple(operators)
        self.exact = all(op.exact for op in operators)
        self.symmetric = all(op.symmetric for op in operators)
        self._products = products

    def products(self, vector: Params) -> Iterable[Params]:
        """``A_k v`` for each k."""
        return (op(vector) for op in self.operators) if self._products is None else self._products(vector)

    def __call__(self, vector: Params) -> Params:
        total = reduce(tree.add, self.products(vector))
        mean = total if len(self.operators) == 1 else tree.scale(1.0 / len(self.operators), total)
        return distributed.mean_over_ranks(mean)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        return mean_and_error(list(self.products(vector)))

    @property
    def batches(self) -> int:
        return len(self.operators)

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        total = reduce(tree.add, (self.operators[k](vector) for k in batches))
        return distributed.mean_over_ranks(tree.scale(1.0 / len(batches), total))

    def agree(self, flag: bool) -> bool:
        return distributed.agree(flag)


class _Combined(LinearOperator):
    """Shares `exact`, `symmetric`, `batches` and `agree` among operators that are made of others."""

    def __init__(self, *operators: LinearOperator) -> None:
        self.operators = operators
        self.exact = all(op.exact for op in operators)
        self.symmetric = all(op.symmetric for op in operators)

    @property
    def batches(self) -> int:
        counts = {op.batches for op in self.operators} - {1}
        # Means over different batches have no batches in common.
        return counts.pop() if len(counts) == 1 else 1

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        """The first operator's, for those that are made of one and change nothing of a product."""
        return self.operators[0].on_batches(vector, batches)

    def agree(self, flag: bool) -> bool:
        return any([op.agree(flag) for op in self.operators])


@final
class SumOperator(_Combined):
    """``A_1 + ... + A_m``."""

    def __call__(self, vector: Params) -> Params:
        return reduce(tree.add, (op(vector) for op in self.operators))

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        parts = [op.sampled(vector) for op in self.operators]
        errors = [error for _, error in parts if error is not None]
        error = torch.stack(errors).square().sum().sqrt() if errors else None
        return reduce(tree.add, (product for product, _ in parts)), error

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        return reduce(tree.add, (op.on_batches(vector, batches) for op in self.operators))


@final
class ScaledOperator(_Combined):
    """``factor * A``."""

    def __init__(self, factor: float, operator: LinearOperator) -> None:
        super().__init__(operator)
        self.factor = factor

    def __call__(self, vector: Params) -> Params:
        return tree.scale(self.factor, self.operators[0](vector))

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        product, error = self.operators[0].sampled(vector)
        return tree.scale(self.factor, product), None if error is None else abs(self.factor) * error

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        return tree.scale(self.factor, self.operators[0].on_batches(vector, batches))


@final
class KnownProduct(_Combined):
    """An operator of which one product is known: that with the very object `vector`."""

    def __init__(self, operator: LinearOperator, vector: Params, product: Params) -> None:
        super().__init__(operator)
        self.vector, self.product = vector, product

    def __call__(self, vector: Params) -> Params:
        return self.product if vector is self.vector else self.operators[0](vector)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        return self.operators[0].sampled(vector)


@final
class SampledOnce(_Combined):
    """An operator that takes note of the noise of its first product, for nothing; products are the same.

    Attributes:
        noise: standard error of that product over the norm of its vector, 0-d; None before it and for a single batch.
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self.noise: Tensor | None = None
        self._made = False

    def __call__(self, vector: Params) -> Params:
        return self.operators[0](vector) if self._made else self.sampled(vector)[0]

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        product, error = self.operators[0].sampled(vector)
        if not self._made and error is not None:
            self.noise = error / tree.norm(vector)
        self._made = True
        return product, error


@final
class WatchedOperator(_Combined):
    """An operator that calls `watch` before each product."""

    def __init__(self, operator: LinearOperator, watch: Callable[[], None]) -> None:
        super().__init__(operator)
        self.watch = watch

    def __call__(self, vector: Params) -> Params:
        self.watch()
        return self.operators[0](vector)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        self.watch()
        return self.operators[0].sampled(vector)

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        self.watch()
        return self.operators[0].on_batches(vector, batches)


@final
class TikhonovOperator(_Combined):
    """``A + tikhonov I`` (Tikhonov); `tikhonov` is one number or one per leaf, leaves left out getting 0."""

    def __init__(self, operator: LinearOperator, tikhonov: float | Mapping[str, float]) -> None:
        super().__init__(operator)
        self.tikhonov = tikhonov

    def __call__(self, vector: Params) -> Params:
        return self._with_term(self.operators[0](vector), vector)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        product, error = self.operators[0].sampled(vector)
        return self._with_term(product, vector), error

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        return self._with_term(self.operators[0].on_batches(vector, batches), vector)

    def _with_term(self, product: Params, vector: Params) -> Params:
        if not isinstance(self.tikhonov, Mapping):
            return tree.axpy(self.tikhonov, vector, product)
        tikhonov = self.tikhonov
        return {name: leaf + tikhonov.get(name, 0.0) * vector[name] for name, leaf in product.items()}


def mean_and_error(parts: Sequence[Params]) -> tuple[Params, Tensor | None]:
    r"""Mean over n batches, and its standard error :math:`(\sum_k \|p_k - \bar p\|^2 / (n (n - 1)))^{1/2}`; None for a
    single batch. Each part is first averaged over the ranks, which have a share of each batch: all parts are exchanged.
    """
    parts = [distributed.mean_over_ranks(part) for part in parts]
    count = len(parts)
    if count < 2:
        return parts[0], None
    mean = tree.scale(1.0 / count, reduce(tree.add, parts))
    deviations = torch.stack([tree.norm(tree.sub(part, mean)).square() for part in parts])
    return mean, (deviations.mean() / (count - 1)).sqrt()


def as_operator(operator: LinearOperator | Callable[[Params], Params]) -> LinearOperator:
    """An operator from an operator or from a function of `Params`."""
    if isinstance(operator, LinearOperator):
        return operator
    if callable(operator):
        return FunctionOperator(operator)
    raise TypeError(f"operator must be a LinearOperator or a function of Params, got {type(operator).__name__}")
