#!/usr/bin/env python3
"""Train and evaluate the rows of a table of the focal loss paper, and compare them with it.

tools/reproduce.py --table 1d --profile coco --num-gpus 8
tools/reproduce.py --table 1d --profile digits --seeds 1 2 3
tools/reproduce.py --table 1d --profile my.yaml --rows fl_gamma2_alpha0.25 ohem_128_nms0.5 --register ... KEY VALUE ...
"""

import sys

from focal_plugin.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
