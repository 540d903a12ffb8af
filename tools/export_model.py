#!/usr/bin/env python3
"""A trained model as TorchScript and ONNX, compared with the model itself.

tools/export_model.py --config-file configs/digits/focal.yaml --output exported \\
    MODEL.WEIGHTS output/digits/model_final.pth
tools/export_model.py --config-file mine.yaml --output exported --format onnx --sample-image street.jpg \\
    --classes car,person MODEL.WEIGHTS output/model_final.pth MODEL.RETINANET.SCORE_THRESH_TEST 0.3

Thresholds are the config's and become part of the model. It is exported on the CPU, whatever MODEL.DEVICE says.
Exit code: 0; 1: the exported model does not find what the model finds; 2: it could not be exported.
"""

import argparse
import sys
import warnings
from pathlib import Path

from focal_plugin.deploy.export import (
    FILES,
    OUTPUTS,
    check_export,
    export,
    format_differences,
    read_sample,
    require,
    write_description,
)
from focal_plugin.deploy.predict import Predictor, add_model_arguments, load_inference_config


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write into")
    add("--format", choices=(*FILES, "all"), default="all", help="(default: %(default)s)")
    add("--sample-image", metavar="IMG", help="to trace and compare with (default: noise); best one with objects")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare the two (default: yes)")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...: config overrides, such as MODEL.WEIGHTS FILE; last")
    return parser.parse_args()


def run(args, formats):
    """Writes and compares; whether all are the same."""
    if "onnx" in formats:
        require("onnx", "an ONNX export")
        if args.check:
            require("onnxruntime", "checking an ONNX export (--no-check leaves it out)")
    args.opts += ["MODEL.DEVICE", "cpu"]
    cfg = load_inference_config(args)
    sample = read_sample(cfg, args.sample_image)
    predictor = Predictor(cfg, args.classes, score_threshold=1.0)  # its own threshold is higher than the config's
    args.output.mkdir(parents=True, exist_ok=True)
    same = True
    for name in formats:
        path = args.output / FILES[name]
        export(predictor.model, sample, path)
        print(f"{name}: {path}, {path.stat().st_size / 2**20:.1f} MiB", flush=True)
        if args.check:
            differences = check_export(predictor.model, path, sample)
            print(format_differences(differences), flush=True)
            same = same and not any(d.problems for d in differences.values())
    write_description(args.output / "model.json", cfg, predictor.classes, formats)
    print(
        f"Before: float32 (3, height, width), {cfg.INPUT.FORMAT}, 0 to 255, shortest edge {cfg.INPUT.MIN_SIZE_TEST} "
        f"(longest at most {cfg.INPUT.MAX_SIZE_TEST}).\n"
        f"After: {', '.join(OUTPUTS)}; boxes are XYXY in pixels of that input.\n"
        f"All of it is in {args.output / 'model.json'}."
    )
    return same


def main():
    args = parse_args()
    # What the tracer says of Detectron2's sizes, which never vary where it says so.
    warnings.simplefilter("ignore")
    try:
        same = run(args, list(FILES) if args.format == "all" else [args.format])
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not same:
        print("error: the exported model does not find what the model finds (above)", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
