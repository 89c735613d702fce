"""Who imports whom, read from the sources: what the rules about the project's structure are checked with."""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, whether it is a package's ``__init__``, and its syntax tree."""

    name: str
    is_package: bool
    tree: ast.Module


def read_modules(root: Path, *folders: str) -> dict[str, Module]:
    """The modules below `root` by name; the folder `recipes` is `bilevel.recipes`, as it is installed."""
    found = {}
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        if path.relative_to(root).parts[:2] == ("bilevel", "recipes"):
            continue  # the checkout's pointer to the folder `recipes`
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = installed_name(".".join(parts[:-1] if is_package else parts))
        found[name] = Module(name, is_package, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    return found


def installed_name(name: str) -> str:
    return f"bilevel.{name}" if f"{name}.".startswith("recipes.") else name


def imported(module: Module, tree: ast.AST | None = None, *, absolute: bool = False) -> list[str]:
    """Dotted names that import statements ask for, ``from a import b`` as ``a.b``; relative ones resolved, or left out
    where `absolute`."""
    names = []
    for node in ast.walk(tree or module.tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not (absolute and node.level):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                parents = parts[: len(parts) - node.level + module.is_package]
                base = ".".join([*parents, base] if base else parents)
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names if absolute else [installed_name(name) for name in names]


def targets(module: Module, modules: Mapping[str, Module], tree: ast.AST | None = None) -> set[str]:
    """The modules of the project that imports reach: the longest part of each name that is a file."""
    found = set()
    for name in imported(module, tree):
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found.update(next(([prefix] for prefix in prefixes if prefix in modules), []))
    return found


def cycle(modules: Mapping[str, Module]) -> list[str]:
    """The modules of an import cycle, the first again at the end; none if there is none.

    A module brings along the packages that it lies in, other than those of the importer.
    """
    graph = {}
    for name, module in modules.items():
        reached = targets(module, modules)
        packages = {p for target in reached for p in ancestors(target) if p in modules and p not in ancestors(name)}
        graph[name] = (reached | packages) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def place(name: str, order: Sequence[str]) -> int | None:
    """The position in `order` of the module, or of the package that holds it; one with further entries below stands for
    its own file alone."""
    for index, entry in enumerate(order):
        whole = not any(other.startswith(f"{entry}.") for other in order)
        if name == entry or (whole and name.startswith(f"{entry}.")):
            return index
    return None


def upward_imports(modules: Mapping[str, Module], order: Sequence[str]) -> list[str]:
    """A line for each module without a place in `order`, and for each import from a later place."""
    wrong = []
    for name, module in modules.items():
        own = place(name, order)
        if own is None:
            wrong.append(f"{name} has no place in the order of imports")
            continue
        reached = {target: place(target, order) for target in sorted(targets(module, modules))}
        wrong += [f"{name} imports {target}" for target, index in reached.items() if index is not None and index > own]
    return wrong


def private_imports(modules: Mapping[str, Module], rooms: Iterable[str]) -> list[str]:
    """A line for each import from outside a room of something that the room's ``__init__`` does not export."""
    wrong = []
    for room in rooms:
        exported = exports(modules[room])
        for name, module in modules.items():
            if f"{name}.".startswith(f"{room}."):
                continue
            names = sorted(asked for asked in imported(module) if asked.startswith(f"{room}."))
            wrong += [f"{name} imports {n}" for n in names if n.removeprefix(f"{room}.").split(".")[0] not in exported]
    return wrong


def between_recipes(modules: Mapping[str, Module], shared: Sequence[str]) -> list[str]:
    """A line for each import from one recipe of another one; a recipe is a folder of recipes that is not `shared`."""

    def recipe(name: str) -> str | None:
        parts = name.split(".")
        return parts[2] if len(parts) > 2 and ".".join(parts[:3]) not in shared else None

    wrong = []
    for name, module in modules.items():
        reached = sorted(targets(module, modules))
        wrong += [f"{name} imports {target}" for target in reached if recipe(target) not in (None, recipe(name))]
    return wrong


def lines_of_code(source: str) -> int:
    """Lines of a module that are neither blank nor hold comments or strings alone."""
    alone = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            alone.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in no_code]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - alone)


def exports(module: Module) -> set[str]:
    """The names in a module's ``__all__``."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def imports_in_functions(modules: Mapping[str, Module]) -> list[str]:
    """A line for each import of the project's own modules inside a function."""
    found = []
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [f"{name}:{node.lineno}: {target}" for target in targets(module, modules, node)]
    return found


def needed_packages(modules: Mapping[str, Module], *, except_for: Iterable[str]) -> dict[str, str]:
    """The top-level packages that are imported while a module is, each with a module that does.

    Those inside functions and under ``if TYPE_CHECKING`` are not.
    """
    found = {}
    for name, module in modules.items():
        for node in _executed(module.tree.body):
            for asked in imported(module, node):
                found.setdefault(asked.split(".")[0], name)
    return {package: name for package, name in found.items() if package not in set(except_for)}


def _executed(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements among those that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            checked = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            blocks = ("orelse",) if checked else ("body", "orelse", "finalbody")
            for block in blocks:
                yield from _executed(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _executed(handler.body)


def crowded_folders(root: Path, folders: Iterable[str], limit: int) -> list[str]:
    """A line for each folder with more than `limit` modules side by side, not counting ``__init__``."""
    counts: dict[Path, int] = {}
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    return [f"{folder.relative_to(root)}: {n} modules" for folder, n in sorted(counts.items()) if n > limit]
