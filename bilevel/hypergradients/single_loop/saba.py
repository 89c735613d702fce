"""Directions with SAGA's variance reduction: a table of what every block gave last."""

from dataclasses import dataclass, field
from functools import reduce
from typing import final

import torch

from bilevel import tree
from bilevel.checks import check_count
from bilevel.hypergradients.method import MethodState, Setup, UpperStep
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point
from bilevel.hypergradients.single_loop.partitions import SagaTable, check_partitions
from bilevel.lower import Oracles, selected
from bilevel.tree import Params


@final
@dataclass(frozen=True, eq=False)
class SABA(AdjointLoop):
    r"""Stochastic average bilevel algorithm (SABA; Dagréou, Ablin, Vaiter & Moreau 2022, Algorithm 1 with its section
    3.2): every sum of the three directions is estimated as SAGA does,

    .. math:: \phi_b^{new} - \phi_b + \frac{1}{B} \sum_{b'} \phi_{b'},

    where the table's row phi_b holds what block b gave when it was drawn last: dG/dy, d2G/dydy v and d2G/dxdy v below,
    dF/dx and dF/dy above. Rows begin at 0. With constant rates the iterates converge to the solution.

    A step costs what one of `SOBA` does. The state is v and, for B_l and B_u blocks, ``B_l (2 dim y + dim x) + B_u (dim
    x + dim y)`` numbers. Needs data with a fixed partition at both levels (`bilevel.training.Blocks`, or a list of
    batches).

    Args:
        table_bytes: at most so many bytes for the tables and their copy in a checkpoint.
    """

    table_bytes: int = field(default=2**30, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SABA: table_bytes", self.table_bytes, least=1)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        below, above = check_partitions("SABA", setup)
        x, y = setup.upper, setup.lower
        v = {name: y[name] for name in selected(setup.problem, y, None)}
        needed = 2 * (below * _row_bytes(y, v, x) + above * _row_bytes(x, v))
        if needed > self.table_bytes:
            raise ValueError(
                f"SABA: table_bytes={self.table_bytes:,}, but tables for {below} lower and {above} upper blocks and "
                f"their copy in a checkpoint take {needed:,}; make larger blocks, raise table_bytes, or take SRBA, "
                "which keeps no table"
            )

    def estimate(self, oracles: Oracles, at: Point, state: MethodState, step: UpperStep) -> Estimate:
        (lower,), (upper,) = step.lower_draws, step.upper_draws
        below = oracles.lower(at.upper, at.lower, at.v, lower)
        above = oracles.upper(at.upper, at.lower, upper)
        of_lower = SagaTable(state.get("lower"), step.lower_blocks, (below.gradient, below.product, below.cross))
        of_upper = SagaTable(state.get("upper"), step.upper_blocks, (above.upper, above.lower))
        d_y, product, cross = of_lower.estimate(lower)
        d_x, d_f = of_upper.estimate(upper)

        def commit() -> None:
            of_lower.write(lower)
            of_upper.write(upper)

        return Estimate(
            above.value,
            Point(tree.sub(d_x, cross), d_y, tree.sub(product, d_f)),
            {"lower": of_lower.following(), "upper": of_upper.following()},
            commit=commit,
        )


def _row_bytes(*parts: Params) -> int:
    """Of one row, which has the widest of the parts' dtypes."""
    leaves = [leaf for part in parts for leaf in part.values()]
    width = reduce(torch.promote_types, (leaf.dtype for leaf in leaves)).itemsize
    return width * sum(leaf.numel() for leaf in leaves)
