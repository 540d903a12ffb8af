#!/usr/bin/env python3
"""Runs a trained model on images and videos, draws what it finds and writes it as COCO results.

tools/predict.py photo.jpg holiday/ 'frames/*.png' film.mp4 --config-file configs/digits/focal.yaml \\
    --output predictions MODEL.WEIGHTS output/digits/model_final.pth

Exit code: 0; 1: some inputs could not be read, the others are done; 2: nothing to do, or it cannot be done.
"""

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from focal_plugin.deploy.model import add_model_arguments, category_ids, class_names, load_inference_config
from focal_plugin.deploy.prediction import Predictor, find_inputs, predict

KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)*")  # MODEL.WEIGHTS, SEED


def threshold(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMAGES", help="files, folders (with all below them), globs, videos")
    add_model_arguments(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for pictures and detections.json")
    add("--score-threshold", type=threshold, default=0.5, metavar="S", help="(default: %(default)s)")
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [KEY VALUE ...]"
    # argparse cannot part two lists of words, one before and one behind the flags.
    args, words = parser.parse_known_args()
    unknown = [word for word in words if word.startswith("--")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    words = args.inputs + words
    first = next((i for i, word in enumerate(words) if KEY.fullmatch(word) and not Path(word).exists()), len(words))
    args.inputs, args.opts = words[:first], words[first:]
    return args


def run(args):
    """Predicts; returns how many inputs failed."""
    paths = find_inputs(args.inputs, args.output)
    cfg, dataset = load_inference_config(args)
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    classes = class_names(num_classes, dataset, args.classes)
    predictor = Predictor(cfg, args.score_threshold)
    args.output.mkdir(parents=True, exist_ok=True)
    ids = None if args.classes else category_ids(num_classes, dataset)
    failed = found = 0

    def frames(iterator, total):
        return tqdm(iterator, total=total, unit="frame", disable=None)

    done = predict(predictor, paths, args.output, classes, ids, frames)
    for _, result in tqdm(done, total=len(paths), unit="file", disable=None):
        if isinstance(result, int):
            found += result
        else:
            failed += 1
            tqdm.write(f"error: {result}", file=sys.stderr)
    print(f"{found} objects in {len(paths) - failed} files; pictures and detections.json are in {args.output}")
    return failed


def main():
    args = parse_args()
    try:
        failed = run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"error: {failed} of the inputs could not be read (above)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
