"""Operators against the matrices they stand for."""

import pytest
import torch
from torch import Tensor

from bilevel import Params
from bilevel.linear import LinearOperator
from bilevel.linear.operators import (
    FunctionOperator,
    MeanOperator,
    SampledOnce,
    ScaledOperator,
    SumOperator,
    TikhonovOperator,
    as_operator,
)
from tests.support.cases import Counting, dense, joined, vector, with_spectrum

A = with_spectrum([1.0, 2.0, 3.0, -4.0, 5.0], seed=0)
B = with_spectrum([0.5, -2.0, 3.5, 1.0, 0.0], seed=1)


def split(x: Tensor) -> Params:
    return {"square": x[:4].reshape(2, 2), "scalar": x[4].reshape(())}


EYE = torch.eye(5, dtype=torch.float64)
SCALAR = torch.diag(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("operator", "matrix"),
    [
        (FunctionOperator(lambda v: dense(A, split)(v)), A),
        (MeanOperator([dense(A, split), dense(B, split), dense(B, split)]), (A + 2 * B) / 3),
        (SumOperator(dense(A, split), dense(B, split)), A + B),
        (ScaledOperator(-0.25, dense(A, split)), -0.25 * A),
        (TikhonovOperator(dense(A, split), 0.7), A + 0.7 * EYE),
        (TikhonovOperator(dense(A, split), {"scalar": 0.7}), A + 0.7 * SCALAR),
        (SumOperator(ScaledOperator(2.0, MeanOperator([dense(A, split)])), dense(EYE, split)), 2 * A + EYE),
    ],
)
def test_products(operator: LinearOperator, matrix: Tensor) -> None:
    for seed in range(3):
        v = split(vector(5, seed=seed))
        before = joined(v).clone()
        torch.testing.assert_close(joined(operator(v)), matrix @ vector(5, seed=seed), rtol=1e-13, atol=1e-13)
        assert torch.equal(joined(v), before)


def test_exactness_is_that_of_the_least_exact_part() -> None:
    exact, rough = dense(A, split), Counting(lambda v: v, exact=False)
    for make in (
        lambda op: MeanOperator([exact, op]),
        lambda op: SumOperator(exact, op),
        lambda op: ScaledOperator(2.0, op),
    ):
        assert make(exact).exact
        assert not make(rough).exact
    assert not TikhonovOperator(SumOperator(exact, rough), 1.0).exact
    assert not FunctionOperator(lambda v: v, exact=False).exact


def test_in_one_process_agreement_is_the_flag() -> None:
    for operator in (FunctionOperator(lambda v: v), MeanOperator([dense(A, split)]), SumOperator(dense(A, split))):
        assert operator.agree(True)
        assert not operator.agree(False)


def test_agreement_asks_every_part() -> None:
    class Voting(LinearOperator):
        def __init__(self, vote: bool) -> None:
            self.vote, self.asked = vote, 0

        def __call__(self, vector: Params) -> Params:
            return vector

        def agree(self, flag: bool) -> bool:
            self.asked += 1
            return flag or self.vote

    yes, no = Voting(True), Voting(False)
    assert SumOperator(yes, no).agree(False)
    assert not SumOperator(no).agree(False)
    assert (yes.asked, no.asked) == (1, 2)


def test_what_is_no_operator_is_refused() -> None:
    operator = dense(A, split)
    assert as_operator(operator) is operator
    assert as_operator(lambda v: v)(split(vector(5))).keys() == split(vector(5)).keys()
    with pytest.raises(TypeError, match="operator must be a LinearOperator or a function of Params, got Tensor"):
        as_operator(A)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="MeanOperator"):
        MeanOperator([])


def test_the_first_product_is_sampled_and_none_is_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    mean = MeanOperator([FunctionOperator(lambda v, m=m: {"a": (m + m.T) @ v["a"]}) for m in matrices])
    whole = TikhonovOperator(SumOperator(ScaledOperator(0.3, mean), FunctionOperator(lambda v: v)), 0.7)
    vectors = [{"a": torch.randn(6, generator=generator, dtype=torch.float64)} for _ in range(3)]
    watched = SampledOnce(whole)
    assert watched.noise is None
    assert all(torch.equal(watched(v)["a"], whole(v)["a"]) for v in vectors)
    products = torch.stack([0.3 * (m + m.T) @ vectors[0]["a"] for m in matrices])
    expected = float((products.var(dim=0).sum() / 3).sqrt() / vectors[0]["a"].norm())
    assert watched.noise is not None
    assert float(watched.noise) == pytest.approx(expected, rel=1e-12)
    single = SampledOnce(MeanOperator(mean.operators[:1]))
    single(vectors[0])
    assert single.noise is None
