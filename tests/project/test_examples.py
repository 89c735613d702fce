"""The examples run, keep their form, and show what they claim: in their quick versions, and as the README prints it."""

import ast
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.support.paths import ROOT

FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
# Full runs of a few seconds; the others are made with -m slow.
BRIEF = ("hyper_cleaning", "logistic")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module of another name than the file's, so that it meets no installed module."""
    if name == "meta_weight_net":
        pytest.importorskip("timm", reason="examples/meta_weight_net.py needs the extra timm")
    module_name = f"example_{name}"
    spec = importlib.util.spec_from_file_location(module_name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where a plug-in named by module:Class is looked for.
    monkeypatch.setitem(sys.modules, module_name, module)
    spec.loader.exec_module(module)
    return module


def quick(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> dict[str, Any]:
    """What the example's main returns; its numbers are finite, it prints what the README shows but for the numbers, and
    it leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    result = load(name, monkeypatch).main(["--quick"])
    assert all(math.isfinite(number) for number in numbers(result))
    assert words(capsys.readouterr().out) == words(documented_output(name))
    assert list(tmp_path.iterdir()) == []
    return result


def documented_output(name: str) -> str:
    (output,) = re.findall(rf"^```\n\$ python examples/{name}\.py\n(.*?)^```$", README, re.M | re.S)
    assert len(output.splitlines()) >= 3
    return output


def words(output: str) -> list[list[str]]:
    """Each line with a sign for each number, or list of numbers, and one space for several."""
    return [re.sub(r"#(, #)+", "#", NUMBER.sub("#", line)).split() for line in output.splitlines()]


def agree(found: str, documented: str) -> bool:
    """Whether two printed numbers may be those of one program on two machines: 2% and three units of the last digit, or
    a factor of 30 where all is rounding."""
    mantissa, _, exponent = documented.replace(",", "").partition("e")
    a, b = (float(text.replace(",", "")) for text in (found, documented))
    if exponent and abs(b) < 1e-7:
        return abs(a) < 1e-12 if b == 0.0 else 1 / 30 < a / b < 30
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= 0.02 * abs(b) + 3.0 * unit


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield float(value)


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    tree = ast.parse(source)
    # Steps along hypergradients are the trainer's: no example gives an optimizer a gradient by hand.
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert not [node.lineno for node in attributes if node.attr == "grad" and isinstance(node.ctx, ast.Store)]
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert f"python examples/{name}.py [--quick]" in docstring


def test_readme_lists_every_example() -> None:
    for name in NAMES:
        assert README.count(f"[{name}.py]({name}.py)") == 1
        assert f"$ python examples/{name}.py\n" in README


@pytest.mark.parametrize(
    "name", [name if name in BRIEF else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_readme_shows_what_the_command_prints(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    load(name, monkeypatch).main([])
    output, documented = capsys.readouterr().out, documented_output(name)
    assert words(output) == words(documented)
    for line, expected in zip(output.splitlines(), documented.splitlines(), strict=True):
        for found, shown in zip(NUMBER.findall(line), NUMBER.findall(expected), strict=True):
            assert agree(found, shown), (line, expected)


def test_numbers_of_another_program_are_noticed() -> None:
    same = [("94.2", "94.1"), ("6.64e-09", "3.1e-09"), ("-2.9", "-3.0"), ("2.2e-04", "2.1e-04"), ("1,003", "1,000")]
    other = [("90.2", "94.1"), ("6.6e-05", "3.1e-09"), ("+3.0", "-3.0"), ("4.1e-04", "2.1e-04"), ("1e-9", "0.0e+00")]
    assert all(agree(*pair) for pair in same)
    assert not any(agree(*pair) for pair in other)
    assert words("a +1.2, -3.0; 1,000 b(10) x1 2e-05%") == [["a", "#;", "#", "b(#)", "x1", "#%"]]
    assert words("a  1") == words("a 2") != words("b 1")


def test_ridge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("ridge", monkeypatch, capsys, tmp_path)
    assert result["largest_error_of_hypergradients"] < 1e-6
    assert result["largest_lower_gradient"] < 1e-10
    assert result["validation_error_after_tuning"] < result["validation_error_before_tuning"]


def test_logistic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("logistic", monkeypatch, capsys, tmp_path)
    error = {name: row["error"] for name, row in result.items()}
    assert error["CG, rtol 1e-6"] < 1e-4
    assert error["CG(10)"] < error["CG(3)"] < error["Identity"]
    assert error["Neumann(100)"] < error["Neumann(10)"] < error["Identity"]
    assert error["MINRES(10)"] < 1e-2
    assert result["Identity"]["products"] == 0
    assert result["CG(10)"]["products"] < result["Dense"]["products"]


def test_hyper_cleaning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("hyper_cleaning", monkeypatch, capsys, tmp_path)
    # By chance, three in ten would be right.
    assert result["precision"] > 0.6
    assert result["recall"] > 0.6
    assert result["learned weights"] > result["all labels as they are"]
    assert result["failed_solves"] == 0


def test_meta_weight_net(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("meta_weight_net", monkeypatch, capsys, tmp_path)
    (learned,), (equal,) = result["learned"]["auc_of_weights"], result["equal"]["auc_of_losses"]
    assert learned > 0.85
    assert learned > equal
    assert result["equal"]["auc_of_weights"] == [0.5]


@pytest.mark.slow
def test_meta_weight_net_ranks_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    result = load("meta_weight_net", monkeypatch).main([])
    areas = result["learned"]["auc_of_weights"]
    assert sum(areas) / len(areas) >= 0.9
    assert all(ours > plain for ours, plain in zip(areas, result["equal"]["auc_of_losses"], strict=True))


def test_imaml(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("imaml", monkeypatch, capsys, tmp_path)
    assert result["maml_seen"] > result["random_seen"] + 1.0
    assert result["failed_solves"] == 0


def test_imaml_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    imaml = load("imaml", monkeypatch)
    (support, labels), (query, query_labels) = imaml.draw(3, 20, imaml.TEST, imaml.NEW)
    assert support.shape == (20, imaml.WAYS, 64)
    assert query.shape == (20, imaml.WAYS * imaml.QUERIES, 64)
    # Images are the pool's, in orientations of the range, and a label stands for one digit in one orientation.
    known = {
        tuple(imaml.VIEWS[v, i].tolist()): (v, int(imaml.DIGIT[i])) for v in imaml.NEW for i in imaml.TEST.tolist()
    }
    for task in range(20):
        seen: dict[int, set[tuple[int, int]]] = {}
        for images, classes in ((support, labels), (query, query_labels)):
            for image, label in zip(images[task], classes[task], strict=True):
                seen.setdefault(int(label), set()).add(known[tuple(image.tolist())])
        characters = [next(iter(found)) for found in seen.values()]
        assert all(len(found) == 1 for found in seen.values())
        assert len({digit for _, digit in characters}) == imaml.WAYS


def test_maml(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("maml", monkeypatch, capsys, tmp_path)
    assert result["maml_strong"] < 0.9 * result["random_strong"]
    assert result["failed_solves"] <= 3


def test_lasso(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("lasso", monkeypatch, capsys, tmp_path)
    assert result["mismatch"] < 1e-7
    # The mean of the targets, about 1, is what no features give.
    assert all(error < 0.8 for name, error in result.items() if name != "mismatch")


def test_lasso_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    lasso = load("lasso", monkeypatch)
    train, _, _ = lasso.load(3)
    generator = torch.Generator().manual_seed(0)
    x = {"a": -3.0 + torch.rand(55, generator=generator).double(), "b": torch.tensor(-4.0).double()}
    w, (X, t) = lasso.fit(x, train), train
    slope = X.T @ (X @ w - t) / len(t) + x["b"].exp() * w
    assert 0 < int((w != 0).sum()) < 55
    # The conditions for a minimum: the slope is the weight against the sign on the support, and no larger elsewhere.
    assert torch.allclose(slope[w != 0], -x["a"].exp()[w != 0] * w[w != 0].sign(), rtol=1e-6)
    assert bool((slope.abs() <= x["a"].exp() * (1.0 + 1e-6)).all())


def test_svm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("svm", monkeypatch, capsys, tmp_path)
    assert result["failures"] == 0
    assert result["stationarity"] < 1e-10
    assert result["C and 30 widths"][0] < result["grid of 64, C and one width"][0]


def test_svm_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    svm = load("svm", monkeypatch)
    train, _, _ = svm.load(3)
    x = {"log_C": torch.tensor(1.0).double(), "log_width": torch.tensor(-4.0).double()}
    machine = svm.Machine(train)
    y = machine.reset_lower(x)["y"]
    slope = machine.quadratic(x) @ y - 1.0
    assert 0 < int((y > 0).sum()) < len(y)
    assert float(slope[y > 0].abs().max()) < 1e-9
    assert float(slope.min()) > -1e-9


def test_equilibrium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("equilibrium", monkeypatch, capsys, tmp_path)
    assert result["equilibrium"]["test"] > result["linear"]["test"]
    assert result["equilibrium"]["kept"] < 0.25 * result["30"]["kept"]


def test_equilibrium_gradients_are_those_of_many_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("equilibrium", monkeypatch)
    torch.manual_seed(0)
    network, X = example.Network(None), torch.rand(5, 64)
    gradients = []
    for steps in (None, 200):
        network.steps = steps
        network.zero_grad()
        network(X).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 1e-2 * torch.linalg.vector_norm(gradients[1])


def test_sklearn_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("sklearn_layer", monkeypatch, capsys, tmp_path)
    assert result["lower_gradient"] < 1e-4
    assert result["classifier on learned features"] > 50.0


def test_long_tail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("long_tail", monkeypatch, capsys, tmp_path)
    assert result["lower_gradient"] < 1e-3
    assert result["learned"] > result["unweighted"] + 1.0
    assert result["inverse_frequency"] > result["unweighted"]


def test_distillation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("distillation", monkeypatch, capsys, tmp_path)
    assert result["error"] < 1e-6
    assert result["lower_gradient"] < 1e-10
    assert result["ten learned images"] > result["ten class means"] > result["ten random images (mean of 20)"]


def test_plugin_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("plugin_tasks", monkeypatch, capsys, tmp_path)
    assert result["primary_metric"] == "auroc"
    assert set(result["variants"]) == {"bissl", "baseline", "scratch"}
    assert all(0.0 <= value <= 100.0 for arm in result["variants"].values() for value in arm["auroc"]["per_seed"])
    assert result["variants"]["bissl"]["pretext_steps"] == result["variants"]["baseline"]["pretext_steps"] > 0


def test_masked_autoencoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = quick("masked_autoencoder", monkeypatch, capsys, tmp_path)
    assert result["primary_metric"] == "top1"
    assert result["variants"]["bissl"]["pretext_steps"] == result["variants"]["baseline"]["pretext_steps"] > 0


def test_segmentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = quick("segmentation", monkeypatch, capsys, tmp_path)
    assert result["primary_metric"] == "miou"
    assert result["variants"]["bissl"]["pretext_steps"] == result["variants"]["baseline"]["pretext_steps"] > 0


def test_plugin_metric_is_the_area_under_the_roc_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("plugin_tasks", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (50, 1), generator=generator).float()
    odd = torch.randint(2, (50,), generator=generator).float()
    state = None
    for part in (slice(0, 20), slice(20, 50)):
        state = example.collect(state, scores[part], odd[part])
    assert example.auroc(state) == pytest.approx(
        100.0 * float(roc_auc_score(odd.numpy(), scores[:, 0].numpy())), rel=1e-6
    )


def test_plugin_covers_one_square_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("plugin_tasks", monkeypatch)
    images = torch.randint(1, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen, target = example.Uncover(image_size=8, side=3).transform(images, torch.Generator().manual_seed(1))
    assert torch.allclose(target, images.float().flatten(1) / 127.5 - 1.0)
    covered = seen[:, 0] == 0.0
    assert torch.equal(seen[:, 0].flatten(1)[~covered.flatten(1)], target[~covered.flatten(1)])
    rows, columns = covered.any(dim=2).sum(dim=1), covered.any(dim=1).sum(dim=1)
    assert rows.tolist() == columns.tolist() == [3] * 40
    assert covered.sum(dim=(1, 2)).tolist() == [9] * 40
    assert len({tuple(mask.flatten().tolist()) for mask in covered}) > 10
