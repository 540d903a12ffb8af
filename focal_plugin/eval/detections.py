"""For code not yet moved: the names are in coco and drawing."""

from .coco import PrecisionRecall, precision_recall_curves  # noqa: F401
from .drawing import Method, draw_mosaic  # noqa: F401
