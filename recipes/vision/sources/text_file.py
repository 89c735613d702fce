"""Text files that people make with spreadsheets and editors."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ..errors import DataError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LINE_END = re.compile(r"\r\n|\r|\n")
REMEDY = 'save it as "CSV UTF-8" or as text in UTF-8'


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, with or without its mark, or in UTF-16 with its mark.

    Raises DataError if the file cannot be read, and, naming the row, on bytes of any other encoding, such as those of a
    Windows code page or of UTF-16 without its mark.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): make it a readable text file") from error
    encoding = "utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        row = _row(content[: error.start].decode(encoding, "replace"))
        kind = "UTF-16" if encoding == "utf-16" else "UTF-8, but of a Windows code page, say"
        raise DataError(
            f"{file}: row {row} holds a byte 0x{content[error.start]:02X} that is not {kind}: {REMEDY}"
        ) from error
    if "\0" in text:
        row = _row(text[: text.index("\0")])
        raise DataError(f"{file}: row {row} holds a null character, as UTF-16 without its mark does: {REMEDY}")
    return text


def _row(before: str) -> int:
    """The number of the row, counted from 1, in which the text `before` ends."""
    return len(LINE_END.findall(before)) + 1
