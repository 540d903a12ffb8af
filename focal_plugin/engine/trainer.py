"""Detectron2's ``DefaultTrainer`` with COCO evaluation, safe checkpoints and CPU workers."""

import functools
import os
import weakref
from contextlib import contextmanager, nullcontext

from detectron2.engine import DefaultTrainer, defaults
from detectron2.evaluation import COCOEvaluator

from .checkpoint import SafeCheckpointer


class FocalTrainer(DefaultTrainer):
    """``DefaultTrainer`` that evaluates with ``COCOEvaluator`` and also trains on several CPU workers."""

    def __init__(self, cfg):
        with _ddp_without_device_ids() if cfg.MODEL.DEVICE == "cpu" else nullcontext():
            super().__init__(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str, output_folder: str = ""):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=folder)

    def build_hooks(self):
        # Here and not in the constructor: upstream's makes its checkpointer right before the hooks that keep it.
        self.checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        return super().build_hooks()


@contextmanager
def _ddp_without_device_ids():
    """``DefaultTrainer`` gives DistributedDataParallel a GPU index, which it refuses for a module on the CPU."""
    original = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(original, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = original
