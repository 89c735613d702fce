"""The passes of `Oracles` as functions for torch.compile, for objectives that it can take whole."""

# Annotations of inner functions would be evaluated while torch.compile traces, which it does not take.
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from bilevel.problem import Problem
from bilevel.tree import Params


def lower(problem: Problem, x: Params, y: Params, v: Params, batch: Any) -> tuple[Tensor, Params, Params, Params]:
    """G, dG/dy, and over the names of v d2G/dydy v; d2G/dxdy v."""

    def along(x: Params, y: Params) -> tuple[Tensor, tuple[Params, Tensor]]:
        gradient, value = grad(_valued(lambda of_y: _lower(problem, x, of_y, batch)), has_aux=True)(y)
        return _dot(gradient, v), (gradient, value)

    (cross, product), (gradient, value) = grad(along, argnums=(0, 1), has_aux=True)(x, y)
    return value, gradient, {name: product[name] for name in v}, cross


def hessian(problem: Problem, x: Params, y: Params, v: Params, batch: Any) -> tuple[Tensor, Params]:
    """G, and over the names of v d2G/dydy v."""

    def along(y: Params) -> tuple[Tensor, Tensor]:
        gradient, value = grad(_valued(lambda of_y: _lower(problem, x, of_y, batch)), has_aux=True)(y)
        return _dot(gradient, v), value

    product, value = grad(along, has_aux=True)(y)
    return value, {name: product[name] for name in v}


def lower_gradients(problem: Problem, x: Params, y: Params, batch: Any) -> tuple[Tensor, Params, Params]:
    """G, dG/dx and dG/dy."""
    parts = grad(_valued(lambda x, y: _lower(problem, x, y, batch)), argnums=(0, 1), has_aux=True)
    (of_x, of_y), value = parts(x, y)
    return value, of_x, of_y


def upper(problem: Problem, x: Params, y: Params, rest: Params, batch: Any) -> tuple[Tensor, Params, Params]:
    """F, dF/dx and dF/dy over the names of y, which take the place of some of `rest`."""
    parts = grad(_valued(lambda x, y: problem.upper_objective(x, {**rest, **y}, batch)), argnums=(0, 1), has_aux=True)
    (of_x, of_y), value = parts(x, y)
    return value, of_x, of_y


def compiled(function: Callable[..., Any], backend: str, problem: Problem, *arguments: Any) -> Any:
    """What one of these functions returns, compiled.

    Raises:
        RuntimeError: torch.compile cannot take an objective whole.
    """
    try:
        return _compiler(function, backend)(problem, *arguments)
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(
            f"compile: torch.compile cannot take the objectives of {type(problem).__name__} whole ({reason}); leave "
            "compile out, or write them in plain operations of tensors, modules by torch.func.functional_call"
        ) from error


@cache
def _compiler(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)


def _lower(problem: Problem, x: Params, y: Params, batch: Any) -> Tensor:
    loss, penalty = problem.lower_objective(x, y, batch), problem.regularizer(x, y)
    return loss if penalty is None else loss + problem.regularization_weight * penalty


def _valued(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with its value beside it, for `has_aux`."""

    def both(*arguments: Params) -> tuple[Tensor, Tensor]:
        value = function(*arguments)
        return value, value

    return both


def _dot(x: Params, v: Params) -> Tensor:
    """<x, v> over the names of v."""
    return torch.stack([(x[name] * leaf).sum() for name, leaf in v.items()]).sum()
