#!/usr/bin/env python3
"""Look again at a step whose loss became infinite or NaN, with the batch and the weights that the run has saved.

tools/replay_loss.py output/broken_0000123_worker0.pth
tools/replay_loss.py output/broken_0000123_worker0.pth MODEL.RETINANET.BBOX_REG_LOSS_TYPE giou    (does that help?)
"""

import argparse
import os
import sys

from focal_plugin.engine.replay import replay


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="BROKEN.pth", help="saved in OUTPUT_DIR when the loss broke")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...: config overrides; last")
    args = parser.parse_args(argv)
    try:
        seen = replay(args.file, args.opts)
    except (AssertionError, OSError, ValueError) as error:  # of fvcore, on boxes that are none
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {seen.iteration}, then: " + ", ".join(f"{key} {value}" for key, value in seen.facts.items()))
    print("now:")
    for name, value in seen.losses.items():
        print(f"{name:<16} {value:.6g}")
    print(f"{'largest |logit|':<16} {seen.largest_logit}")
    broken = seen.broken_gradients
    where = f"NaN or infinite in {len(broken)} parameters, {broken[0]} first" if broken else "finite"
    print(f"{'gradients':<16} {where}")
    if seen.logits_are_broken:
        print("The logits themselves are not finite: the weights are broken already, and no image is to blame.")
    print("each image alone:")
    for file_name, losses, num_boxes, smallest in seen.images:
        values = ", ".join(f"{name} {value:.6g}" for name, value in losses.items())
        boxes = f"{num_boxes} boxes" + (f", the smallest {smallest}" if smallest else "")
        print(f"{os.path.basename(file_name)} {values}, {boxes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
