"""What a check found, and a tally of it that stays small however many elements have the same fault."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field

from ..files import printable as shown  # noqa: F401

SEVERITIES = ("error", "warning", "note")
MAX_EXAMPLES = 5


@dataclass
class Finding:
    """One kind of fault, however often it was met.

    Attributes:
        code: a stable name for programs, such as "duplicate_image_ids".
        severity: "error", "warning" or "note".
        message: one or two sentences for people.
        count: elements (annotations, images, ...) that have it.
        examples: up to ``MAX_EXAMPLES`` of them, in words.
        fatal: training would crash or learn something wrong; an error.
    """

    code: str
    severity: str
    message: str
    count: int = 1
    examples: list[str] = field(default_factory=list)
    fatal: bool = False

    def __post_init__(self):
        if self.severity not in SEVERITIES or (self.fatal and self.severity != "error"):
            raise ValueError(f"severity {self.severity!r}, fatal {self.fatal}")
        self.examples = list(self.examples)[:MAX_EXAMPLES]

    def to_dict(self) -> dict:
        return asdict(self)

    def to_text(self) -> str:
        """A line, and one with the examples."""
        label = self.severity.upper() + (" (fatal)" if self.fatal else "")
        text = f"{label} {self.code}: {self.message}"
        if self.examples:
            more = ", ..." if self.count > len(self.examples) else ""
            text += f"\n    {', '.join(self.examples)}{more}"
        return text


def fatal(code: str, message: str, count: int = 1, examples: Sequence[str] = ()) -> Finding:
    return Finding(code, "error", message, count, examples, fatal=True)


def error(code: str, message: str, count: int = 1, examples: Sequence[str] = ()) -> Finding:
    return Finding(code, "error", message, count, examples)


def warning(code: str, message: str, count: int = 1, examples: Sequence[str] = ()) -> Finding:
    return Finding(code, "warning", message, count, examples)


def note(code: str, message: str, count: int = 1, examples: Sequence[str] = ()) -> Finding:
    return Finding(code, "note", message, count, examples)


class Tally:
    """Counts faults by kind while a file streams by, and keeps the first few examples of each."""

    def __init__(self):
        self._kinds: dict = {}

    def add(self, kind: Hashable, example: str) -> None:
        """Counts one more of a ``kind`` (anything hashable)."""
        entry = self._kinds.setdefault(kind, [0, []])
        entry[0] += 1
        if len(entry[1]) < MAX_EXAMPLES:
            entry[1].append(example)

    def items(self) -> list[tuple[Hashable, int, list[str]]]:
        """``(kind, count, examples)`` in the order of first meeting."""
        return [(kind, count, list(examples)) for kind, (count, examples) in self._kinds.items()]

    def __len__(self) -> int:
        return len(self._kinds)
