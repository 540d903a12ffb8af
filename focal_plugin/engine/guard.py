"""Stop all workers at once when a loss or gradient breaks, say who, where and why, and save what a replay needs."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase, hooks
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from ..config import load_config
from ..files import atomic_write, printable
from ..scalars import flush_scalars
from .preemption import stop_requested
from .preflight import usual_lr
from .safe_load import load_plain
from .worker_state import unwrap_ddp

logger = logging.getLogger(__name__)

BROKEN = "NaN or infinite"
_CAUSES = """\
The usual causes:
  1. The learning rate is too high{ratio}. Try SOLVER.BASE_LR {lower:.3g}, a longer SOLVER.WARMUP_ITERS, or
     SOLVER.CLIP_GRADIENTS.ENABLED True.
  2. Boxes that are none (of no, negative or endless size, or written as corners): tools/check_dataset.py JSON IMAGES
  3. Numbers too large for the precision{amp}: SOLVER.AMP.ENABLED False, or SOLVER.AMP.PRECISION bfloat16."""


class NonFiniteGuard(HookBase):
    """Look at every step's losses and gradients before the weights are changed, and at whether to stop.

    For the trainer that runs the steps (``DefaultTrainer._trainer``), on all workers: what one of them finds, all learn
    in the same step, by one small tensor. Detectron2 looks at the losses of the main worker and says which step.

    Attributes:
        batch: what the model was trained on last.
        stopping: whether training ends after this step, to be resumed later; the same on all workers.
        finishing: whether this step is the last, though ``SOLVER.MAX_ITER`` says otherwise; the same on all workers.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.cfg, self.looked_at, self.stopping, self.finishing, self._finish = cfg, -1, False, False, False
        self.batch: Sequence[dict] = ()
        self._losses: dict[str, Tensor] = {}
        self._normalizer: Tensor | None = None
        # Functions and no methods, which a deep copy of the model, as for averaged weights, would copy.
        model.register_forward_pre_hook(lambda *args: self._before_forward(*args))
        model.register_forward_hook(lambda *args: self._after_forward(*args))

    def finish(self) -> None:
        """End training after the next step, as if it were the last, on all workers; to be called on any of them."""
        self._finish = True

    def _before_forward(self, model, args):
        if model.training:
            batch = args[0] if args else ()
            is_of_dicts = isinstance(batch, (list, tuple)) and all(isinstance(image, dict) for image in batch)
            self.batch = batch if is_of_dicts else ()
            # The forward pass moves the running mean: a replay has to start from here.
            normalizer = getattr(unwrap_ddp(model), "loss_normalizer", None)
            self._normalizer = normalizer.clone() if isinstance(normalizer, Tensor) else None

    def _after_forward(self, model, args, losses):
        if model.training:
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            self._losses = {name: loss.detach() for name, loss in losses.items() if isinstance(loss, Tensor)}

    def after_backward(self) -> None:
        """Raise a FloatingPointError, on all workers and before the step, if a loss or gradient of any is broken."""
        loss = sum((loss.sum() for loss in self._losses.values()), torch.zeros(()))
        broken = ~torch.isfinite(torch.stack([loss, self._gradient_norm(2.0).to(loss)]))
        bad_loss, bad_gradient = self.exchange(broken)
        if bad_gradient and not bad_loss:
            # The squares of large gradients overflow; their maximum does not, but takes longer.
            broken[1] = ~torch.isfinite(self._gradient_norm(math.inf))
            bad_loss, bad_gradient = self.exchange(broken)
        self.looked_at = self.trainer.iter
        if bad_loss or bad_gradient:
            # One worker's loss has broken the gradients of all.
            raise FloatingPointError(self._report(bool(broken[0 if bad_loss else 1]), loss_is_finite=not bad_loss))
        self._losses = {}

    def _gradient_norm(self, norm_type: float) -> Tensor:
        if isinstance(self.trainer, AMPTrainer) and self.trainer.grad_scaler.is_enabled():
            return torch.zeros(())  # the scaler leaves a broken step out, and scales less
        params = (p for group in self.trainer.optimizer.param_groups for p in group["params"])
        return get_total_norm([p.grad for p in params if p.grad is not None], norm_type, foreach=True)

    def exchange(self, broken: Tensor | None = None) -> tuple[bool, bool]:
        """Learn from all workers whether to stop, and whether a loss or a gradient is broken. A collective call.

        ``broken``: (2,) bool, whether this worker's loss and gradients are; None: neither is looked at.
        """
        broken = torch.zeros(2, dtype=torch.bool) if broken is None else broken
        requests = torch.tensor([stop_requested(), self._finish])
        flags = torch.cat([broken, requests.to(broken.device, non_blocking=True)]).to(torch.uint8)
        if comm.get_world_size() > 1:
            if distributed.get_backend() == "nccl":
                flags = flags.cuda()
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        bad_loss, bad_gradient, self.stopping, self.finishing = map(bool, flags.tolist())
        return bad_loss, bad_gradient

    def _report(self, is_mine: bool, loss_is_finite: bool) -> str:
        """Save the batch of each broken worker; return the message, the same on all workers."""
        flush_scalars()
        facts = self._facts()
        path = self._save(facts) if is_mine else ""
        # On all workers, for norms over all of them.
        facts["largest |logit|"] = largest_logit(self.trainer.model, self.batch)
        workers = comm.all_gather((is_mine, facts, [_name(image) for image in self.batch], path))
        what = "Gradients, not the loss, are" if loss_is_finite else "Loss became"
        lines = [f"{what} infinite or NaN at iteration={self.trainer.iter}!"]
        for rank, (is_broken, facts, names, path) in enumerate(workers):
            if is_broken:
                lines.append(f"Worker {rank} of {len(workers)}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
                lines.append("  images: " + ", ".join(names))
            if path:
                lines.append(f"  saved, with the weights before this step; to look again: tools/replay_loss.py {path}")
        return "\n".join([*lines, self._causes()])

    def _facts(self) -> dict[str, Any]:
        optimizer = self.trainer.optimizer
        group = optimizer.param_groups[hooks.LRScheduler.get_best_param_group_id(optimizer)]
        facts = {name: float(loss.sum()) for name, loss in self._losses.items()}
        facts["learning rate"] = f"{group['lr']:.3g} (SOLVER.BASE_LR {self.cfg.SOLVER.BASE_LR:.3g})"
        logged = get_event_storage().latest()
        for name, title in (("loss_normalizer", "normalizer"), ("num_pos_anchors", "positive anchors per image")):
            if name in logged:
                facts[title] = round(logged[name][0], 3)
        return facts

    def _save(self, facts: dict[str, Any]) -> str:
        """Save the batch and the weights before the step, with the norms' statistics after it; return where, or ""."""
        state = unwrap_ddp(self.trainer.model).state_dict()
        if self._normalizer is not None:
            state["loss_normalizer"] = self._normalizer
        content = {"model": state, "batch": [_plain(image) for image in self.batch], "facts": facts}
        content |= {"iteration": self.trainer.iter, "config": self.cfg.dump()}
        path = os.path.join(self.cfg.OUTPUT_DIR, f"broken_{self.trainer.iter:07d}_worker{comm.get_rank()}.pth")
        try:
            with atomic_write(path, "wb") as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # what broke the loss matters more than a full disk
            logger.warning(f"{path} could not be saved: {error}")
            return ""
        return path

    def _causes(self) -> str:
        solver = self.cfg.SOLVER
        usual, ratio = 1e-3, ""  # more than what AdamW is commonly given
        if solver.OPTIMIZER == "SGD":
            usual = usual_lr(solver)
            ratio = f" for the batch: per image it is {solver.BASE_LR / usual:.3g} times the published schedules'"
        amp = f" ({solver.AMP.PRECISION})" if solver.AMP.ENABLED else " (not likely here: it is float32)"
        return _CAUSES.format(ratio=ratio, lower=min(solver.BASE_LR / 4, usual), amp=amp)


def _name(image: dict[str, Any]) -> str:
    return printable(image.get("file_name", "?"), 300, quotes=False)


def _plain(image: dict[str, Any]) -> dict[str, Any]:
    """Return an image of a batch in types that any checkpoint may hold."""
    kept = {k: image[k] for k in ("file_name", "image_id", "height", "width", "image") if k in image}
    if "instances" in image:
        kept |= {"boxes": image["instances"].gt_boxes.tensor, "classes": image["instances"].gt_classes}
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kept.items()}


