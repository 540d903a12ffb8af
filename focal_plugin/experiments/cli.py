"""The command line of tools/reproduce.py."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from .estimate import describe_plan
from .executors import EXECUTORS, InlineExecutor, SubmititExecutor
from .paper import TABLES, PaperRow
from .plan import Profile, choose_rows, load_profile, make_runs, method_key
from .report import Data, Line, Study, format_table, write_report
from .results import RunResult
from .runner import available_cores, run_all
from .worker import Run

TRAIN_NET = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Trains and evaluates the rows of a table of the focal loss paper, and compares them with it. "
        "Stopped at any moment, the same command goes on where it was.",
    )
    add = parser.add_argument
    add("--table", required=True, choices=TABLES, help="of the paper, or extra: SSD's loss and IoU box losses")
    add("--profile", required=True, help="coco, digits, or the path of a config that each row changes the loss of")
    add("--rows", nargs="+", default=[], metavar="ROW", help="only these (--dry-run lists them)")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="one run per row and seed (default: 1)")
    add("--num-gpus", type=int, default=1, metavar="N", help="of each run; without a GPU, CPU workers (default: 1)")
    add("--register", action="append", default=[], metavar="NAME=JSON:IMAGES", help="as in train_net.py; repeatable")
    add("--output", type=Path, help="folder for the runs (default: output/reproduce/PROFILE)")
    add("--report", type=Path, default=Path("report"), help="folder for the report (default: report)")
    add("--parallel", type=int, metavar="N", help="runs at the same time (default: one per core; on GPUs 1)")
    add("--threads", type=int, metavar="N", help="of each run on a CPU (default: the cores, shared out)")
    add("--fresh", action="store_true", help="train again what has ended before")
    add("--dry-run", action="store_true", help="print what there is to train, and how long that may take")
    add("--print-commands", action="store_true", help="print the train_net.py line of each run, and train nothing")
    add("--executor", choices=EXECUTORS, default="inline", help="who runs it: this process, or submitit")
    add("--executor-args", nargs="+", default=[], metavar="K=V", help="for submitit, such as slurm_partition=gpu")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config overrides for all rows, which come last")
    flags, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(flags)
    if args.overrides:
        parser.error(f"{args.overrides[0]}: neither a flag nor a config KEY such as SOLVER.MAX_ITER")
    args.overrides = overrides
    return args


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The flags and the KEY VALUE pairs behind them, which a flag with many values would swallow."""
    for i, word in enumerate(words):
        after_flag = i > 0 and words[i - 1].startswith("-")  # a word without a dot may be its value
        key = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)*", word)
        if key and (key[1] or not after_flag):
            return words[:i], words[i:]
    return words, []


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if every run is done, 1 if not, 2 for a wrong command, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the titles hold Greek letters
    args = parse_args(argv)
    try:
        return _reproduce(args, command=shlex.join(["tools/reproduce.py", *(argv or sys.argv[1:])]))
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _reproduce(args: argparse.Namespace, command: str) -> int:
    if not TRAIN_NET.is_file():
        raise ValueError(
            f"there is no {TRAIN_NET}: run tools/reproduce.py from a checkout, not from an installed wheel"
        )
    if args.num_gpus < 1:
        raise ValueError(f"--num-gpus {args.num_gpus}: at least 1 is needed; without a GPU it counts CPU workers")
    profile = load_profile(args.profile, args.register, args.overrides)
    rows = choose_rows(args.table, profile, args.rows)
    output = args.output or Path("output") / "reproduce" / profile.name
    runs = make_runs(rows, profile, args.seeds, output, TRAIN_NET, args.num_gpus)
    if args.print_commands:
        for run in runs:
            print(shlex.join(run.command))
        return 0
    parallel, threads = _share_out(args, runs)
    if args.dry_run:
        print(describe_plan(runs, profile, parallel))
        return 0
    executor = _executor(args, runs, output, parallel, threads)
    data = prepare_data(profile)
    results = run_all(runs, executor, parallel=parallel, threads=threads)
    study = _study(args, profile, rows, results, data, command)
    page = write_report(study, results, args.report)
    print(f"\n{format_table(study, results)}\n\nThe report is in {page} (report.md and results.json beside it)")
    return 0 if all(result.ok for result in results) else 1


def _study(args, profile: Profile, rows: list[PaperRow], results: list[RunResult], data: Data, command: str) -> Study:
    titles = {result.method: result.title for result in results}
    lines = [Line(method_key(r, profile), titles[method_key(r, profile)], r.published, r.title) for r in rows]
    return Study(
        table=args.table,
        profile=profile.name,
        is_coco=profile.is_coco,
        lines=lines,
        seeds=args.seeds,
        data=data,
        command=command,
        left_out=[row.title for row in TABLES[args.table] if row not in rows],
    )


def _share_out(args: argparse.Namespace, runs: list[Run]) -> tuple[int, int]:
    """How many runs at a time, with how many threads each."""
    cores = available_cores()
    if runs[0].on_gpu:
        if args.executor == "inline" and (args.parallel or 1) > 1:
            raise ValueError(
                f"--parallel {args.parallel}: all would use the same GPU. Give each run more with --num-gpus, or start "
                "this command once for each GPU, with CUDA_VISIBLE_DEVICES and its own --rows"
            )
        return args.parallel or 1, args.threads or cores
    parallel = args.parallel or max(1, min(len(runs), cores // args.num_gpus))
    return parallel, args.threads or max(1, cores // (parallel * args.num_gpus))


def _executor(args, runs: list[Run], output: Path, parallel: int, threads: int):
    if args.executor == "inline":
        return InlineExecutor(parallel, threads, args.fresh)
    wrong = [text for text in args.executor_args if "=" not in text]
    if wrong:
        raise ValueError(f"--executor-args {' '.join(wrong)}: not of the form KEY=VALUE")
    options = dict(text.split("=", 1) for text in args.executor_args)
    options = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    num_gpus = args.num_gpus if runs[0].on_gpu else 0
    return SubmititExecutor(args.executor, output / "submitit", parallel, threads, num_gpus, options, args.fresh)


def prepare_data(profile: Profile) -> Data:
    """Where the data set lies; one that is made on first use is drawn now, and not by every run at once.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained on and reported.
    """
    cfg = profile.config()
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in names:
        _check_dataset(name)
    for name in names:
        if MetadataCatalog.get(name).get("lazily_generated"):
            print(f"{name}: {len(DatasetCatalog.get(name)):,} images", file=sys.stderr, flush=True)
    train, val = (MetadataCatalog.get(splits[0]) for splits in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    return Data(Path(train.json_file), Path(val.json_file), Path(val.image_root))


def _check_dataset(name: str) -> None:
    meta = MetadataCatalog.get(name)
    if name not in DatasetCatalog or not meta.get("json_file"):
        raise ValueError(f"data set {name!r} is not registered in COCO format: add --register {name}=FILE.json:IMAGES")
    for path in (meta.json_file, meta.image_root):
        if not Path(path).exists() and not meta.get("lazily_generated"):
            raise FileNotFoundError(f"data set {name!r}: there is no {path}")
