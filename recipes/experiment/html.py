"""One HTML page, in one file that needs no other: sections of text, tables, drawings and pictures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, StrictUndefined

from .plots import Drawing
from .records import NOT_RECORDED
from .tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out, with its first words, `lead`, in bold."""

    text: str
    kind: Literal["plain", "warning"] = "plain"
    lead: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A drawing in the page's colours."""

    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture file, of this media type, kept inside the page."""

    content: bytes
    media_type: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side, each above its caption."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Listing:
    """Preformatted text that a click on `summary` unfolds."""

    summary: str
    text: str


@dataclass(frozen=True)
class Absent:
    """Says that nothing was recorded, below a heading of its own where it has a title."""

    title: str = ""


Block = Text | Bullets | Table | Figure | Picture | Gallery | Listing | Absent


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; one without any says that nothing was recorded."""

    title: str
    blocks: Sequence[Block]


def render_page(title: str, opening: Sequence[Block], sections: Sequence[Section]) -> str:
    """The page: its title, the blocks of `opening`, then the sections.

    Every string is text, whatever it holds: none becomes markup, but the SVG of a `Figure`. The page asks nothing of
    the network, and a policy in it makes the browser refuse any request.
    """
    return _TEMPLATE.render(title=title, opening=opening, sections=sections)


_PAGE = """\
{% macro cells(tag, row, left) -%}
{% for cell in row -%}
<{{ tag }}{% if loop.index0 >= left %} class="number"{% elif cell | length > 50 %} class="long"{% endif %}>
{{- cell }}</{{ tag }}>
{%- endfor %}
{%- endmacro -%}

{% macro show(block) %}
{% set kind = block | kind %}
{% if kind == "Text" %}
<p class="{{ block.kind }}">{% if block.lead %}<strong>{{ block.lead }}</strong> {% endif %}{{ block.text }}</p>
{% elif kind == "Bullets" %}
<ul>
{% for item in block.items %}
<li>{{ item }}</li>
{% endfor %}
</ul>
{% elif kind == "Table" %}
{% if block.title %}
<h3>{{ block.title }}</h3>
{% endif %}
<div class="scroll"><table>
<thead><tr>{{ cells("th", block.headings, block.left) }}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{{ cells("td", row, block.left) }}</tr>
{% endfor %}
</tbody></table></div>
{% elif kind == "Figure" %}
<figure>
{{ block.drawing.svg | safe }}
<figcaption>{{ block.caption }}
{%- if block.drawing.not_finite %} {{ block.drawing.not_finite }} recorded value(s) were null or not finite and leave
gaps.{% endif %}</figcaption>
</figure>
{% elif kind == "Picture" %}
<figure>
<img alt="{{ block.caption }}" src="data:{{ block.media_type }};base64,{{ block.content | base64 }}">
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif kind == "Gallery" %}
<div class="gallery">
{% for picture in block.pictures %}
<figure>
<img alt="{{ picture.caption }}" src="data:{{ picture.media_type }};base64,{{ picture.content | base64 }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% elif kind == "Listing" %}
<details><summary>{{ block.summary }}</summary><pre>{{ block.text }}</pre></details>
{% else %}
{% if block.title %}
<h3>{{ block.title }}</h3>
{% endif %}
<p class="absent">{{ not_recorded }}</p>
{% endif %}
{% endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1d2126; --page: #ffffff; --line: #d4d9df; --soft: #f3f5f7; --warn: #fff1cf; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe3e8; --page: #16191d; --line: #3a4047; --soft: #20252b; --warn: #4a3a10; }
}
body { color: var(--text); background: var(--page); font: 15px/1.5 system-ui, sans-serif; max-width: 1400px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--soft); font-weight: 600; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 24rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.warning { background: var(--warn); padding: 0.6rem 1rem; border-radius: 4px; }
.absent { opacity: 0.7; font-style: italic; }
p, ul, figure { max-width: 1180px; }
figure { margin: 0.8rem 0; }
figure svg, figure img { width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.gallery { display: flex; flex-wrap: wrap; gap: 0.8rem; }
.gallery figure { width: 11rem; margin: 0; }
.gallery img { width: 6rem; }
.gallery figcaption { font-size: 13px; overflow-wrap: anywhere; white-space: pre-line; }
figcaption { opacity: 0.85; max-width: 60rem; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for block in opening %}
{{ show(block) }}
{%- endfor %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for block in section.blocks or [absent] %}
{{ show(block) }}
{%- endfor %}
</section>
{% endfor %}
</body>
</html>
"""

_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["kind"] = lambda block: type(block).__name__
_ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode()
_ENVIRONMENT.globals |= {"absent": Absent(), "not_recorded": NOT_RECORDED}
_TEMPLATE = _ENVIRONMENT.from_string(_PAGE)
