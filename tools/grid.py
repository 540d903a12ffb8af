#!/usr/bin/env python3
"""When does the focal loss beat OHEM? Trains Table 1d over background per object and budget, and draws the answer.

tools/grid.py --cells digits:500 digits:1500 configs/digits/dense.yaml:500 configs/digits/dense.yaml:1500 --seeds 1 2 3
"""

import sys

from focal_plugin.experiments.grid import main

if __name__ == "__main__":
    sys.exit(main())
