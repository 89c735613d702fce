"""Recipes: whole experiments on top of `bilevel`, and what they have in common.

Installed, this folder is the package `bilevel.recipes`. In a checkout it lies beside `bilevel` and goes by the same
name, to which the pointer `bilevel/recipes` leads; imported as `recipes` it gives the very same modules.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType


class _SecondName(MetaPathFinder, Loader):
    """Finds under ``recipes.x`` the module ``bilevel.recipes.x``, which keeps its name and its `__spec__`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = find_spec(f"bilevel.{fullname}") if fullname.startswith("recipes.") else None
        if spec is None:
            return None
        return ModuleSpec(fullname, self, origin=spec.origin, is_package=spec.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"bilevel.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It ran under its own name; meanwhile the import system has given it the second name's spec.
        module.__spec__ = module.__spec__ and module.__spec__.loader_state

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m`` runs."""
        spec = find_spec(f"bilevel.{fullname}")
        return spec and spec.loader.get_code(spec.name)  # type: ignore[union-attr]


if __name__ == "recipes":
    sys.meta_path.insert(0, _SecondName())
