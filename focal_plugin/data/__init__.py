"""Data sets: your own from a COCO json, checks before training, and one that needs no download."""

from .dataset_check import check_coco
from .digits import make_digits, register_digits
from .loader import build_train_loader
from .register import add_register_argument, register_coco_json, register_from_args

__all__ = [
    "add_register_argument",
    "build_train_loader",
    "check_coco",
    "make_digits",
    "register_coco_json",
    "register_digits",
    "register_from_args",
]
