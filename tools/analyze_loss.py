#!/usr/bin/env python3
"""Figures 1 and 4 of the focal loss paper: the loss itself, and which windows of a trained model carry it.

tools/analyze_loss.py                                             (Figure 1 alone, without a model)
tools/analyze_loss.py --config-file configs/digits/focal.yaml \\
    MODEL.WEIGHTS output/reproduce/digits/fl_gamma2_alpha0.25/seed1/model_final.pth
tools/analyze_loss.py --config-file mine.yaml --register mine_val=val.json:images --dataset mine_val \\
    --num-images 1000 --output report/loss MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

from focal_plugin.analysis import loss_figures
from focal_plugin.analysis.loss_distribution import GAMMAS
from focal_plugin.data import add_register_argument
from focal_plugin.engine import load_checked_config
from focal_plugin.engine.checkpoint import build_trained_model
from focal_plugin.files import origin


def gamma(text):
    try:
        value = float(text)
    except ValueError:
        hint = "KEY VALUE pairs cannot follow it; put another flag in between"
        raise argparse.ArgumentTypeError(f"{text!r} is no number ({hint})") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="of the model; without one only Figure 1 is drawn")
    add_register_argument(parser)
    add("--dataset", metavar="NAME", help="annotated images to run the model on, instead of DATASETS.TEST")
    add("--num-images", type=int, metavar="N", help="a random choice of N of them (default: all)")
    add("--figure", type=int, choices=(1, 4), help="only this one (default: both, or 1 without --config-file)")
    add("--gammas", nargs="+", type=gamma, help="(default: 0 .5 1 2, and 5 in Figure 1; 0 is added for OHEM)")
    add("--no-ohem", action="store_true", help="leave out what OHEM would keep")
    add("--output", type=Path, default=Path("report/loss"), metavar="DIR", help="(default: %(default)s)")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...: config overrides, such as MODEL.WEIGHTS FILE; last")
    args = parser.parse_args()
    if args.num_images is not None and args.num_images < 1:
        parser.error(f"argument --num-images: must be at least 1, got {args.num_images}")
    args.gammas = args.gammas and sorted(set(args.gammas))
    if args.dataset:
        args.opts = ["DATASETS.TEST", repr((args.dataset,)), *args.opts]
    # As tools/train_net.py --eval-only, which needs weights and no training data.
    args.eval_only, args.resume = True, False
    return args


def analyze_model(args, figures):
    """Figure 4 and the report of a model; prints its tables."""
    cfg = load_checked_config(args)
    model, loader = build_trained_model(cfg), loss_figures.build_loader(cfg, args.num_images)
    ohem = None if args.no_ohem else loss_figures.build_ohem_head(cfg)
    start = time.perf_counter()
    counted = loss_figures.collect(model, loader, gammas=args.gammas or GAMMAS, ohem=ohem)
    seconds = time.perf_counter() - start
    datasets = ", ".join(cfg.DATASETS.TEST)
    title = f"{cfg.MODEL.WEIGHTS} on {counted.images:,} images of {datasets}"
    figures = figures + loss_figures.draw_figure4(counted, args.output, title)
    numbers, tables = loss_figures.summarize(counted, cfg)
    environment = {
        **origin(shlex.join(["python", "tools/analyze_loss.py", *sys.argv[1:]])),
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "data sets": datasets,
        "seconds": f"{seconds:.1f}",
    }
    written = loss_figures.write_report(numbers, tables, environment, figures, args.output)
    print(f"{tables}\n")
    return [*figures, *written]


def main():
    args = parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the tables hold Greek letters
    with_model = bool(args.config_file or args.opts) if args.figure is None else args.figure == 4
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        written = []
        if args.figure != 4:
            written = loss_figures.draw_figure1(args.gammas or loss_figures.FIGURE1_GAMMAS, args.output)
        if with_model:
            written = analyze_model(args, written)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
