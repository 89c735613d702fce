"""Escapes for text from files and names that is shown on a terminal."""


def printable(text: str) -> str:
    """`text` with control characters as their escapes: a terminal takes some of them for commands."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
