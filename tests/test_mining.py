"""mine_hard_examples against the naive algorithm: full sort, greedy NMS over everything, then the top B."""

import itertools
import math

import pytest
import torch
from torchvision.ops import nms

from focal_plugin import mining
from focal_plugin.mining import mine_hard_examples


def naive(losses, boxes, labels, num_classes, batch_size, nms_thresh, neg_pos_ratio, per_label, groups=None):
    order = [i for i in sorted(range(len(losses)), key=lambda i: (-losses[i].item(), i)) if labels[i] >= 0]
    if nms_thresh > 0:
        order = naive_nms(order, boxes, labels, nms_thresh, per_label, groups)
    if neg_pos_ratio <= 0:
        return order[:batch_size]
    pos, neg = [i for i in order if labels[i] < num_classes], [i for i in order if labels[i] == num_classes]
    num_pos = min(len(pos), math.ceil(batch_size / (1 + neg_pos_ratio)))
    num_neg = min(math.floor(neg_pos_ratio * max(num_pos, 1)), batch_size - num_pos)
    chosen = {*pos[:num_pos], *neg[:num_neg]}
    return [i for i in order if i in chosen]


def naive_nms(order, boxes, labels, nms_thresh, per_label, groups):
    kept, sets = set(), {}
    for i in order:
        key = (int(groups[i]) if groups is not None else 0, int(labels[i]) if per_label else 0)
        sets.setdefault(key, []).append(i)
    for members in sets.values():
        # Ranks as scores: torchvision must not have to break ties.
        scores = torch.arange(len(members), 0, -1, dtype=boxes.dtype)
        kept.update(members[j] for j in nms(boxes[members], scores, nms_thresh).tolist())
    return [i for i in order if i in kept]


def examples(num, num_classes, generator, tied, background=0.9):
    """Boxes on a coarse grid, so that IoUs of exactly 0.3, 0.5, 0.6 and boxes without area occur."""
    xy = torch.randint(0, 40, (num, 2), generator=generator).float()
    boxes = torch.cat([xy, xy + torch.randint(0, 20, (num, 2), generator=generator)], dim=1)
    losses = torch.randint(0, 20, (num,), generator=generator).float() if tied else torch.rand(num, generator=generator)
    labels = torch.randint(-1, num_classes + 1, (num,), generator=generator)
    labels[torch.rand(num, generator=generator) < background] = num_classes
    return losses, boxes, labels


OPTIONS = list(itertools.product([1, 16, 128], [0.0, 0.3, 0.5, 0.6, 0.7], [0.0, 0.3, 1.0, 3.0], [True, False]))


@pytest.mark.parametrize("num_classes", [1, 3, 80])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [0, 1, 60, 400])
def test_equals_naive_for_every_option(num_classes, tied, size):
    generator = torch.Generator().manual_seed(size + num_classes + tied)
    arguments = examples(size, num_classes, generator, tied)
    for batch_size, nms_thresh, ratio, per_label in OPTIONS:
        options = {"num_classes": num_classes, "batch_size": batch_size, "nms_thresh": nms_thresh}
        options |= {"neg_pos_ratio": ratio, "per_label": per_label}
        assert mine_hard_examples(*arguments, **options).tolist() == naive(*arguments, **options), options


@pytest.mark.parametrize("per_label", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("size, background, num_groups", [(9000, 0.99, 1), (300, 0.4, 4)], ids=str)
def test_equals_naive_over_many_blocks_and_over_groups(per_label, ratio, size, background, num_groups):
    """Enough examples, and enough suppressed, that several blocks are gone through; groups suppress only their own."""
    generator = torch.Generator().manual_seed(7)
    arguments = examples(size, 3, generator, False, background)
    options = {"num_classes": 3, "batch_size": 512, "nms_thresh": 0.3, "neg_pos_ratio": ratio, "per_label": per_label}
    options["groups"] = torch.randint(0, num_groups, (size,), generator=generator) if num_groups > 1 else None
    assert mine_hard_examples(*arguments, **options).tolist() == naive(*arguments, **options)


def test_no_matrix_of_all_pairs(monkeypatch):
    """At 100,000 examples it would take 10 GB; the largest comparison is bounded, and most are never looked at."""
    sizes = []
    overlaps = mining._overlaps

    def spy(boxes, groups, rows, cols, thresh):
        sizes.append(len(rows) * len(cols))
        return overlaps(boxes, groups, rows, cols, thresh)

    monkeypatch.setattr(mining, "_overlaps", spy)
    torch.manual_seed(5)
    xy, losses, labels = 1000 * torch.rand(100_000, 2), torch.rand(100_000), torch.full((100_000,), 4)
    boxes = torch.cat([xy, xy + 30], dim=1)
    assert len(mine_hard_examples(losses, boxes, labels, num_classes=4, batch_size=128, nms_thresh=0.5)) == 128
    assert max(sizes) <= mining._LARGEST_BLOCK**2
    assert sum(sizes) < 10**6  # of 10**10 pairs


def test_takes_no_part_in_the_graph_and_all_ignored_keeps_nothing():
    losses, boxes, labels = torch.rand(10, requires_grad=True), torch.rand(10, 4, requires_grad=True), torch.arange(10)
    kept = mine_hard_examples(losses, boxes, labels, num_classes=10, batch_size=5, nms_thresh=0.0)
    assert kept.tolist() == losses.detach().argsort(descending=True)[:5].tolist()
    kept = mine_hard_examples(losses, boxes, torch.full((10,), -1), num_classes=2, batch_size=4, nms_thresh=0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


def test_bad_arguments_are_named():
    for change, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"neg_pos_ratio": -1.0}, "neg_pos_ratio must be"),
        ({"boxes": torch.rand(3, 4)}, r"shapes \(R,\)"),
        ({"groups": torch.zeros(2)}, "groups must have the shape"),
    ):
        arguments = {"losses": torch.rand(5), "boxes": torch.rand(5, 4), "labels": torch.zeros(5, dtype=torch.long)}
        options = {"num_classes": 1, "batch_size": 3, "nms_thresh": 0.5}
        with pytest.raises(ValueError, match=message):
            mine_hard_examples(**{**arguments, **options, **change})
