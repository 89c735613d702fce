"""What solvers refuse: one sentence that names the argument and what came."""

# The wrong kinds are the point here.
# pyright: reportArgumentType=false

from collections.abc import Callable

import pytest

from bilevel.linear import CG, MINRES, Escalating, Neumann, Nystrom, NystromPreconditioner

BELOW_1 = "rtol must be a finite number >= 0 and below 1, or"
ROWS = [
    (lambda: CG(5, "nois"), ValueError, f"^CG: {BELOW_1} 'noise', or None for a fixed budget, got 'nois'$"),
    (lambda: CG(5, True), ValueError, f"^CG: {BELOW_1} 'noise', or None for a fixed budget, got True$"),
    (lambda: MINRES(5, "x"), ValueError, f"^MINRES: {BELOW_1} None for a fixed budget, got 'x'$"),
    (lambda: Neumann(5, [1]), ValueError, rf"^Neumann: {BELOW_1} None for a fixed budget, got \[1\]$"),
    (lambda: Nystrom(5, rtol="x"), ValueError, f"^Nystrom: {BELOW_1} None for a fixed budget, got 'x'$"),
    (lambda: Neumann(5, scale=None), ValueError, "^Neumann: scale must be a positive number, or 'auto', got None$"),
    (lambda: Nystrom(5, tikhonov="x"), ValueError, "^Nystrom: tikhonov must be a positive number, .*, got 'x'$"),
    (lambda: NystromPreconditioner(5, True), ValueError, "tikhonov must be a positive number, .*, got True$"),
    (lambda: Escalating(CG), TypeError, r"^Escalating: solver must be a solver such as CG\(\), got the class CG$"),
    (lambda: Escalating(CG(), "x"), ValueError, "^Escalating: factor must be a finite number above 1, got 'x'$"),
    (lambda: Escalating(CG(), None), ValueError, "^Escalating: factor must be a finite number above 1, got None$"),
    (lambda: Escalating(CG(), 1), ValueError, "^Escalating: factor must be a finite number above 1, got 1$"),
    (lambda: Escalating(CG(), initial="x"), ValueError, "initial must be a positive number, or None .*, got 'x'$"),
    (lambda: Escalating(CG(), initial=True), ValueError, "initial must be a positive number, or None .*, got True$"),
]


@pytest.mark.parametrize(("make", "error", "message"), ROWS)
def test_is_refused_in_a_sentence(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
