"""Detectron2's ``DefaultTrainer`` with COCO evaluation, safe checkpoints and CPU workers."""

import functools
import os
import weakref
from contextlib import contextmanager, nullcontext

import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, defaults
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping

from ..scalars import flush_scalars
from .checkpoint import SafeCheckpointer


class FocalTrainer(DefaultTrainer):
    """``DefaultTrainer`` that evaluates with ``COCOEvaluator``; also trains in bfloat16 and on several CPU workers."""

    def __init__(self, cfg):
        check_amp_precision(cfg)
        with _ddp_without_device_ids() if cfg.MODEL.DEVICE == "cpu" else nullcontext():
            super().__init__(cfg)
        if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16":
            self._trainer.precision = torch.bfloat16
            # bfloat16 has float32's range: no gradient underflows, and a scale would only cost its steps.
            self._trainer.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str, output_folder: str = ""):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=folder)

    @classmethod
    def build_optimizer(cls, cfg, model):
        check_optimizer(cfg)
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        solver = cfg.SOLVER
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    def build_hooks(self):
        # Here and not in the constructor: upstream's makes its checkpointer right before the hooks that keep it.
        self.checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        # First, so that what this step logged is there when the writers write it.
        return [_FlushScalars(), *super().build_hooks()]

    def load_state_dict(self, state_dict):
        trainer = state_dict["_trainer"]
        if isinstance(self._trainer, AMPTrainer) and not trainer.get("grad_scaler"):
            # Saved in float32 or bfloat16, which have no loss scale: float16 starts from its own.
            trainer = {**trainer, "grad_scaler": self._trainer.grad_scaler.state_dict()}
        super().load_state_dict({**state_dict, "_trainer": trainer})


class _FlushScalars(HookBase):
    def after_step(self):
        flush_scalars(self.trainer.model)


def check_optimizer(cfg) -> None:
    """Raises a ValueError unless ``SOLVER.OPTIMIZER`` is one that ``FocalTrainer`` builds."""
    if cfg.SOLVER.OPTIMIZER not in ("SGD", "ADAMW"):
        raise ValueError(f"SOLVER.OPTIMIZER must be one of SGD, ADAMW; got {cfg.SOLVER.OPTIMIZER!r}")


def check_amp_precision(cfg) -> None:
    """Raises a ValueError unless ``SOLVER.AMP.PRECISION`` is one that ``FocalTrainer`` trains in."""
    if cfg.SOLVER.AMP.get("PRECISION", "float16") not in ("float16", "bfloat16"):
        raise ValueError(f"SOLVER.AMP.PRECISION must be one of float16, bfloat16; got {cfg.SOLVER.AMP.PRECISION!r}")


@contextmanager
def _ddp_without_device_ids():
    """``DefaultTrainer`` gives DistributedDataParallel a GPU index, which it refuses for a module on the CPU."""
    original = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(original, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = original
