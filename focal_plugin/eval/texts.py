"""Titles, errors and class names as others gave them, made fit to stand in a report."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def markdown_text(text: str) -> str:
    """On one line, and without what Markdown would take for a table, a tag or a quotation."""
    text = " / ".join(line for line in printable(text).splitlines() if line.strip())
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\[")):
        text = text.replace(mark, instead)
    return text


def printable(text: str) -> str:
    """Without control characters, which a console may obey, and lone surrogates, which no file can hold."""
    return _CONTROL.sub("", text)
