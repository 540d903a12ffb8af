"""SSDHead against the naive loss, and its scores against a softmax."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from focal_plugin import SSDHead
from focal_plugin.heads import AnchorTargets
from focal_plugin.losses import softmax_focal_loss

pytestmark = pytest.mark.usefixtures("levels")
A = 2
CE = ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1.0", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.0")


def make_head(num_classes=3, **kwargs):
    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=8, stride=16)]
    return SSDHead(input_shape=shapes, num_classes=num_classes, num_anchors=A, conv_dims=[8], **kwargs)


def make_case(num_classes, memory_format=torch.contiguous_format, positives=(5, 0, 1), seed=0):
    """Logits of two levels; an image without a positive is among them, and ignored anchors in each."""
    g = torch.Generator().manual_seed(seed)
    sizes, num_images = ((6, 5), (3, 2)), len(positives)
    logits = [3 * torch.randn(num_images, A * (num_classes + 1), h, w, generator=g) for h, w in sizes]
    logits = [x.contiguous(memory_format=memory_format).requires_grad_() for x in logits]
    r = A * (6 * 5 + 3 * 2)
    labels = torch.full((num_images, r), num_classes)
    for row, num in zip(labels, positives):
        places = torch.randperm(r, generator=g)
        row[places[:num]] = torch.randint(num_classes, (num,), generator=g)
        row[places[num : num + 7]] = -1
    return logits, AnchorTargets(labels, torch.rand(r, 4, generator=g), None, None)


def flatten(logits, num_outputs):
    """(N, R, K + 1), as upstream transposes."""
    levels = [x.view(len(x), A, num_outputs, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in logits]
    return torch.cat(levels, dim=1)


def naive(x, labels, num_classes, anchor_losses, ratio=3):
    """Image by image: all positives, and the hardest negatives by sorting."""
    total, positive_part = 0, 0
    for scores, label in zip(anchor_losses(x, labels), labels):
        positive, negative = scores[(label >= 0) & (label < num_classes)], scores[label == num_classes]
        hardest = negative.sort(descending=True).values[: ratio * max(len(positive), 1)]
        total, positive_part = total + positive.sum() + hardest.sum(), positive_part + positive.sum()
    return total, positive_part


def cross_entropy(x, labels):
    rows = F.cross_entropy(x.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
    return rows.view_as(labels)


@pytest.mark.parametrize("num_classes", [1, 2, 80])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("positives", [(5, 0, 1), (0, 0), (60,)], ids=str)
def test_loss_and_gradient_equal_the_naive_ones(num_classes, memory_format, positives):
    logits, targets = make_case(num_classes, memory_format, positives)
    with EventStorage() as storage:
        out = make_head(num_classes).losses(logits, targets)
        kept = {k: v for k, (v, _) in storage.latest().items()}
    want, part = naive(flatten(logits, num_classes + 1), targets.labels, num_classes, cross_entropy)
    torch.testing.assert_close(out.loss_cls, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss_cls_pos, torch.as_tensor(part), rtol=1e-5, atol=1e-6)
    got, expected = torch.autograd.grad(out.loss_cls, logits), torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    # All boxes are trained, and both losses are divided by the positives: by the model's normaliser.
    assert out.box_mask.sum() == sum(positives)
    assert out.num_examples is None and out.num_boxes is None
    assert kept["ohem/num_pos"] * len(positives) == pytest.approx(sum(positives))
    negatives = [min(3 * max(p, 1), len(row) - p - 7) for p, row in zip(positives, targets.labels)]
    assert kept["ohem/num_neg"] * len(positives) == pytest.approx(sum(negatives))


def test_ratio_and_softmax_focal_loss():
    logits, targets = make_case(3)
    out = make_head(alpha=0.25, gamma=2.0, neg_pos_ratio=1.0).losses(logits, targets)

    def rows(x, labels):
        return softmax_focal_loss(x, labels, alpha=0.25, gamma=2.0)

    want, _ = naive(flatten(logits, 4), targets.labels, 3, rows, ratio=1)
    torch.testing.assert_close(out.loss_cls, want)


@pytest.mark.parametrize("num_classes", [1, 2, 80])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 3), (torch.float32, 200), (torch.bfloat16, 3)])
def test_scores_are_a_softmax(num_classes, dtype, scale):
    x = (scale * torch.randn(2, A * (num_classes + 1), 4, 3)).to(dtype)
    scores = make_head(num_classes).detection_logits(x).sigmoid()
    want = x.view(2, A, num_classes + 1, 4, 3).double().softmax(dim=2)[:, :, :-1].flatten(1, 2)
    torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-12)


def test_scores_of_no_image():
    assert make_head(3).detection_logits(torch.zeros(0, A * 4, 5, 5)).shape == (0, A * 3, 5, 5)


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


def test_from_the_config(tiny_config):
    opts = ("MODEL.FOCAL.HEAD", "SSDHead", *CE, "MODEL.OHEM.NMS_THRESH", "0.7", "MODEL.OHEM.SCOPE", "batch")
    head = build_model(tiny_config(*opts, "MODEL.SSD.NEG_POS_RATIO", "2.0")).head
    assert isinstance(head, SSDHead)
    # MODEL.OHEM is OHEMHead's.
    assert head._mine.keywords["neg_pos_ratio"] == 2.0 and head._mine.keywords["nms_thresh"] == 0
    assert head.scope == "image" and head.normalizer == head.box_loss_on == "positives"
    assert head.cls_score.out_channels == head.bbox_pred.out_channels // 4 * (3 + 1)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.SSD.NEG_POS_RATIO", "0.0", "MODEL.SSD.NEG_POS_RATIO must be a finite number > 0"),
        ("MODEL.FOCAL.LOSS", "focal_star", "SSDHead is a softmax: MODEL.FOCAL.LOSS"),
        ("MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.2, 0.3]", "SSDHead is a softmax: .*MODEL.FOCAL.CLASS_ALPHA"),
    ],
)
def test_bad_values_name_their_key(refused, key, value, message):
    refused(message, "MODEL.FOCAL.HEAD", "SSDHead", *CE, key, value)
