"""Online hard example mining: which anchors of an image, or of a batch, are trained on.

"Each example is scored by its loss, non-maximum suppression (nms) is then applied, and a minibatch is constructed
with the highest-loss examples" (Lin et al. 2017, 5.1, after Shrivastava et al., CVPR 2016). Knows tensors and
boxes, nothing of Detectron2.
"""

import math
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torchvision.ops import box_iou

# Examples compared at a time: the first block answers most calls (128 wanted of 100,000 anchors), the largest
# bounds the memory (a block is compared with itself and with what is kept, never all anchors with all).
_FIRST_BLOCK, _LARGEST_BLOCK = 128, 2048


def mine_hard_examples(
    losses: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    batch_size: int,
    nms_thresh: float,
    neg_pos_ratio: float = 0.0,
    per_label: bool = True,
    groups: Optional[Tensor] = None,
) -> Tensor:
    """The hardest examples left by a greedy NMS whose scores are the losses.

    Exactly what sorting all examples, suppressing greedily and cutting to size would keep. Examples are gone through
    from the hardest down, until enough are kept; only with a ratio and without ``per_label`` that means down to the
    easiest positive, which can be all of them and then takes seconds for 100,000.

    Args:
        losses: (R,) loss of each example; ties are broken by the lower index.
        boxes: (R, 4) XYXY.
        labels: (R,) integers: a class in [0, K), K = ``num_classes`` for background, -1 for never mined.
        num_classes: K.
        batch_size: B, the number of examples to keep at most.
        nms_thresh: an example that overlaps a harder kept one by IoU > this is dropped, as torchvision's nms
            does; <= 0 switches the suppression off.
        neg_pos_ratio: 0 lets positives and negatives compete. r > 0 keeps, after NMS, the p = min(positives,
            ceil(B / (1 + r))) hardest positives and the min(floor(r * max(p, 1)), B - p) hardest negatives.
        per_label: suppress only examples of the same label, background being one (as the original OHEM does).
        groups: (R,) integers, optional: only examples of one group suppress each other, e.g. those of one image
            when the examples of several are pooled.

    Returns:
        (M,) int64 indices of the kept examples, hardest first; M <= B.

    Raises:
        ValueError: if the shapes do not agree or a number is out of range.
    """
    _check(losses, boxes, labels, groups, batch_size, neg_pos_ratio)
    losses, boxes = losses.detach(), boxes.detach()
    order = losses.argsort(descending=True, stable=True)
    order = order[labels[order] >= 0]
    groups = torch.zeros_like(labels) if groups is None else groups
    if per_label:
        groups = groups * (num_classes + 1) + labels

    if neg_pos_ratio <= 0:
        return _hardest(order, boxes, groups, nms_thresh, batch_size)
    max_pos = math.ceil(batch_size / (1 + neg_pos_ratio))
    positive = labels < num_classes

    def num_neg(num_pos: int) -> int:
        return min(math.floor(neg_pos_ratio * max(num_pos, 1)), batch_size - num_pos)

    if per_label or nms_thresh <= 0:
        # No positive suppresses a negative here, so each side is mined alone: easy positives, far down in the
        # common order, then cost nothing.
        pos = _hardest(order[positive[order]], boxes, groups, nms_thresh, max_pos)
        neg = _hardest(order[~positive[order]], boxes, groups, nms_thresh, num_neg(len(pos)))
    else:
        pos, neg = _hardest_of_both(order, boxes, groups, nms_thresh, positive, max_pos, num_neg)
    chosen = torch.zeros_like(positive)
    chosen[torch.cat([pos, neg])] = True
    return order[chosen[order]]


def _hardest(order: Tensor, boxes: Tensor, groups: Tensor, nms_thresh: float, count: int) -> Tensor:
    """The first ``count`` survivors of ``order``."""
    kept, num_kept = [order[:0]], 0
    for _, survivors in _survivors(order, boxes, groups, nms_thresh):
        kept.append(survivors)
        num_kept += len(survivors)
        if num_kept >= count:
            break
    return torch.cat(kept)[:count]


