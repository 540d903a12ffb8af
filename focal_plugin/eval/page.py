"""Renders a report: one HTML file that needs nothing else, and Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .texts import markdown_text, printable


def render_html(context: dict[str, Any], folder: Path, template: str = "page.html") -> str:
    """`folder` has the pictures, which go into the page itself."""
    environment = _environment(autoescape=True)
    environment.filters["data_uri"] = lambda name: _data_uri(folder / name)
    return environment.get_template(template).render(context)


def render_markdown(context: dict[str, Any]) -> str:
    environment = _environment(autoescape=False)
    environment.filters["md"] = markdown_text
    return environment.get_template("report.md").render(context)


def _environment(autoescape: bool) -> Environment:
    loader = PackageLoader("focal_plugin.eval", "templates")
    return Environment(
        loader=loader,
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
