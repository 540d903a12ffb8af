#!/usr/bin/env python3
"""Check a data set in COCO format: its json, its images, and whether the anchors of a config fit its boxes.

tools/check_dataset.py train.json images/
tools/check_dataset.py train.json images/ --json > report.json
tools/check_dataset.py train.json images/ --fast --config-file configs/retina_focal.yaml INPUT.MIN_SIZE_TRAIN "(1024,)"

Exit code: 0 without errors (there may be warnings), 1 with errors, 2 if there is no such file or the call is wrong.
"""

import argparse
import json
import sys
from pathlib import Path

from focal_plugin import get_config
from focal_plugin.data.dataset_check import check_coco


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("annotations", type=Path, metavar="ANN.json", help="annotations in COCO format")
    add("images", type=Path, metavar="IMAGES", help="folder that their file names start from")
    add("--config-file", default="retina_focal.yaml", metavar="FILE", help="whose anchors to check (%(default)s)")
    add("--json", action="store_true", help="print the report as json")
    add("--fast", action="store_true", help="look at the headers of 64 images only, as the start of a training does")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser.parse_intermixed_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        cfg = get_config(args.config_file, args.opts)
        if not args.annotations.is_file():
            swapped = " (the annotations go first, then the folder)" if args.annotations.is_dir() else ""
            raise FileNotFoundError(f"there is no file {args.annotations}{swapped}")
        if not args.images.is_dir():
            raise FileNotFoundError(f"there is no folder {args.images}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = check_coco(args.annotations, args.images, cfg, images="sample" if args.fast else "all")
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if args.json else report.to_text())
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
