#!/usr/bin/env python3
"""Runs a trained model on images and videos, draws what it finds and writes it as COCO results.

tools/predict.py photo.jpg holiday/ 'frames/*.png' film.mp4 --config-file configs/digits/focal.yaml \\
    --output predictions MODEL.WEIGHTS output/digits/model_final.pth

Pictures whose shorter side is under 400 pixels are drawn 2 to 4 times as large, so that labels can be read; boxes in
detections.json are in pixels of the image as it is.
Category ids are those of DATASETS.TEST, or of what --register NAME=ANNOTATIONS.JSON:IMAGE_DIR names, where its class
names are those used; else 0, 1, ... in the order of the classes.
Exit code: 0; 1: some inputs could not be read, the others are done; 2: nothing to do, or it cannot be done.
"""

import argparse
import glob
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

from focal_plugin.deploy.predict import VIDEOS, Predictor, add_model_arguments, load_inference_config, predict

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
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
    add("--score-threshold", type=threshold, metavar="S", help="(default: that in the checkpoint, else 0.5)")
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


def find_inputs(arguments, output):
    """Returns the images and videos that files, folders (with all below them) and globs name, and where to draw each.

    Below ``output``, that is where it lies below what all have in common; with .png or .mp4 behind its name where no
    such picture is written, or two would have one name. A file that is named outright is taken whatever its name ends
    in. In a folder that holds ``output``, that is left out: its pictures are of the last run.

    Raises:
        FileNotFoundError: an argument names nothing; the message says which.
        ValueError: a picture would overwrite an input.
    """
    found, drawn = {}, output.resolve()  # by their absolute paths
    for argument in arguments:
        path, why = Path(argument), "there is no such file or folder, and nothing matches"
        inside = [path] if path.is_file() else map(Path, sorted(glob.glob(argument, recursive=True)))  # e.g. a[1].png
        if path.is_dir():
            why, is_inside = "no image or video in this folder", path.resolve().is_relative_to(drawn)
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES | VIDEOS]
            inside = [p for p in inside if is_inside or not p.resolve().is_relative_to(drawn)]
        files = {Path(os.path.abspath(p)): p for p in inside if p.is_file()}
        if not files:
            raise FileNotFoundError(f"{argument}: {why}")
        found |= {key: p for key, p in files.items() if key not in found}
    common, names = os.path.commonpath({path.parent for path in found}), {}
    for path in found:
        name, added = os.path.relpath(path, common), ".mp4" if path.suffix.lower() in VIDEOS else ".png"
        # Upper case counts for nothing in some file systems.
        while not name.lower().endswith((".avi", ".jpg", ".jpeg", added)) or name.lower() in names:
            name += added
        names[name.lower()] = output / name
    overwritten = {name.resolve() for name in names.values()} & {path.resolve() for path in found}
    if overwritten:
        raise ValueError(f"--output {output}: the picture would overwrite {min(overwritten)}; give another folder")
    return dict(zip(found.values(), names.values()))


def run(args):
    """Predicts; returns how many inputs failed."""
    if not args.inputs:
        raise ValueError("no images: name files, folders or globs")
    targets = find_inputs(args.inputs, args.output)
    predictor = Predictor(load_inference_config(args), args.classes, args.score_threshold)
    args.output.mkdir(parents=True, exist_ok=True)
    failed = found = 0
    for _, result in tqdm(predict(predictor, targets, args.output), total=len(targets), unit="file", disable=None):
        if isinstance(result, int):
            found += result
        else:
            failed += 1
            tqdm.write(f"error: {result}", file=sys.stderr)
    print(
        f"{found} objects in {len(targets) - failed} files, with scores from {predictor.score_threshold:.3g}; pictures "
        f"and detections.json are in {args.output}"
    )
    if predictor.category_ids[0] == 0:
        print("Category ids count from 0; --register NAME=ANNOTATIONS.JSON:IMAGE_DIR gives those of a data set.")
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
