"""What there is to train, and what one training leaves in its folder, read back."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy.stats import ttest_rel

from ..config_yaml import lookup
from ..engine.trainer import DIVERGED
from ..files import atomic_write, machine, now, printable
from .paper import FL, LEADS, PaperRow

CONSOLE, RESULT = "console.txt", "result.json"
OF_LINE = ["title", "kind", "paper_title", "published", "overrides", "config"]  # of a method, not of one run
AP = "bbox/AP"
PUBLISHED = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ms")


@dataclass(frozen=True)
class Run:
    """One training: a row of a table with one seed."""

    method: str  # see RunResult
    title: str
    seed: int
    folder: Path  # everything it leaves goes there
    command: tuple[str, ...]  # what trains it, as a person in this folder would type it; it begins with "python"
    fingerprint: str  # of everything that decides the outcome
    max_iter: int  # SOLVER.MAX_ITER
    images_per_step: int = 0  # SOLVER.IMS_PER_BATCH
    on_gpu: bool = False  # whether it computes there
    row: PaperRow | None = None

    def __str__(self) -> str:
        return f"{self.title} seed {self.seed}"

    def result(self) -> RunResult:
        """Return how it ended, if it has ended with this fingerprint; else a result that is "missing"."""
        result = RunResult(self.method, self.title, self.seed, self.folder, list(self.command), self.fingerprint)
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
            if saved["fingerprint"] == self.fingerprint and (saved["status"] != "done" or result.detections.is_file()):
                saved["metrics"] = {k: math.nan if v is None else v for k, v in saved["metrics"].items()}
                vars(result).update({key: saved[key] for key in vars(result).keys() & saved.keys()})
        return result


@dataclass
class RunResult:
    """How one training ended."""

    method: str  # key of the paper's method, such as "ohem_128_nms0.5", or on COCO of its recipe
    title: str  # the method by what its configuration does, such as "OHEM 32/.5"
    seed: int  # of weights and data order
    folder: Path  # where all of the run is
    command: list[str]  # what trained it, as a person would type it
    fingerprint: str = ""  # of everything that decides the outcome
    status: str = "missing"  # has not ended; or "done", "diverged", "failed"
    step: int | None = None  # of a diverged run, the step whose loss was no number
    error: str = ""  # of a diverged or failed run, what it said
    exit_code: int | None = None  # of the process; None: it was not started
    metrics: dict[str, float] = field(default_factory=dict)  # in percent: "bbox/AP", "bbox/AP50", "bbox/AP-dog", ...
    seconds: float = 0.0  # wall clock of the last attempt's process, start-up and evaluation included
    attempts: int = 1  # more for a run that was stopped and went on
    peak_memory: int = 0  # bytes; of the GPU, or resident in the process on a CPU. 0: unknown
    peak_memory_of: str = "process"  # or "GPU"
    machine: str = ""  # where it was trained
    date: str = ""  # when it ended, UTC
    threads: int = 1  # of the process
    parallel: int = 1  # how many runs shared the machine
    reused: bool = False  # an earlier call trained it

    @property
    def ok(self) -> bool:
        return self.status == "done"

    @property
    def ended(self) -> bool:
        return self.status in ("done", "diverged")  # it need not be trained again

    @property
    def ap(self) -> float:
        return self.metrics.get(AP, math.nan)

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    def history(self) -> list[dict[str, Any]]:
        """Return the records of Detectron2's metrics.json by step; of steps done twice, after a stop, the later one."""
        records = sorted(self._records(), key=lambda record: record["iteration"])
        return list({record["iteration"]: record for record in records}.values())

    def last_step(self) -> dict[str, Any]:
        """Return the newest training record, or {}; only the file's end is read, for long runs write long files."""
        return next((record for record in reversed(self._records(tail=16384)) if "total_loss" in record), {})

    def _records(self, tail: int = sys.maxsize) -> list[dict[str, Any]]:
        records = []
        with suppress(OSError), (self.folder / "metrics.json").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            for line in file.read().decode("utf-8", errors="replace").splitlines():
                with suppress(ValueError):  # a stop leaves half a line, which has the next record behind it
                    records.append(json.loads(line[line.rindex("{") :]))
        return [record for record in records if "iteration" in record]

    def config(self) -> dict[str, Any]:
        """Return the full configuration the run was trained with; empty if it failed before writing one."""
        path = self.folder / "config.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    def finish(self, exit_code: int, seconds: float) -> None:
        """Take in what the ended process has left, and write it down."""
        self.exit_code, self.seconds, self.machine, self.date = exit_code, seconds, machine(), now()
        self.metrics = {k: v for record in self.history() for k, v in record.items() if k.startswith("bbox/")}
        with suppress(OSError, ValueError):  # Detectron2 gives NaN to a model that detects nothing; its AP is 0
            if json.loads(self.detections.read_text(encoding="utf-8")) == []:
                self.metrics = {k: 0.0 if math.isnan(v) else v for k, v in self.metrics.items()}
        path = self.folder / CONSOLE
        console = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        gpu = re.findall(r"max_mem: (\d+)M", console)  # how Detectron2's printer ends its lines
        peak = max(map(int, gpu)) * 2**20 if gpu else self.peak_memory
        self.peak_memory, self.peak_memory_of = peak, "GPU" if gpu else "process"
        self.status, self.error, self.step = "done", "", None
        if exit_code:
            self.status, self.error = "failed", _last_error(console, exit_code)
            with suppress(OSError, ValueError, KeyError, TypeError):  # as the trainer's guard has left it
                self.step = int(json.loads((self.folder / DIVERGED).read_text(encoding="utf-8"))["iteration"])
                self.status = "diverged"
        elif AP not in self.metrics or not self.detections.is_file():
            self.status, self.error = "failed", "ended well, but left no AP in metrics.json or no detections"
        # How it is called and where it lies are the asker's to say.
        saved = {k: v for k, v in asdict(self).items() if k not in ("method", "title", "folder", "reused")}
        write_json(self.folder / RESULT, saved, indent=1)


