"""Writes a comparison down: a table, pictures, the numbers for machines, and what they do and do not say."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ..analysis.detections import Method, PrecisionRecall, draw_mosaic, precision_recall
from .figures import draw_precision_recall, draw_training_curves
from .results import RunResult
from .runner import Row
from .verdict import verdict

_IOUS = (0.5, 0.75)
_CONFIG_KEYS = ("SEED", "SOLVER", "MODEL.FOCAL", "MODEL.OHEM", "MODEL.RETINANET", "MODEL.DEVICE", "DATASETS")
_LEGEND = """\
AP as COCO defines it, in percent. s/step: median over the run, with the other runs beside it. run: the whole
process, with start-up and evaluation. positives, negatives: examples per image that take part in the
classification loss, mean over the run (FL and CE: all anchors but the ignored ones; OHEM: those it mined)."""
_PICTURES = (
    "## Precision and recall\n\n![precision and recall](precision_recall.png)",
    "## Training\n\nThe methods divide their classification loss by different counts: on the left, only the "
    "shapes of the curves compare.\n\n![training curves](training_curves.png)",
    "## Detections\n\n![detections](detections.png)",
)


@dataclass(frozen=True)
class Data:
    """The data set the rows were trained and evaluated on, in COCO's format."""

    train_json: Path
    val_json: Path
    val_images: Path


