"""Overrides of Detectron2's engine; no training loop of our own."""

from .checkpoint import SafeCheckpointer
from .launch import argument_parser, run
from .preflight import load_checked_config
from .trainer import FocalTrainer

__all__ = ["FocalTrainer", "SafeCheckpointer", "argument_parser", "load_checked_config", "run"]
