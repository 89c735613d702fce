"""BiSSL's gradients against formulas written out by hand, in float64."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AlternatingSchedule, Identity, Implicit, Level, Params, Trainer, hypergradient, linearize
from bilevel.linear import Dense, Solver
from recipes.bissl.tasks.base import Bound, PretextTask
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.training.problem import BiSSLProblem

FEATURES, LAMBDA, GAMMA, DAMPING = 4, 0.3, 0.25, 1.7
BACKBONE = ("linear.weight", "linear.bias", "norm.weight", "norm.bias")


class Net(nn.Module):
    """tanh(BatchNorm(W x + b))"""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, FEATURES), nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        return self.norm(self.linear(x)).tanh()


class Follow(PretextTask):
    """Distance of the projected first view to the second, with a momentum target among the heads."""

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        target = nn.Linear(FEATURES, 3).requires_grad_(False)
        return nn.ModuleDict({"project": nn.Linear(FEATURES, 3), "target": target})

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (heads["project"](backbone(batch[0])) - batch[1]).square().sum(dim=1).mean()

    def after_step(self, backbone: nn.Module, heads: nn.ModuleDict, step: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(heads["target"].parameters(), heads["project"].parameters(), strict=True):
                slow.lerp_(fast, 0.5)


class Siamese(Follow):
    """Each view's projection against the other one's features, which are taken as constants (SimSiam)."""

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        goal = heads["project"](backbone(batch[0].flip(0))).detach()
        return (heads["project"](backbone(batch[0])) - goal).square().sum(dim=1).mean()


class Meant(Siamese):
    stops_gradients = True


def make_problem(gamma: float = GAMMA, kind: type[Follow] = Follow) -> BiSSLProblem:
    torch.manual_seed(0)
    pretext, downstream = kind(image_size=1), Classification(image_size=1, classes=("a", "b", "c"))  # type: ignore[call-arg]
    lower, upper = Net().double(), Net().double()
    heads, head = pretext.build(lower).double(), downstream.build(upper).double()
    for net in (lower, upper):
        nn.init.normal_(net.norm.weight, 1.0, 0.2)
        nn.init.normal_(net.norm.running_mean)  # type: ignore[arg-type]
    return BiSSLProblem(pretext, downstream, lower, upper, heads, head, regularization_weight=LAMBDA, gamma=gamma)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOWER_BATCHES = [(draw(9, 6, seed=k), draw(9, 3, seed=k + 10)) for k in range(2)]
UPPER_BATCH = (draw(8, 6, seed=5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


def features(theta: list[Tensor], x: Tensor) -> Tensor:
    """The network in train mode, from its definition."""
    w, b, scale, shift = theta
    a = x @ w.T + b
    centred = a - a.mean(dim=0)
    return (centred / (centred.square().mean(dim=0) + 1e-5).sqrt() * scale + shift).tanh()


def pretext_loss(theta: list[Tensor], phi: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return (features(theta, batch[0]) @ phi[0].T + phi[1] - batch[1]).square().sum() / len(batch[0])


def downstream_loss(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
    x, target = UPPER_BATCH
    scores = features(theta, x) @ phi[0].T + phi[1]
    return (scores.exp().sum(dim=1).log() - scores[torch.arange(len(x)), target]).mean()


def leaves(params: Params, prefix: str, names: tuple[str, ...] = BACKBONE) -> list[Tensor]:
    return [params[prefix + name].detach().clone().requires_grad_() for name in names]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def backbone_part(params: Params) -> Tensor:
    return flat(params[f"backbone.{name}"] for name in BACKBONE)


class ByHand:
    """The pieces of eq. 2-7 by plain autograd."""

    def __init__(self, problem: BiSSLProblem, gamma: float = GAMMA) -> None:
        upper, lower = problem.variables()
        self.theta_p, self.theta_d = leaves(lower, "backbone."), leaves(upper, "backbone.")
        self.phi_d = leaves(upper, "head.", ("weight", "bias"))
        self.phi_p = leaves(lower, "heads.project.", ("weight", "bias"))
        through, direct = downstream_loss(self.theta_p, self.phi_d), downstream_loss(self.theta_d, self.phi_d)
        self.loss = (through + gamma * direct).item()
        self.v = flat(torch.autograd.grad(through, self.theta_p, retain_graph=True))
        self.direct = flat(torch.autograd.grad(gamma * direct, self.theta_d, retain_graph=True))
        self.head = flat(torch.autograd.grad(through + gamma * direct, self.phi_d))

    def hessian(self) -> Tensor:
        """Mean over the lower batches of the Hessian of L_P in theta_P, row by row."""
        loss = sum((pretext_loss(self.theta_p, self.phi_p, batch) for batch in LOWER_BATCHES), torch.zeros(()))
        gradient = torch.autograd.grad(loss / len(LOWER_BATCHES), self.theta_p, create_graph=True)
        entries = torch.cat([part.reshape(-1) for part in gradient])
        return torch.stack([flat(torch.autograd.grad(entry, self.theta_p, retain_graph=True)) for entry in entries])


def buffers(problem: BiSSLProblem, backbone: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in getattr(problem, backbone).named_buffers()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainer(
    problem: BiSSLProblem, schedule: AlternatingSchedule, solver: Solver | None = None, *, lr: float = 0.1
) -> Trainer:
    upper, lower = problem.variables()
    return Trainer(
        problem,
        Level(upper, torch.optim.SGD(list(upper.values()), lr=lr), [UPPER_BATCH]),
        Level(lower, torch.optim.SGD(list(lower.values()), lr=lr), LOWER_BATCHES),
        schedule,
        solver,
    )


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((actual - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("gamma", [GAMMA, 0.0])
def test_identity_gives_v_plus_gamma_gradient(gamma: float) -> None:
    problem = make_problem(gamma)
    expected = ByHand(problem, gamma)
    upper, lower = problem.variables()
    result = hypergradient(
        problem,
        upper,
        lower,
        Implicit(Identity(), damping=DAMPING),
        upper_batch=UPPER_BATCH,
        lower_batches=LOWER_BATCHES,
    )
    assert result.grad.keys() == upper.keys()
    assert float(result.loss) == pytest.approx(expected.loss, rel=1e-12)
    assert close(backbone_part(result.grad), expected.v + expected.direct, 1e-12)
    assert close(flat(result.grad[f"head.{name}"] for name in ("weight", "bias")), expected.head, 1e-12)


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_dense_solves_the_damped_system(damping: float) -> None:
    problem = make_problem()
    expected = ByHand(problem)
    a = torch.eye(len(expected.v), dtype=torch.float64) + expected.hessian() / (LAMBDA + damping)
    solved = torch.linalg.solve(a, expected.v)
    # Far from v, so that the test can tell a solve from none.
    assert not close(solved, expected.v, 0.05)
    upper, lower = problem.variables()
    result = hypergradient(
        problem, upper, lower, Implicit(Dense(), damping=damping), upper_batch=UPPER_BATCH, lower_batches=LOWER_BATCHES
    )
    assert close(backbone_part(result.grad), solved + expected.direct, 1e-8)
    assert close(flat(result.grad[f"head.{name}"] for name in ("weight", "bias")), expected.head, 1e-12)


def test_only_the_backbone_responds() -> None:
    problem = make_problem()
    upper, lower = problem.variables()
    assert set(lower) == {f"backbone.{name}" for name in BACKBONE} | {"heads.project.weight", "heads.project.bias"}
    assert set(upper) == {f"backbone.{name}" for name in BACKBONE} | {"head.weight", "head.bias"}
    assert [name for name in lower if problem.implicit(name)] == [f"backbone.{name}" for name in BACKBONE]
    system = linearize(problem, upper, lower, LOWER_BATCHES)
    assert set(system.implicit) == {f"backbone.{name}" for name in BACKBONE}


def test_lower_step_descends_pretext_loss_and_pull() -> None:
    problem = make_problem()
    expected = ByHand(problem)
    loss = pretext_loss(expected.theta_p, expected.phi_p, LOWER_BATCHES[0])
    gradient = torch.autograd.grad(loss, [*expected.theta_p, *expected.phi_p])
    pull = LAMBDA * (flat(expected.theta_p) - flat(expected.theta_d))
    trainer(problem, AlternatingSchedule(1, 1, 0), lr=0.1).run()
    upper, lower = problem.variables()
    assert close(backbone_part(lower), flat(expected.theta_p) - 0.1 * (flat(gradient[:4]) + pull), 1e-12)
    heads = flat(lower[f"heads.project.{name}"] for name in ("weight", "bias"))
    assert close(heads, flat(expected.phi_p) - 0.1 * flat(gradient[4:]), 1e-12)
    assert torch.equal(backbone_part(upper), flat(expected.theta_d))


def test_curvature_serves_every_upper_step() -> None:
    problem = make_problem()
    assert problem.curvature_depends_on_upper is False
    upper, lower = problem.variables()
    system = linearize(problem, upper, lower, LOWER_BATCHES, solver=Dense(), damping=DAMPING)
    with torch.no_grad():
        for leaf in upper.values():
            leaf.add_(0.3)
    reused = system.hypergradient(UPPER_BATCH)
    expected = ByHand(problem)
    a = torch.eye(len(expected.v), dtype=torch.float64) + expected.hessian() / (LAMBDA + DAMPING)
    assert close(backbone_part(reused.grad), torch.linalg.solve(a, expected.v) + expected.direct, 1e-8)


def test_hypergradient_writes_nothing() -> None:
    problem = make_problem()
    upper, lower = problem.variables()
    before = {name: buffers(problem, name) for name in ("lower_backbone", "upper_backbone", "heads", "head")}
    values = {name: leaf.clone() for name, leaf in {**upper, **{f"lower {n}": t for n, t in lower.items()}}.items()}
    hypergradient(problem, upper, lower, upper_batch=UPPER_BATCH, lower_batches=LOWER_BATCHES, on_failure="ignore")
    assert all(same(buffers(problem, name), old) for name, old in before.items())
    assert same({**upper, **{f"lower {n}": t for n, t in lower.items()}}, values)
    assert all(leaf.grad is None for leaf in [*upper.values(), *lower.values()])


@pytest.mark.parametrize("gamma", [GAMMA, 0.0])
def test_running_statistics_belong_to_their_own_level(gamma: float) -> None:
    problem = make_problem(gamma)
    problem_trainer = trainer(problem, AlternatingSchedule(1, 0, 1), Identity())
    lower, upper = buffers(problem, "lower_backbone"), buffers(problem, "upper_backbone")
    problem_trainer.run()
    assert same(buffers(problem, "lower_backbone"), lower)
    after = buffers(problem, "upper_backbone")
    if gamma == 0.0:
        assert same(after, upper)
        return
    w, b, *_ = (leaf.detach() for leaf in leaves(problem.variables()[0], "backbone."))
    a = UPPER_BATCH[0] @ w.T + b
    assert close(after["norm.running_mean"], 0.9 * upper["norm.running_mean"] + 0.1 * a.mean(dim=0), 1e-12)
    assert close(after["norm.running_var"], 0.9 * upper["norm.running_var"] + 0.1 * a.var(dim=0), 1e-12)
    assert int(after["norm.num_batches_tracked"]) == 1


def test_lower_steps_move_only_the_lower_statistics() -> None:
    problem = make_problem()
    upper = buffers(problem, "upper_backbone")
    trainer(problem, AlternatingSchedule(1, 3, 0)).run()
    assert int(buffers(problem, "lower_backbone")["norm.num_batches_tracked"]) == 3
    assert same(buffers(problem, "upper_backbone"), upper)


def test_adaptation_moves_parameters_and_no_buffer() -> None:
    problem = make_problem()
    expected = ByHand(problem)
    upper, lower = problem.variables()
    before = buffers(problem, "lower_backbone"), buffers(problem, "upper_backbone")
    pairs = {name: name for name in upper if name.startswith("backbone.")}
    trainer(problem, AlternatingSchedule(1, 0, 0, 1, 0.3, pairs)).run()
    assert close(backbone_part(upper), 0.7 * flat(expected.theta_d) + 0.3 * flat(expected.theta_p), 1e-12)
    assert torch.equal(backbone_part(lower), flat(expected.theta_p))
    assert same(buffers(problem, "lower_backbone"), before[0])
    assert same(buffers(problem, "upper_backbone"), before[1])


def test_momentum_target_follows_lower_steps_and_is_saved() -> None:
    problem = make_problem()
    target = problem.heads.state_dict()["target.weight"].clone()
    run = trainer(problem, AlternatingSchedule(1, 1, 1), Identity())
    run.run()
    heads = problem.heads.state_dict()
    torch.testing.assert_close(heads["target.weight"], 0.5 * target + 0.5 * heads["project.weight"], rtol=1e-12, atol=0)
    other = make_problem()
    restored = trainer(other, AlternatingSchedule(1, 1, 1), Identity())
    restored.load_state_dict(run.state_dict())
    for name in ("lower_backbone", "upper_backbone", "heads", "head"):
        assert same(getattr(other, name).state_dict(), getattr(problem, name).state_dict())


def test_the_head_may_respond_too() -> None:
    problem = make_problem()
    problem.implicit_head = True
    upper, lower = problem.variables()
    assert all(problem.implicit(name) for name in lower)
    batch = (draw(5, 6, seed=1), draw(5, 3, seed=2))
    tikhonov = {name: 1.0 for name in lower if not name.startswith("backbone.")}
    system = linearize(problem, upper, lower, [batch], solver=Dense(), damping=DAMPING, tikhonov=tikhonov)
    assert set(system.implicit) == set(lower)
    v = {name: torch.zeros_like(leaf) for name, leaf in system.variables(lower).items()}
    v["backbone.linear.weight"] = draw(FEATURES, 6, seed=3)
    x = system.solve(v).value
    assert float(x["heads.project.weight"].norm()) > 1e-6, "the coupling to the head must show in the solve"
    back = system.operator(x)
    assert all(torch.allclose(back[name], v[name], atol=1e-9) for name in v)


@pytest.mark.parametrize("kind", [Follow, Siamese, Meant])
def test_a_stop_gradient_of_a_task_is_a_failure_unless_the_task_means_it(kind: type[Follow]) -> None:
    problem = make_problem(kind=kind)
    upper, lower = problem.variables()
    result = hypergradient(
        problem, upper, lower, upper_batch=UPPER_BATCH, lower_batches=LOWER_BATCHES, on_failure="ignore"
    )
    assert ("lost curvature" in (result.failure or "")) == (kind is Siamese)
