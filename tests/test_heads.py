"""What the heads train on, from the outside: against naive selections and losses, the registry, bad values."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from focal_plugin import FocalHead, OHEMHead, SSDHead
from focal_plugin.heads import AnchorTargets
from focal_plugin.losses import sigmoid_focal_loss, softmax_focal_loss
from focal_plugin.mining import mine_hard_examples

pytestmark = pytest.mark.usefixtures("levels")
K, A = 3, 2
SIZES = (6, 5), (3, 2)
R = A * (6 * 5 + 3 * 2)


def make_head(cls=OHEMHead, num_classes=K, **kwargs):
    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=8, stride=16)]
    return cls(input_shape=shapes, num_classes=num_classes, num_anchors=A, conv_dims=[8], **kwargs)


def make_case(num_images=2, seed=0, num_classes=K, num_outputs=K, background=0.7):
    """Logits of two levels, and targets of R anchors."""
    g = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(num_images, A * num_outputs, h, w, generator=g) for h, w in SIZES]
    labels = torch.randint(-1, num_classes + 1, (num_images, R), generator=g)
    labels[(torch.rand(labels.shape, generator=g) < background) & (labels >= 0)] = num_classes
    xy = torch.randint(0, 30, (R, 2), generator=g).float()
    anchors = torch.cat([xy, xy + torch.randint(5, 20, (R, 2), generator=g)], dim=1)
    box_losses = torch.rand(labels.shape, generator=g) * 5 * ((labels >= 0) & (labels < num_classes))
    pred_boxes = anchors + torch.randint(0, 8, (num_images, R, 4), generator=g)
    return logits, AnchorTargets(labels, anchors, lambda: box_losses, lambda: pred_boxes)


def flatten(logits, num_outputs=K):
    """Return (N, R, num_outputs), as Detectron2 transposes."""
    levels = [x.view(len(x), A, num_outputs, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in logits]
    return torch.cat(levels, dim=1)


def test_focal_head_equals_the_loss_over_transposed_logits_and_labels_out_of_range_are_refused():
    logits, targets = make_case()
    out = make_head(FocalHead, alpha=0.3, gamma=1.5).losses(logits, targets)
    want = sigmoid_focal_loss(flatten(logits), targets.labels, 0.3, 1.5, "sum")
    assert_close(out.loss_cls, want, rtol=1e-6, atol=0)
    assert torch.equal(out.box_mask, (targets.labels >= 0) & (targets.labels < K))
    assert out.num_examples is None
    targets.labels[1, 5] = K + 1
    for head in (FocalHead, OHEMHead):
        with pytest.raises(ValueError, match=r"labels must be in \[-1, 3\].*got values from -1 to 4"):
            make_head(head).losses(logits, targets)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("rank_by", ["cls", "cls+box"])
@pytest.mark.parametrize("nms_boxes", ["anchors", "predicted"])
@pytest.mark.parametrize("nms", [(0.0, True), (3.0, True), (0.0, False), (3.0, False)], ids=str)
@pytest.mark.parametrize("normalizer", ["selected", "positives"])
@pytest.mark.parametrize("box_loss_on", ["selected", "positives"])
def test_ohem_trains_on_what_the_naive_selection_keeps(scope, rank_by, nms_boxes, normalizer, box_loss_on, nms):
    logits, targets = make_case(seed=1)
    labels, (ratio, nms_per_label) = targets.labels, nms
    options = {"nms_thresh": 0.4, "neg_pos_ratio": ratio}
    keys = {"scope": scope, "rank_by": rank_by, "nms_boxes": nms_boxes, "nms_per_label": nms_per_label}
    head = make_head(ohem_batch_size=12, normalizer=normalizer, box_loss_on=box_loss_on, **keys, **options)
    leaves = [x.requires_grad_() for x in logits]
    with EventStorage() as storage:
        out = head.losses(leaves, targets)

    per_anchor = sigmoid_focal_loss(flatten(logits), labels, -1.0, 0.0).sum(-1)
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

    assert_close(out.loss_cls, per_anchor[kept].sum(), rtol=1e-6, atol=0)
    foreground = (labels >= 0) & (labels < K)
    assert (out.num_examples is None) if normalizer == "positives" else out.num_examples == kept.sum()
    if box_loss_on == "selected":
        assert torch.equal(out.box_mask, foreground & kept) and out.num_boxes == out.box_mask.sum()
    else:
        assert torch.equal(out.box_mask, foreground) and out.num_boxes is None
    logged = {key: value for key, (value, _) in storage.latest().items()}
    assert 2 * logged["ohem/num_pos"] == (kept & foreground).sum()
    assert 2 * (logged["ohem/num_pos"] + logged["ohem/num_neg"]) == kept.sum()
    for name, anchors in (("kept", kept), ("dropped", (labels >= 0) & ~kept)):
        assert logged[f"ohem/loss_{name}"] == pytest.approx(ranks[anchors].mean().item(), rel=1e-5)
    # Only the kept anchors have a gradient.
    out.loss_cls.backward()
    assert torch.equal((flatten([x.grad for x in leaves]) != 0).any(-1), kept)


def test_ohem_of_everything_is_cross_entropy_and_of_a_focal_loss_warns(caplog):
    logits, targets = make_case(seed=2)
    out = make_head(ohem_batch_size=10**6, nms_thresh=0.0).losses(logits, targets)
    want = make_head(FocalHead, alpha=-1.0, gamma=0.0).losses(logits, targets)
    assert_close((out.loss_cls, out.box_mask), (want.loss_cls, want.box_mask))
    assert out.num_examples == (targets.labels >= 0).sum() and not caplog.text
    make_head(gamma=2.0)
    assert "FOCAL_LOSS_GAMMA 0.0" in caplog.text


CHOICES = r"must be one of (image, batch|cls, cls\+box|anchors, predicted|selected, positives)"
BAD_VALUES = {
    "must be one of .*FocalHead, OHEMHead": ["FOCAL.HEAD FocalHed"],
    "must be one of focal, focal_star": ["FOCAL.LOSS ghm"],
    CHOICES: [f"OHEM.{key} x" for key in ("SCOPE", "RANK_BY", "NMS_BOXES", "NORMALIZER", "BOX_LOSS_ON")],
    "must be (ema or batch|smooth_l1, iou)": ["FOCAL.NORMALIZER sum", "RETINANET.BBOX_REG_LOSS_TYPE l2"],
    r"must be in \[0, 1\]": ["RETINANET.FOCAL_LOSS_ALPHA 1.5", "FOCAL.MIN_LOW_QUALITY_IOU 1.5"],
    "must be a finite number >= 0": ["RETINANET.FOCAL_LOSS_GAMMA -2.0", "OHEM.NEG_POS_RATIO -1.0"],
    "must be a finite number( > 0)?, got": ["FOCAL.STAR_BETA nan", "SSD.NEG_POS_RATIO 0.0"],
    "must be (between 0 and 1|an IoU)": ["RETINANET.PRIOR_PROB 0.0", "OHEM.NMS_THRESH 1.5"],
    "must be at least 1": ["OHEM.BATCH_SIZE 0"],
    "must have one value a class: 3 expected, got 1": ["FOCAL.CLASS_ALPHA [0.5]"],
    r"must hold numbers in \[0, 1\]": ["FOCAL.CLASS_ALPHA [0.5,1.5,0.1]"],
}


@pytest.mark.parametrize("setting, message", [(text, key) for key, texts in BAD_VALUES.items() for text in texts])
def test_bad_values_name_their_key(refused, setting, message):
    key, value = f"MODEL.{setting}".split()
    head = {"OHEM": "OHEMHead", "SSD": "SSDHead"}.get(key.split(".")[1], "FocalHead")
    refused(f"{key} {message}", "MODEL.FOCAL.HEAD", head, key, value)


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


CE = ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1.0", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.0")


def naive_ssd(x, labels, num_classes, anchor_losses, ratio):
    """Image by image: all positives, and the hardest negatives by sorting."""
    total, positive_part = 0, 0
    for scores, label in zip(anchor_losses(x, labels), labels):
        positive, negative = scores[(label >= 0) & (label < num_classes)], scores[label == num_classes]
        hardest = negative.sort(descending=True).values[: ratio * max(len(positive), 1)]
        total, positive_part = total + positive.sum() + hardest.sum(), positive_part + positive.sum()
    return total, positive_part


@pytest.mark.parametrize("options", [{}, {"alpha": 0.25, "gamma": 2.0, "neg_pos_ratio": 1.0}], ids=["ce", "focal"])
@pytest.mark.parametrize("num_classes", [1, 2, 80])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("background", [0.0, 0.97, 1.0])
def test_ssd_loss_and_gradient_equal_the_naive_ones(options, num_classes, memory_format, background):
    ratio = int(options.get("neg_pos_ratio", 3))
    logits, targets = make_case(3, 0, num_classes, num_classes + 1, background)
    labels, logits = targets.labels, [x.contiguous(memory_format=memory_format).requires_grad_() for x in logits]
    labels[1][labels[1] >= 0] = num_classes  # an image without a positive
    with EventStorage() as storage:
        out = make_head(SSDHead, num_classes, **options).losses(logits, targets)
    anchor_losses = partial(softmax_focal_loss, alpha=0.25, gamma=2.0)
    if not options:
        anchor_losses = lambda x, y: F.cross_entropy(x.transpose(1, 2), y.clamp(min=0), reduction="none")  # noqa: E731
    want, part = naive_ssd(flatten(logits, num_classes + 1), labels, num_classes, anchor_losses, ratio)
    gradients = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (out.loss_cls, want))
    assert_close((out.loss_cls, out.loss_cls_pos), (want, torch.as_tensor(part)), rtol=1e-5, atol=1e-6)
    assert_close(*gradients, rtol=1e-5, atol=1e-6)

    # All boxes are trained, and both losses are divided by the positives: by the model's normaliser.
    positives = ((labels >= 0) & (labels < num_classes)).sum(1)
    assert out.box_mask.sum() == positives.sum() and out.num_examples is None and out.num_boxes is None
    negatives = torch.minimum(ratio * positives.clamp(min=1), (labels == num_classes).sum(1))
    for name, kept in (("pos", positives), ("neg", negatives)):
        assert storage.latest()[f"ohem/num_{name}"][0] * 3 == pytest.approx(kept.sum().item())


@pytest.mark.parametrize("num_classes", [1, 2, 80])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 3), (torch.float32, 200), (torch.bfloat16, 3)])
def test_scores_are_a_softmax(num_classes, dtype, scale):
    x = (scale * torch.randn(2, A * (num_classes + 1), 4, 3)).to(dtype)
    scores = make_head(SSDHead, num_classes).detection_logits(x).sigmoid()
    want = x.view(2, A, num_classes + 1, 4, 3).double().softmax(dim=2)[:, :, :-1].flatten(1, 2)
    assert_close(scores.double(), want, rtol=1e-5, atol=1e-12)
    assert make_head(SSDHead).detection_logits(torch.zeros(0, A * 4, 5, 5)).shape == (0, A * 3, 5, 5)


def test_detections_are_those_of_the_softmax(tiny_config, make_batch):
    """The whole model: scores of what is detected are softmax scores of what the head gives in training."""
    torch.manual_seed(0)
    model = build_model(tiny_config("MODEL.FOCAL.HEAD", "SSDHead", *CE, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"))
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    batch = [{k: v for k, v in x.items() if k == "image"} for x in make_batch([2, 1], size=(128, 128))]
    model.eval()
    with torch.no_grad():
        found = [x["instances"] for x in model(batch)]
        features = model.backbone(model.preprocess_image(batch).tensor)
        model.head.train()
        logits, _ = model.head([features[f] for f in model.head_in_features])
    levels = [x.view(2, -1, 4, *x.shape[-2:]).softmax(dim=2)[:, :, :-1].flatten(1) for x in logits]
    scores = torch.cat(levels, dim=1)
    for instances, all_scores in zip(found, scores):
        assert len(instances) > 0 and (instances.scores > 0.3).all()
        assert (instances.scores.max() - all_scores.max()).abs() < 1e-6
        assert all((all_scores - s).abs().min() < 1e-6 for s in instances.scores)


def test_from_the_config(tiny_config, refused):
    for key, value in (("MODEL.FOCAL.LOSS", "focal_star"), ("MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.2, 0.3]")):
        refused(f"SSDHead is a softmax: .*{key}", "MODEL.FOCAL.HEAD", "SSDHead", key, value)
    opts = ("MODEL.FOCAL.HEAD", "SSDHead", *CE, "MODEL.OHEM.NMS_THRESH", "0.7", "MODEL.OHEM.SCOPE", "batch")
    head = build_model(tiny_config(*opts, "MODEL.SSD.NEG_POS_RATIO", "2.0")).head
    assert isinstance(head, SSDHead)
    # MODEL.OHEM is OHEMHead's.
    assert head._mine.keywords["neg_pos_ratio"] == 2.0 and head._mine.keywords["nms_thresh"] == 0
    assert head.scope == "image" and head.normalizer == head.box_loss_on == "positives"
    assert head.cls_score.out_channels == head.bbox_pred.out_channels // 4 * (3 + 1)
