"""Write files that are there whole or not at all, and print what stands in somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"  # how the name of a file that is being written ends


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes the place of ``path`` when, and only when, the block ends well.

    Stopped at any moment, loss of power included, ``path`` is whole or as it was.

    Args:
        path: on this machine.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        OSError: it cannot be written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # a folder, synced so that the new name survives a loss of power, cannot be on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def printable(value: object, limit: int = 60, quotes: bool = True) -> str:
    """Return the repr of a value out of somebody's file, safe to print: one line, no control characters, not long.

    ``quotes`` says whether those of a text are shown.
    """
    if isinstance(value, str):
        value = value[: limit + 1]  # repr of a huge string takes a while
    elif isinstance(value, (list, dict)) and len(value) > limit:
        value = list(value)[:limit]
    try:
        text = repr(value) if quotes else repr(value)[1:-1]
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= limit else text[: limit - 3] + "..."
