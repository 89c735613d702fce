"""Presets: functions that return a full configuration, by their names on the command line."""

from inspect import cleandoc

from ..paper import TITLES, PaperVersion
from .bundled import digits, images
from .published import Preset, paper_literal, paper_preset
from .small import small_preset, stl10

__all__ = ["PRESETS", "PaperVersion", "describe_preset", "list_presets"]

PRESETS: dict[str, Preset] = {
    "digits": digits,
    "images": images,
    "stl10": stl10,
    **{f"small-{name}": small_preset(name) for name in TITLES},
    **{f"paper-{name}": paper_preset(name) for name in TITLES},
    "paper-literal": paper_literal,
}
"""Name on the command line -> preset."""


def describe_preset(name: str) -> str:
    """The whole description of a preset: what it is, its command, its cost, what the paper reports."""
    return cleandoc(PRESETS[name].__doc__ or "")


def list_presets() -> str:
    """One line a preset: its name, and the first line of its description."""
    width = max(map(len, PRESETS))
    return "\n".join(f"{name:<{width}}  {describe_preset(name).partition(chr(10))[0]}" for name in PRESETS)