def typed(path: Path) -> str:
    """Return the path as a person in this folder would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write it with null for what is no number, such as the AP of a class without objects: JSON has no NaN."""
    clean = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    with atomic_write(path) as file:
        file.write(json.dumps(clean, **options) + "\n")


def _last_error(console: str, exit_code: int) -> str:
    """Return the exception a process died of, or the end of its console."""
    lines = [line.rstrip() for line in console.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    text = "\n".join(lines[raised[-1] :][:4] if raised else lines[-3:]) or "nothing on the console"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        text = f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; {text}"
    return text


@dataclass(frozen=True)
class Data:
    """The data set that rows are trained and evaluated on, in COCO's format."""

    train_json: Path
    val_json: Path
    val_images: Path

    def count_objects(self) -> pd.DataFrame:
        """Count the objects of each class, by name, in the "training" and the "validation" set, without crowds."""
        counts = {}
        for part, path in (("training", self.train_json), ("validation", self.val_json)):
            truth = json.loads(path.read_text(encoding="utf-8"))
            found = Counter(a["category_id"] for a in truth["annotations"] if not a.get("iscrowd"))
            counts[part] = {c["name"]: found[c["id"]] for c in sorted(truth["categories"], key=lambda c: c["id"])}
        return pd.DataFrame(counts)


@dataclass(frozen=True)
class Study:
    """What was asked for: rows of one of the paper's tables, trained in one setting."""

    table: str  # of the paper, such as "1d"
    profile: str  # "coco", "digits", or a config's name
    is_coco: bool  # whether the data and the recipe are the paper's
    rows: Sequence[PaperRow]  # in the paper's order
    seeds: Sequence[int]  # that each row was to be trained with
    data: Data | None  # None: read from a results.json, which has the counts
    command: str  # what a person typed
    left_out: Sequence[str] = ()  # titles of the table's rows that this command did not ask for


@dataclass(frozen=True)
class Comparison:
    """AP of a method minus that of a rival with the same seed; as a results.json has it."""

    focal: str
    rival: str
    kind: str  # of the rival, such as "OHEM"
    picked_of: int  # number of methods of this kind that are done, which the rival may be the best of
    difference_by_seed: dict[int, float]  # over the seeds that both have done
    mean: float  # of them; NaN without any
    interval_95: tuple[float, float] | None  # the t interval of the mean; None with fewer than two seeds
    excludes_zero: bool | None  # whether the interval does; None without one
    paper_difference: float | None  # of the two kinds in the paper; None where it compares none
    interval_holds_paper_difference: bool | None  # None without one of the two


def compare(runs: pd.DataFrame, method: str, rival: str) -> Comparison:
    """Compare two methods over the seeds that both have done."""
    aps = runs.pivot(index="seed", columns="method", values=AP)[[method, rival]].dropna()
    difference, kind = aps[method] - aps[rival], runs.kind[runs.method == rival].iloc[0]
    paper = round(LEADS[kind][0] - LEADS[kind][1], 1) if kind in LEADS else None
    interval = None
    if len(aps) > 1:
        with warnings.catch_warnings():  # that equal differences lose precision
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = tuple(map(float, ttest_rel(aps[method], aps[rival]).confidence_interval(0.95)))
    excludes_zero = interval and (interval[0] > 0 or interval[1] < 0)
    holds_paper = interval and paper and interval[0] <= paper <= interval[1]
    count = runs[runs.kind == kind].dropna(subset=AP).method.nunique()
    by_seed, mean = difference.to_dict(), float(difference.mean())
    return Comparison(method, rival, kind, count, by_seed, mean, interval, excludes_zero, paper, holds_paper)


def tabulate_runs(study: Study, results: Sequence[RunResult]) -> pd.DataFrame:
    """Return a table with one row a run, by method in the study's order.

    Its columns are the keys of the lines and runs of a results.json, the metrics of runs that are done, such as
    "bbox/AP", and what the paper published, such as "paper/AP". What is missing is NaN.
    """
    asked = {row.recipe if study.is_coco else row.method: row for row in study.rows}
    found = [_describe(row, run) for method, row in asked.items() for run in results if run.method == method]
    runs = _with_numbers(pd.DataFrame(found, dtype=object))
    runs.loc[runs.groupby("title").method.transform("nunique") > 1, "title"] += " " + runs.method
    return runs


def read_results(path: str | os.PathLike) -> tuple[Study, pd.DataFrame]:
    """Return the study and the table of runs that a results.json was written from, without the losses by step."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    lines = pd.DataFrame(record["lines"], dtype=object)[["method", *OF_LINE]]
    runs = _with_numbers(lines.merge(pd.DataFrame(record["runs"], dtype=object), on="method"))
    names = ("table", "profile", "is_coco", "seeds", "command", "left_out")
    return Study(rows=(), data=None, **{name: record[name] for name in names}), runs


def _with_numbers(runs: pd.DataFrame) -> pd.DataFrame:
    metrics = pd.DataFrame([run.metrics if run.status == "done" else {} for run in runs.itertuples()], runs.index)
    metrics = metrics.reindex(columns=dict.fromkeys([*(f"bbox/{name}" for name in PUBLISHED[:6]), *metrics]))
    paper = pd.DataFrame([p or {} for p in runs.published], runs.index, list(PUBLISHED)).add_prefix("paper/")
    runs["console"] = runs.folder.map(lambda folder: Path(folder) / CONSOLE)
    numbers = ["seconds", "step_seconds", "positives_per_image", "negatives_per_image"]
    return pd.concat([runs.astype(dict.fromkeys(numbers, float)), metrics.astype(float), paper.astype(float)], axis=1)


def lines_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the first run of each method, by method: what is the same for all of its runs."""
    return runs.drop_duplicates("method").set_index("method")


def reference(runs: pd.DataFrame) -> str | None:
    """Return the method that the others are compared with: the paper's own focal loss, or else its best row here.

    It is chosen by its settings and not by how it came out, so that it is not the winner of a draw.
    """
    published = lines_of(runs)["paper/AP"]
    own = [method for method in published.index if method.removesuffix("_anchors3x3").endswith(FL.key)]
    return own[0] if len(own) == 1 else published.idxmax() if published.count() else None


def _describe(row: PaperRow, run: RunResult) -> dict[str, Any]:
    config, history = run.config(), run.history()

    def recorded(*names: str) -> list[float]:
        """What the run says under the first of these names that it has."""
        return next((found for name in names if (found := [r[name] for r in history if name in r])), [math.nan])

    key = re.compile(r"SEED|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
    words = list(itertools.dropwhile(lambda word: not key.fullmatch(word), run.command))
    steps, batch = lookup(config, "SOLVER.MAX_ITER"), lookup(config, "SOLVER.IMS_PER_BATCH")
    return {
        **vars(run),
        "title": printable(run.title, limit=120, quotes=False),
        "kind": row.kind,
        "paper_title": row.title,
        "published": row.published and asdict(row.published),
        "command": shlex.join(run.command),
        "overrides": {key: value for key, value in zip(words[::2], words[1::2]) if key not in ("SEED", "OUTPUT_DIR")},
        "config": config,
        "folder": str(run.folder),
        "detections": run.detections,
        "steps": steps,
        "images_seen": steps * batch if steps and batch else None,
        "peak_memory": run.peak_memory or None,
        "step_seconds": statistics.median(recorded("time")),
        # What OHEM kept, or else all anchors that are not ignored.
        "positives_per_image": statistics.fmean(recorded("ohem/num_pos", "num_pos_anchors")),
        "negatives_per_image": statistics.fmean(recorded("ohem/num_neg", "num_neg_anchors")),
        "background_per_image": statistics.fmean(recorded("num_neg_anchors")),
        "loss_cls": {r["iteration"] + 1: r["loss_cls"] for r in history if math.isfinite(r.get("loss_cls", math.nan))},
    }
