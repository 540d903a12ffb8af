"""Make the losses that are compared, ours, Detectron2's, fvcore's and torchvision's, and the batches to do it on.

Shapes: N images, A anchors per position, K classes, levels of Hi x Wi; R = sum(Hi * Wi * A) anchors per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import fvcore.nn
import torch
import torch.nn.functional as F
import torchvision.ops
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from focal_plugin.heads import AnchorTargets, FocalHead, OHEMHead
from focal_plugin.losses import sigmoid_focal_loss

ALPHA, GAMMA = 0.25, 2.0
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STOCK = "stock RetinaNet"
FUNCTIONS = {
    "fvcore": fvcore.nn.sigmoid_focal_loss,
    "fvcore jit": fvcore.nn.sigmoid_focal_loss_jit,
    "torchvision": torchvision.ops.sigmoid_focal_loss,
    "focal_plugin, dense": sigmoid_focal_loss,
}
"""``f(logits, targets, alpha, gamma, reduction)`` of dense targets that have the logits' shape and dtype."""


class Case(NamedTuple):
    """A batch: ``num_images`` of ``image_size`` (height, width), one level for each of ``strides``."""

    num_images: int
    image_size: tuple[int, int]
    strides: tuple[int, ...]
    num_anchors: int
    num_classes: int

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        return [tuple(math.ceil(side / stride) for side in self.image_size) for stride in self.strides]


CASES = {
    # What a GPU gets in the paper's schedule: COCO at 800 px.
    "large": Case(2, (800, 1216), (8, 16, 32, 64, 128), num_anchors=9, num_classes=80),
    "small": Case(16, (128, 128), (8, 16, 32), num_anchors=3, num_classes=10),
}


@dataclass
class Batch:
    """What a head's loss starts from."""

    case: Case
    logits: list[Tensor]  # per level, (N, A * K, Hi, Wi), leaves of the graph
    labels: Tensor  # (N, R) int64 in [-1, K]
    anchors: Tensor  # (R, 4) XYXY in pixels
    normalizer: float  # the number of positives


def make_batch(case: Case, dtype: torch.dtype, memory_format: str, device: torch.device) -> Batch:
    """Draw logits as after initialization (prior 0.01) with noise; 20 positives an image, 0.1 % ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = []
    for size in case.level_sizes:
        x = torch.randn(case.num_images, case.num_anchors * case.num_classes, *size, generator=generator) - math.log(99)
        logits.append(x.to(device, dtype).contiguous(memory_format=FORMATS[memory_format]).requires_grad_())
    # Detectron2's anchors, in three aspect ratios and A / 3 scales an octave.
    octaves = case.num_anchors // 3
    sizes = [[4 * stride * 2 ** (i / octaves) for i in range(octaves)] for stride in case.strides]
    boxes = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=list(case.strides), offset=0.0)
    anchors = cat([level.tensor for level in boxes([torch.empty(1, 1, h, w) for h, w in case.level_sizes])])
    labels = torch.full((case.num_images, len(anchors)), case.num_classes)
    for row in labels:
        chosen = torch.randperm(len(row), generator=generator)[: 20 + max(len(row) // 1000, 1)]
        row[chosen[:20]] = torch.randint(case.num_classes, (20,), generator=generator)
        row[chosen[20:]] = -1
    return Batch(case, logits, labels.to(device), anchors.to(device), 20.0 * case.num_images)


class Candidate(NamedTuple):
    """A way to compute the loss: the forward pass, to a scalar, and whose gradients are computed."""

    name: str
    loss: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    def step(self) -> tuple[Tensor, ...]:
        """Return the gradients, from one forward and backward pass."""
        return torch.autograd.grad(self.loss(), self.leaves)


def head_candidates(batch: Batch, compiled: bool = False) -> list[Candidate]:
    """Return those that start from what a head returns; ``compiled``: ours under ``torch.compile``, too."""
    losses = {
        "focal_plugin": head_loss(FocalHead, batch),
        "focal_plugin OHEM": head_loss(OHEMHead, batch),
        STOCK: lambda: stock_loss(batch),
    }
    if compiled:
        losses["focal_plugin, torch.compile"] = torch.compile(head_loss(FocalHead, batch), dynamic=False)
    return [Candidate(name, loss, batch.logits) for name, loss in losses.items()]


def head_loss(head_class: type[FocalHead], batch: Batch) -> Callable[[], Tensor]:
    """Return the loss of one of our heads, by its default alpha and gamma, over what it or the batch normalizes by."""
    case = batch.case
    shapes = [ShapeSpec(channels=1, stride=s) for s in case.strides]
    # Its convolutions are never run: the smallest that Detectron2 builds.
    head = head_class(input_shape=shapes, num_classes=case.num_classes, num_anchors=case.num_anchors, conv_dims=[1])
    targets = AnchorTargets(
        labels=batch.labels,
        anchors=batch.anchors,
        box_losses=lambda: torch.zeros_like(batch.labels, dtype=torch.float32),
        pred_boxes=lambda: batch.anchors.expand(case.num_images, -1, -1),
    )
    head.to(batch.anchors.device)

    def loss() -> Tensor:
        out = head.losses(batch.logits, targets)
        return out.loss_cls / (batch.normalizer if out.num_examples is None else out.num_examples)

    return loss


def stock_loss(batch: Batch) -> Tensor:
    """Compute the ``loss_cls`` of Detectron2's ``RetinaNet``, from what its head returns, step by step as it does it.

    What it holds until its ``losses`` returns, the transposed logits and the integer one-hot, is held here too.
    """
    num_classes = batch.case.num_classes
    pred_logits = [permute_to_N_HWA_K(x, num_classes) for x in batch.logits]
    valid = batch.labels >= 0
    one_hot = F.one_hot(batch.labels[valid], num_classes=num_classes + 1)[:, :-1]
    logits, target = cat(pred_logits, dim=1)[valid], one_hot.to(pred_logits[0].dtype)
    loss = fvcore.nn.sigmoid_focal_loss_jit(logits, target, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    return loss / batch.normalizer


def function_candidates(batch: Batch) -> list[Candidate]:
    """Return the functions alone, at their best: (N * R, K) logits and dense targets of their dtype are there."""
    num_classes = batch.case.num_classes
    logits = cat([permute_to_N_HWA_K(x.detach(), num_classes) for x in batch.logits], dim=1).flatten(0, 1).contiguous()
    # Ignored anchors train as if they were of class 0: the functions know none.
    target = F.one_hot(batch.labels.flatten().clamp(min=0), num_classes + 1)[:, :-1].to(logits.dtype).contiguous()
    logits.requires_grad_()
    return [
        Candidate(name, lambda f=function: f(logits, target, ALPHA, GAMMA, "sum"), [logits])
        for name, function in FUNCTIONS.items()
    ]
