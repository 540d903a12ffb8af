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

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from focal_plugin.files import origin

from .accuracy import measure_accuracy
from .baselines import CASES, STOCK, Candidate, function_candidates, head_candidates, make_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: Namespace, device: torch.device, command: str, emit: Callable[[str], None]) -> dict:
    """Measure everything, and hand each table to ``emit``, in Markdown, when it is ready.

    Args:
        args: the flags of tools/benchmark_loss.py.
        device: where.
        command: that was typed.

    Returns:
        All details, ready for JSON: "environment", "losses" (rows of :func:`measure`) and "accuracy".
    """
    results = {"environment": describe_environment(device, command), "losses": []}
    emit("\n".join(f"{name}: {value}" for name, value in results["environment"].items()))
    for name, dtype, memory_format in product(args.cases, args.dtypes, args.formats):
        case, batch = CASES[name], make_batch(CASES[name], DTYPES[dtype], memory_format, device)
        # The functions alone take (N * R, K) logits: to them the format of the head's outputs is nothing.
        candidates = head_candidates(batch, compiled=args.compile)
        candidates += function_candidates(batch) if memory_format == args.formats[0] else []
        num_logits = sum(x.numel() for x in batch.logits)
        rows = measure(candidates, num_logits * batch.logits[0].element_size(), device, args.rounds)
        results["losses"] += [{"case": name, "dtype": dtype, "format": memory_format, **row} for row in rows]
        height, width = case.image_size
        emit(
            f"\n{name}: {case.num_images} images of {height}x{width}, {case.num_classes} classes, {case.num_anchors} "
            f"anchors, {num_logits:,} logits; {dtype}, {memory_format}; forward and backward, {args.rounds} rounds\n"
        )
        emit(format_losses(rows))
    results["accuracy"] = measure_accuracy(device)
    emit(f"\nLargest error relative to float64, logits -200 to 200\n\n{format_accuracy(results['accuracy'])}")
    return results


def describe_environment(device: torch.device, command: str) -> dict:
    """Return what the numbers depend on."""
    made, cores = origin(command), os.cpu_count()
    made["versions"] |= {d.name: d.version for d in metadata.distributions() if d.name in ("fvcore", "triton")}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    advice = " (other programs ran just now: if they still do, do not trust the times)" if load > 0.5 * cores else ""
    threads = torch.get_num_threads()
    return {**made, "device": str(device), "threads used": threads, "load before": f"{load:.1f}{advice}"}


def measure(candidates: Sequence[Candidate], num_bytes: int, device: torch.device, rounds: int) -> list[dict]:
    """Measure one step of each candidate; stock RetinaNet's is among them.

    Args:
        candidates: all on the same batch.
        num_bytes: of its logits.
        device: of the batch.
        rounds: in each of which all take their turn, so that a slow moment hits them alike.

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
    timers = [Timer("step()", globals={"step": c.step}, num_threads=torch.get_num_threads()) for c in candidates]
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
    cells = {}
    for row in rows:
        low, ratio, high = pd.Series(row["ratios"]).quantile([0.25, 0.5, 0.75])
        seconds = pd.Series(row["seconds"]).median()
        cells[row["name"]] = [f"{1000 * seconds:.3g}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{row['peak']:.2f}"]
    return _markdown(pd.DataFrame(cells, ["ms", "stock / this", "quartiles", "peak memory / logits"]).T)


def format_accuracy(rows: Sequence[dict]) -> str:
    """Return rows of :func:`measure_accuracy` as a table."""
    cells = {}
    for row in rows:
        errors = [
            "-" if row[f"{kind}_error"] is None else f"{row[f'{kind}_error']:.1e} (γ {row[f'{kind}_gamma']:g})"
            for kind in ("loss", "gradient")
        ]
        bad = " ".join(f"{gamma:g}" for gamma in row["non_finite_gammas"])
        non_finite = f"{row['non_finite_gradients']:,} of {row['values']:,}" + (f" (γ {bad})" if bad else "")
        cells[f"{row['function']}, {row['dtype']}"] = [*errors, f"{row['non_finite_losses']:,}", non_finite]
    return _markdown(
        pd.DataFrame(cells, ["loss error", "gradient error", "NaN or inf losses", "NaN or inf gradients"]).T
    )


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(table.columns))
