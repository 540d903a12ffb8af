#!/usr/bin/env python
"""Times the classification losses of focal_plugin, Detectron2, fvcore and torchvision side by side.

Usage: python tools/benchmark_loss.py --cases large small --json losses.json

Also measures their peak memory and how accurate they are. Takes minutes; close what else runs.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmark/ is not installed

from benchmark.baselines import CASES, FORMATS
from benchmark.loss import DTYPES, run
from focal_plugin.files import atomic_write


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    dtypes = ["float32", "bfloat16"]
    add("--dtypes", nargs="+", choices=DTYPES, default=dtypes, help="of the logits (default: %(default)s)")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of the logits (default: all)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--rounds", type=int, metavar="N", default=5, help="of timing, in turns (default: %(default)s)")
    add("--compile", action="store_true", help="our loss under torch.compile, too, which takes a compiler and minutes")
    add("--json", type=Path, metavar="FILE", help="write everything measured here")
    args = parser.parse_args()
    for name in ("threads", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
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
    command = shlex.join(["python", "tools/benchmark_loss.py", *sys.argv[1:]])
    results = run(args, device, command, emit=lambda text: print(text, flush=True))
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(results, indent=1, allow_nan=False) + "\n")
        print(f"\nEverything measured is in {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
