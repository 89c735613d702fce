"""The lower level's objective as HVP providers take it: one function a batch, randomness and buffers fixed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.lower.reach import examine_lower
from bilevel.lower.repeatable import repeatable
from bilevel.lower.staleness import BufferWatch
from bilevel.lower.surroundings import check_recordable
from bilevel.nn import chunk_seeds, curvature_pass
from bilevel.problem import Problem
from bilevel.products import ComposedObjective, Objective, check_outputs, check_rows
from bilevel.tree import Params


class LowerObjectives:
    """L and r as functions of the upper variables and of some of the lower ones.

    It holds nothing that is built from these functions, so that whoever drops a `System` drops its graphs at once.

    Args:
        lower: all lower variables, so that the Problem meets them in their own order.
        seed: of the random masks of the regularizer, and of the first batch.
        watch: takes note of the buffers that the lower objective reads.
    """

    def __init__(self, problem: Problem, lower: Params, seed: int, watch: BufferWatch) -> None:
        self.problem, self.everything, self.seed, self.watch = problem, tree.detach(lower), seed, watch

    def whole(self, batch: Any, seed: int) -> Objective:
        """L on a batch."""

        def objective(upper: Params, variables: Params) -> Tensor:
            check_recordable("lower_objective")
            lower = {**self.everything, **variables}

            def evaluated(_: bool) -> Tensor:
                with curvature_pass(notes=self.watch):
                    return self.problem.lower_objective(upper, lower, batch)

            loss = check_scalar("lower_objective", repeatable(self.problem, "lower", seed, evaluated))
            examine_lower(self.problem, "lower_objective", loss, upper, variables)
            return loss

        return objective

    def composed(self, batch: Any, seed: int) -> ComposedObjective:
        """L on a batch with the outputs and the loss of the outputs apart."""

        def outputs(batch: Any, seed: int, upper: Params, variables: Params) -> Any:
            check_recordable("lower_outputs")
            with curvature_pass(seed, self.watch):
                z = check_outputs(self.problem.lower_outputs(upper, {**self.everything, **variables}, batch))
            examine_lower(self.problem, "lower_outputs", z, upper, variables)
            return z

        def rows(chunk: Any, seed: int, upper: Params, variables: Params) -> Any:
            return check_rows(outputs(chunk, seed, upper, variables), chunk)

        def split(size: int) -> list[Callable[[Params, Params], Any]]:
            chunks = self.problem.split_batch(batch, size)
            return [partial(rows, *one) for one in zip(chunks, chunk_seeds(seed, len(chunks)), strict=True)]

        def loss(upper: Params, z: Any) -> Tensor:
            with curvature_pass(seed, self.watch):
                return check_scalar("lower_output_loss", self.problem.lower_output_loss(upper, z, batch))

        return ComposedObjective(partial(outputs, batch, seed), loss, split)

    @torch.no_grad()
    def check_composition(self, batch: Any, upper: Params, variables: Params) -> None:
        """Raise unless the loss of the outputs is the lower objective."""
        upper = tree.detach(upper)
        parts = self.composed(batch, self.seed)(upper, variables)
        whole = self.whole(batch, self.seed)(upper, variables)
        if not torch.isclose(parts, whole, rtol=torch.finfo(whole.dtype).eps ** 0.5, equal_nan=True):
            raise ValueError(
                f"lower_output_loss(upper, lower_outputs(...)) = {float(parts):.6g}, but lower_objective = "
                f"{float(whole):.6g} on lower_batches[0]; the two must be the same function, random masks included"
            )

    def has_regularizer(self, upper: Params, variables: Params) -> bool:
        """Whether there is an r; where the Problem defines none, nothing is evaluated."""
        own = getattr(self.problem.regularizer, "__func__", self.problem.regularizer)
        return own is not Problem.regularizer and self.regularizer(tree.detach(upper), variables) is not None

    def regularizer(self, upper: Params, variables: Params) -> Tensor | None:
        """r, None where there is none."""
        with curvature_pass(self.seed):
            return self.problem.regularizer(upper, {**self.everything, **variables})

    def penalty(self, upper: Params, variables: Params) -> Tensor:
        """r where there is one."""
        return check_scalar("regularizer", self.regularizer(upper, variables))


def check_scalar(name: str, value: Tensor | None) -> Tensor:
    """Raise unless an objective returned a 0-d tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a 0-d tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"{name} must return a 0-d tensor, got shape {tuple(value.shape)}; take the mean over the batch"
        )
    return value
