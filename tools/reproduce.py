#!/usr/bin/env python3
"""Train and evaluate the rows of a table of the focal loss paper, and compare them with it.

tools/reproduce.py --table 1d --profile coco --num-gpus 8
tools/reproduce.py --table 1d --profile digits --seeds 1 2 3
tools/reproduce.py --table 1d --profile my.yaml --rows fl_gamma2_alpha0.25 ohem_128_nms0.5 --register ... KEY VALUE ...
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from focal_plugin.experiments.paper import TABLES
from focal_plugin.experiments.plan import choose_rows, describe_plan, load_profile, make_runs, prepare_data
from focal_plugin.experiments.report import format_table, write_report
from focal_plugin.experiments.results import Run, Study
from focal_plugin.experiments.runner import InlineExecutor, SubmititExecutor, available_cores, run_all


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Train and evaluate the rows of a table of the focal loss paper, and compare them with it. "
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
    add("--fresh", action="store_true", help="empty the folders of earlier runs, and train them again")
    add("--dry-run", action="store_true", help="print what there is to train, beside what the paper measured")
    add("--print-commands", action="store_true", help="print the train_net.py line of each run, and train nothing")
    add("--executor", choices=("inline", "local", "slurm"), default="inline", help="this process, or submitit's jobs")
    add("--executor-args", nargs="+", default=[], metavar="K=V", help="for submitit, such as slurm_partition=gpu")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config overrides for all rows, which come last")
    flags, overrides = split_overrides(argv)
    args = parser.parse_args(flags)
    if args.overrides:
        parser.error(f"{args.overrides[0]}: neither a flag nor a config KEY such as SOLVER.MAX_ITER")
    args.overrides = overrides
    return args


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags and the KEY VALUE pairs behind them, which a flag with many values would swallow."""
    for i, word in enumerate(words):
        after_flag = i > 0 and words[i - 1].startswith("-")  # a word without a dot may be its value
        key = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)*", word)
        if key and (key[1] or not after_flag):
            return words[:i], words[i:]
    return words, []


def reproduce(args: argparse.Namespace, command: str) -> int:
    """Plan, run and report; return the exit code: 0 if every run is done, 1 if not."""
    if args.num_gpus < 1:
        raise ValueError(f"--num-gpus {args.num_gpus}: at least 1 is needed; without a GPU it counts CPU workers")
    profile = load_profile(args.profile, args.register, args.overrides)
    rows = choose_rows(args.table, profile, args.rows)
    output = args.output or Path("output") / "reproduce" / profile.name
    runs = make_runs(rows, profile, args.seeds, output, args.num_gpus)
    if args.print_commands:
        print(*(shlex.join(run.command) for run in runs), sep="\n")
        return 0
    parallel, threads = share_out(args, runs)
    if args.dry_run:
        print(describe_plan(runs, parallel))
        return 0
    executor = make_executor(args, runs, output, parallel, threads)
    args.report.mkdir(parents=True, exist_ok=True)  # what cannot be written is said now, not after hours
    data = prepare_data(profile)
    results = run_all(runs, executor, args.fresh)
    left_out = [row.title for row in TABLES[args.table] if row not in rows]
    study = Study(args.table, profile.name, profile.is_coco, rows, args.seeds, data, command, left_out)
    page = write_report(study, results, args.report)
    print(f"\n{format_table(study, results)}\n\nThe report is in {page} (report.md and results.json beside it)")
    return 0 if all(result.ok for result in results) else 1


def share_out(args: argparse.Namespace, runs: list[Run]) -> tuple[int, int]:
    """Return how many runs there are at a time, and the threads of each."""
    cores, on_gpu = available_cores(), runs[0].on_gpu
    if on_gpu and args.executor == "inline" and (args.parallel or 1) > 1:
        raise ValueError(
            f"--parallel {args.parallel}: all would use the same GPU. Give each run more with --num-gpus, or start "
            "this command once for each GPU, with CUDA_VISIBLE_DEVICES and its own --rows"
        )
    if on_gpu:
        return args.parallel or 1, args.threads or cores
    parallel = args.parallel or max(1, min(len(runs), cores // args.num_gpus))
    return parallel, args.threads or max(1, cores // (parallel * args.num_gpus))


def make_executor(args, runs: list[Run], output: Path, parallel: int, threads: int):
    if args.executor == "inline":
        return InlineExecutor(parallel, threads)
    wrong = [text for text in args.executor_args if "=" not in text]
    if wrong:
        raise ValueError(f"--executor-args {' '.join(wrong)}: not of the form KEY=VALUE")
    options = dict(text.split("=", 1) for text in args.executor_args)
    options = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    num_gpus = args.num_gpus if runs[0].on_gpu else 0
    return SubmititExecutor(args.executor, output / "submitit", parallel, threads, num_gpus, options)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 if every run is done, 1 if not, 2 for a wrong command, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the titles hold Greek letters
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        return reproduce(args, command=shlex.join(["tools/reproduce.py", *argv]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
