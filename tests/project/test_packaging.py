"""The project's metadata, rules about its files that no linter checks, and what is installed of it."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

from tests.project.imports import imported, read_modules
from tests.support.paths import ROOT

NOT_IN_THE_SOURCES = {".ci/run", ".gitignore"}
SHARED = "\n".join(folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages"))
"""The places of this environment's packages."""


def tracked_files() -> list[Path]:
    """The project's files, relative to its root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout to know which files belong to the project")
    return [Path(name) for name in filter(None, listing.split("\0")) if (ROOT / name).is_file()]


def tracked_text_files() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data:
            yield path, data.decode("utf-8")


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A finished process that ended with `code`, in an environment that leads Python to no checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_metadata_and_version_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "bilevel"
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11,<3.14"
    assert project["dependencies"] == ["torch>=2.11", "numpy>=1.24", "rich"]
    assert importlib.import_module("bilevel").__version__ == project["version"]
    (author,) = project["authors"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = dict(re.findall(r'^(title|version|license|  - name): "?([^"\n]+)"?$', citation, re.M))
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["  - name"] == author["name"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    bibtex = dict(re.findall(r"^  (title|version|author) += \{+([^{}]+)\}+,$", readme, re.M))
    assert bibtex == {"title": cited["title"], "version": project["version"], "author": author["name"]}
    assert re.search(rf"^## \[{re.escape(project['version'])}\] - ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert (ROOT / "bilevel/py.typed").is_file()


@pytest.mark.slow
def test_the_citation_fits_its_schema(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema, of the extra release")
    checks = sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.citation-file-format"
    run(*checks, ROOT / "CITATION.cff", cwd=tmp_path)
    wrong = (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("given-names", "first-names")
    (tmp_path / "CITATION.cff").write_text(wrong, encoding="utf-8")
    assert "first-names" in run(*checks, tmp_path / "CITATION.cff", cwd=tmp_path, code=1).stdout


LINK = re.compile(r"\]\(([^)]*)\)")


def shown_by_an_index(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> str:
    """The description that setup.py hands on, of the README and pyproject.toml of a checkout."""
    handed_on: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: handed_on.update(arguments))
    (checkout / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    runpy.run_path(str(checkout / "setup.py"))
    assert handed_on["long_description_content_type"] == "text/markdown"
    return handed_on["long_description"]


def test_the_readme_without_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme + "\n[a\nb](docs/c.md#d) [e](e) [f](https://g.h)\n", encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    described = f'[project]\nversion = "{project["version"]}"\n[project.urls]\n'
    (tmp_path / "pyproject.toml").write_text(described, encoding="utf-8")
    bare = shown_by_an_index(monkeypatch, tmp_path)
    assert bare.endswith("\na\nb [docs/c.md] e [f](https://g.h)\n")
    assert all(target.startswith("https://") for target in LINK.findall(bare))
    (tmp_path / "pyproject.toml").write_text(described + 'Source = "https://x.y/z"\n', encoding="utf-8")
    linked, release = shown_by_an_index(monkeypatch, tmp_path), f"https://x.y/z/blob/v{project['version']}"
    assert linked.endswith(f"\n[a\nb]({release}/docs/c.md#d) [e]({release}/e) [f](https://g.h)\n")
    assert linked.replace(f"{release}/", "") == (tmp_path / "README.md").read_text(encoding="utf-8")
    code = re.compile(r"^```.*?^```$", re.M | re.S)
    assert code.findall(bare) == code.findall(linked) == code.findall(readme)


# What is wrong in second derivatives, and is replaced in the passes of a hypergradient: it has no public name.
INTERCEPTED = {"torch._weight_norm", "torch.nn.utils.parametrizations._SpectralNorm"}


DISPATCH = ("torch.utils._python_dispatch", "torch.utils._pytree", "torch._C", "torch.Tensor._make_wrapper_subclass")
"""How torch's own documentation writes tensors and modes that see every operation, for which it has no other names; in
benchmarks and tests alone, which watch devices and rounding by them."""


def test_only_public_torch() -> None:
    found = []
    for name, module in read_modules(ROOT, "bilevel", "recipes", "examples", "benchmarks", "tests").items():
        dotted = [ast.unparse(node) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
        for asked in imported(module) + dotted:
            parts = asked.split(".")
            # Operations over lists of tensors have no public name; torch.optim itself is built on torch._foreach_*.
            private = parts[0] == "torch" and any(re.match(r"_(?!_|foreach_)", part) for part in parts)
            watches = name.startswith(("benchmarks.", "tests.")) and asked.startswith(DISPATCH)
            if (private and asked not in INTERCEPTED and not watches) or parts[0] == "functorch":
                found.append(f"{name}: {asked}")
    assert not found


def test_files_name_no_place_of_one_machine() -> None:
    home_or_work = re.compile(r"(?<![\w.~/-])/(?:" + "|".join(["work", "root", "home"]) + r")(?![\w.-])")
    for path, text in tracked_text_files():
        match = home_or_work.search(text)
        assert match is None, f"{path} names {match[0]!r}" if match else ""


def test_files_name_no_package_index() -> None:
    needle = "index" + "-url"
    assert not [str(path) for path, text in tracked_text_files() if needle in text]


def test_ci_script_is_executable_and_runs_tests_then_lint() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8").splitlines()
    assert re.findall(r"\bmake (\w+)$", "\n".join(lines), re.M) == ["test", "lint", "docs", "package"]
    assert "set -euo pipefail" in lines


def test_a_module_of_the_recipes_is_one_object_by_either_name() -> None:
    ours, installed = (importlib.import_module(f"{name}.bissl.tasks.base") for name in ("recipes", "bilevel.recipes"))
    assert ours is installed
    spec = ours.__spec__
    assert spec is not None
    assert ours.__name__ == spec.name == "bilevel.recipes.bissl.tasks.base"
    assert spec.origin == str(ROOT / "recipes/bissl/tasks/base.py")
    packages = [importlib.import_module(f"{name}.bissl") for name in ("bilevel.recipes", "recipes")]
    assert packages[0] is packages[1]
    task = ours.DownstreamTask
    assert pickle.loads(pickle.dumps(task)) is task
    assert importlib.util.find_spec("recipes.nothing") is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'recipes\.nothing'"):
        importlib.import_module("recipes.nothing")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["recipes.experiment.errors", "bilevel.recipes.experiment.errors"])
def test_either_name_may_come_first(first: str) -> None:
    code = f"""
