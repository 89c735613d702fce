"""Layers and parametrizations that torch differentiates once: right in curvature passes, and left as they were."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    OneStep,
    Params,
    Problem,
    Trainer,
    Unrolled,
    functional_call,
    hypergradient,
    linearize,
    tree,
)
from bilevel.hypergradients import SAMA, Method, SGDUpdate
from bilevel.nn import curvature_pass, layers
from bilevel.products import FiniteDifference, GaussNewton, HVPProvider, MicroBatched, ReverseOverReverse
from tests.support.cases import joined, vector
from tests.support.problems.small_modules import BATCH, EXACT, Fit, check_products, double, parameters, split

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROVIDERS = [*EXACT, FiniteDifference()]
Wrap = Callable[[nn.Module], nn.Module]


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


WEIGHT_NORMS: dict[str, Wrap] = {"parametrization": weight_norm, "hook": old_weight_norm}


def normed(wrap: Wrap) -> nn.Module:
    return double(nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), wrap(nn.Linear(4, 2))))


def by_hand(p: Params, x: Tensor) -> Tensor:
    for k in (0, 2):
        # The parametrization calls the length "original0" and the direction "original1".
        g, v = (leaf for name, leaf in sorted(p.items()) if name.startswith(f"{k}.") and "bias" not in name)
        x = F.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), p[f"{k}.bias"])
        x = x.tanh() if k == 0 else x
    return x


@pytest.mark.parametrize("wrap", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_products_through_weight_norm(hvp: HVPProvider, wrap: Wrap) -> None:
    check_products(Fit(normed(wrap)), lambda p: by_hand(p, BATCH).tanh().square().mean() * 3.0, BATCH, hvp)


class Scaled(Problem):
    """An upper variable scales what the lower network gives; outputs and their loss apart."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, (batch,)) * upper["scale"].exp()

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - 0.5).square().mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.module, lower, (batch,)).sin().mean()


class ByHand(Scaled):
    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return by_hand(lower, batch) * upper["scale"].exp()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return by_hand(lower, batch).sin().mean()


UPPER = {"scale": torch.tensor(0.3, dtype=torch.float64)}


@pytest.mark.parametrize("wrap", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
@pytest.mark.parametrize(
    "method",
    [
        *(Implicit(CG(3, None), hvp=hvp, tikhonov=5.0) for hvp in (*EXACT, MicroBatched(2), GaussNewton())),
        Unrolled(SGDUpdate(lr=0.1)),
        Unrolled(SGDUpdate(lr=0.1), recompute=True),
        OneStep(0.1, hvp=ReverseOverReverse()),
        SAMA(SGDUpdate(lr=0.1), hvp=ReverseOverReverse()),
    ],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'hvp', '')}",
)
def test_every_method_differentiates_weight_norm_as_it_does_the_formula(method: Method, wrap: Wrap) -> None:
    module = normed(wrap)
    lower = parameters(module)
    found, expected = (
        hypergradient(
            problem, UPPER, lower, method, upper_batch=BATCH, lower_batches=[BATCH, BATCH + 0.1], on_failure="ignore"
        )
        for problem in (Scaled(module), ByHand(module))
    )
    assert abs(float(expected.implicit["scale"])) > 1e-4
    assert float(found.implicit["scale"]) == pytest.approx(float(expected.implicit["scale"]), rel=1e-10)


def exact(weight: Tensor) -> Tensor:
    return weight / torch.linalg.matrix_norm(weight, 2)


@pytest.mark.parametrize("wrap", [spectral_norm, old_spectral_norm], ids=["parametrization", "hook"])
@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_products_through_spectral_norm_see_the_singular_vectors_move(hvp: HVPProvider, wrap: Wrap) -> None:
    module = double(wrap(nn.Linear(3, 4)))

    def loss(p: Params) -> Tensor:
        weight = next(leaf for name, leaf in p.items() if "bias" not in name)
        return F.linear(BATCH, exact(weight), p["bias"]).tanh().square().mean() * 3.0

    check_products(Fit(module), loss, BATCH, hvp)


