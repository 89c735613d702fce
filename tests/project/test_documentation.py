"""The documentation against the code: every public name is there, every example runs, every link leads somewhere."""

import ast
import builtins
import doctest
import functools
import html
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bilevel
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def page_name(page: Path) -> str:
    return page.name


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def examples(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, code) of each block of Python on a page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "pycon"):
            yield text.count("\n", 0, match.start()) + 2, match["language"], match["body"]


def run_examples(page: Path) -> None:
    """A page's blocks in order and in one namespace; ``pycon`` blocks are doctests."""
    names: dict[str, object] = {"__name__": page.stem}
    for line, language, code in examples(page):
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            continue
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line - 1)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
        assert not runner.failures, "".join(report)


def anchors(page: Path) -> set[str]:
    """Targets within a page: explicit ones, and headings as GitHub and MyST spell them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        exists = linked.exists() and (not anchor or (linked.suffix == ".md" and anchor in anchors(linked)))
        broken += [] if exists else [target]
    return broken


COMMAND = r"^(?:\S*/bin/)?(bissl|cleaning)"
"""The start of a line that calls an installed recipe."""


def command_lines(page: Path) -> list[list[str]]:
    """The words of each line that starts a program of this project, in blocks of a shell and indented ones."""
    text = page.read_text(encoding="utf-8")
    blocks = [match["body"] for match in FENCE.finditer(text) if match["language"] in ("", "bash", "shell", "console")]
    blocks += re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.M)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    ours = [line for line in lines if re.search(rf"[\w./]+\.py(?: |$)|-m bilevel|^make |{COMMAND} ", line.strip())]
    return [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in ours]


def unknown_in(words: list[str], known: Callable[[str, str], str]) -> list[str]:
    """What a line asks for that is not there: a target of the Makefile, or an option in what is `known` of a script or
    module and the words of its subcommand."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return [word for word in words[1:] if "=" not in word and word not in targets]
    place = next(n for n, word in enumerate(words) if re.search(rf"\.py$|^bilevel\.|{COMMAND}$", word))
    program = re.sub(rf"{COMMAND}$", r"recipes/\1/run.py", words[place])
    following = words[place + 1 :]
    command = [*itertools.takewhile(str.isidentifier, following)] if program.startswith("recipes/") else []
    text = known(program, " ".join(command))
    asked = [word.partition("=")[0] for word in following if re.match(r"--[a-z]", word)]
    return [option for option in asked if not re.search(rf"(?<![\w.-]){re.escape(option)}(?![\w.-])", text)]


def test_commands_are_there_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    def helped(program: str, command: str) -> str:
        run = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        with pytest.raises(SystemExit, match=r"^0$"):
            sys.modules[run.console.__module__].main([*command.split(), "--help"])
        return capsys.readouterr().out

    @functools.cache
    def known(program: str, command: str) -> str:
        """The help of a recipe; of other programs their sources and those that they share."""
        if program.startswith("recipes/"):
            return helped(program, "") + helped(program, command)
        path = ROOT / program.replace(".", "/") if program.startswith("bilevel.") else ROOT / program
        files = [path, ROOT / "benchmarks/measuring.py"] if path.is_file() else []
        files += (path if path.is_dir() else path.parent).glob("*.py")
        return "\n".join(file.read_text(encoding="utf-8") for file in files)

    lines = [words for page in [*TEXTS, ROOT / "examples/README.md"] for words in command_lines(page)]
    assert len(lines) > 50
    assert not [(words, unknown) for words in lines if (unknown := unknown_in(words, known))]


