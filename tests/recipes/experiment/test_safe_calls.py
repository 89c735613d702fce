"""No line of the tree loads, extracts or runs what a file says, save those that are listed here with a reason."""

import ast
from collections.abc import Callable

import pytest

from tests.support.paths import ROOT

FORBIDDEN: dict[str, Callable[[ast.Call], bool]] = {
    **dict.fromkeys(
        ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"), lambda _: True
    ),
    **dict.fromkeys(("shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load"), lambda _: True),
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "importlib.import_module"), lambda _: True),
    **dict.fromkeys(
        ("os.system", "os.popen", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load"), lambda _: True
    ),
    **dict.fromkeys(("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"), lambda _: True),
    **dict.fromkeys(("torch.load",), lambda call: not constant(call, "weights_only", True)),
    **dict.fromkeys(("np.load", "numpy.load"), lambda call: not constant(call, "allow_pickle", False)),
}
"""Calls that can run what a file holds, and when they do."""

ALLOWED = {
    ("bilevel/compare/command.py", "importlib.import_module"): "module:factory of the command line",
    ("bilevel/training/trackers.py", "importlib.import_module"): "one name, written there: an optional package",
    ("recipes/experiment/plugins.py", "importlib.import_module"): "module:Class of the command line or a config file",
    ("recipes/vision/pictures/arrow.py", "importlib.import_module"): "names written there: an optional package",
    ("benchmarks/loading/sides.py", "importlib.import_module"): "a name written there: a package to compare with",
    ("benchmarks/peers/adapters.py", "importlib.import_module"): "names written there: packages to compare with",
    ("benchmarks/pretext.py", "importlib.import_module"): "names written there: packages to compare with",
    ("benchmarks/race/finite_sums/jax_contestants.py", "importlib.import_module"): "names written there: JAX",
    ("benchmarks/race/methods.py", "importlib.import_module"): "names written there: packages to compare with",
}


def constant(call: ast.Call, name: str, value: object) -> bool:
    given = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return len(given) == 1 and isinstance(given[0], ast.Constant) and given[0].value is value


def dangers(source: str) -> list[str]:
    """Calls that can run what a file holds, extract where a file says, or go through a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found += [ast.unparse(base) for base in node.bases if ast.unparse(base).endswith("Unpickler")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN and FORBIDDEN[name](node):
            found.append(name)
        if name.rpartition(".")[2] in ("extractall", "extract"):
            found.append("extract")
        if any(keyword.arg == "shell" for keyword in node.keywords):
            found.append("shell")
    return found


def test_nothing_in_the_tree_loads_or_runs_what_a_file_says() -> None:
    allowed = {
        *ALLOWED,
        ("recipes/vision/sources/published/cifar.py", "pickle.Unpickler"),
    }  # a closed table of names: see above
    found = {
        (str(file.relative_to(ROOT)), name)
        for folder in ("bilevel", "recipes", "examples", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        for name in dangers(file.read_text(encoding="utf-8"))
    }
    assert found == allowed


@pytest.mark.parametrize(
    "line",
    [
        *(
            "pickle.load(f)",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "np.load(f)",
            "np.load(f, allow_pickle=True)",
        ),
        *(
            "eval(x)",
            "exec(x)",
            "subprocess.run(x, shell=True)",
            "tar.extractall()",
            "yaml.load(f)",
            "class U(pickle.Unpickler): pass",
        ),
    ],
)
def test_the_search_finds(line: str) -> None:
    assert dangers(line)
    assert not dangers("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); model.eval(); re.compile(x)")
