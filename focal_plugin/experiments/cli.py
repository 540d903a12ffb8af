"""The command line of tools/reproduce.py."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from .estimate import describe_plan
from .executors import EXECUTORS, InlineExecutor, SubmititExecutor
from .paper import TABLES
from .plan import Profile, choose_rows, load_profile, make_runs
from .runner import available_cores, run_all
from .worker import Run

_TRAIN_NET = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Trains and evaluates the rows of a table of the focal loss paper, and compares them with it. "
        "Stopped at any moment, the same command goes on where it was.",
    )
    add = parser.add_argument
    add("--table", required=True, choices=TABLES, help="of the paper")
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
    add("overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides for all rows; come last")
    return parser.parse_args(argv)


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
    profile = load_profile(args.profile, args.register, args.overrides)
    rows = choose_rows(args.table, profile, args.rows)
    output = args.output or Path("output") / "reproduce" / profile.name
    runs = make_runs(rows, profile, args.seeds, output, _TRAIN_NET, args.num_gpus)
    if args.print_commands:
        for run in runs:
            print(shlex.join(run.command))
        return 0
    parallel, threads = _share_out(args, runs)
    if args.dry_run:
        print(describe_plan(runs, profile, parallel, threads))
        return 0
    _prepare_data(profile)
    results = run_all(
        runs, _executor(args, runs, output, parallel, threads), parallel=parallel, threads=threads, fresh=args.fresh
    )
    return 0 if all(result.ok for result in results) else 1


def _share_out(args: argparse.Namespace, runs: list[Run]) -> tuple[int, int]:
    """How many runs at a time, with how many threads each."""
    cores = available_cores()
    if any(run.on_gpu for run in runs):
        return args.parallel or 1, args.threads or cores
    parallel = args.parallel or max(1, min(len(runs), cores // args.num_gpus))
    return parallel, args.threads or max(1, cores // (parallel * args.num_gpus))


def _executor(args, runs: list[Run], output: Path, parallel: int, threads: int):
    if args.executor == "inline":
        return InlineExecutor(parallel, threads)
    options = dict(text.split("=", 1) for text in args.executor_args)
    options = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    num_gpus = args.num_gpus if runs[0].on_gpu else 0
    return SubmititExecutor(args.executor, output / "submitit", parallel, threads, num_gpus, options)


def _prepare_data(profile: Profile) -> None:
    """Draws a data set that is made on first use, so that the runs do not all wait for the same thing."""
    cfg = profile.config()
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in DatasetCatalog and MetadataCatalog.get(name).get("made_on_first_use"):
            print(f"{name}: {len(DatasetCatalog.get(name)):,} images", file=sys.stderr, flush=True)
