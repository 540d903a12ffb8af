#!/usr/bin/env python3
"""One page on an evaluation: AP by class and size, precision-recall curves, and the worst errors as pictures.

tools/eval_report.py output/inference/coco_instances_results.json val.json --images val_images/
tools/eval_report.py predictions/detections.json val.json --images images/ --output report/errors.html --iou 0.75

The first file holds predictions as an evaluation of Detectron2 or tools/predict.py writes them, the second the
annotations. Numbers are of all detections, errors and pictures of those with a score of at least --score-threshold.
"""

import argparse
import shlex
import sys
from pathlib import Path

from focal_plugin.eval.page import write_eval_report


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", type=Path, metavar="PREDICTIONS.json", help="results in COCO's format")
    add("annotations", type=Path, metavar="ANNOTATIONS.json", help="in COCO's format")
    add("--images", type=Path, metavar="DIR", help="folder of the images, for the pictures")
    add("--output", type=Path, default=Path("eval_report.html"), metavar="FILE.html", help="(default: %(default)s)")
    add("--iou", type=float, default=0.5, help="from which on an object is found (default: %(default)s)")
    add("--score-threshold", type=float, metavar="S", help="of the errors (default: that of the highest F1)")
    add("--examples", type=int, default=24, metavar="N", help="pictures of each kind of error (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    words = sys.argv if argv is None else ["eval_report.py", *argv]
    command = shlex.join([f"tools/{Path(words[0]).name}", *map(str, words[1:])])
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = write_eval_report(
            args.predictions,
            args.annotations,
            args.output,
            images=args.images,
            iou=args.iou,
            score_threshold=args.score_threshold,
            examples=args.examples,
            command=command,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{result}\n{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
