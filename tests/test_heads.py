"""What the heads train on, from the outside: OHEMHead against a naive selection, the registry, bad values."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from focal_plugin import RETINANET_HEAD_REGISTRY, FocalHead, OHEMHead
from focal_plugin.heads import AnchorTargets
from focal_plugin.losses import sigmoid_focal_loss
from focal_plugin.mining import mine_hard_examples

pytestmark = pytest.mark.usefixtures("levels")
K, A = 3, 2


def make_head(cls=OHEMHead, **kwargs):
    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=8, stride=16)]
    return cls(input_shape=shapes, num_classes=K, num_anchors=A, conv_dims=[8], **kwargs)


def make_case(num_images=2, seed=0):
    """Logits of two levels, and targets of R = 2 * (6 * 5 + 3 * 2) anchors."""
    g = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(num_images, A * K, h, w, generator=g) for h, w in ((6, 5), (3, 2))]
    r = A * (6 * 5 + 3 * 2)
    labels = torch.randint(-1, K + 1, (num_images, r), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.7] = K
    xy = torch.randint(0, 30, (r, 2), generator=g).float()
    anchors = torch.cat([xy, xy + torch.randint(5, 20, (r, 2), generator=g)], dim=1)
    box_losses = torch.rand(labels.shape, generator=g) * 5 * ((labels >= 0) & (labels < K))
    pred_boxes = anchors + torch.randint(0, 8, (num_images, r, 4), generator=g)
    return logits, AnchorTargets(labels, anchors, lambda: box_losses, lambda: pred_boxes)


def flatten(logits):
    """(N, R, K), as upstream transposes."""
    levels = [x.view(len(x), A, K, *x.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(len(x), -1, K) for x in logits]
    return torch.cat(levels, dim=1)


def test_focal_head_equals_the_loss_over_transposed_logits():
    logits, targets = make_case()
    out = make_head(FocalHead, alpha=0.3, gamma=1.5).losses(logits, targets)
    want = sigmoid_focal_loss(flatten(logits), targets.labels, 0.3, 1.5, "sum")
    torch.testing.assert_close(out.loss_cls, want, rtol=1e-6, atol=0)
    assert torch.equal(out.box_mask, (targets.labels >= 0) & (targets.labels < K))
    assert out.num_examples is None


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("rank_by", ["cls", "cls+box"])
@pytest.mark.parametrize("nms_boxes", ["anchors", "predicted"])
@pytest.mark.parametrize("nms_per_label", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 3.0])
@pytest.mark.parametrize("normalizer", ["selected", "positives"])
@pytest.mark.parametrize("box_loss_on", ["selected", "positives"])
def test_ohem_trains_on_what_the_naive_selection_keeps(
    scope, rank_by, nms_boxes, nms_per_label, ratio, normalizer, box_loss_on
):
    logits, targets = make_case(seed=1)
    labels = targets.labels
    options = {"nms_thresh": 0.4, "neg_pos_ratio": ratio}
    head = make_head(
        ohem_batch_size=12,
        scope=scope,
        rank_by=rank_by,
        nms_boxes=nms_boxes,
        nms_per_label=nms_per_label,
        normalizer=normalizer,
        box_loss_on=box_loss_on,
        **options,
    )
    leaves = [x.requires_grad_() for x in logits]
    out = head.losses(leaves, targets)

    flat = flatten(logits)
    per_anchor = sigmoid_focal_loss(flat, labels, -1.0, 0.0).sum(-1)
    ranks = (per_anchor + targets.box_losses() if rank_by == "cls+box" else per_anchor).detach()
    boxes = targets.pred_boxes() if nms_boxes == "predicted" else targets.anchors.expand(2, -1, -1)
    options.update(num_classes=K, batch_size=12, per_label=nms_per_label)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    if scope == "image":
        for i in range(2):
            kept[i, mine_hard_examples(ranks[i], boxes[i], labels[i], **options)] = True
    else:
        image = torch.arange(2)[:, None].expand_as(labels).flatten()
        pooled = mine_hard_examples(ranks.flatten(), boxes.flatten(0, 1), labels.flatten(), groups=image, **options)
        kept.view(-1)[pooled] = True

    torch.testing.assert_close(out.loss_cls, per_anchor[kept].sum(), rtol=1e-6, atol=0)
    foreground = (labels >= 0) & (labels < K)
    assert (out.num_examples is None) if normalizer == "positives" else out.num_examples == kept.sum()
    if box_loss_on == "selected":
        assert torch.equal(out.box_mask, foreground & kept) and out.num_boxes == out.box_mask.sum()
    else:
        assert torch.equal(out.box_mask, foreground) and out.num_boxes is None
    # Only the kept anchors have a gradient.
    out.loss_cls.backward()
    assert torch.equal((flatten([x.grad for x in leaves]) != 0).any(-1), kept)


def test_ohem_of_everything_is_cross_entropy():
    logits, targets = make_case(seed=2)
    out = make_head(ohem_batch_size=10**6, nms_thresh=0.0).losses(logits, targets)
    want = make_head(FocalHead, alpha=-1.0, gamma=0.0).losses(logits, targets)
    torch.testing.assert_close(out.loss_cls, want.loss_cls)
    assert torch.equal(out.box_mask, want.box_mask)
    assert out.num_examples == (targets.labels >= 0).sum()


def test_ohem_logs_what_it_kept():
    logits, targets = make_case(seed=3)
    with EventStorage() as storage:
        out = make_head(ohem_batch_size=10, nms_thresh=0.0).losses(logits, targets)
        logged = {k: v for k, (v, _) in storage.latest().items()}
    assert 2 * (logged["ohem/num_pos"] + logged["ohem/num_neg"]) == 20
    assert 2 * logged["ohem/num_pos"] == out.box_mask.sum()
    ranks = sigmoid_focal_loss(flatten(logits), targets.labels, -1.0, 0.0).sum(-1)
    total, num_valid = ranks.sum().item(), (targets.labels >= 0).sum().item()
    assert logged["ohem/loss_kept"] == pytest.approx(out.loss_cls.item() / 20, rel=1e-5)
    assert logged["ohem/loss_dropped"] == pytest.approx((total - out.loss_cls.item()) / (num_valid - 20), rel=1e-5)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.FOCAL.HEAD", "FocalHed", "MODEL.FOCAL.HEAD must be one of .*FocalHead, OHEMHead"),
        ("MODEL.FOCAL.LOSS", "ghm", "MODEL.FOCAL.LOSS must be one of focal, focal_star"),
        ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", "1.5", r"MODEL.RETINANET.FOCAL_LOSS_ALPHA must be in \[0, 1\]"),
        ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", "-2.0", "MODEL.RETINANET.FOCAL_LOSS_GAMMA must be a finite number >= 0"),
        ("MODEL.RETINANET.PRIOR_PROB", "0.0", "MODEL.RETINANET.PRIOR_PROB must be between 0 and 1"),
        ("MODEL.FOCAL.STAR_BETA", "nan", "MODEL.FOCAL.STAR_BETA must be a finite number"),
        ("MODEL.FOCAL.CLASS_ALPHA", "[0.5]", "MODEL.FOCAL.CLASS_ALPHA must have one value a class: 3 expected, got 1"),
        ("MODEL.FOCAL.CLASS_ALPHA", "[0.5, 1.5, 0.1]", r"MODEL.FOCAL.CLASS_ALPHA must hold numbers in \[0, 1\]"),
        ("MODEL.OHEM.BATCH_SIZE", "0", "MODEL.OHEM.BATCH_SIZE must be at least 1"),
        ("MODEL.OHEM.NMS_THRESH", "1.5", "MODEL.OHEM.NMS_THRESH must be an IoU"),
        ("MODEL.OHEM.NEG_POS_RATIO", "-1.0", "MODEL.OHEM.NEG_POS_RATIO must be a finite number >= 0"),
        ("MODEL.OHEM.SCOPE", "gpu", "MODEL.OHEM.SCOPE must be one of image, batch"),
        ("MODEL.OHEM.RANK_BY", "box", r"MODEL.OHEM.RANK_BY must be one of cls, cls\+box"),
        ("MODEL.OHEM.NMS_BOXES", "gt", "MODEL.OHEM.NMS_BOXES must be one of anchors, predicted"),
        ("MODEL.OHEM.NORMALIZER", "ema", "MODEL.OHEM.NORMALIZER must be one of selected, positives"),
        ("MODEL.OHEM.BOX_LOSS_ON", "all", "MODEL.OHEM.BOX_LOSS_ON must be one of selected, positives"),
    ],
)
def test_bad_values_name_their_key(refused, key, value, message):
    head = "OHEMHead" if ".OHEM." in key else "FocalHead"
    refused(message, "MODEL.FOCAL.HEAD", head, key, value)


def test_ohem_on_a_focal_loss_warns(caplog):
    make_head(gamma=2.0)
    assert "FOCAL_LOSS_GAMMA 0.0" in caplog.text


def test_own_head_is_found_by_name(tiny_config, make_batch):
    @RETINANET_HEAD_REGISTRY.register()
    class HalfHead(FocalHead):
        def losses(self, pred_logits, targets):
            out = super().losses(pred_logits, targets)
            return out._replace(loss_cls=out.loss_cls / 2)

    try:
        results = []
        for name in ("FocalHead", "HalfHead"):
            torch.manual_seed(0)
            results.append(build_model(tiny_config("MODEL.FOCAL.HEAD", name))(make_batch([1])))
        assert results[1]["loss_cls"].item() == pytest.approx(results[0]["loss_cls"].item() / 2)
    finally:
        RETINANET_HEAD_REGISTRY._obj_map.pop("HalfHead")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("class_alpha", [(), (0.1, 0.5, 0.9)], ids=["alpha", "class alpha"])
@pytest.mark.parametrize("loss", ["focal", "focal_star"])
def test_focal_loss_never_asks_for_a_value(loss, class_alpha, memory_format):
    """On tensors without data every .item(), nonzero and boolean index fails: what makes a host wait for its GPU."""
    logits, targets = make_case()
    leaves = [x.to("meta").contiguous(memory_format=memory_format).requires_grad_() for x in logits]
    head = make_head(FocalHead, loss=loss, class_alpha=class_alpha).to("meta")
    out = head.losses(leaves, AnchorTargets(targets.labels.to("meta"), targets.anchors, None, None))
    out.loss_cls.backward()
    assert all(x.grad.stride() == x.stride() for x in leaves)
    with pytest.raises(RuntimeError, match="meta"):
        out.loss_cls.item()


def test_own_classification_loss_is_what_ohem_ranks_by():
    class Mine(OHEMHead):
        def classification_loss(self, logits, labels):
            return sigmoid_focal_loss(logits, labels, 0.25, 1.0).sum(dim=-1)

    logits, targets = make_case(seed=4)
    got = make_head(Mine, ohem_batch_size=9).losses(logits, targets)
    want = make_head(ohem_batch_size=9, alpha=0.25, gamma=1.0).losses(logits, targets)
    torch.testing.assert_close(got.loss_cls, want.loss_cls)
    assert torch.equal(got.box_mask, want.box_mask)


@pytest.mark.parametrize("head", [FocalHead, OHEMHead])
def test_labels_out_of_range_are_refused(head):
    logits, targets = make_case()
    targets.labels[1, 5] = K + 1
    with pytest.raises(ValueError, match=r"labels must be in \[-1, 3\].*got values from -1 to 4"):
        make_head(head).losses(logits, targets)
