"""The examples of one's own stack, examples/stack: in their quick versions, as docs/stack.md prints them, and in parts.

Those whose packages are missing are skipped by name: transformers and peft are not in the extra `test`.
"""

import importlib.util
import math
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, Implicit, hypergradient, linearize
from bilevel.nn.functional import curvature_pass
from bilevel.products import ReverseOverReverse
from recipes.experiment.plugins import PluginError, resolve
from tests.project.test_examples import numbers, words
from tests.support.paths import ROOT
from tests.support.recipes.pretext_cases import (
    check_micro_batches,
    check_products,
    check_same_runs,
    direction,
    make_problem,
    run_stages,
    views,
)

FOLDER = ROOT / "examples/stack"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PAGE = (ROOT / "docs/stack.md").read_text(encoding="utf-8")
NEEDS = {"three_loops": (), "lora_domains": ("transformers", "peft"), "lightly_tasks": ("lightly",)}
LIGHTLY = "NTXent", "VICReg", "BarlowTwins", "DINO"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, under the name that ``module:Class`` finds it by; skipped without its packages."""
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"examples/stack/{name}.py needs {package}")
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def documented_output(name: str) -> str:
    (output,) = re.findall(rf"^```\n\$ python examples/stack/{name}\.py\n(.*?)^```$", PAGE, re.M | re.S)
    return output


def quick(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[dict[str, Any], list[list[str]]]:
    """What main returns, all of it finite, and the words of each line that it prints; it leaves no file behind."""
    monkeypatch.chdir(folder)
    result = load(name, monkeypatch).main(["--quick", *arguments])
    assert all(math.isfinite(number) for number in numbers(result))
    assert list(folder.iterdir()) == []
    return result, words(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    assert f"python examples/stack/{name}.py" in source.partition("import argparse")[0]
    assert documented_output(name).count("\n") >= 3
    assert f"[stack/{name}.py](stack/{name}.py)" in (ROOT / "examples/README.md").read_text(encoding="utf-8")


def test_every_example_is_here() -> None:
    assert set(NAMES) == set(NEEDS)


def test_three_loops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result, printed = quick("three_loops", monkeypatch, capsys, tmp_path)
    missing = {line.split(" left out")[0].strip() for line in map(" ".join, printed) if " left out: " in line}
    shown = words(documented_output("three_loops"))
    assert [line for line in printed if "left" not in line] == [
        line for line in shown if not any(" ".join(line).startswith(name) for name in missing)
    ]
    for name in {"Lightning Fabric", "Trainer"} - missing:
        # A fused AdamW rounds otherwise.
        assert result[f"{name}, apart"] < 1e-6
        assert result[name] != result["nothing"]


def test_a_loop_whose_package_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for package in ("transformers", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, package, None)
    result, _ = quick("three_loops", monkeypatch, capsys, tmp_path)
    assert set(result) == {"nothing", "nothing, apart", "plain torch", "plain torch, apart"}


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_adapters_without_their_extra_end_in_a_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "transformers"):
        pytest.importorskip(name, reason=f"without one of both packages; {name} is missing")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f'^{package} is not installed; the extra stack brings it: pip install "'):
        runpy.run_path(str(FOLDER / "lora_domains.py"))


def test_losses_of_lightly_without_their_extra_end_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly")
    for name in ("lightly", "lightly.loss"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"^lightly\S* is not installed; the extra lightly brings it"):
        runpy.run_path(str(FOLDER / "lightly_tasks.py"), run_name="__main__")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "lightly_tasks", raising=False)
    with pytest.raises(PluginError, match=r"importing 'lightly_tasks' failed: SystemExit: lightly\S* is not installed"):
        resolve("lightly_tasks:NTXent")


def test_the_layers_gradient_is_that_through_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("three_loops", monkeypatch)
    torch.manual_seed(0)
    model, (batch,) = example.Sines(), example.draw(1, 0)
    model(**batch)["loss"].backward()
    found = [p.grad for p in model.parameters()]
    A, B = (model.features(batch["X"][:, part]) for part in (slice(0, 10), slice(10, 20)))
    ridge = 10 * 0.02 * torch.eye(41).double()
    w = torch.linalg.solve(A.mT @ A + ridge, A.mT @ batch["t"][:, :10])
    loss = (B @ w - batch["t"][:, 10:]).square().mean()
    for gradient, expected in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert gradient is not None
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_lora_domains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result, printed = quick("lora_domains", monkeypatch, capsys, tmp_path)
    assert printed == words(documented_output("lora_domains"))
    assert result["same"] > 1 / 3 > result["other"]
    assert result["same"] + result["other"] + result["noise"] == pytest.approx(1.0, abs=1e-6)
    assert min(value for name, value in result.items() if name not in ("same", "other", "noise")) == result["entropy"]


def test_adapters_are_all_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("lora_domains", monkeypatch)
    problem = example.Domains()
    y = problem.adapters()
    assert all(".lora_A." in name or ".lora_B." in name for name in y)
    assert len(y) == 2 * 7
    assert not any(bool(leaf.any()) for name, leaf in y.items() if ".lora_B." in name)
    tokens = example.speak(4, None, 0)
    # The second factors are 0: the adapted model is the frozen one.
    with problem.model.disable_adapter(), torch.no_grad():
        logits = problem.model(input_ids=tokens).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(problem.losses(y, tokens).mean()) == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_by_weights_is_that_of_the_dense_system(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("lora_domains", monkeypatch)
    problem, generator = example.Domains(), torch.Generator().manual_seed(0)
    fresh = problem.adapters()
    y = {name: 0.1 * torch.randn(fresh[name].shape, generator=generator) for name in fresh if "down_proj" in name}
    problem.model.requires_grad_(False)
    x = torch.tensor([0.1, -0.2, 0.3])
    domains, target = example.speak(12, None, 0).view(4, 3, -1), example.speak(5, None, 1)
    method = Implicit(CG(300, 1e-6), tikhonov=10.0)
    found = hypergradient(problem, {"logits": x}, y, method, upper_batch=target, lower_batches=[(domains,)])

    def at(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([leaf.numel() for leaf in y.values()])
        return {name: part.view_as(y[name]) for name, part in zip(y, parts, strict=True)}

    def below(both: Tensor) -> Tensor:
        return problem.lower_objective({"logits": both[:3]}, at(both[3:]), (domains,))

    flat = torch.cat([leaf.flatten() for leaf in y.values()])
    with curvature_pass():
        second = torch.as_tensor(torch.autograd.functional.hessian(below, torch.cat([x, flat]))).double()
        point = flat.clone().requires_grad_()
        (v,) = torch.autograd.grad(problem.upper_objective({}, at(point), target), point)
    expected = -second[:3, 3:] @ torch.linalg.solve(second[3:, 3:] + 10.0 * torch.eye(len(flat)).double(), v.double())
    # The model's norms compute in float32, whatever its weights are.
    assert (found.grad["logits"].double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("task", ["BarlowTwins", pytest.param("DINO", marks=pytest.mark.slow)])
def test_lightly_tasks(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result, printed = quick("lightly_tasks", monkeypatch, capsys, tmp_path, "--task", task)
    assert printed == words(documented_output("lightly_tasks"))
    assert result["variants"]["bissl"]["pretext_steps"] == result["variants"]["baseline"]["pretext_steps"] > 0


def test_lightlys_losses_by_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("lightly_tasks", monkeypatch)
    a, b = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = torch.stack([a, b], dim=1)

    def scaled(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()

    c = scaled(a).T @ scaled(b) / 16
    off = c - c.diagonal().diag()
    barlow = (c.diagonal() - 1).square().sum() + 0.005 * off.square().sum()
    expected = {
        "NTXent": float(example.nt_xent(a, b)),
        "VICReg": float(example.half_variance(a, b)),
        "BarlowTwins": float(barlow) / 8,
    }
    for name, value in expected.items():
        task = example.TASKS[name].model_validate({"image_size": 8})
        assert float(task.output_loss(both)) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name", LIGHTLY)
def test_products_equal_central_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load("lightly_tasks", monkeypatch).TASKS[name].model_validate({"image_size": 2})
    check_products(make_problem(task), views(), ReverseOverReverse())
    if name != "DINO":
        check_micro_batches(make_problem(task), views())


def test_a_curvature_pass_leaves_the_centre_alone_and_a_step_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load("lightly_tasks", monkeypatch).DINO(image_size=2)
    problem, batch = make_problem(task), views()
    upper, lower = problem.variables()
    centre = problem.heads["criterion"].get_buffer("center")
    before = centre.clone()
    system = linearize(problem, upper, lower, [batch])
    first, second = (system.operator(direction(system.variables(lower))) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(problem.heads["criterion"].get_buffer("center"), before)
    problem.lower_objective(upper, lower, batch)
    assert not torch.equal(problem.heads["criterion"].get_buffer("center"), before)


def test_dino_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("lightly_tasks", monkeypatch)
    named = "--pretext.task=lightly_tasks:DINO", "--bissl.lower-lr=0.01", "--pretext.lr=0.01"
    whole = run_stages(tmp_path / "whole", monkeypatch, *named)
    assert whole["bissl"]["heads.criterion.center"].abs().sum() > 0
    check_same_runs(run_stages(tmp_path / "again", monkeypatch, *named, interrupted=True), whole)
