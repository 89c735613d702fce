"""Gauss-Newton products against J^T H J formed densely."""

import pytest
import torch
from torch import Tensor

from bilevel import CG, Implicit, Params, Problem, Status, hypergradient, linearize
from bilevel.products import GaussNewton


class Network(Problem):
    """A small tanh network under cross-entropy, with an upper temperature."""

    def lower_outputs(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(batch[0] @ lower["a"]) @ lower["b"] * upper["scale"].exp()

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.lower_objective({"scale": torch.zeros_like(upper["scale"])}, lower, batch)


def point(seed: int = 0) -> tuple[Params, Params, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = normal(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    return {"scale": normal(1)[0]}, {"a": normal(4, 3), "b": normal(3, 3), "unused": normal(2)}, batch


def dense(upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    problem = Network()

    def outputs(flat: Tensor) -> Tensor:
        lower = {"a": flat[:12].reshape(4, 3), "b": flat[12:].reshape(3, 3)}
        return problem.lower_outputs(upper, lower, batch).flatten()

    flat = torch.cat([lower["a"].flatten(), lower["b"].flatten()])
    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    z = outputs(flat)
    hessian = torch.autograd.functional.hessian(lambda v: problem.lower_output_loss(upper, v.reshape(7, 3), batch), z)
    assert isinstance(jacobian, Tensor)
    assert isinstance(hessian, Tensor)
    return jacobian.T @ hessian @ jacobian


def test_products_equal_the_dense_matrix_and_are_semidefinite() -> None:
    upper, lower, batch = point()
    operator = linearize(Network(), upper, lower, [batch], hvp=GaussNewton()).operator
    matrix = dense(upper, lower, batch)
    columns = []
    for i in range(21):
        e = torch.zeros(21, dtype=torch.float64)
        e[i] = 1.0
        v = {"a": e[:12].reshape(4, 3), "b": e[12:].reshape(3, 3), "unused": torch.ones(2, dtype=torch.float64)}
        product = operator(v)
        assert not product["unused"].any()
        columns.append(torch.cat([product["a"].flatten(), product["b"].flatten()]))
    assert torch.allclose(torch.stack(columns), matrix, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_hypergradient_uses_the_exact_cross_term() -> None:
    upper, lower, batch = point(1)
    tikhonov = 0.1
    found = hypergradient(
        Network(),
        upper,
        lower,
        Implicit(CG(100, 1e-12), hvp=GaussNewton(), tikhonov=tikhonov),
        upper_batch=batch,
        lower_batches=[batch],
    )
    assert found.solution is not None
    assert found.solution.status is Status.CONVERGED

    def gradient(y: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        loss = Network().lower_objective({"scale": scale}, {"a": y[0], "b": y[1]}, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, y, create_graph=True)])

    y = (lower["a"].requires_grad_(), lower["b"].requires_grad_())
    mixed = torch.autograd.functional.jacobian(lambda s: gradient(y, s), upper["scale"])
    v = torch.cat([g.flatten() for g in torch.autograd.grad(Network().upper_objective(upper, lower, batch), y)])
    system = dense(upper, {n: t.detach() for n, t in lower.items()}, batch) + tikhonov * torch.eye(
        21, dtype=torch.float64
    )
    assert isinstance(mixed, Tensor)
    assert torch.allclose(found.implicit["scale"], -mixed @ torch.linalg.solve(system, v), rtol=1e-8)


class Opaque(Network):
    def lower_outputs(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return Problem.lower_outputs(self, upper, lower, batch)


def test_a_problem_without_outputs_is_refused_with_the_remedy() -> None:
    upper, lower, batch = point()
    with pytest.raises(TypeError, match="define lower_outputs"):
        linearize(Opaque(), upper, lower, [batch], hvp=GaussNewton())


@pytest.mark.parametrize("changed", ["factor", "term", "mask"])
def test_outputs_that_do_not_compose_to_the_objective_are_refused(changed: str) -> None:
    class Other(Network):
        def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
            if changed == "mask":
                z = self.lower_outputs(upper, lower, batch)
                return self.lower_output_loss(upper, z * torch.rand_like(z).round(), batch)
            loss = super().lower_objective(upper, lower, batch)
            return 1.001 * loss if changed == "factor" else loss + 1e-3 * lower["a"].square().sum()

    upper, lower, batch = point()
    with pytest.raises(
        ValueError, match=r"lower_output_loss\(upper, lower_outputs.*lower_objective.*must be the same function"
    ):
        linearize(Other(), upper, lower, [batch], hvp=GaussNewton())
    linearize(Other(), upper, lower, [batch])


def test_random_masks_drawn_alike_compose() -> None:
    class Masked(Network):
        def lower_outputs(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
            z = super().lower_outputs(upper, lower, batch)
            return torch.nn.functional.dropout(z, 0.5)

    upper, lower, batch = point()
    linearize(Masked(), upper, lower, [batch], hvp=GaussNewton())
