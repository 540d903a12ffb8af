"""When the loss breaks: who, where and why, with everything that is needed to look again, on all workers at once."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..files import atomic_write
from ..scalars import flush_scalars
from .interrupt import stop_requested
from .resume import unwrapped
from .scale import REFERENCE_BATCH, REFERENCE_LR

logger = logging.getLogger(__name__)

BROKEN = "NaN or infinite"
_CAUSES = """\
The usual causes:
  1. The learning rate is too high{ratio}. Try SOLVER.BASE_LR {lower:.3g}, a longer SOLVER.WARMUP_ITERS, or
     SOLVER.CLIP_GRADIENTS.ENABLED True.
  2. Boxes that are none (of no, negative or endless size, or written as corners): tools/check_dataset.py JSON IMAGES
  3. Numbers too large for the precision{amp}: SOLVER.AMP.ENABLED False, or SOLVER.AMP.PRECISION bfloat16."""


class LossGuard(HookBase):
    """Looks at every step's losses and gradients before the weights are changed; and at whether to stop.

    For the trainer that runs the steps (``DefaultTrainer._trainer``), on all workers: what one of them finds, all learn
    in the same step. Upstream looks on the main worker only, at the losses only, and says which step.

    Args:
        cfg: of the run.
        model: whose losses it looks at.

    Attributes:
        stopping: whether a worker has been asked to stop; the same on all.
        finish: set on any worker, ends training after the next step.
        finishing: whether it is set on any; the same on all.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.cfg, self.stopping, self.finish, self.finishing = cfg, False, False, False
        self.looked_at = -1  # the last step that it has looked at
        self._batch: Sequence[dict] = ()
        self._losses: dict[str, Tensor] = {}
        self._normalizer: Tensor | None = None
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model, args):
        if model.training:
            self._batch = args[0] if args else ()
            normalizer = getattr(unwrapped(model), "loss_normalizer", None)
            # The forward pass moves the running mean: a replay has to start from here.
            self._normalizer = normalizer.clone() if isinstance(normalizer, Tensor) else None

    def _after_forward(self, model, args, losses):
        if model.training:
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            self._losses = {name: loss.detach() for name, loss in losses.items() if isinstance(loss, Tensor)}

    def after_backward(self) -> None:
        """
        Raises:
            FloatingPointError: on all workers, if a loss or a gradient of any is NaN or infinite.
        """
        is_finite = all_finite(list(self._losses.values()))
        grads_finite = not is_finite or self._gradients_are_finite()
        losses, gradients = self.ask_all(is_finite, grads_finite)
        self.looked_at = self.trainer.iter
        no_loss = [rank for rank, finite in enumerate(losses) if not finite]
        no_grads = [rank for rank, finite in enumerate(gradients) if not finite]
        if no_loss or no_grads:
            # One worker's loss has broken the gradients of all.
            raise FloatingPointError(self._report(no_loss or no_grads, loss_is_finite=not no_loss))
        self._batch, self._losses = (), {}

    def ask_all(self, is_finite: bool = True, grads_finite: bool = True) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """What all workers say of their losses and gradients; also whether any is to stop. A collective call."""
        all_workers = comm.all_gather((is_finite, grads_finite, stop_requested(), self.finish))
        losses, gradients, stops, finishes = zip(*all_workers)
        self.stopping, self.finishing = any(stops), any(finishes)
        return losses, gradients

    def _gradients_are_finite(self) -> bool:
        if isinstance(self.trainer, AMPTrainer) and self.trainer.grad_scaler.is_enabled():
            return True  # the scaler leaves such a step out, and scales less
        params = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        norms = [p.grad.norm(math.inf) for p in params if p.grad is not None]
        return not norms or all_finite([torch.stack(norms)])

    def _report(self, broken: list[int], loss_is_finite: bool) -> str:
        """The message, the same on all workers but for the batch; each broken worker saves its own first."""
        flush_scalars()
        mine = comm.get_rank() in broken
        facts = self._facts()
        path = self._save(facts) if mine else ""
        # On all workers, for norms over all of them.
        facts["largest |logit|"] = largest_logit(self.trainer.model, self._batch)
        workers = comm.all_gather((facts, [image.get("file_name", "?") for image in self._batch], path))
        what = "Gradients, not the loss," if loss_is_finite else "Loss"
        verb = "are" if loss_is_finite else "became"
        lines = [f"{what} {verb} infinite or NaN at iteration={self.trainer.iter}!"]
        for rank in broken:
            facts, files, path = workers[rank]
            lines.append(f"Worker {rank} of {len(workers)}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
            lines.append("  images: " + ", ".join(files))
            if path:
                lines.append(f"  saved, with the weights before this step; to look again: tools/replay_loss.py {path}")
        return "\n".join([*lines, self._causes()])

    def _facts(self) -> dict[str, Any]:
        optimizer = self.trainer.optimizer
        group = optimizer.param_groups[hooks.LRScheduler.get_best_param_group_id(optimizer)]
        facts = {name: float(loss.sum()) for name, loss in self._losses.items()}
        facts["learning rate"] = f"{group['lr']:.3g} (SOLVER.BASE_LR {self.cfg.SOLVER.BASE_LR:.3g})"
        logged = get_event_storage().latest()
        for name, title in (("loss_normalizer", "normaliser"), ("num_pos_anchors", "positive anchors per image")):
            if name in logged:
                facts[title] = round(logged[name][0], 3)
        return facts

    def _save(self, facts: dict[str, Any]) -> str:
        """Saves the batch and the weights before the step (the norms' running statistics are those after its forward
        pass, which training does not read); returns where, or "" if the disk does not take it."""
        state = {name: value.detach().cpu() for name, value in unwrapped(self.trainer.model).state_dict().items()}
        if self._normalizer is not None:
            state["loss_normalizer"] = self._normalizer.cpu()
        name = f"broken_{self.trainer.iter:07d}_worker{comm.get_rank()}.pth"
        path = os.path.join(self.cfg.OUTPUT_DIR, name)
        content = {
            "model": state,
            "batch": [_plain(image) for image in self._batch],
            "facts": facts,
            "iteration": self.trainer.iter,
            "config": self.cfg.dump(),
        }
        try:
            with atomic_write(path, "wb") as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # what broke the loss matters more than a full disk
            logger.warning(f"{path} could not be saved: {error}")
            return ""
        return path

    def _causes(self) -> str:
        solver = self.cfg.SOLVER
        ratio, lower, amp = "", solver.BASE_LR / 4, " (not likely here: it is float32)"
        if solver.OPTIMIZER == "SGD":
            times = solver.BASE_LR / solver.IMS_PER_BATCH * REFERENCE_BATCH / REFERENCE_LR
            ratio = f" for the batch: per image it is {times:.3g} times that of the published schedules"
            lower = min(lower, REFERENCE_LR * solver.IMS_PER_BATCH / REFERENCE_BATCH)
        else:
            lower = min(lower, 1e-3)  # more than what AdamW is commonly given
        if solver.AMP.ENABLED:
            amp = f" ({solver.AMP.PRECISION})"
        return _CAUSES.format(ratio=ratio, lower=lower, amp=amp)


def _plain(image: dict[str, Any]) -> dict[str, Any]:
    """An image of a batch, in types that any checkpoint may hold."""
    kept = {k: image[k] for k in ("file_name", "image_id", "height", "width", "image") if k in image}
    if "instances" in image:
        kept["boxes"] = image["instances"].gt_boxes.tensor.cpu()
        kept["classes"] = image["instances"].gt_classes.cpu()
        kept["image_size"] = tuple(image["instances"].image_size)
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kept.items()}


@torch.no_grad()
def largest_logit(model: nn.Module, batch: Sequence[dict]) -> str:
    """The largest of a batch, in words; computed again, since to keep those of every step would cost their memory."""
    model = unwrapped(model)
    try:
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        logits, _ = model.head([features[name] for name in model.head_in_features])
        return f"{max(float(level.abs().max()) for level in logits):.3g}" if all_finite(logits) else BROKEN
    except Exception as error:  # another architecture, or no memory left
        return f"unknown ({type(error).__name__})"


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value of any is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
