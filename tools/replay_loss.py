#!/usr/bin/env python3
"""Look again at a step whose loss became infinite or NaN, with the batch and the weights that the run has saved.

tools/replay_loss.py output/broken_0000123_worker0.pth
tools/replay_loss.py output/broken_0000123_worker0.pth MODEL.RETINANET.BBOX_REG_LOSS_TYPE giou    (does that help?)
"""

import argparse
import sys

from focal_plugin.engine.guard import replay


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="BROKEN.pth", help="saved in OUTPUT_DIR when the loss broke")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...: config overrides; last")
    args = parser.parse_args(argv)
    try:
        for line in replay(args.file, args.opts):
            print(line)
    except (AssertionError, OSError, ValueError) as error:  # of fvcore, on boxes that are none
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