def _hardest_of_both(order, boxes, groups, nms_thresh, positive, max_pos, num_neg) -> tuple[Tensor, Tensor]:
    """The hardest positives and negatives where they suppress each other and so must be gone through together."""
    pos, neg = [order[:0]], [order[:0]]
    num_kept_pos = num_kept_neg = 0
    num_unseen_pos = int(positive[order].sum())
    for block, survivors in _survivors(order, boxes, groups, nms_thresh):
        is_pos = positive[survivors]
        pos.append(survivors[is_pos])
        neg.append(survivors[~is_pos])
        num_kept_pos += len(pos[-1])
        num_kept_neg += len(neg[-1])
        num_unseen_pos -= int(positive[block].sum())
        pos_are_known = num_kept_pos >= max_pos or num_unseen_pos == 0
        if pos_are_known and num_kept_neg >= num_neg(min(num_kept_pos, max_pos)):
            break
    pos = torch.cat(pos)[:max_pos]
    return pos, torch.cat(neg)[: num_neg(len(pos))]


def _survivors(order: Tensor, boxes: Tensor, groups: Tensor, nms_thresh: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Greedy NMS down ``order``, block by block: yields each block and what of it no harder kept example removes."""
    kept, start, size = order[:0], 0, _FIRST_BLOCK
    thresh = _round_down(nms_thresh, boxes)
    while start < len(order):
        block = order[start : start + size]
        start, size = start + size, min(2 * size, _LARGEST_BLOCK)
        survivors = block
        if nms_thresh > 0:
            for harder in kept.split(_LARGEST_BLOCK):
                hit = _overlaps(boxes, groups, harder, survivors, thresh).any(dim=0)
                survivors = survivors[~hit]
            survivors = survivors[_greedy(_overlaps(boxes, groups, survivors, survivors, thresh))]
            kept = torch.cat([kept, survivors])
        yield block, survivors


def _greedy(overlaps: Tensor) -> Tensor:
    """Which of n examples, hardest first, greedy NMS keeps, from the (n, n) matrix of who overlaps whom.

    The greedy result is the one fixed point of "kept unless a harder kept one overlaps it"; the first k entries are
    final after k rounds at the latest. Random losses take a few rounds, long chains of overlaps many.
    """
    harder = overlaps.triu(diagonal=1)
    keep = harder.new_ones(len(harder))
    while True:
        updated = ~(harder & keep[:, None]).any(dim=0)
        if torch.equal(updated, keep):
            return keep
        keep = updated


def _overlaps(boxes: Tensor, groups: Tensor, rows: Tensor, cols: Tensor, thresh: Tensor) -> Tensor:
    same_group = groups[rows][:, None] == groups[cols][None]
    return same_group & (box_iou(boxes[rows], boxes[cols]) > thresh)


def _round_down(thresh: float, boxes: Tensor) -> Tensor:
    """``thresh`` in the boxes' dtype, but never above it.

    torchvision compares a float32 IoU with a double threshold, and on a grid of anchors an IoU of just 0.6 or 0.7
    is common.
    """
    rounded = torch.tensor(thresh, dtype=boxes.dtype)
    if rounded.item() > thresh:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded.to(boxes.device)


def _check(losses, boxes, labels, groups, batch_size, neg_pos_ratio) -> None:
    if losses.dim() != 1 or labels.shape != losses.shape or boxes.shape != (len(losses), 4):
        raise ValueError(
            "losses, boxes and labels must have the shapes (R,), (R, 4) and (R,); got "
            f"{tuple(losses.shape)}, {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if groups is not None and groups.shape != losses.shape:
        raise ValueError(f"groups must have the shape {tuple(losses.shape)}, got {tuple(groups.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= neg_pos_ratio < float("inf"):
        raise ValueError(f"neg_pos_ratio must be a finite number >= 0, got {neg_pos_ratio}")
