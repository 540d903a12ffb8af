"""Measures classification losses side by side, forward and backward: time, peak memory, bytes moved, accuracy."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import detectron2
import fvcore
import fvcore.nn
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor

from focal_plugin.losses import sigmoid_focal_loss

from .loss_accuracy import Accuracy, measure_accuracy
from .loss_contenders import CASES, FORMATS, STOCK, Case, Contender, dense_contenders, head_contenders, make_batch
from .loss_counters import Traffic, cache_size, count_traffic, peak_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        cases: names in ``CASES``.
        dtypes: names in ``DTYPES``.
        formats: names in ``FORMATS``.
        device: where.
        rounds: of timing; None: as many as fit ``seconds`` for each table, within ``few`` and ``many``.
    """

    cases: Sequence[str] = tuple(CASES)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    formats: Sequence[str] = tuple(FORMATS)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int | None = None
    seconds: float = 3.0
    few: int = 3
    many: int = 50


@dataclass
class Row:
    """What was measured of one contender. Bytes are per logit, of forward and backward together.

    Attributes:
        name: of the contender.
        seconds: of each round.
        ratios: stock's seconds in each round over these.
        peak: the most extra memory at a time, gradients included, in multiples of the logits'.
        memory, cache: bytes moved, see ``Traffic``; ``cache`` is 0 where everything counts as memory.
        bandwidth_share: of a GPU's copy bandwidth, reached by ``memory`` and ``cache`` together.
        start_up: seconds of the first step of a compiled contender.
        skipped: why it was not measured; else "".
        note: how to read the row.
    """

    name: str
    seconds: list[float]
    ratios: list[float]
    peak: float | None = None
    memory: float | None = None
    cache: float | None = None
    bandwidth_share: float | None = None
    start_up: float | None = None
    skipped: str = ""
    note: str = ""

    @property
    def total(self) -> float | None:
        return None if self.memory is None else self.memory + self.cache

    def as_dict(self) -> dict:
        summary = {"seconds": _quartiles(self.seconds), "stock_over_this": _quartiles(self.ratios)}
        return {**asdict(self), "bytes_per_logit": self.total, "quartiles": summary}


@dataclass
class Table:
    """All rows of one case, dtype and memory format; ``copy_bandwidth`` in bytes per second, on a GPU only."""

    case: str
    dtype: str
    memory_format: str
    num_logits: int
    rows: list[Row]
    copy_bandwidth: float | None = None

    def as_dict(self) -> dict:
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows]}


def run_benchmark(settings: Settings, emit: Callable[[str], None], command: str = "") -> dict:
    """Measures everything in ``settings`` and hands each table to ``emit`` as text when it is ready.

    Returns:
        The same and all details, ready for JSON: "environment", "tables", "accuracy".
    """
    environment = describe_environment(settings.device, command)
    emit("\n".join(f"{name}: {value}" for name, value in environment.items()))
    tables = []
    for case in settings.cases:
        for dtype in settings.dtypes:
            for i, memory_format in enumerate(settings.formats):
                # The functions alone take (N * R, K): the format of the head's outputs is nothing to them.
                tables.append(measure_table(settings, case, dtype, memory_format, with_functions=i == 0))
                emit(format_table(tables[-1], CASES[case]))
    accuracy = measure_accuracy(accuracy_functions(), settings.device)
    emit(format_accuracy(accuracy))
    results = {"tables": [t.as_dict() for t in tables], "accuracy": [a._asdict() for a in accuracy]}
    return {"environment": environment, **_without_nan(results)}


def measure_table(settings: Settings, case: str, dtype: str, memory_format: str, with_functions: bool) -> Table:
    """Every contender on one batch; ``with_functions``: also the loss functions on logits and targets made ready."""
    device = settings.device
    batch = make_batch(CASES[case], DTYPES[dtype], memory_format, device)
    contenders = head_contenders(batch) + (dense_contenders(batch) if with_functions else [])
    running = [c for c in contenders if not c.skipped]
    size = CASES[case].num_logits * batch.logits[0].element_size()
    # A batch that fits into the cache as a whole makes no difference between memory and cache.
    threshold = cache_size(device) if size > cache_size(device) else 0
    rows = {c.name: Row(c.name, [], [], start_up=c.start_up, skipped=c.skipped, note=c.note) for c in contenders}
    for contender in running:
        _measure_bytes(contender, rows[contender.name], CASES[case].num_logits, size, threshold, device)
    for name, seconds in _time_rounds(running, settings).items():
        rows[name].seconds = seconds
    for row in rows.values():
        row.ratios = [stock / own for stock, own in zip(rows[STOCK].seconds, row.seconds)]
    table = Table(case, dtype, memory_format, CASES[case].num_logits, list(rows.values()))
    if device.type == "cuda":
        _add_kernels(running, rows)
        table.copy_bandwidth = _copy_bandwidth(size, device)
        for row in table.rows:
            if row.seconds and row.total is not None:
                moved = row.total * table.num_logits / statistics.median(row.seconds)
                row.bandwidth_share = moved / table.copy_bandwidth
    return table


def _add_kernels(contenders: Sequence[Contender], rows: dict[str, Row]) -> None:
    """Adds what our fused kernels move to the counts that do not see it, if it is them that did the work."""
    ours = [c for c in contenders if c.kernel]
    if rows[ours[0].name].memory >= ours[0].kernel:
        return  # operations did, and all of them are counted
    for contender in ours:
        rows[contender.name].memory += contender.kernel
        rows[contender.name].note = "bytes of the fused kernels computed, of the rest counted"


