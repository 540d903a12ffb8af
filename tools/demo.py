#!/usr/bin/env python
"""Trains CE, OHEM, OHEM 1:3 and FL on the embedded digits, prints how they compare and writes a report.

Usage: python tools/demo.py --output report
"""

import argparse
import shlex
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

import focal_plugin
from focal_plugin.experiments.report import Data, format_class_table, format_table, write_report
from focal_plugin.experiments.runner import Row, run_rows
from focal_plugin.experiments.verdict import title_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("ce", "ohem", "ohem_1to3", "focal")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("report"), help="folder for the runs and the report")
    add("--seed", type=int, default=1, help="of all runs (default: 1)")
    add("--parallel", type=int, help="runs at the same time (default: one per core, at most 4)")
    add("--threads", type=int, help="threads of each run (default: the cores, shared out evenly)")
    add("--steps", type=int, help="training steps, instead of the configs' own; for a quick try")
    add("--fresh", action="store_true", help="train again what an earlier call has finished")
    return parser.parse_args()


def prepare_data():
    """Draws the data set if it is not there, so that the runs do not all wait for the same thing."""
    print("Preparing the digits data set...", file=sys.stderr, flush=True)
    images = {split: len(DatasetCatalog.get(f"digits_{split}")) for split in ("train", "val")}
    train, val = MetadataCatalog.get("digits_train"), MetadataCatalog.get("digits_val")
    print(f"{images['train']} training and {images['val']} validation images.", file=sys.stderr)
    return Data(Path(train.json_file), Path(val.json_file), Path(val.image_root))


def make_row(name):
    path = ROOT / "configs" / "digits" / f"{name}.yaml"
    return Row(name, title_of(focal_plugin.get_config(str(path))), path)


def main():
    args = parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the titles hold Greek letters
    overrides = ["SEED", str(args.seed)]
    if args.steps:
        overrides += ["SOLVER.MAX_ITER", str(args.steps)]
    rows = [make_row(name) for name in CONFIGS]
    data = prepare_data()
    try:
        results = run_rows(
            rows,
            args.output,
            train_net=ROOT / "tools" / "train_net.py",
            parallel=args.parallel,
            threads=args.threads,
            overrides=overrides,
            fresh=args.fresh,
        )
    except KeyboardInterrupt:
        return 130
    except FileExistsError as error:  # a folder in --output that is no run
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "tools/demo.py", *sys.argv[1:]])
    report = write_report(results, args.output, data=data, command=command, expected=rows)
    done = [result for result in results if result.ok]
    print(
        f"\n{format_table(results)}\n\nAP per class:\n\n{format_class_table(done, data)}\n\nThe report is in {report}"
    )
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