import {first}
from bilevel.recipes.experiment.errors import ConfigError
from recipes.experiment.errors import ConfigError as same
assert ConfigError is same and ConfigError.__module__ == "bilevel.recipes.experiment.errors"
"""
    run(sys.executable, "-c", code, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["recipes.bissl.run", "bilevel.recipes.bissl.run"])
def test_the_command_is_a_module_to_run(module: str) -> None:
    assert run(sys.executable, "-m", module, "--list-presets", cwd=ROOT).stdout.startswith("digits ")


def copy_of_the_project(folder: Path) -> Path:
    """The files that belong to it and nothing that a build has left beside them."""
    for path in tracked_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())
    return folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The sources' archive, the wheel made from it, and what was said meanwhile."""
    pytest.importorskip("build", reason="needs the package build")
    source, folder = copy_of_the_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel, done.stdout + done.stderr


def environment(folder: Path, *installed: str | Path) -> Path:
    """A fresh environment with `installed` and nothing else; its folder of packages."""
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "--disable-pip-version-check", "install"]
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(SHARED)
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", *installed, cwd=folder)
    (packages / "shared.pth").unlink()
    return packages


def share(packages: Path, *names: str) -> None:
    """Lend this environment's distributions `names`, and what they need, to another environment."""
    needed, queue = set(), list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name not in needed:
            needed.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for distribution in map(importlib.metadata.distribution, needed):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))


@pytest.fixture(scope="module")
def bare(distributions: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment with torch, numpy, rich and what these need."""
    folder = tmp_path_factory.mktemp("bare")
    share(environment(folder, distributions[1]), "torch", "numpy", "rich")
    return folder


@pytest.fixture(scope="module")
def whole(distributions: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment that shares all packages of this one."""
    return with_everything(tmp_path_factory.mktemp("whole"), distributions[1])


def with_everything(folder: Path, *installed: str | Path) -> Path:
    packages = environment(folder, *installed)
    (packages / "shared.pth").write_text(SHARED)
    return folder


@pytest.mark.slow
def test_sdist_and_wheel_are_built_without_a_warning(distributions: tuple[Path, Path, str]) -> None:
    archive, wheel, said = distributions
    assert not re.findall(r".*(?:warn|deprecat|no previously-included|absent from).*", said, re.I)
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {str(path) for path in tracked_files()} - held == NOT_IN_THE_SOURCES
    names = zipfile.ZipFile(wheel).namelist()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    description = zipfile.ZipFile(wheel).read(metadata).decode("utf-8")
    assert [target for target in LINK.findall(description) if not target.startswith("https://")] == []
    assert {name.split("/")[0] for name in names} == {"bilevel", metadata.split("/")[0]}
    inside = {name for name in names if name.startswith("bilevel/")} - {"bilevel/py.typed"}
    modules = {name.replace("bilevel/recipes/", "recipes/") for name in inside}
    expected = {str(p) for p in tracked_files() if p.parts[0] in ("bilevel", "recipes") and p.suffix == ".py"}
    assert modules == expected - {"bilevel/recipes/__init__.py"}
    assert "bilevel/py.typed" in names


@pytest.mark.slow
def test_sdist_and_wheel_may_be_uploaded(distributions: tuple[Path, Path, str], tmp_path: Path) -> None:
    pytest.importorskip("twine", reason="needs twine, of the extra release")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *distributions[:2], cwd=tmp_path).stdout
    assert len(re.findall(r": (?:\x1b\[\d+m)?PASSED", said)) == 2