def write_report(
    results: Sequence[RunResult],
    output_dir: Path,
    *,
    data: Data,
    command: str,
    expected: Sequence[Row] = (),
    title: str = "Focal loss, OHEM and cross entropy on the digits",
    scope: str = "small synthetic scenes",
) -> Path:
    """Writes report.md, results.json and the pictures into `output_dir`.

    Args:
        results: what `run_rows` returned.
        output_dir: the folder to write to.
        data: what the rows were trained and evaluated on.
        command: what a person typed to get here.
        expected: the rows there should be; the report names those without a result.
        title: headline of the report.
        scope: what kind of data this is, for the caveat.

    Returns:
        The path of report.md.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    done = [result for result in results if result.ok]
    curves = {r.key: [precision_recall(data.val_json, r.detections, iou) for iou in _IOUS] for r in done}
    parts = [f"# {title}", _shortcomings(results, expected), format_table(results), _LEGEND]
    parts.append(verdict(done, scope))
    if done:
        _draw(results, curves, output_dir, data)
        parts += ["## AP per class\n\n" + format_class_table(done, data), *_PICTURES]
    parts.append(_origin(results, command))
    path = output_dir / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    record = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "missing": [row.key for row in _missing(results, expected)],
        "rows": [_row_record(result, curves.get(result.key, [])) for result in results],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    return path


def format_table(results: Sequence[RunResult]) -> str:
    """The comparison, one method per line; Markdown that reads well in a terminal too."""
    lines = [_table_line(result) for result in results]
    headers = ["method", "AP", "AP50", "AP75", "s/step", "run, min", "positives", "negatives"]
    return _markdown(headers, lines)


def format_class_table(results: Sequence[RunResult], data: Data) -> str:
    """AP of each class beside the number of instances it was learned from."""
    truth = json.loads(Path(data.train_json).read_text(encoding="utf-8"))
    instances = Counter(a["category_id"] for a in truth["annotations"] if not a.get("iscrowd"))
    lines = [
        [c["name"], instances[c["id"]], *(_number(r.metrics.get(f"bbox/AP-{c['name']}")) for r in results)]
        for c in sorted(truth["categories"], key=lambda c: c["id"])
    ]
    return _markdown(["class", "training instances", *(r.title for r in results)], lines)


def step_seconds(result: RunResult) -> float:
    """Median time of a training step."""
    return statistics.median([r["time"] for r in result.history() if "time" in r] or [math.nan])


def examples_per_image(result: RunResult) -> tuple[float, float]:
    """Positives and negatives per image in the classification loss, mean over the run."""
    history = result.history()

    def mean(mined: str, anchors: str) -> float:
        name = mined if any(mined in record for record in history) else anchors
        return statistics.fmean([record[name] for record in history if name in record] or [math.nan])

    return mean("ohem/num_pos", "num_pos_anchors"), mean("ohem/num_neg", "num_neg_anchors")


def _table_line(result: RunResult) -> list[str]:
    if not result.ok:
        return [result.title, "failed", *["-"] * 6]
    aps = [_number(result.metrics.get(f"bbox/{name}")) for name in ("AP", "AP50", "AP75")]
    counts = [_number(count, 0 if count >= 1000 else 1) for count in examples_per_image(result)]
    return [result.title, *aps, _number(step_seconds(result), 3), _number(result.seconds / 60), *counts]


def _shortcomings(results: Sequence[RunResult], expected: Sequence[Row]) -> str:
    """What this report lacks, for its top; empty if it lacks nothing."""
    lines = [f"> - **{row.title} is missing**: it was not run." for row in _missing(results, expected)]
    for result in results:
        if not result.ok:
            error = result.error.replace("\n", " / ").replace("`", "'")
            lines.append(
                f"> - **{result.title} failed** with exit code {result.exit_code}: `{error}` "
                f"(console: {result.key}/console.txt)"
            )
    return "\n".join(["> **This comparison is incomplete.**", ">", *lines]) if lines else ""


def _missing(results: Sequence[RunResult], expected: Sequence[Row]) -> list[Row]:
    present = {result.key for result in results}
    return [row for row in expected if row.key not in present]


def _draw(
    results: Sequence[RunResult], curves: Mapping[str, list[PrecisionRecall]], output_dir: Path, data: Data
) -> None:
    done = [result for result in results if result.ok]
    order = [result.title for result in results]  # with the failed ones: a method keeps its colour
    by_title = {r.title: curves[r.key] for r in done}
    draw_precision_recall(by_title, order, output_dir / "precision_recall.png")
    draw_training_curves({r.title: r.history() for r in done}, order, output_dir / "training_curves.png")
    methods = [Method(f"{r.title}\nAP {r.ap:.1f}", r.detections) for r in done]
    draw_mosaic(data.val_json, data.val_images, methods, output_dir / "detections.png")


def _origin(results: Sequence[RunResult], command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    settings = sorted({(r.parallel, r.threads) for r in results})
    beside = "; ".join(f"{p} at a time with {t} thread{'s' if t > 1 else ''} each" for p, t in settings)
    runs = "\n".join(" ".join(result.command) for result in results)
    return "\n\n".join(
        [
            f"## How this was made\n\n`{command}` on {_machine()}; {versions}.",
            f"Runs, {beside}:",
            f"```\n{runs}\n```",
        ]
    )


def _row_record(result: RunResult, curves: Sequence[PrecisionRecall]) -> dict[str, Any]:
    config = result.config()
    positives, negatives = examples_per_image(result)
    return {
        "key": result.key,
        "title": result.title,
        "command": " ".join(result.command),
        "ok": result.ok,
        "exit_code": result.exit_code,
        "error": result.error,
        "reused": result.reused,
        "seed": config.get("SEED"),
        "seconds": round(result.seconds, 1),
        "step_seconds": _finite(step_seconds(result)),
        "threads": result.threads,
        "parallel": result.parallel,
        "positives_per_image": _finite(positives),
        "negatives_per_image": _finite(negatives),
        "metrics": {name: _finite(value) for name, value in sorted(result.metrics.items())},
        "precision_at_recall": {f"{c.iou:g}": [_finite(p) for p in c.precision.tolist()] for c in curves},
        "config": {key: value for key in _CONFIG_KEYS if (value := _lookup(config, key)) is not None},
    }


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _machine() -> str:
    """Processor, cores and, where there is one, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {gpu}, {platform.system()}, Python {platform.python_version()}"


def _versions() -> dict[str, str]:
    names = ("focal_plugin", "detectron2", "torch", "torchvision", "numpy", "pycocotools")
    # A module's own word comes first: Detectron2 is also distributed under other names.
    return {n: getattr(import_module(n), "__version__", None) or metadata.version(n) for n in names}


def _markdown(headers: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    align = ["left"] + ["right"] * (len(headers) - 1) if lines else None
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
