"""The order of rooms: who may import whom, what a room keeps to itself, and how much stands side by side."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import bilevel
from tests.project.imports import (
    between_recipes,
    crowded_folders,
    cycle,
    imported,
    imports_in_functions,
    installed_name,
    lines_of_code,
    needed_packages,
    private_imports,
    read_modules,
    upward_imports,
)
from tests.support.paths import ROOT

ROOMS = [f"bilevel.{name}" for name in ("nn", "products", "linear", "lower", "hypergradients", "training", "compare")]
GROUND = [
    f"bilevel.{name}" for name in ("sharded", "tree", "checks", "distributed", "interruption", "problem", "checkpoint")
]
RECIPES = [
    f"bilevel.recipes.{name}"
    for name in (
        "experiment",
        "vision",
        "bissl",
        "bissl.tasks",
        "bissl.settings",
        "bissl.training",
        "bissl.outcome",
        "bissl.commands",
        "bissl.run",
        "cleaning",
    )
]
SHARED = ("bilevel.recipes.experiment", "bilevel.recipes.vision")
# A module imports from its own entry and those before it alone.
ORDER = [*GROUND, *ROOMS, "bilevel", "bilevel.recipes", *RECIPES]

PACKAGES = read_modules(ROOT, "bilevel", "recipes")
EVERYTHING = PACKAGES | read_modules(ROOT, "benchmarks", "examples")
CORE = {name: module for name, module in PACKAGES.items() if not f"{name}.".startswith("bilevel.recipes.")}
RECIPE = {name: module for name, module in PACKAGES.items() if name not in CORE}
OWN_WORDS = r"\b(arms?|baselines?|backbones?|bissl|downstream|fine-?tun\w*|images?|papers?|pretext)\b"


def test_rooms_import_only_from_rooms_before_them() -> None:
    assert not upward_imports(PACKAGES, ORDER)


def test_no_import_cycle() -> None:
    assert not cycle(PACKAGES)
    assert not cycle(EVERYTHING)


def test_what_a_room_does_not_export_is_its_own() -> None:
    assert not private_imports(EVERYTHING, ROOMS)


def test_no_function_imports_our_own_modules() -> None:
    assert not imports_in_functions(PACKAGES)


def test_packages_import_no_examples_benchmarks_or_tests() -> None:
    outside = {"examples", "benchmarks", "tests"}
    assert not {
        name: found
        for name, module in PACKAGES.items()
        if (found := [asked for asked in imported(module) if asked.split(".")[0] in outside])
    }


def test_recipes_name_each_other_relatively_as_they_go_by_two_names() -> None:
    own = re.compile(r"(bilevel\.)?recipes(\.|$)")
    assert not {n: found for n, m in RECIPE.items() if (found := list(filter(own.match, imported(m, absolute=True))))}


def test_no_recipe_imports_another_one() -> None:
    assert not between_recipes(RECIPE, SHARED)


def test_a_second_recipe_costs_a_few_hundred_lines() -> None:
    sources = (ROOT / "recipes" / "cleaning").rglob("*.py")
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in sources) <= 700


def test_the_core_needs_torch_numpy_and_rich_and_recipes_what_their_extra_brings() -> None:
    core = {"bilevel", "torch", "numpy", "rich", *sys.stdlib_module_names}
    assert not needed_packages(CORE, except_for=core)
    # PIL comes with torchvision.
    extra = {"torchvision", "PIL", "pydantic", "pydantic_settings", "safetensors", "scipy", "jinja2"}
    assert not needed_packages(RECIPE, except_for=core | extra)


def test_the_experiment_room_knows_no_data_model_arm_or_paper() -> None:
    found = []
    for path in sorted((ROOT / "recipes" / "experiment").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{path.name}:{number}: {match[0]}" for match in re.finditer(OWN_WORDS, line, re.I)]
    assert not found


def test_few_things_stand_side_by_side() -> None:
    assert not crowded_folders(ROOT, ["bilevel", "recipes", "benchmarks", "tests"], 15)
    for folder, limit in (("bilevel", 17), ("recipes/bissl", 8)):
        entries = sorted(path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__")
        assert len(entries) <= limit, entries


def test_the_surface_is_small() -> None:
    assert len(bilevel.__all__) <= 32
    assert len(inspect.signature(bilevel.hypergradient).parameters) <= 7
    assert len(inspect.signature(bilevel.Trainer).parameters) <= 9


def test_an_import_of_another_recipe_is_noticed(tmp_path: Path) -> None:
    planted(
        tmp_path,
        recipes__experiment__x="",
        recipes__one__a="from ..experiment import x\nfrom . import b\nfrom ..two import c",
        recipes__one__b="",
        recipes__two__c="from ..experiment.x import y",
    )
    modules = read_modules(tmp_path, "recipes")
    assert between_recipes(modules, SHARED) == ["bilevel.recipes.one.a imports bilevel.recipes.two.c"]


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings() -> None:
    source = '"""One.\n\nTwo."""\n\n# Why.\nx = 1\n"""Of x."""\n\n\ndef f():\n    """F."""\n    return """\n    y"""\n'
    assert lines_of_code(source) == 4


def planted(root: Path, **sources: str) -> Path:
    """A tree of modules ``a__b=source``, with an empty ``__init__`` for each package."""
    for name, source in sources.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        if name.endswith("__init"):
            path = path.with_name("__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from bilevel.linear import CG", "bilevel.linear"),
        ("import bilevel.linear.cg", "bilevel.linear.cg"),
        ("from ..linear.cg import CG", "bilevel.linear.cg"),
        ("from .. import linear", "bilevel.linear"),
        ("from bilevel import CG", "bilevel"),
        ("from bilevel.recipes.experiment import x", "bilevel.recipes.experiment.x"),
        ("def f():\n    from recipes.experiment import x", "bilevel.recipes.experiment.x"),
    ],
)
def test_an_import_of_a_later_room_is_noticed(source: str, target: str, tmp_path: Path) -> None:
    planted(tmp_path, bilevel__linear__cg="", bilevel__nn__layers=source, recipes__experiment__x="")
    modules = read_modules(tmp_path, "bilevel", "recipes")
    assert upward_imports(modules, ORDER) == [f"bilevel.nn.layers imports {target}"]


def test_imports_of_earlier_rooms_and_of_the_own_one_are_none(tmp_path: Path) -> None:
    planted(
        tmp_path,
        bilevel__tree="",
        bilevel__nn__init="from .layers import x\nfrom bilevel import tree",
        bilevel__nn__layers="from bilevel.tree import y\nfrom .other import z",
        bilevel__nn__other="import torch",
        bilevel__linear__cg="from ..nn import x",
        recipes__vision__views="from ..experiment import x\nfrom bilevel.linear import cg",
        recipes__experiment__x="",
    )
    modules = read_modules(tmp_path, "bilevel", "recipes")
    assert not upward_imports(modules, ORDER)
    assert not cycle(modules)


def test_a_module_without_a_place_is_noticed(tmp_path: Path) -> None:
    modules = read_modules(planted(tmp_path, bilevel__helpers=""), "bilevel")
    assert upward_imports(modules, ORDER) == ["bilevel.helpers has no place in the order of imports"]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("from . import b", "from .a import x"),
        ("from ..p.b import x", "import p.a"),
        ("from q.c import x", ""),
        ("import q.c", "from .. import p"),
    ],
)
def test_a_cycle_is_noticed(one: str, two: str, tmp_path: Path) -> None:
    # The third goes through a package's __init__, which nobody names.
    planted(tmp_path, p__a=one, p__b=two, q__init="import p.a", q__c="import p.b")
    found = cycle(read_modules(tmp_path, "p", "q"))
    assert found[0] == found[-1]
    assert len(found) > 2


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("from bilevel.linear.cg import CG", "bilevel.linear.cg.CG"),
        ("import bilevel.linear.cg", "bilevel.linear.cg"),
        ("from bilevel.linear import cg", "bilevel.linear.cg"),
        ("from bilevel.linear import checked", "bilevel.linear.checked"),
    ],
)
def test_an_import_of_what_a_room_does_not_export_is_noticed(source: str, asked: str, tmp_path: Path) -> None:
    room = 'from .cg import CG, checked\n__all__ = ["CG"]'
    inside = "from bilevel.linear.cg import CG\nfrom .cg import checked"
    planted(tmp_path, bilevel__linear__init=room, bilevel__linear__cg="", bilevel__linear__two=inside)
    planted(tmp_path, benchmarks__one=source, benchmarks__two="from bilevel.linear import CG\nimport bilevel.linear")
    modules = read_modules(tmp_path, "bilevel", "benchmarks")
    assert private_imports(modules, ["bilevel.linear"]) == [f"benchmarks.one imports {asked}"]


def test_an_import_inside_a_function_is_noticed(tmp_path: Path) -> None:
    source = "import b.c\ndef f():\n    import torch\n    def g():\n        from .. import b"
    modules = read_modules(planted(tmp_path, a__x=source, b__c=""), "a", "b")
    assert not imports_in_functions(modules)
    modules = read_modules(planted(tmp_path, a__x=source.replace(".. import b", "b import c")), "a", "b")
    assert set(imports_in_functions(modules)) == {"a.x:2: b.c", "a.x:4: b.c"}


def test_packages_that_an_import_needs(tmp_path: Path) -> None:
    source = """
import torch.nn, os
if TYPE_CHECKING:
    import checked
try:
    import tried
except ImportError:
    import instead
class A:
    import held
def f():
    import late
"""
    modules = read_modules(planted(tmp_path, a__x=source), "a")
    assert set(needed_packages(modules, except_for=["os"])) == {"torch", "tried", "instead", "held"}


def test_absolute_imports_are_told_from_relative_ones(tmp_path: Path) -> None:
    source = "from .y import z\nimport recipes.x\nfrom bilevel.recipes import y"
    module = read_modules(planted(tmp_path, recipes__x=source), "recipes")["bilevel.recipes.x"]
    assert imported(module, absolute=True) == ["recipes.x", "bilevel.recipes.y"]
    assert imported(module) == ["bilevel.recipes.y.z", "bilevel.recipes.x", "bilevel.recipes.y"]
    assert installed_name("recipes_of_mine") == "recipes_of_mine"


def test_a_crowded_folder_is_noticed(tmp_path: Path) -> None:
    planted(tmp_path, a__b__c="", a__b__d="", a__e="")
    assert crowded_folders(tmp_path, ["a"], 1) == ["a/b: 2 modules"]