def _measure_bytes(c: Contender, row: Row, num_logits: int, size: int, threshold: int, device: torch.device) -> None:
    """Fills in what one step moves and holds. The steps that are run for it warm the contender up."""
    for _ in range(c.warm_ups):
        c.step()
        c.clear()
    traffic = Traffic(c.num_bytes, 0) if c.num_bytes is not None else None
    if traffic is None and c.countable:
        # A GPU fuses TorchScript into kernels that no counter sees: there the same function without it is counted.
        counted = c.unfused if device.type == "cuda" else None
        traffic = count_traffic(lambda: c.step(counted), threshold)
        if counted:
            row.note = "bytes counted without TorchScript's fusion: at most this"
        c.clear()
    if traffic is not None:
        row.memory, row.cache = traffic.memory / num_logits, traffic.cache / num_logits
    row.peak = peak_bytes(c.step, device) / size
    c.clear()


def _time_rounds(contenders: Sequence[Contender], settings: Settings) -> dict[str, list[float]]:
    """Seconds per contender and round. In each round all take their turn, so that a slow moment hits them alike."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    most = settings.rounds or settings.many
    least = settings.rounds or settings.few
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(most):
            if done >= least and time.perf_counter() - start > settings.seconds:
                break
            for contender in contenders:
                seconds[contender.name].append(_time(contender.step, settings.device))
                contender.clear()
    finally:
        gc.enable()
    return seconds


def _time(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_bandwidth(num_bytes: int, device: torch.device, repeats: int = 20) -> float:
    """Bytes per second, read and written, of copying a tensor of ``num_bytes``."""
    x = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    times = [_time(x.clone, device) for _ in range(repeats + 1)]
    return 2 * num_bytes / statistics.median(times[1:])


def accuracy_functions() -> dict:
    """The loss functions whose accuracy is measured, as ``loss_accuracy.LossFunction``."""

    def labels_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
        labels = 1 - targets.long()  # of the one class there is: 0 present, 1 background
        return sigmoid_focal_loss(logits[:, None], labels, alpha, gamma).squeeze(1)

    return {
        "focal_plugin": labels_loss,
        "focal_plugin, dense": sigmoid_focal_loss,
        "fvcore": fvcore.nn.sigmoid_focal_loss,
        "fvcore jit": fvcore.nn.sigmoid_focal_loss_jit,
        "torchvision": torchvision.ops.sigmoid_focal_loss,
    }


def describe_environment(device: torch.device, command: str) -> dict[str, str]:
    """What the numbers depend on, for the head of the report."""
    cores = os.cpu_count()
    environment = {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_cpu_model()}, {cores} cores, threads used: {torch.get_num_threads()}",
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "not used",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fvcore": fvcore.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        advice = (
            " (other programs ran just now: if they still do, do not trust the times)" if load > 0.5 * cores else ""
        )
        environment["load before"] = f"{load:.1f}{advice}"
    return environment


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def format_table(table: Table, case: Case) -> str:
    """A table as text, for a terminal."""
    height, width = case.image_size
    rounds = max(len(row.seconds) for row in table.rows)
    title = (
        f"{table.case}: {case.num_images} images of {height}x{width}, {case.num_classes} classes, {case.num_anchors} "
        f"anchors, {table.num_logits:,} logits; {table.dtype}, {table.memory_format}; median of {rounds} rounds"
    )
    split = any(row.cache for row in table.rows)
    header = ["forward + backward", "ms", "stock / this", "peak memory / logits", "bytes / logit"]
    header += ["in cache"] * split + ["of copy bandwidth"] * (table.copy_bandwidth is not None)
    cells, notes = [], []
    for row in table.rows:
        if row.note or row.skipped:
            notes.append(f"{row.name}: {'skipped: ' + row.skipped if row.skipped else row.note}")
        if row.start_up is not None:
            notes.append(f"{row.name}: its first step took {row.start_up:.1f} s, not counted in the times")
        line = [row.name, _text(_median(row.seconds, 1000), ".3g"), _text(_median(row.ratios), ".2f")]
        line += [_text(row.peak, ".2f"), _text(row.memory, ".1f")] + [_text(row.cache, ".1f")] * split
        cells.append(line + [_text(row.bandwidth_share, ".0%")] * (table.copy_bandwidth is not None))
    aligned = ["left"] + ["right"] * (len(header) - 1)
    body = tabulate(cells, header, disable_numparse=True, colalign=aligned)
    if table.copy_bandwidth:
        notes.append(f"copy bandwidth: {table.copy_bandwidth / 1e9:.0f} GB/s")
    return "\n".join(["", title, "", body, *notes])


def format_accuracy(rows: Sequence[Accuracy]) -> str:
    """The accuracies as text, for a terminal."""
    header = ["logits -200 to 200", "dtype", "loss error", "at gamma", "gradient error", "at gamma"]
    header += ["NaN or inf gradients", "at gammas"]
    cells = [
        [
            *(r.function, r.dtype, _text(r.loss_error, ".1e"), f"{r.loss_gamma:g}", _text(r.gradient_error, ".1e")),
            *(f"{r.gradient_gamma:g}", f"{r.non_finite_gradients:,} of {r.values:,}"),
            " ".join(f"{g:g}" for g in r.non_finite_gammas),
        ]
        for r in rows
    ]
    body = tabulate(cells, header, disable_numparse=True)
    return "\n".join(["", "Largest relative error against float64", "", body])


def _quartiles(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2:
        return list(values) * 3 or None
    return statistics.quantiles(values, n=4, method="inclusive")


def _median(values: Sequence[float], factor: float = 1.0) -> float | None:
    return factor * statistics.median(values) if values else None


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _without_nan(value):
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
