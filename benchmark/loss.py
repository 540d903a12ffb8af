"""Measure classification losses side by side, forward and backward: time, peak memory and accuracy."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import accumulate, product

import numpy as np
import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from focal_plugin.files import origin

from .accuracy import measure_accuracy
from .baselines import CASES, STOCK, Candidate, function_candidates, head_candidates, make_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: Namespace, device: torch.device, command: str, emit: Callable[[str], None]) -> dict:
    """Measure what ``args`` of tools/benchmark_loss.py say; ``emit`` gets each table, in Markdown, when it is ready.

    Returns:
        All details, ready for JSON: "environment", "losses" (rows of :func:`measure`) and "accuracy".
    """
    results = {"environment": describe_environment(device, command), "losses": []}
    emit(json.dumps(results["environment"], indent=1))
    for name, dtype, memory_format in product(args.cases, args.dtypes, args.formats):
        case, batch = CASES[name], make_batch(CASES[name], DTYPES[dtype], memory_format, device)
        # The functions alone take (N * R, K) logits: to them the format of the head's outputs is nothing.
        candidates = head_candidates(batch, compiled=args.compile)
        candidates += function_candidates(batch) if memory_format == args.formats[0] else []
        num_logits = sum(x.numel() for x in batch.logits)
        rows = measure(candidates, num_logits * batch.logits[0].element_size(), device, args.rounds)
        results["losses"] += [{"case": name, "dtype": dtype, "format": memory_format, **row} for row in rows]
        emit(
            f"\n{name}: {case.num_images} images of {case.image_size} pixels, {case.num_classes} classes, "
            f"{num_logits:,} logits; {dtype}, {memory_format}; median of {args.rounds} rounds\n"
        )
        emit(format_losses(rows))
    results["accuracy"] = measure_accuracy(device)
    formats = [".1e" if name.endswith("error") else "g" for name in results["accuracy"][0]]
    table = tabulate(results["accuracy"], "keys", "pipe", floatfmt=formats, intfmt=",", missingval="-")
    emit(f"\nLargest error relative to float64, logits -200 to 200\n\n{table}")
    return results


def describe_environment(device: torch.device, command: str) -> dict:
    """Return what the numbers depend on."""
    made, cores = origin(command), os.cpu_count()
    made["versions"] |= {d.name: d.version for d in metadata.distributions() if d.name in ("fvcore", "triton")}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    advice = " (other programs ran just now: if they still do, do not trust the times)" if load > 0.5 * cores else ""
    used = {"device": str(device), "threads used": torch.get_num_threads()}
    return {**made, **used, "load before": f"{load:.1f}{advice}"}


def measure(candidates: Sequence[Candidate], num_bytes: int, device: torch.device, rounds: int) -> list[dict]:
    """Measure one step of each candidate, stock RetinaNet's among them, on one batch with ``num_bytes`` of logits.

    In each round all take their turn, so that a slow moment hits them alike.

    Returns:
        Of each: "seconds", the median of each round; "ratios", stock's seconds in each round over these; "peak", the
        most extra memory at a time, gradients included, in multiples of the logits'.
    """
    rows = []
    for candidate in candidates:
        for _ in range(3):  # TorchScript optimizes a function by what it saw it do the first times
            candidate.step()
        peak = peak_bytes(candidate.step, device) / num_bytes
        rows.append({"name": candidate.name, "peak": peak, "seconds": []})
    timers = [Timer("f()", globals={"f": c.step}, num_threads=torch.get_num_threads()) for c in candidates]
    for _ in range(rounds):
        for row, timer in zip(rows, timers):
            row["seconds"].append(timer.blocked_autorange(min_run_time=0.1).median)
    (stock,) = (row["seconds"] for row in rows if row["name"] == STOCK)
    return [{**row, "ratios": [theirs / own for theirs, own in zip(stock, row["seconds"])]} for row in rows]


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Run ``step`` once; return the most bytes allocated at a time beyond those before it, its results included.

    Exact: on a GPU from the caching allocator's statistics, on a CPU from every recorded allocation and release. Run
    in one thread, the only one that the profiler hears; each further one of our own losses adds its scratch, 768 KB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise the profiler prints its stages, and the lack of a GPU, to stderr. Read when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json") as file:
            events = [event for event in json.load(file)["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in events), initial=0))


def format_losses(rows: Sequence[dict]) -> str:
    """Return rows of :func:`measure` as a table: medians of the rounds, and quartiles of the ratio."""
    cells = []
    for row in rows:
        low, ratio, high = np.quantile(row["ratios"], [0.25, 0.5, 0.75])
        ms = 1000 * np.median(row["seconds"])
        cells.append([row["name"], f"{ms:.3g}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{row['peak']:.2f}"])
    header = ["forward + backward", "ms", "stock / this", "quartiles", "peak memory / logits"]
    return tabulate(cells, header, "pipe", disable_numparse=True, colalign=["left"] + ["right"] * 4)
