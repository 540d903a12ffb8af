"""For code not yet moved: the names are in page."""

from .page import _safe as printable  # noqa: F401
from .page import markdown_text  # noqa: F401