@torch.no_grad()
def largest_logit(model: nn.Module, batch: Sequence[dict]) -> str:
    """Return the largest of a batch, in words; computed again, since to keep those of every step would cost memory."""
    model = unwrap_ddp(model)
    try:
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        logits, _ = model.head([features[name] for name in model.head_in_features])
        largest = torch.stack([level.abs().max() for level in logits]).max().item()
        return f"{largest:.3g}" if math.isfinite(largest) else BROKEN
    except Exception as error:  # another architecture, or no memory left
        return f"unknown ({type(error).__name__})"


def replay(path: str, opts: Sequence[str] = ()) -> Iterator[str]:
    """Compute a step again whose loss broke, whole and image by image; yield, by lines, what it was and what it is.

    Args:
        path: a ``broken_*.pth`` of :class:`NonFiniteGuard`.
        opts: ``["KEY", "VALUE", ...]``: what to change in its config, to see whether that helps.

    Raises:
        OSError, ValueError: the file cannot be read or is no such one, or an override is wrong.
    """
    content = load_plain(path)
    missing = {"model", "batch", "facts", "iteration", "config"} - content.keys()
    if missing:
        raise ValueError(f"{path} was not saved by a run whose loss broke: it lacks {', '.join(sorted(missing))}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(str(content["config"]))
        file.flush()
        # The run's OUTPUT_DIR may be one that only its command line could choose; here nothing is written.
        cfg = load_config(file.name, ["OUTPUT_DIR", ".", *opts])
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    batch, model = content["batch"], build_model(cfg).train()
    for image in batch:
        boxes, classes = image.pop("boxes", torch.zeros(0, 4)), image.pop("classes", torch.zeros(0, dtype=torch.long))
        image["instances"] = Instances(image["image"].shape[-2:], gt_boxes=Boxes(boxes), gt_classes=classes)

    def losses_of(images: list[dict]) -> dict[str, Tensor]:
        model.load_state_dict(content["model"])  # each time: a forward pass moves the normalizer
        with EventStorage():
            return model(images)

    yield f"step {content['iteration']}, then: {', '.join(f'{k} {v}' for k, v in content['facts'].items())}"
    model.load_state_dict(content["model"])
    logit = largest_logit(model, batch)
    yield f"now:\n{'largest |logit|':<16} {logit}"
    if logit == BROKEN:  # before the losses, some of which fvcore refuses to compute then
        yield "The logits themselves are not finite: the weights are broken already, and no image is to blame."
    losses = losses_of(batch)
    sum(losses.values()).backward()
    yield from (f"{name:<16} {loss.item():.6g}" for name, loss in losses.items())
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    yield f"{'gradients':<16} " + (f"{BROKEN} in {len(broken)} parameters, {broken[0]} first" if broken else "finite")
    yield "each image alone, its losses divided by a normalizer of its own:"
    for image in batch:
        with torch.no_grad():
            values = ", ".join(f"{name} {loss.item():.6g}" for name, loss in losses_of([image]).items())
        boxes = image["instances"].gt_boxes.tensor
        sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
        smallest = sorted(sides, key=lambda pair: min(pair) if all(map(math.isfinite, pair)) else -math.inf)[:1]
        worst = "".join(f", the smallest {w:.3g} x {h:.3g}" for w, h in smallest)
        yield f"{os.path.basename(_name(image))} {values}, {len(boxes)} boxes{worst}"