def test_a_wrong_command_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "X=1 python a/b.py --one 1 \\\n  --two=2 # --no\nmake it demo A=b\n"
    page.write_text(f"```\n{block}```\n\n    .venv/bin/bissl data list --all\n", "utf-8")
    script, target, recipe = command_lines(page)
    assert unknown_in(script, lambda *asked: {("a/b.py", ""): "--one-more N --two"}[asked]) == ["--one"]
    assert unknown_in(target, lambda *asked: "") == ["it"]
    assert unknown_in(recipe, lambda *asked: {("recipes/bissl/run.py", "data list"): "--al"}[asked]) == ["--all"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=page_name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "searching.md":
        pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    monkeypatch.chdir(tmp_path)
    run_examples(page)
    assert not list(tmp_path.iterdir()), "an example left files behind"


def unbound(code: str) -> set[str]:
    """The names that code reads and nothing in it binds."""
    nodes = [*ast.walk(ast.parse(code))]
    bound = {n.asname or n.name.partition(".")[0] for n in nodes if isinstance(n, ast.alias)}
    bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    names = [n for n in nodes if isinstance(n, ast.Name)]
    bound |= {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(dir(builtins))
    return {n.id for n in names if isinstance(n.ctx, ast.Load)} - bound


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_that_is_not_run_is_whole(page: Path) -> None:
    """Blocks marked ``py`` need what is not installed everywhere, or write files: their names are there, or they are
    excerpts of an example."""
    shown = [m["body"] for m in FENCE.finditer(page.read_text("utf-8")) if m["language"] == "py"]
    sources = [path.read_text("utf-8") for path in (ROOT / "examples").rglob("*.py")]
    code = "".join(body for body in shown if not any(body in source for source in sources))
    assert not unbound(code)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bilevel"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_a_name_without_a_binding_is_noticed() -> None:
    assert unbound("import a.b as c, d.e\nfor f in c: print(d, f, g)\ndef h(i): return h(i, j=k)") == {"g", "k"}


def test_the_readmes_ridge_example_is_short() -> None:
    (code,) = (body for _, language, body in examples(ROOT / "README.md") if "class Ridge" in body)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_a_wrong_example_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nn = 1\n```\n\n```pycon\n>>> n + 1\n3\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_examples(page)


def test_documented_names_are_the_public_ones() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. (?:auto\w+|py:type):: bilevel\.(\w+)$", text, re.M)
    assert sorted(documented) == sorted(bilevel.__all__)


def test_public_names_are_there() -> None:
    assert len(set(bilevel.__all__)) == len(bilevel.__all__)
    assert not [name for name in bilevel.__all__ if name not in vars(bilevel)]


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    groups = [m["body"].splitlines() for m in FENCE.finditer(index) if m["language"] == "{toctree}"]
    assert all(any(line.startswith(":caption:") for line in group) for group in groups)
    listed = [line for group in groups for line in group if line and not line.startswith(":")]
    assert sorted([*listed, "index"]) == sorted(page.stem for page in PAGES)


def test_the_readme_links_every_page() -> None:
    linked = re.findall(r"\]\(docs/(\w+)\.md[#)]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {page.stem for page in PAGES} <= set(linked)


def without_their_page(pages: list[Path], rendered: Path) -> list[str]:
    """The pages whose first heading is not that of the rendered page of their name."""
    missing = []
    for page in pages:
        heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
        text = (rendered / f"{page.stem}.html").read_text(encoding="utf-8")
        shown = [html.unescape(re.sub(r"<a .*?</a>|<.*?>", "", h)) for h in re.findall(r"<h1>(.*?)</h1>", text, re.S)]
        missing += [] if heading and heading[1] in shown else [page.name]
    return missing


@pytest.mark.slow
def test_every_page_is_rendered_under_its_heading(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not without_their_page(PAGES, tmp_path)


def test_a_page_that_another_has_replaced_is_noticed(tmp_path: Path) -> None:
    pages = [tmp_path / "a.md", tmp_path / "search.md"]
    pages[0].write_text("(label)=\n# A & b\n\n# c", "utf-8")
    pages[1].write_text("# Searching\n", "utf-8")
    (tmp_path / "a.html").write_text('<h1>A &amp; <em>b</em><a class="headerlink" href="#a">¶</a></h1>', "utf-8")
    (tmp_path / "search.html").write_text("<title>Searching</title><h1>Search</h1>", "utf-8")
    assert without_their_page(pages, tmp_path) == ["search.md"]


@pytest.mark.parametrize("page", TEXTS, ids=page_name)
def test_files_of_the_project_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:[\w.-]+/)*test_\w+\.py|(?:benchmarks|bilevel|examples|recipes|tests)/[\w/.-]+\.\w+)`",
        page.read_text("utf-8"),
    )
    assert not [name for name in named if not (ROOT / name).is_file() and not list((ROOT / "tests").rglob(name))]


@pytest.mark.parametrize("page", TEXTS, ids=page_name)
def test_links_resolve(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n\n[x](#a-b) [x](page.md#a-b) [y](#c) [z](none.md) `[w](w.md)` <https://a.b>\n", "utf-8")
    assert broken_links(page) == ["#c", "none.md"]


@pytest.mark.parametrize("page", TEXTS, ids=page_name)
def test_no_places_of_one_machine(page: Path) -> None:
    roots = "|".join(["home", "root", "work", "Users", "usr", "opt", "tmp", "var", "mnt", "srv", "media"])
    assert not re.findall(rf"(?<![\w.~/-])/(?:{roots})/?[\w./-]*|\b[A-Z]:\\\S*", page.read_text(encoding="utf-8"))
