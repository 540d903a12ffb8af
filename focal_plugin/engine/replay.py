"""Another look at a step whose loss broke, from what :class:`~focal_plugin.engine.guard.LossGuard` has saved of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import load_config
from .guard import BROKEN, all_finite, largest_logit
from .safe_load import load_plain


@dataclass
class Replay:
    """What a broken step gave when it was computed again.

    Attributes:
        iteration: of the run.
        facts: what the run reported then.
        losses: of the batch, now.
        largest_logit: in words.
        logits_are_broken: whether any is NaN or infinite.
        broken_gradients: names of the parameters whose gradient is NaN or infinite.
        images: per image: its name, its losses alone (divided by the same normaliser), its boxes, the worst of them.
    """

    iteration: int
    facts: dict[str, Any]
    losses: dict[str, float]
    largest_logit: str
    logits_are_broken: bool
    broken_gradients: list[str]
    images: list[tuple[str, dict[str, float], int, str]]


def replay(path: str, opts: Sequence[str] = ()) -> Replay:
    """Computes the step again.

    Args:
        path: a ``broken_*.pth``.
        opts: ``["KEY", "VALUE", ...]``: what to change in its config, to see whether that helps.

    Raises:
        ValueError: the file is no such one, or an override is wrong.
        OSError: it cannot be read.
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
    batch = [_image(saved) for saved in content["batch"]]
    model = build_model(cfg)
    model.train()
    losses = _losses(model, content["model"], batch)
    sum(losses.values()).backward()
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not all_finite([p.grad])]
    logits = largest_logit(model, batch)
    return Replay(
        iteration=content["iteration"],
        facts=content["facts"],
        losses={name: float(loss) for name, loss in losses.items()},
        largest_logit=logits,
        logits_are_broken=logits == BROKEN,
        broken_gradients=broken,
        images=[_look_at(cfg, model, content["model"], image) for image in batch],
    )


def _losses(model: nn.Module, state: dict, batch: list[dict]) -> dict[str, torch.Tensor]:
    model.load_state_dict(state)  # each time: a forward pass moves the normaliser
    with EventStorage():
        return model(batch)


def _look_at(cfg: CfgNode, model: nn.Module, state: dict, image: dict) -> tuple[str, dict[str, float], int, str]:
    with torch.no_grad():
        losses = {name: float(loss) for name, loss in _losses(model, state, [image]).items()}
    boxes = image["instances"].gt_boxes.tensor
    sides = boxes[:, 2:] - boxes[:, :2]
    worst = ""
    if len(boxes):
        at = int(torch.where(torch.isfinite(sides).all(1), sides.min(1).values, -torch.inf).argmin())
        worst = "x ".join(f"{side:.3g} " for side in sides[at].tolist()).strip()
    return image.get("file_name", "?"), losses, len(boxes), worst


def _image(saved: dict[str, Any]) -> dict[str, Any]:
    """An input of the model again."""
    saved = dict(saved)
    instances = Instances(saved.pop("image_size", saved["image"].shape[-2:]))
    instances.gt_boxes = Boxes(saved.pop("boxes", torch.zeros(0, 4)))
    instances.gt_classes = saved.pop("classes", torch.zeros(0, dtype=torch.long))
    return {**saved, "instances": instances}
