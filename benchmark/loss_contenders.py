"""The losses that the benchmark compares, ours and upstream's, and the batches it compares them on.

Each goes from the outputs of a RetinaNet head to their gradients. Shapes: N images, A anchors per position, K classes,
levels of Hi x Wi; R = sum(Hi * Wi * A) anchors per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

from .loss_counters import compile_and_count, kernel_bytes

ALPHA, GAMMA = 0.25, 2.0
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STOCK = "stock RetinaNet"
# TorchScript optimises a function by what it saw it do the first times.
_JIT_WARM_UPS = 3


@dataclass(frozen=True)
class Case:
    """A batch: ``num_images`` of ``image_size`` (height, width), one level for each of ``strides``."""

    num_images: int
    image_size: tuple[int, int]
    strides: tuple[int, ...]
    num_anchors: int
    num_classes: int

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        height, width = self.image_size
        return [(math.ceil(height / s), math.ceil(width / s)) for s in self.strides]

    @property
    def num_logits(self) -> int:
        return self.num_images * self.num_anchors * self.num_classes * sum(h * w for h, w in self.level_sizes)


CASES = {
    # What a GPU gets in the paper's schedule: COCO at 800 px.
    "large": Case(2, (800, 1216), (8, 16, 32, 64, 128), num_anchors=9, num_classes=80),
    "small": Case(16, (128, 128), (8, 16, 32), num_anchors=3, num_classes=10),
}


@dataclass
class Batch:
    """What a head's loss starts from.

    Attributes:
        case: of which size.
        logits: per level, (N, A * K, Hi, Wi), leaves of the graph.
        labels: (N, R) int64 in [-1, K].
        anchors: (R, 4) XYXY in pixels.
        normalizer: the number of positives.
    """

    case: Case
    logits: list[Tensor]
    labels: Tensor
    anchors: Tensor
    normalizer: float

    def level_labels(self) -> list[Tensor]:
        """Per level, (N, A, Hi, Wi): views."""
        sizes = [h * w * self.case.num_anchors for h, w in self.case.level_sizes]
        levels = zip(self.labels.split(sizes, dim=1), self.case.level_sizes)
        return [y.reshape(len(y), h, w, self.case.num_anchors).permute(0, 3, 1, 2) for y, (h, w) in levels]


def make_batch(case: Case, dtype: torch.dtype, memory_format: str, device: torch.device, seed: int = 0) -> Batch:
    """Logits as after initialisation (prior 0.01) with noise; 20 positives per image, 0.1% ignored, else background."""
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for height, width in case.level_sizes:
        shape = (case.num_images, case.num_anchors * case.num_classes, height, width)
        x = torch.randn(shape, generator=generator) - math.log(99)
        x = x.to(device=device, dtype=dtype).contiguous(memory_format=FORMATS[memory_format])
        logits.append(x.requires_grad_())
    anchors = _make_anchors(case)
    labels = torch.full((case.num_images, len(anchors)), case.num_classes)
    num_positive, num_ignored = 20, max(len(anchors) // 1000, 1)
    for row in labels:
        chosen = torch.randperm(len(row), generator=generator)[: num_positive + num_ignored]
        row[chosen[:num_positive]] = torch.randint(case.num_classes, (num_positive,), generator=generator)
        row[chosen[num_positive:]] = -1
    return Batch(case, logits, labels.to(device), anchors.to(device), float(num_positive * case.num_images))


def _make_anchors(case: Case) -> Tensor:
    """(R, 4): upstream's, in three aspect ratios and A / 3 scales an octave."""
    octaves = case.num_anchors // 3
    sizes = [[4 * stride * 2 ** (i / octaves) for i in range(octaves)] for stride in case.strides]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=list(case.strides), offset=0.0
    )
    return cat([boxes.tensor for boxes in generator([torch.empty(1, 1, h, w) for h, w in case.level_sizes])])


@dataclass
class Contender:
    """A way to compute the loss.

    Attributes:
        name: of the row.
        loss: the forward pass, to a scalar.
        leaves: whose gradients are computed.
        unfused: the same forward pass without TorchScript, which on a GPU fuses operations that then do not show.
        kernel: bytes a logit that our fused GPU kernels move unseen, where they are used; the first contender that
            has one moves nearly nothing else.
        num_bytes: bytes a step, where something else than the operations tells.
        countable: the operations of a step can be counted.
        warm_ups: steps before anything is measured.
        start_up: seconds of the first step.
        skipped: why it does not run; else "".
        note: for the reader of the row.
    """

    name: str
    loss: Callable[[], Tensor] | None
    leaves: Sequence[Tensor] = ()
    unfused: Callable[[], Tensor] | None = None
    kernel: float = 0.0
    num_bytes: int | None = None
    countable: bool = True
    warm_ups: int = 1
    start_up: float | None = None
    skipped: str = ""
    note: str = ""

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self, loss: Callable[[], Tensor] | None = None) -> list[Tensor]:
        """One forward and backward pass, of ``loss`` if given; returns the gradients."""
        (loss or self.loss)().backward()
        return [leaf.grad for leaf in self.leaves]


