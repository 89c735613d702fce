"""What a lower solution is not made in, and what it does not give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bilevel import CG, Implicit, Params, Problem, SGDUpdate, Unrolled, hypergradient
from bilevel.hypergradients import lower_solution
from tests.bilevel.hypergradients.lower_solution.fits import TARGET, RidgeFit, X, fitted, ridge_solution
from tests.support.cases import vector
from tests.support.problems.closed_forms import NO_BATCH, quadratic


def variable() -> Tensor:
    return vector(5, 50).requires_grad_()


def solved(x: Tensor) -> Tensor:
    return fitted(x)["y"]


def by_backward(y: Tensor, x: Tensor) -> None:
    y.square().sum().backward(create_graph=True)


def by_grad(y: Tensor, x: Tensor) -> None:
    torch.autograd.grad(y.square().sum(), x, create_graph=True)


def by_backward_of_inputs(y: Tensor, x: Tensor) -> None:
    y.square().sum().backward(inputs=[x], create_graph=True)


def by_hessian(y: Tensor, x: Tensor) -> None:
    torch.autograd.functional.hessian(lambda x: solved(x).square().sum(), x)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("second", [by_backward, by_grad, by_backward_of_inputs, by_hessian])
def test_second_derivatives_are_refused(second: Callable[[Tensor, Tensor], None]) -> None:
    x = variable()
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives through what lower_solution"):
        second(solved(x), x)
    assert x.grad is None


def test_second_derivatives_of_the_rest_of_a_loss_are_not() -> None:
    x, other = variable(), vector(5, 51).requires_grad_()
    loss = (solved(x).detach() * other**3).sum() + solved(x).sum()
    (first,) = torch.autograd.grad(loss, other, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), other)
    torch.testing.assert_close(second, 6.0 * other.detach() * solved(x).detach())


def test_as_a_lower_objective_it_is_refused() -> None:
    """Where a lower level needs second derivatives of what a lower solution stands in."""

    class Above(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return solved(lower["z"]).square().sum() + (lower["z"] - upper["x"]).square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
            return lower["z"].sum()

    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        hypergradient(Above(), {"x": vector(5)}, {"z": vector(5, 1)}, upper_batch=None, lower_batches=NO_BATCH)


def test_batches_of_gradients_are_refused() -> None:
    x = variable()
    with pytest.raises(RuntimeError, match=r"cannot pass back a batch of gradients .is_grads_batched=True"):
        torch.autograd.grad(solved(x), x, torch.eye(5, dtype=torch.float64), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="cannot pass back a batch of gradients"):
        torch.autograd.functional.jacobian(solved, x, vectorize=True)


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.func.grad(lambda x: solved(x).sum())(x),
        lambda x: torch.func.vmap(solved)(x.expand(2, 5)),
        lambda x: torch.func.jacrev(solved)(x),
        lambda x: torch.func.jvp(solved, (x,), (x,)),
        lambda x: torch.func.grad(lambda z: (solved(x) * z).sum())(x.detach()),
    ],
    ids=["grad", "vmap", "jacrev", "jvp", "closure"],
)
def test_transforms_around_it_are_refused(transform: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"under a torch.func transform .grad, vmap, jacrev, jvp."):
        transform(variable())


def test_forward_mode_is_refused() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(variable(), torch.ones(5, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"upper\['log_weight'\] belongs to .* forward-mode"):
            lower_solution(RidgeFit(), {"log_weight": dual}, {"y": torch.zeros(5).double()}, [(X, TARGET)])


def test_inference_mode_is_refused() -> None:
    x = variable()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"lower_solution was called under torch.inference"):
        solved(x)


@contextmanager
def offloading() -> Iterator[None]:
    with torch.autograd.graph.save_on_cpu():
        yield


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_it_is_refused(reentrant: bool) -> None:
    with pytest.raises(RuntimeError, match="inside activation checkpointing or another saved-tensor hook"):
        checkpoint(solved, variable(), use_reentrant=reentrant)


def test_other_saved_tensor_hooks_are_refused() -> None:
    x = variable()
    with offloading(), pytest.raises(RuntimeError, match="inside activation checkpointing or another saved-tensor"):
        solved(x)


def test_checkpointing_above_it_is_not() -> None:
    x = variable()
    y = solved(x)
    above = checkpoint(lambda y: y.tanh().sum(), y, use_reentrant=False)
    assert isinstance(above, Tensor)
    (found,) = torch.autograd.grad(above, x)
    expected = torch.autograd.grad(ridge_solution(x).tanh().sum(), x)
    torch.testing.assert_close(found, expected[0])


def test_a_method_without_a_linear_system_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"method must be Implicit, or a solver such as CG.. in its place, got Unrolled"
    ):
        fitted(variable(), Unrolled(SGDUpdate(0.1)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"method must be a Method .* or a solver"):
        fitted(variable(), "cg")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"problem": RidgeFit}, TypeError, "problem must be an instance of a Problem, got the class RidgeFit"),
        ({"upper": variable()}, TypeError, "upper must be a dict of named tensors"),
        ({"upper": {"log_weight": torch.zeros(5, dtype=torch.int64)}}, TypeError, "must be real floating point"),
        ({"lower": {"y": None}}, TypeError, r"lower\['y'\] must be a tensor"),
        ({"lower_batches": X}, TypeError, "lower_batches must be a sequence of batches, got Tensor"),
        ({"lower_batches": []}, ValueError, "lower_batches is empty"),
        ({"on_failure": "no"}, ValueError, "on_failure must be one of"),
        ({"method": CG()}, None, ""),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_bad_arguments(change: dict[str, Any], error: type[Exception] | None, match: str, recorded: bool) -> None:
    arguments: dict[str, Any] = {
        "problem": RidgeFit(),
        "upper": {"log_weight": variable()},
        "lower": {"y": ridge_solution(vector(5, 50))},
        "lower_batches": [(X, TARGET)],
        **change,
    }
    with torch.set_grad_enabled(recorded):
        if error is None:
            assert lower_solution(**arguments)["y"].requires_grad is recorded
            return
        with pytest.raises(error, match=match):
            lower_solution(**arguments)


def test_a_lower_level_that_no_upper_variable_reaches() -> None:
    class Apart(RidgeFit):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective({"log_weight": torch.zeros(5).double()}, lower, batch)

    x = variable()
    y = fitted(x, problem=Apart())
    with pytest.raises(
        ValueError, match=r"no objective of the lower level reaches any of the upper variables \['log_weight'\]"
    ):
        y["y"].sum().backward()


def test_a_regularizer_may_be_all_that_reaches_them() -> None:
    class Tied(RidgeFit):
        regularization_weight = 2.0

        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return 0.5 * lower["y"].square().sum()

        def regularizer(self, upper: Params, lower: Params) -> Tensor:
            return 0.5 * (lower["y"] - upper["log_weight"]).square().sum()

    x = variable()
    y = lower_solution(Tied(), {"log_weight": x}, {"y": 2.0 / 3.0 * x}, NO_BATCH)
    y["y"].sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 2.0 / 3.0, dtype=torch.float64))


def test_a_problem_without_an_upper_objective_is_named_where_one_is_needed() -> None:
    with pytest.raises(TypeError, match=r"RidgeFit does not define upper_objective.*lower_solution"):
        hypergradient(
            RidgeFit(),
            {"log_weight": vector(5)},
            {"y": vector(5)},
            upper_batch=(X, TARGET),
            lower_batches=[(X, TARGET)],
        )


def test_what_the_linear_system_refuses_is_refused_when_the_solution_is_made() -> None:
    problem, upper, lower = quadratic()
    x = {name: leaf.clone().requires_grad_() for name, leaf in upper.items()}
    with pytest.raises(ValueError, match=r"damping=1.0: damping adds to the weight of the regularizer"):
        lower_solution(problem, x, lower, NO_BATCH, Implicit(CG(), damping=1.0))
