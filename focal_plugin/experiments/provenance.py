"""Where and with what a number was made."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch


def origin(command: str) -> dict[str, Any]:
    return {"command": command, "date": now(), "machine": machine(), "versions": versions()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> str:
    """Processor, cores and, where there is one, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {gpu}, {platform.system()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    names = ("focal_plugin", "detectron2", "torch", "torchvision", "numpy", "scipy", "pycocotools")
    # A module's own word comes first: Detectron2 is also distributed under other names.
    return {n: getattr(import_module(n), "__version__", None) or metadata.version(n) for n in names}
