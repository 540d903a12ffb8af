"""Data sets: your own from a COCO json, checks before training, and one that needs no download."""

from .check import check_datasets
from .dataset_check import check_coco
from .digits import make_digits, register_digits
from .loader import build_train_loader
from .register import add_register_argument, parse_register_arg, register_coco_json, register_from_args
from .start import check_training_data

__all__ = [
    "add_register_argument",
    "build_train_loader",
    "check_coco",
    "check_datasets",
    "check_training_data",
    "make_digits",
    "parse_register_arg",
    "register_coco_json",
    "register_digits",
    "register_from_args",
]
