"""Write files that are there whole or not at all, say where they were made, and print what stands in others'."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".tmp"  # how the name of a file that is being written ends


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing ("w": UTF-8, or "wb") that takes the place of ``path`` when the block ends well.

    Stopped at any moment, loss of power included, ``path`` is whole or as it was. An OSError, such as that of a full
    disk, leaves nothing behind.
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
    """Return the repr of a value out of somebody's file, safe to print: one line, no control characters, not long."""
    if isinstance(value, str):
        value = value[: limit + 1]  # repr of a huge string takes a while
    elif isinstance(value, (list, dict)) and len(value) > limit:
        value = list(value)[:limit]
    try:
        text = repr(value) if quotes else repr(value)[1:-1]
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def origin(command: str) -> dict[str, Any]:
    """Return what a file of results says about its making: command, date (UTC), machine and versions."""
    return {"command": command, "date": now(), "machine": machine(), "versions": versions()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> str:
    """Name the processor, its cores and, where there is one, the GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    cpu = named[1] if named else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {gpu}, {platform.system()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    names = ("focal_plugin", "detectron2", "torch", "torchvision", "numpy", "scipy", "pycocotools")
    # A module's own word comes first: Detectron2 is also distributed under other names.
    return {n: getattr(import_module(n), "__version__", None) or metadata.version(n) for n in names}
