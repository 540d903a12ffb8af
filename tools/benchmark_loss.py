#!/usr/bin/env python
"""Times the classification losses of focal_plugin, Detectron2, fvcore and torchvision side by side.

Usage: python tools/benchmark_loss.py --cases large small --json losses.json

Also measures their peak memory, the bytes they move and how accurate they are. Takes minutes; close what else runs.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmark/ is not installed

from benchmark.loss_benchmark import DTYPES, Settings, run_benchmark
from benchmark.loss_contenders import CASES, FORMATS
from focal_plugin.analysis.arguments import positive_number


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Settings()
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=defaults.cases, help="(default: all)")
    add("--dtypes", nargs="+", choices=DTYPES, default=defaults.dtypes, help="of the logits (default: %(default)s)")
    add("--formats", nargs="+", choices=FORMATS, default=defaults.formats, help="of the logits (default: all)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--threads", type=positive_number, help="CPU threads (default: torch's own choice)")
    add("--rounds", type=positive_number, help="timings of each (default: by the time they take)")
    add("--json", type=Path, metavar="FILE", help="write everything measured here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA GPU here")
    if args.json and not args.json.parent.is_dir():  # told now, not after minutes
        parser.error(f"argument --json: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        parser.error(f"argument --json: {args.json} is a folder")
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    many = 200 if device.type == "cuda" else Settings.many
    settings = Settings(args.cases, args.dtypes, args.formats, device, args.rounds, many=many)
    command = shlex.join(["python", "tools/benchmark_loss.py", *sys.argv[1:]])
    results = run_benchmark(settings, emit=lambda text: print(text, flush=True), command=command)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nEverything measured is in {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
