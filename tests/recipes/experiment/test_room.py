"""`recipes.experiment` serves any recipe: it imports none of them, and speaks of no data, network or method of one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOM = ROOT / "recipes" / "experiment"
FILES = sorted(ROOM.rglob("*.py"))

FORBIDDEN_PACKAGES = {"torchvision", "sklearn", "PIL", "recipes"}
"""Data and networks; and the recipes by their absolute name, which the installed package does not have."""

FORBIDDEN_WORDS = {
    # One paper's method, stages and comparisons.
    *("bissl", "paper", "arm", "arms", "baseline", "scratch", "pretext", "downstream", "pretrain", "pretraining"),
    *("pretrained", "finetune", "finetuned", "finetuning", "simclr", "byol", "vicreg", "contrastive", "supervised"),
    # What it trains on, and what it trains.
    *("image", "images", "imagenet", "cifar", "flowers", "dataset", "datasets", "labelled", "unlabelled"),
    *("augmentation", "augmentations", "torchvision", "resnet", "backbone", "backbones", "encoder"),
    # How that is scored.
    *("accuracy", "top1", "top5"),
}
"""Lower case, as `words` splits identifiers and texts."""


def words(text: str) -> set[str]:
    """The words of an identifier or a text, each part of a joined one and the whole: "SimCLR" is "sim", "clr" and
    "simclr"; "fine-tuning" is "finetuning"."""
    joined = re.sub(r"(?i)\b(fine|pre)[ -](?=t(un|rain))", r"\1", text)
    parts = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", joined)
    return {word.lower() for word in (*parts, *re.findall(r"[A-Za-z0-9]+", joined))}


def spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and every string, docstrings and the constant parts of f-strings included."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, node.value


def wrong_words(source: str) -> list[str]:
    """``line: word`` for each forbidden word."""
    found = {(line, word) for line, text in spoken(ast.parse(source)) for word in words(text) & FORBIDDEN_WORDS}
    return [f"{line}: {word}" for line, word in sorted(found)]


def wrong_imports(source: str, path: Path) -> list[str]:
    """``line: module`` for each import of a forbidden package, or from outside the room by a relative one."""
    depth, found = len(path.relative_to(ROOM).parts), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if _root(alias.name) in FORBIDDEN_PACKAGES]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            found.append((node.lineno, "." * node.level + (node.module or "")))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _root(node.module or "") in FORBIDDEN_PACKAGES:
            found.append((node.lineno, node.module or ""))
    return [f"{line}: {module}" for line, module in found]


def _root(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOM)))
def test_a_module_knows_no_recipe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert wrong_imports(source, path) == []
    assert wrong_words(source) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("events.py", "from ..vision.losses import nt_xent"),
        ("events.py", "from .. import vision"),
        ("ranks/processes.py", "from ...bissl.settings.config import Config"),
        ("events.py", "from recipes.vision import losses"),
        ("events.py", "import torchvision.models as models"),
        ("events.py", "def f():\n    import sklearn"),
    ],
)
def test_a_planted_import_is_found(place: str, line: str) -> None:
    assert len(wrong_imports(f"import json\n{line}\n", ROOM / place)) == 1


def test_imports_within_the_room_are_allowed() -> None:
    source = (
        "import torch\nfrom bilevel.distributed import rank\nfrom ..errors import ConfigError\nfrom . import leases\n"
    )
    assert wrong_imports(source, ROOM / "folder" / "run_folder.py") == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("arm = 1", "arm"),
        ("x.labelled_steps", "labelled"),
        ("def of(downstream=None): ...", "downstream"),
        ("class BaselineRun: ...", "baseline"),
        ("import a as images", "images"),
        ("'''Steps, for instance ``x = SimCLR()``.'''", "simclr"),
        ("'''After fine-tuning.'''", "finetuning"),
        ("x = f'{1} of the paper'", "paper"),
        ("x = {'top1': 1}", "top1"),
        ("f(backbone=1)", "backbone"),
    ],
)
def test_a_planted_word_is_found(line: str, word: str) -> None:
    found = wrong_words(f"import json\n{line}\n")
    assert found == [f"2: {word}"]


def test_words_that_only_contain_one_are_allowed() -> None:
    assert wrong_words("alarm = harmless = newspaper = 'imagine'") == []