def test_the_largest_singular_value_has_three_derivatives_beside_equal_smaller_ones() -> None:
    values = torch.tensor([1.0, 0.3, 0.3, 0.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(vector(n * 4, n).reshape(n, 4))[0] for n in (5, 4))
    matrix, step = left @ values.diag() @ right.T, vector(20, 3).reshape(5, 4)

    def third(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        found = [function(matrix + t * step)]
        for _ in range(3):
            found += torch.autograd.grad(found[-1], t, create_graph=True)
        return tuple(found)

    # The mean of high order, from which smaller values are missing to rounding.
    def by_trace(w: Tensor) -> Tensor:
        return torch.linalg.matrix_power(w.T @ w, 16).trace().pow(1 / 32)

    for value, expected in zip(third(layers._largest_singular_value), third(by_trace), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    double_one = torch.eye(3, dtype=torch.float64, requires_grad=True)
    largest = layers._largest_singular_value(double_one)
    assert not torch.autograd.grad(largest, double_one)[0].isfinite().all()


@pytest.mark.parametrize(
    "wrap",
    [
        *(old_weight_norm, old_spectral_norm, spectral_norm, weight_norm),
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    ],
    ids=["weight_norm hook", "spectral_norm hook", "spectral_norm", "weight_norm", "prune"],
)
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_nothing_of_a_pass_stays_in_the_module(hvp: HVPProvider, wrap: Wrap) -> None:
    module = double(wrap(nn.Linear(3, 4)))
    module(BATCH)
    before = [dict(vars(layer)) for layer in module.modules()]
    hooks = [dict(vars(hook)) for layer in module.modules() for hook in layer._forward_pre_hooks.values()]
    state = copy.deepcopy(module.state_dict())
    lower = {name: leaf + 0.1 for name, leaf in parameters(module).items()}
    linearize(Fit(module), lower, lower, [BATCH], hvp=hvp).operator(lower)
    assert all(
        now.keys() == then.keys() and all(now[key] is value for key, value in then.items())
        for now, then in zip(map(vars, module.modules()), before, strict=True)
    )
    assert hooks == [dict(vars(hook)) for layer in module.modules() for hook in layer._forward_pre_hooks.values()]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


def test_a_cached_parametrization_is_that_of_the_parameters_given() -> None:
    module = normed(weight_norm)
    own, other = parameters(module), {name: leaf + 1.0 for name, leaf in parameters(module).items()}
    expected = [functional_call(module, p, BATCH) for p in (own, other)]
    with parametrize.cached():
        module(BATCH)
        for _ in range(2):
            torch.testing.assert_close(functional_call(module, own, BATCH), expected[0])
            torch.testing.assert_close(functional_call(module, other, BATCH), expected[1])
            with curvature_pass():
                torch.testing.assert_close(functional_call(module, other, BATCH), expected[1])
        assert parametrize._cache, "the module's own cache is there still"


WORDS = torch.tensor([[0, 2, 2], [1, 4, 0], [3, 3, 3]])
EMBEDDINGS = {
    "max_norm": ({"max_norm": 1.0}, r"layer '0' \(Embedding.*\) writes to its weight.*max_norm=None"),
    "scale_grad_by_freq": (
        {"scale_grad_by_freq": True},
        r"layer '0' \(Embedding.*\) has scale_grad_by_freq=True.*build",
    ),
}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", EMBEDDINGS)
@pytest.mark.parametrize("hvp", [*PROVIDERS, "auto"], ids=str)
def test_embeddings_that_are_no_function_of_their_weight_are_refused(
    hvp: HVPProvider, option: str, kind: type[nn.Embedding]
) -> None:
    options, message = EMBEDDINGS[option]
    module = double(nn.Sequential(kind(5, 3, **options)))
    lower = parameters(module)
    before = {name: leaf.clone() for name, leaf in lower.items()}
    with pytest.raises(TypeError, match=message):
        hypergradient(Fit(module), lower, lower, Implicit(hvp=hvp), upper_batch=WORDS, lower_batches=[WORDS])
    assert all(torch.equal(before[name], leaf) for name, leaf in lower.items())


@pytest.mark.parametrize("hvp", PROVIDERS, ids=str)
def test_sparse_embeddings_have_dense_derivatives(hvp: HVPProvider) -> None:
    module = double(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
    check_products(Fit(module), lambda p: F.embedding(WORDS, p["0.weight"]).tanh().square().mean() * 3.0, WORDS, hvp)
    assert vars(module.get_submodule("0"))["sparse"]


class Direct(Fit):
    """torch's function instead of the layer."""

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return torch.tanh(F.embedding(batch, lower["weight"], sparse=True)).square().mean() * 3.0

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return F.embedding(batch, lower["weight"], sparse=True).sin().mean()


def test_sparse_gradients_of_the_function_are_made_dense() -> None:
    lower = {"weight": vector(15, 4).reshape(5, 3)}
    batches = {"upper_batch": WORDS, "lower_batches": [WORDS]}
    dense = hypergradient(Direct(nn.Identity()), lower, lower, **batches)
    module = double(nn.Embedding(5, 3))
    expected = hypergradient(Fit(module), lower, lower, **batches)
    assert dense.grad["weight"].layout is torch.strided
    torch.testing.assert_close(dense.grad, expected.grad)


def test_a_trainer_trains_a_sparse_embedding_as_a_dense_one() -> None:
    ends = []
    for sparse in (True, False):
        module = double(nn.Embedding(5, 3, sparse=sparse))
        lower = {name: leaf.requires_grad_() for name, leaf in parameters(module).items()}
        upper = {name: (leaf.detach() + 0.1).requires_grad_() for name, leaf in lower.items()}
        Trainer(
            Fit(module),
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [WORDS]),
            Level(lower, torch.optim.Adam(lower.values(), lr=0.1), [WORDS], max_grad_norm=0.1),
            AlternatingSchedule(alternations=2, lower_steps=3, upper_steps=1),
        ).run()
        ends.append({"lower": joined(lower).detach(), "upper": joined(upper).detach()})
    torch.testing.assert_close(ends[0], ends[1])


RAGGED = torch.tensor([1, 2, 3, 2, 4, 2])
STARTS = torch.tensor([0, 2, 2, 5])


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_torch(mode: str, padding_idx: int | None) -> None:
    weight = vector(15, 5).reshape(5, 3)
    options = {"mode": mode, "padding_idx": padding_idx}
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3, 2, 4])], layout=torch.jagged)
    weights = {"per_sample_weights": vector(6, 6)} if mode == "sum" else {}
    for arguments, more in [
        ((WORDS, weight), {}),
        ((RAGGED, weight, STARTS), weights),
        ((RAGGED, weight, torch.tensor([0, 2, 2, 5, 6])), {"include_last_offset": True}),
        ((nested, weight), {}),
    ]:
        with layers._Elementary():
            found = F.embedding_bag(*arguments, **options, **more)
        torch.testing.assert_close(found, F.embedding_bag(*arguments, **options, **more))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_products_through_bags(hvp: HVPProvider, mode: str) -> None:
    module = double(nn.EmbeddingBag(5, 3, mode=mode))
    reduce = {"sum": lambda r: r.sum(1), "mean": lambda r: r.mean(1), "max": lambda r: r.amax(1)}[mode]
    # Equal words in a bag are one maximum twice, whose slope torch gives to the first and amax to both alike.
    check_products(Fit(module), lambda p: reduce(p["weight"][WORDS]).tanh().square().mean() * 3.0, WORDS, hvp)


