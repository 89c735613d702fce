"""The one HTML page: every kind of block, nothing that becomes markup, nothing asked of the network."""

import base64
import re

import pytest

from recipes.experiment.html import (
    Absent,
    Block,
    Bullets,
    Figure,
    Gallery,
    Listing,
    Picture,
    Section,
    Text,
    render_page,
)
from recipes.experiment.plots import Drawing
from recipes.experiment.tables import Table
from tests.support.html_page import Page

HOSTILE = "</pre></td></title></style><script>alert('1')</script><img src=x onerror=alert(1)>&amp;\"'{{ 7 * 7 }}"
SVG = '<svg viewBox="0 0 1 1"><path d="M0 0"/></svg>'
PNG = b"\x89PNG\r\n\x1a\n\x00\xff"


def blocks(text: str) -> list[Block]:
    """One of every kind, with `text` wherever a string may stand."""
    return [
        Text(text),
        Text(text, "warning", lead=text),
        Bullets([text]),
        Table([text, text], [[text, text]], title=text),
        Figure(Drawing(SVG, 0), text),
        Picture(PNG, "image/png", text),
        Gallery([Picture(PNG, "image/png", text), Picture(PNG, "image/png", text)]),
        Listing(text, text),
        Absent(text),
    ]


def test_every_string_is_text() -> None:
    source = render_page(HOSTILE, blocks(HOSTILE), [Section(HOSTILE, blocks(HOSTILE))])
    page = Page(source)
    assert not page.open
    assert "script" not in page.tags
    assert page.tags.count("img") == 6
    # Two titles, a heading of the section, and by kind of block twice: 1, 2, 1, 5, 1, 1, 2, 2 and 1.
    assert page.text.count(HOSTILE) == 3 + 2 * 16


def test_the_page_asks_for_nothing() -> None:
    source = render_page("t", [], [Section("s", blocks("words"))])
    assert all(address.startswith("data:image/png;base64,") for address in Page(source).addresses)
    assert "://" not in source
    assert "url(" not in source
    assert "default-src 'none'" in source


def test_drawings_and_pictures_stand_in_the_page() -> None:
    source = render_page("t", [], [Section("s", [Figure(Drawing(SVG, 3), "Curves."), Picture(PNG, "image/png", "P.")])])
    assert SVG in source
    page = Page(source)
    assert "Curves. 3 recorded value(s) were null or not finite and leave gaps." in page.text
    (address,) = page.addresses
    assert base64.b64decode(address.partition(",")[2]) == PNG
    assert 'alt="P."' in source


def test_a_drawing_without_gaps_says_nothing_of_them() -> None:
    page = Page(render_page("t", [], [Section("s", [Figure(Drawing(SVG, 0), "Curves.")])]))
    assert page.text.endswith("Curves.")


@pytest.mark.parametrize("left", [0, 1, 3])
def test_columns_of_numbers_are_aligned_as_such(left: int) -> None:
    table = Table(["a", "b", "c"], [["1", "2", "3"], ["4", "5", "6"]], left=left)
    source = render_page("t", [], [Section("s", [table])])
    assert Page(source).cells[1:] == [["1", "2", "3"], ["4", "5", "6"]]
    assert len(re.findall(r'<td class="number">', source)) == 2 * (3 - left)
    assert len(re.findall(r'<th class="number">', source)) == 3 - left


def test_what_is_empty_says_that_nothing_was_recorded() -> None:
    page = Page(render_page("t", [], [Section("first", []), Section("second", [Absent("part")])]))
    assert page.text.endswith("first not recorded second part not recorded")


def test_a_warning_stands_out() -> None:
    source = render_page("t", [Text("The rest.", "warning", lead="Not finished.")], [])
    assert '<p class="warning"><strong>Not finished.</strong> The rest.</p>' in source
