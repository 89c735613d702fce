"""What `functional_call` refuses, and that it leaves everything as it was."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel import Implicit, Params, functional_call, hypergradient, linearize
from bilevel.nn.functional import curvature_pass
from bilevel.products import FiniteDifference, HVPProvider, ReverseOverReverse
from tests.support.cases import joined, vector
from tests.support.problems.small_modules import (
    BATCH,
    EXACT,
    IMAGES,
    Fit,
    StopsGradients,
    check_untouched,
    convolutional,
    double,
    everything,
    parameters,
    split,
)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = nn.Linear(3, 3), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        assert isinstance(out, Tensor)
        return out.tanh()


@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_activation_checkpointing_is_refused_with_the_remedy(hvp: HVPProvider) -> None:
    module, batch = double(Checkpointed(False)), vector(15, 51).reshape(5, 3)
    lower = parameters(module)
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*Switch checkpointing off"):
        hypergradient(Fit(module), lower, lower, Implicit(hvp=hvp), upper_batch=batch, lower_batches=[batch])

    class InUpper(Fit):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return joined(lower).square().sum()

    with pytest.raises(RuntimeError, match=r"activation checkpointing.*Switch checkpointing off"):
        hypergradient(InUpper(module), lower, lower, Implicit(hvp=hvp), upper_batch=batch, lower_batches=[batch])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stem", [False, True], ids=["all of it", "after a stem"])
@pytest.mark.parametrize("hvp", [ReverseOverReverse(), FiniteDifference()], ids=str)
def test_reentrant_checkpointing_is_refused_too(hvp: HVPProvider, stem: bool) -> None:
    module = Checkpointed(True)
    module = double(nn.Sequential(nn.Linear(3, 3), module) if stem else module)
    lower = parameters(module)
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*Switch checkpointing off"):
        hypergradient(Fit(module), lower, lower, Implicit(hvp=hvp), upper_batch=BATCH, lower_batches=[BATCH])


def test_a_part_without_gradients_is_no_checkpoint() -> None:
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                goal = self.target(x)
            return self.online(x) - goal

    module = double(Target())
    lower = parameters(module)
    system = linearize(StopsGradients(module), lower, lower, [BATCH], damping=2.0)
    w = split(vector(joined(lower).numel(), 0), lower)
    assert torch.equal(system.operator(w)["target.weight"], w["target.weight"])
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def wrapped(module: nn.Module) -> nn.Module:
    """A DistributedDataParallel that no process group was needed for."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile()
    return module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (wrapped, "DistributedDataParallel.*pass the bare module"),
        (lambda m: nn.Sequential(wrapped(m)), "DistributedDataParallel.*pass the bare module"),
        (compiled, "compiled module.*from before torch.compile"),
        (lambda m: nn.Sequential(compiled(m)), "compiled module.*from before torch.compile"),
        (compiled_in_place, "compiled module.*from before torch.compile"),
    ],
    ids=["ddp", "ddp inside", "compiled", "compiled inside", "compiled in place"],
)
def test_wrappers_are_refused_with_the_remedy(make: Callable[[nn.Module], nn.Module], match: str) -> None:
    module = make(double(nn.Linear(3, 2)))
    lower = parameters(module)
    with pytest.raises(TypeError, match=match):
        hypergradient(Fit(module), lower, lower, upper_batch=BATCH, lower_batches=[BATCH])


def test_synchronised_batchnorm_is_refused_over_several_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.SyncBatchNorm(3).double()
    with curvature_pass():
        reference = F.batch_norm(BATCH, None, None, module.weight, module.bias, training=True)
        torch.testing.assert_close(functional_call(module, {}, BATCH), reference)
        monkeypatch.setattr("bilevel.nn.functional.world_size", lambda: 2)
        with pytest.raises(TypeError, match=r"SyncBatchNorm has no double backward.*synchronised"):
            functional_call(module, {}, BATCH)
        functional_call(module.eval(), {}, BATCH)


def test_unknown_names_are_refused() -> None:
    module = nn.Linear(3, 2)
    for mode in (curvature_pass, lambda: torch.enable_grad()):
        with mode(), pytest.raises(ValueError, match="Linear has no parameter or buffer named 'wieght'"):
            functional_call(module, {"wieght": torch.ones(2, 3)}, torch.ones(1, 3))


def test_arguments_go_through_as_in_torch() -> None:
    module = nn.Bilinear(2, 3, 1)
    x, y = torch.ones(4, 2), torch.ones(4, 3)
    given = {"weight": torch.full((1, 2, 3), 0.5)}
    expected = 3.0 + module.bias.detach().expand(4, 1)
    for mode in (curvature_pass, lambda: torch.enable_grad()):
        with mode():
            torch.testing.assert_close(functional_call(module, given, (x, y)), expected)
            torch.testing.assert_close(functional_call(module, given, (x,), {"input2": y}), expected)
    assert not torch.equal(module.weight, given["weight"])


def test_everything_is_put_back_after_an_error() -> None:
    module = double(convolutional())
    before = everything(module)
    generator = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError), curvature_pass(3):
        functional_call(module, parameters(module), torch.ones(1, dtype=torch.float64))
    check_untouched(module, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    functional_call(module, parameters(module), IMAGES)
    assert int(module.get_buffer("1.num_batches_tracked")) == 1
    with torch.autograd.graph.save_on_cpu():
        pass