def switches() -> tuple[bool, bool]:
    return bool(torch.backends.cudnn.enabled), bool(torch.backends.mkldnn.enabled)


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(1, 2, batch_first=True)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(switches())
        return self.layer(x.unsqueeze(2))[0]


RECURRENT = pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])


@RECURRENT
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_products_through_recurrent_layers_in_single_precision(hvp: HVPProvider, kind: str) -> None:
    module = double(Recurrent(kind))
    lower = parameters(module)
    expected = linearize(Fit(module), lower, lower, [BATCH]).operator(lower)
    single = {name: leaf.float() for name, leaf in lower.items()}
    found = linearize(Fit(module.float()), single, single, [BATCH.float()], hvp=hvp).operator(single)
    torch.testing.assert_close({name: leaf.double() for name, leaf in found.items()}, expected, rtol=1e-4, atol=1e-4)


def test_recurrent_layers_are_called_by_torchs_own_kernels_alone() -> None:
    inside: list[tuple[bool, bool]] = []
    before, module = switches(), Recurrent("LSTM")
    module.layer.forward = lambda x: (inside.append(switches()), (x,))[1]
    with curvature_pass():
        functional_call(module, {}, BATCH)
    assert (module.seen, inside, switches()) == ([before], [(False, False)], before)
    with curvature_pass(), pytest.raises(ValueError, match="dtype"):
        functional_call(Recurrent("LSTM"), {}, BATCH.long())
    assert switches() == before


def test_a_lazy_module_is_refused_until_it_was_called() -> None:
    module = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential has no shape yet; call the module once"):
        functional_call(module, {}, torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"lower\['0.weight'\] has no shape yet.*call the module once"):
        linearize(Fit(module), {}, dict(module.named_parameters()), [BATCH])
    module.double()(BATCH)
    lower = parameters(module)
    system = linearize(Fit(module), lower, lower, [BATCH])
    w = split(vector(joined(lower).numel(), 0), lower)
    assert tree.all_finite(system.operator(w))
