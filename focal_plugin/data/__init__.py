"""Data sets: your own from a COCO json, checks before training, and one that needs no download."""

from .check import check_datasets
from .digits import make_digits, register_digits
from .register import parse_register_arg, register_coco_json, register_from_args

__all__ = [
    "check_datasets",
    "make_digits",
    "parse_register_arg",
    "register_coco_json",
    "register_digits",
    "register_from_args",
]