@pytest.mark.slow
def test_the_core_works_with_torch_numpy_and_rich_alone(bare: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, torch
from bilevel import CG, Problem, linearize

for name in ("recipes", "pydantic", "scipy", "torchvision", "safetensors"):
    assert importlib.util.find_spec(name) is None, name

class Quadratic(Problem):
    def lower_objective(self, upper, lower, batch):
        return 0.5 * (batch * lower["y"] ** 2).sum() - (upper["x"] * lower["y"]).sum()
    def upper_objective(self, upper, lower, batch):
        return lower["y"].sum()

curvature = torch.tensor([1.0, 2.0, 4.0])
system = linearize(Quadratic(), {"x": torch.ones(3)}, {"y": 1 / curvature}, lower_batches=[curvature])
solution = CG(5, 1e-6).solve(system.operator, {"y": torch.ones(3)})
print(solution.status.name, (solution.value["y"] - 1 / curvature).abs().max().item() < 1e-5)
"""
    assert run(bare / "bin/python", "-c", code, cwd=tmp_path).stdout == "CONVERGED True\n"


@pytest.mark.slow
def test_every_module_of_the_core_without_what_recipes_need(bare: Path, tmp_path: Path) -> None:
    files = [path for path in tracked_files() if path.parts[0] == "bilevel" and path.suffix == ".py"]
    names = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files)
    code = "import importlib, sys; print(*(importlib.import_module(name).__name__ for name in sys.argv[1:]))"
    asked = [name for name in names if not name.endswith(".__main__")]
    assert run(bare / "bin/python", "-c", code, *asked, cwd=tmp_path).stdout.split() == asked


@pytest.mark.slow
def test_solvers_are_compared_by_the_core_alone(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "ridge.py").write_text("""
import torch
from bilevel import CG, Problem

class Ridge(Problem):
    def lower_objective(self, upper, lower, batch):
        return 0.5 * ((batch @ lower["w"] - 1.0) ** 2).mean() + 0.5 * upper["weight"] * lower["w"] @ lower["w"]
    def upper_objective(self, upper, lower, batch):
        return 0.5 * ((batch @ lower["w"] - 1.0) ** 2).mean()

def make():
    batch = torch.eye(3)
    upper, lower = {"weight": torch.ones(())}, {"w": torch.full((3,), 0.25)}
    batches = {"upper_batches": [batch], "lower_batches": [batch]}
    solvers = {"solvers": {"CG": lambda n: CG(n, None)}, "iterations": (1, 2)}
    return {"problem": Ridge(), "upper": upper, "lower": lower, **batches, **solvers}
""")
    done = run(bare / "bin/python", "-m", "bilevel.compare", "ridge:make", "--out", "found", cwd=tmp_path)
    assert done.stdout.startswith("Solvers on Ridge: 3 variables, 1 lower batch")
    assert {"report.md", "curves.json"} <= {path.name for path in (tmp_path / "found").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bissl", "cleaning"])
def test_a_command_without_its_extra_says_what_to_install(bare: Path, tmp_path: Path, command: str) -> None:
    done = run(bare / "bin" / command, "--help", cwd=tmp_path, code=2)
    said = r': error: \w+ is not installed; .* pip install "bilevel\[recipes\]", .*\n'
    assert re.fullmatch(command + said, done.stderr)
    assert done.stdout == ""


def dry_run(environment: Path, folder: Path) -> None:
    done = run(environment / "bin/bissl", "--preset", "digits", "--dry-run", cwd=folder)
    assert '"preset": "digits"' in done.stdout
    assert done.stderr == ""
    assert [path.name for path in folder.iterdir()] == ["runs"]


@pytest.mark.slow
def test_the_installed_commands(whole: Path, tmp_path: Path) -> None:
    dry_run(whole, tmp_path)
    assert run(whole / "bin/cleaning", "--help", cwd=tmp_path).stdout.startswith("usage: cleaning ")


@pytest.mark.slow
def test_the_command_of_a_checkout_that_is_installed_in_place(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkout = copy_of_the_project(tmp_path_factory.mktemp("checkout"))
    dry_run(with_everything(tmp_path_factory.mktemp("editable"), "-e", checkout), tmp_path)


@pytest.mark.slow
def test_a_plug_in_task_on_the_installed_package(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin_tasks.py").write_bytes((ROOT / "examples/plugin_tasks.py").read_bytes())
    tasks = "--pretext.task=plugin_tasks:Uncover", "--downstream.task=plugin_tasks:Parity"
    refused = run(whole / "bin/bissl", *tasks, "--pretext.options", "side=0", cwd=tmp_path, code=2)
    assert refused.stderr.startswith("bissl: error: pretext.options.side: ")
    done = run(whole / "bin/bissl", *tasks, "--pretext.options", "side=3", "--dry-run", cwd=tmp_path)
    assert '"task": "plugin_tasks:Uncover"' in done.stdout


@pytest.mark.slow
def test_a_plug_in_task_in_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "plugin_tasks.py").write_bytes((ROOT / "examples/plugin_tasks.py").read_bytes())
    tasks = "--pretext.task=plugin_tasks:Uncover", "--downstream.task=plugin_tasks:Parity"
    done = run(sys.executable, ROOT / "recipes/bissl/run.py", *tasks, "--dry-run", cwd=tmp_path)
    assert '"task": "plugin_tasks:Uncover"' in done.stdout
