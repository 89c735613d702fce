"""The project's metadata and the rules about imports and files that no linter checks."""

import ast
import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A file of the core imports only from files that stand before it here.
CORE_ORDER = (
    "tree",
    "distributed",
    "sync_batch_norm",
    "interruption",
    "problem",
    "modules",
    "operators",
    "graph_memory",
    "double_backward",
    "hvp",
    "automatic",
    "gauss_newton",
    "microbatch",
    "solution",
    "solvers",
    "staleness",
    "lower_objectives",
    "system",
    "objectives",
    "hypergradient",
    "differences",
    "check",
    "updates",
    "torch_updates",
    "unrolled",
    "first_order",
    "penalty",
    "schedule",
    "batches",
    "checkpoint",
    "callbacks",
    "trackers",
    "inspection",
    "level",
    "alternation",
    "trainer_arguments",
    "trainer",
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files("bilevel", "recipes")}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(node: ast.AST, importer: str, *, is_package: bool) -> list[str]:
    """Dotted names that an import statement asks for, relative ones resolved; `from a import b` gives `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = importer.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        base = ".".join([*parents, base] if base else parents)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(path: Path, tree: ast.AST | None = None) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree or parse(path)):
        names += imported_names(node, module_name(path), is_package=path.name == "__init__.py")
    return names


def own_modules(names: list[str]) -> set[str]:
    """The project's modules that the dotted names reach: the longest prefix of each that is a file."""
    found = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found.update(next(([prefix] for prefix in prefixes if prefix in MODULES), []))
    return found


def tracked_text_files() -> Iterator[tuple[Path, str]]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout to know which files belong to the project")
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data:
                yield path.relative_to(ROOT), data.decode("utf-8")


def test_metadata_and_version_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "bilevel"
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "torch>=2.11" in project["dependencies"]
    assert importlib.import_module("bilevel").__version__ == project["version"]
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited is not None
    assert cited[1] == project["version"]
    assert (ROOT / "bilevel/py.typed").is_file()


def test_no_import_cycles() -> None:
    graph = {name: own_modules(imports_of(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_core_imports_only_from_files_above() -> None:
    wrong = []
    for name, path in MODULES.items():
        if not name.startswith("bilevel."):
            continue
        place = name.split(".")[1]
        assert place in CORE_ORDER, f"{name} has no place in the core's import order: add it to CORE_ORDER"
        for target in own_modules(imports_of(path)):
            reached = target.partition(".")[2].split(".")[0]
            inside_package = reached == place and path.parent.name == place
            if reached not in CORE_ORDER or (
                CORE_ORDER.index(reached) >= CORE_ORDER.index(place) and not inside_package
            ):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_core_never_imports_recipes() -> None:
    reached = {name: imports_of(path) for name, path in MODULES.items() if name.split(".")[0] == "bilevel"}
    assert not {name: found for name, found in reached.items() if any(n.split(".")[0] == "recipes" for n in found)}


def test_packages_import_no_examples_benchmarks_or_tests() -> None:
    outside = {"examples", "benchmarks", "tests"}
    for path in MODULES.values():
        assert not outside & {name.split(".")[0] for name in imports_of(path)}, path


def test_no_function_imports_our_own_modules() -> None:
    found = []
    for path in MODULES.values():
        for function in ast.walk(parse(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [f"{path}:{function.lineno}: {n}" for n in own_modules(imports_of(path, function))]
    assert not found


def test_only_public_torch() -> None:
    found = []
    for path in python_files("bilevel", "recipes", "examples", "benchmarks", "tests"):
        tree = parse(path)
        dotted = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for name in imports_of(path, tree) + dotted:
            parts = name.split(".")
            # Operations over lists of tensors have no public name; torch.optim itself is built on torch._foreach_*.
            private = parts[0] == "torch" and any(re.match(r"_(?!_|foreach_)", part) for part in parts)
            if private or parts[0] == "functorch":
                found.append(f"{path.relative_to(ROOT)}: {name}")
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
    assert lines.index("make test") < lines.index("make lint")
    assert "set -euo pipefail" in lines