def head_contenders(batch: Batch) -> list[Contender]:
    """Those that start from what a head returns."""
    case, x = batch.case, batch.logits
    moved = kernel_bytes(x[0].element_size(), case.num_classes, label_size=1 if case.num_classes < 128 else 2)
    # The ranking of OHEM is the kernel's forward pass; what follows it are ATen operations.
    return [
        Contender("focal_plugin", head_loss(FocalHead, batch), x, kernel=sum(moved)),
        Contender("focal_plugin OHEM", head_loss(OHEMHead, batch), x, kernel=moved.forward),
        _compiled(batch),
        Contender(
            STOCK,
            lambda: stock_loss(batch, fvcore.nn.sigmoid_focal_loss_jit),
            x,
            unfused=lambda: stock_loss(batch, fvcore.nn.sigmoid_focal_loss),
            warm_ups=_JIT_WARM_UPS,
        ),
    ]


def head_loss(head_class: type[FocalHead], batch: Batch) -> Callable[[], Tensor]:
    """The loss of one of our heads, with its default alpha and gamma, over what it or the batch normalises by."""
    case = batch.case
    shapes = [ShapeSpec(channels=1, stride=s) for s in case.strides]
    # Its convolutions are never run: the smallest that upstream builds.
    head = head_class(input_shape=shapes, num_classes=case.num_classes, num_anchors=case.num_anchors, conv_dims=[1]).to(
        batch.anchors.device
    )
    targets = AnchorTargets(
        labels=batch.labels,
        anchors=batch.anchors,
        box_losses=lambda: torch.zeros_like(batch.labels, dtype=torch.float32),
        pred_boxes=lambda: batch.anchors.expand(case.num_images, -1, -1),
    )

    def loss() -> Tensor:
        out = head.losses(batch.logits, targets)
        return out.loss_cls / (batch.normalizer if out.num_examples is None else out.num_examples)

    return loss


def stock_loss(batch: Batch, focal_loss: Callable[..., Tensor]) -> Tensor:
    """The ``loss_cls`` of upstream's ``RetinaNet``, from what its head returns, step by step as it does it.

    What upstream holds until its ``losses`` returns, the transposed logits and the integer one-hot, is held here too.
    """
    num_classes = batch.case.num_classes
    pred_logits = [permute_to_N_HWA_K(x, num_classes) for x in batch.logits]
    valid = batch.labels >= 0
    one_hot = F.one_hot(batch.labels[valid], num_classes=num_classes + 1)[:, :-1]
    loss = focal_loss(
        cat(pred_logits, dim=1)[valid], one_hot.to(pred_logits[0].dtype), alpha=ALPHA, gamma=GAMMA, reduction="sum"
    )
    return loss / batch.normalizer


def _compiled(batch: Batch) -> Contender:
    name, labels = "focal_plugin, torch.compile", batch.level_labels()

    def levels_loss(logits: list[Tensor]) -> Tensor:
        pairs = zip(logits, labels)
        views = ((x.view(len(x), -1, batch.case.num_classes, *x.shape[2:]), y) for x, y in pairs)
        return sum(sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum", class_dim=2) for x, y in views) / batch.normalizer

    result = compile_and_count(levels_loss, lambda f: f(batch.logits).backward())
    if result.function is None:
        return Contender(name, None, skipped=result.error)
    return Contender(
        name,
        lambda: result.function(batch.logits),
        batch.logits,
        num_bytes=result.num_bytes,
        countable=False,
        start_up=result.start_up,
        note="bytes as Inductor counts them" if result.num_bytes else "Inductor gives no count of bytes",
    )


def dense_contenders(batch: Batch) -> list[Contender]:
    """The functions alone at their best: (N * R, K) logits and dense targets of their dtype are there already."""
    num_classes = batch.case.num_classes
    with torch.no_grad():
        logits = cat([permute_to_N_HWA_K(x, num_classes) for x in batch.logits], dim=1).flatten(0, 1).contiguous()
        target = F.one_hot(batch.labels.flatten().clamp(min=0), num_classes + 1)
        # Ignored rows train as if they were class 0: the functions know no ignored rows.
        target = target[:, :-1].to(logits.dtype).contiguous()
    logits.requires_grad_()

    def make(name: str, function: Callable[..., Tensor], **more) -> Contender:
        return Contender(name, lambda: function(logits, target, ALPHA, GAMMA, "sum"), [logits], **more)

    def unfused() -> Tensor:
        return fvcore.nn.sigmoid_focal_loss(logits, target, ALPHA, GAMMA, "sum")

    return [
        make("fvcore", fvcore.nn.sigmoid_focal_loss),
        make("fvcore jit", fvcore.nn.sigmoid_focal_loss_jit, unfused=unfused, warm_ups=_JIT_WARM_UPS),
        make("torchvision", torchvision.ops.sigmoid_focal_loss),
        make("focal_plugin, dense", sigmoid_focal_loss),
    ]
