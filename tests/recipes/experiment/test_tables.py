"""Tables of text as markdown and LaTeX: their columns, and characters that mean something there."""

import io

from rich.console import Console

from recipes.experiment.tables import Table, figures_table, latex, markdown, mean_text, print_table

TABLE = Table(["name", "score"], [["a_b|c", "1.0 ± 0.5"], ["<i>&%", "−2"]], left=1, title="Scores #1")


def test_markdown() -> None:
    assert markdown([TABLE], ["a note\nof two lines", "1 < 2"]) == (
        "## Scores #1\n\n| name | score |\n| --- | ---: |\n| a_b\\|c | 1.0 ± 0.5 |\n| \\<i>&% | −2 |\n\n"
        "- a note of two lines\n- 1 < 2\n"
    )


def test_latex() -> None:
    lines = latex([TABLE], ["50%"]).splitlines()
    assert r"\caption{Scores \#1}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert r"a\_b$|$c & 1.0 $\pm$ 0.5 \\" in lines
    assert r"$<$i$>$\&\% & $-$2 \\" in lines
    assert r"\item 50\%" in lines


def test_commands_for_a_terminal_are_shown_as_words() -> None:
    hostile = Table(["a"], [["\x1b[2J"]])
    for written in (markdown([hostile], []), latex([hostile], [])):
        assert "\x1b" not in written
        assert "x1b" in written


def test_figures_as_a_table() -> None:
    one = {"mean": 0.5, "std": 0.25, "ci95": [0.25, 0.75]}
    figures = {"a": {"x": one, "y": {"mean": 1000.0, "std": None}, "z": one}, "b": {"x": {"mean": None}, "y": one}}
    figures["b"]["x"]["std"] = None
    table = figures_table(figures, "name", "Title", {"y": ("Y", ",.0f"), "x": ("X", ".2f"), "z": ("Z", ".1f")})
    assert (table.headings, table.title) == (["name", "Y", "X"], "Title")
    assert table.rows == [["a", "1,000", "0.50 ± 0.25 [0.25, 0.75]"], ["b", "0 ± 0 [0, 1]", "undefined"]]


def test_a_table_on_a_terminal_is_neither_markup_nor_commands() -> None:
    shown = io.StringIO()
    print_table(Console(file=shown, width=80), Table(["[b]a", "b"], [["\x1b[2J[red]x", "1"]], title="[i]t"))
    for word in ("[b]a", "\\x1b[2J[red]x", "[i]t"):
        assert word in shown.getvalue()
    assert "\x1b" not in shown.getvalue()


def test_means_with_their_spread() -> None:
    assert mean_text({"mean": 0.51234, "std": 0.01}, ".3f") == "0.512 ± 0.010"
    assert mean_text({"mean": 1234.0, "std": None}, ",.0f") == "1,234"
    assert mean_text({"mean": None, "std": None}, ".3f") == "undefined"
