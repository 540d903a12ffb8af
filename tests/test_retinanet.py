"""FocalRetinaNet against stock RetinaNet, and on the inputs that break losses; its matcher and its IoU loss."""

import copy
import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from focal_plugin import FocalRetinaNet, add_focal_config
from focal_plugin.retinanet import LowQualityMatcher, iou_loss


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def step(model, batch):
    """Losses, and every parameter's gradient in one vector each."""
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items()}, {n: p.grad for n, p in model.named_parameters()}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()


BOX_LOSSES = [("smooth_l1", 0.0), ("smooth_l1", 0.1), ("giou", 0.0), ("diou", 0.0), ("ciou", 0.0)]


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("box_loss, beta", BOX_LOSSES)
def test_losses_and_gradients_equal_stock(tiny_config, make_batch, box_loss, beta):
    """Over several steps, so that the normalizer's running mean is covered; same seed, so the same weights.

    Stock computes 1 - p_t by subtraction, which costs it digits that the closed form keeps: a gradient further than
    1e-5 from stock's must be nearer than stock's to float64.
    """
    cfg = tiny_config()
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE, cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = box_loss, beta
    # A bias before a norm has no gradient but noise.
    cfg.MODEL.RETINANET.NORM = ""
    ours = build(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    stock = build(cfg)
    exact = copy.deepcopy(ours).double()
    for (name, p), (other, q) in zip(ours.named_parameters(), stock.named_parameters()):
        assert name == other and torch.equal(p, q)
    for seed in range(3):
        batch = make_batch([3, 0, 1], seed=seed)
        got, got_gradients = step(ours, batch)
        want, want_gradients = step(stock, batch)
        _, exact_gradients = step(exact, [{**x, "image": x["image"].double()} for x in batch])
        assert got == pytest.approx(want, rel=1e-5)
        for name, gradient in want_gradients.items():
            error = relative(got_gradients[name], gradient)
            own = relative(got_gradients[name], exact_gradients[name])
            assert error < 1e-5 or own < relative(gradient, exact_gradients[name]), (seed, name, error)
    assert ours.loss_normalizer.item() == pytest.approx(stock.loss_normalizer, rel=1e-6)


def test_stock_state_dict_loads_strictly_and_inference_is_identical(tiny_config, make_batch):
    cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    ours = build(cfg, seed=1).eval()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    stock = build(cfg, seed=2).eval()
    ours.loss_normalizer.fill_(7.0)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert ours.loss_normalizer == 7
    with torch.no_grad():
        for a, b in zip(ours(make_batch([1, 0])), stock(make_batch([1, 0]))):
            a, b = a["instances"], b["instances"]
            assert len(a) == len(b) > 0
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and torch.equal(a.scores, b.scores)
            assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalizer_stays_in_float32_and_is_in_the_checkpoint(tiny_config, tmp_path, dtype):
    model = build(tiny_config("MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.3, 0.999]"))
    model.loss_normalizer.fill_(123.456)
    model.to(dtype)
    assert model.head.cls_score.weight.dtype == dtype
    DetectionCheckpointer(model, str(tmp_path)).save("m")
    fresh = build(tiny_config(), seed=5)
    DetectionCheckpointer(fresh).load(str(tmp_path / "m.pth"))
    for each in (model, fresh):
        assert each.loss_normalizer.dtype == torch.float32 and each.loss_normalizer.item() == pytest.approx(123.456)
    assert torch.equal(model.head.class_alpha, torch.tensor([0.1, 0.3, 0.999]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["focal", "ohem", "ssd"])
def test_autocast_equals_float32(tiny_config, make_batch, head, dtype):
    """The network in 16 bits, the loss in 32: the losses are close, and every gradient is finite and in float32."""
    results = []
    for enabled in (False, True):
        model = build(tiny_config(*HEADS[head]))
        with torch.autocast("cpu", dtype, enabled=enabled):
            results.append(model(make_batch([2, 1])))
        sum(results[-1].values()).backward()
        assert not [name for name, p in model.named_parameters() if not torch.isfinite(p.grad).all()]
    assert_close(results[1], results[0], rtol=0.03, atol=0)  # dtypes, too


RETINANET, OHEM = "MODEL.RETINANET.", "MODEL.OHEM."
CE = (RETINANET + "FOCAL_LOSS_GAMMA", "0.0", RETINANET + "FOCAL_LOSS_ALPHA", "-1.0")
MINED = ("MODEL.FOCAL.HEAD", "OHEMHead", *CE[:2])
POSITIVES = (OHEM + "NORMALIZER", "positives", OHEM + "BOX_LOSS_ON", "positives")
HEADS = {
    "focal": (),
    "ce": CE,
    "star": ("MODEL.FOCAL.LOSS", "focal_star"),
    "class_alpha": ("MODEL.FOCAL.CLASS_ALPHA", "[0.2, 0.5, 0.9]"),
    "iou": (RETINANET + "BBOX_REG_LOSS_TYPE", "iou"),
    "ssd": ("MODEL.FOCAL.HEAD", "SSDHead", *CE),
    "ohem": MINED,
    "ohem 1:3": (*MINED, OHEM + "NEG_POS_RATIO", "3.0"),
    "ohem batch": (*MINED, OHEM + "SCOPE", "batch", OHEM + "RANK_BY", "cls+box", OHEM + "NMS_BOXES", "predicted"),
    "ohem positives": (*MINED, *POSITIVES, OHEM + "NMS_THRESH", "0.0"),
    "ohem all": (*MINED, OHEM + "BATCH_SIZE", "1000000", OHEM + "NMS_PER_LABEL", "False"),
    "ohem giou": (*MINED, OHEM + "RANK_BY", "cls+box", RETINANET + "BBOX_REG_LOSS_TYPE", "giou"),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("normalizer", ["ema", "batch"])
@pytest.mark.parametrize("objects", [[2, 0], [0, 0], [1]], ids=str)
def test_every_input_gives_finite_losses_that_reach_every_parameter(tiny_config, make_batch, head, normalizer, objects):
    model = build(tiny_config("MODEL.FOCAL.NORMALIZER", normalizer, *HEADS[head]))
    losses, gradients = step(model, make_batch(objects))
    assert set(losses) == {"loss_cls", "loss_box_reg"} and all(map(math.isfinite, losses.values()))
    assert not [name for name, g in gradients.items() if g is None or not torch.isfinite(g).all()]
    assert any(objects) or losses["loss_box_reg"] == 0


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("num_images", [0, 2])
def test_all_ignored_and_no_image_at_all(tiny_config, head, num_images):
    model = build(tiny_config(*HEADS[head]))
    features = [torch.rand(num_images, 32, s, s) for s in (16, 8, 4)]
    logits, deltas = model.head(features[: len(model.head_in_features)])
    anchors = model.anchor_generator(features)
    boxes = [torch.zeros(sum(map(len, anchors)), 4)] * num_images
    losses = model.losses(anchors, logits, [torch.full((len(b),), -1) for b in boxes], deltas, boxes)
    assert all(v.item() == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_classification_loss_is_logged_in_its_two_parts(case, head):
    """The positive part against the loss of all anchors but the background ones, which are made to be ignored."""
    model, (anchors, logits, labels, deltas, boxes) = case(*HEADS[head], "MODEL.FOCAL.NORMALIZER", "batch")
    logits = [x - 4 for x in logits]  # as the prior does: positives are among the hardest
    with EventStorage() as storage:
        loss = model.losses(anchors, logits, labels, deltas, boxes)["loss_cls"].item()
    positive, negative = (storage.latest()[f"loss_cls/{part}"][0] for part in ("positive", "negative"))
    assert positive > 0 and negative > 0 and positive + negative == pytest.approx(loss, rel=1e-5)
    if "ohem" not in head and head != "ssd":  # what is ignored changes what else is mined: test_heads.py
        labels = [y.masked_fill(y == model.num_classes, -1) for y in labels]
        loss = model.losses(anchors, logits, labels, deltas, boxes)["loss_cls"]  # and without an event storage
        assert loss.item() == pytest.approx(positive, rel=1e-5)


def test_normalizers(case):
    (ema, outputs), (per_batch, _) = (case("MODEL.FOCAL.NORMALIZER", n) for n in ("ema", "batch"))
    losses = ema.losses(*outputs)
    with EventStorage() as storage:
        want = per_batch.losses(*outputs)
    num_pos = 3 * storage.latest()["num_pos_anchors"][0]
    assert ema.loss_normalizer.item() == pytest.approx(0.9 * 100 + 0.1 * num_pos)
    for key in losses:
        assert losses[key].item() * ema.loss_normalizer.item() == pytest.approx(want[key].item() * num_pos, rel=1e-5)
    for running_mean in (True, False):  # never asks a tensor for its value
        assert ema.to("meta")._normalizer(torch.zeros((), dtype=torch.long, device="meta"), running_mean).is_meta


@pytest.fixture
def case(tiny_config, make_batch):
    """case("KEY", "VALUE", ...): the model, and anchors, head outputs, labels and boxes of one batch."""

    def make(*opts):
        model, batch = build(tiny_config(*opts)), make_batch([3, 0, 2], size=(96, 96))
        features = [torch.rand(3, 32, s, s) for s in (12, 6, 3)]
        anchors = model.anchor_generator(features)
        labels, boxes = model.label_anchors(anchors, [x["instances"] for x in batch])
        torch.manual_seed(4)
        logits = [torch.randn(3, 4 * model.head.num_outputs, *f.shape[-2:]) for f in features]
        deltas = [0.3 * torch.randn(3, 4 * 4, *f.shape[-2:]) for f in features]
        return model, (anchors, logits, labels, deltas, boxes)

    return make


def losses_of_outputs(model, outputs, cast):
    """Return the losses of a case whose head outputs ``cast`` has changed, and the gradients of these outputs."""
    anchors, logits, labels, deltas, boxes = outputs
    logits, deltas = ([cast(x).detach().requires_grad_() for x in levels] for levels in (logits, deltas))
    model.loss_normalizer.fill_(100.0)
    losses = model.losses(anchors, logits, labels, deltas, boxes)
    return losses, torch.autograd.grad(sum(losses.values()), logits + deltas)


def losses_and_what_the_head_saw(model, outputs):
    """Return the model's losses, what its head is given, and what the head returns."""
    seen, losses = [], model.head.losses
    model.head.losses = lambda x, targets: seen.extend([targets, losses(x, targets)]) or seen[1]
    return model.losses(*outputs), *seen


def stock_box_loss(model, outputs, mask, *kind):
    anchors, _, _, deltas, boxes = outputs
    flat = [permute_to_N_HWA_K(x, 4) for x in deltas]
    return _dense_box_regression_loss(anchors, model.box2box_transform, flat, boxes, mask, *kind).item()


@pytest.mark.parametrize("box_loss, beta", BOX_LOSSES)
def test_box_losses_and_boxes_given_to_the_head_are_upstreams(case, box_loss, beta):
    keys = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss, "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", str(beta))
    model, outputs = case(*HEADS["ohem"], *keys)
    _, targets, _ = losses_and_what_the_head_saw(model, outputs)
    foreground, got = (targets.labels >= 0) & (targets.labels < 3), targets.box_losses()
    assert foreground.sum() > 5 and (got[~foreground] == 0).all()
    for i, j in foreground.nonzero().tolist()[:10]:
        only = torch.zeros_like(foreground)
        only[i, j] = True
        assert got[i, j].item() == pytest.approx(stock_box_loss(model, outputs, only, box_loss, beta), rel=1e-5)
    for i, image_deltas in enumerate(torch.cat([permute_to_N_HWA_K(x, 4) for x in outputs[3]], dim=1)):
        want = model.box2box_transform.apply_deltas(image_deltas, Boxes.cat(outputs[0]).tensor)
        assert torch.equal(targets.pred_boxes()[i], want)


@pytest.mark.parametrize("normalizer", ["selected", "positives"])
@pytest.mark.parametrize("box_loss_on", ["selected", "positives"])
def test_ohem_divides_by_what_its_keys_say(case, normalizer, box_loss_on):
    opts = ("MODEL.OHEM.NORMALIZER", normalizer, "MODEL.OHEM.BOX_LOSS_ON", box_loss_on, "MODEL.OHEM.BATCH_SIZE", "200")
    model, outputs = case(*HEADS["ohem"], *opts, "MODEL.OHEM.NMS_THRESH", "0.0")
    got, targets, out = losses_and_what_the_head_saw(model, outputs)
    num_pos = ((targets.labels >= 0) & (targets.labels < 3)).sum().item()
    running_mean = 0.9 * 100 + 0.1 * num_pos
    assert model.loss_normalizer.item() == pytest.approx(running_mean)
    num_examples = 600 if normalizer == "selected" else running_mean
    assert got["loss_cls"].item() == pytest.approx(out.loss_cls.item() / num_examples, rel=1e-5)
    box_loss = stock_box_loss(model, outputs, out.box_mask)
    num_boxes = out.box_mask.sum().item() if box_loss_on == "selected" else running_mean
    assert 0 < out.box_mask.sum() < num_pos or box_loss_on == "positives"
    assert got["loss_box_reg"].item() == pytest.approx(box_loss / num_boxes, rel=1e-5)


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["focal", "ohem", "ohem batch", "ssd"])
def test_layout_and_dtype_of_the_heads_outputs(case, head, dtype):
    """As under autocast: the losses are those of the rounded outputs in float32, the gradients keep the dtype."""
    model_and_outputs = case(*HEADS[head])
    want, want_gradients = losses_of_outputs(*model_and_outputs, lambda x: x.to(dtype).float())
    for layout in (torch.contiguous_format, torch.channels_last):
        cast = {"dtype": dtype, "memory_format": layout}
        losses, gradients = losses_of_outputs(*model_and_outputs, lambda x, cast=cast: x.to(**cast))
        assert_close(losses, want, rtol=1e-6, atol=1e-9)
        assert_close(gradients, tuple(x.to(dtype) for x in want_gradients))  # dtypes, too


THRESHOLDS = [0.4, 0.5], [0, -1, 1]


def test_matcher_equals_detectron2s_but_for_the_floor():
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [100, 100, 104, 104], [500, 500, 510, 510]]))
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 11], [98, 98, 108, 108], [0, 3, 10, 13], [300, 300, 310, 310]]))
    iou = pairwise_iou(boxes, anchors)
    assert iou[1, 1] == pytest.approx(0.16)
    # The third box touches no anchor: Detectron2 then makes a match of every anchor of IoU 0.
    assert Matcher(*THRESHOLDS, allow_low_quality_matches=True)(iou)[1].tolist() == [1, 1, 1, 1]
    assert LowQualityMatcher(*THRESHOLDS)(iou)[1].tolist() == [1, 1, 1, 0]
    assert LowQualityMatcher(*THRESHOLDS, 0.4)(iou)[1].tolist() == [1, 0, 1, 0]
    for seed in range(20):
        boxes = Boxes(random_boxes(60, seed, size=80))
        iou = pairwise_iou(boxes[:6], boxes)
        want = Matcher(*THRESHOLDS, allow_low_quality_matches=True)(iou)
        assert all(torch.equal(a, b) for a, b in zip(LowQualityMatcher(*THRESHOLDS)(iou), want))


def random_boxes(num, seed, size=12):
    g = torch.Generator().manual_seed(seed)
    xy = torch.randint(0, size, (num, 2), generator=g)
    return torch.cat([xy, xy + torch.randint(1, size, (num, 2), generator=g)], dim=1).double()


def test_iou_loss_equals_counting_pixels_finite_differences_and_giou_where_the_union_is_a_box():
    a, b = random_boxes(50, 0), random_boxes(50, 1)
    for x, y, loss in zip(a.int().tolist(), b.int().tolist(), iou_loss(a, b, eps=0.0)):
        one, other = ({(i, j) for i in range(x0, x1) for j in range(y0, y1)} for x0, y0, x1, y1 in (x, y))
        assert loss.item() == pytest.approx(1 - len(one & other) / len(one | other), abs=1e-12)
    b[:, :2], b[:, 2:] = a[:, :2], torch.stack([(a[:, 0] + a[:, 2]) / 2, a[:, 3]], dim=1)
    assert_close(iou_loss(b, a), giou_loss(b, a))
    a, b = random_boxes(20, 2), random_boxes(20, 3) + 0.5  # half pixels apart, where no edge meets another
    assert gradcheck(iou_loss, (a.requires_grad_(), b.requires_grad_()))
    assert iou_loss(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    point = torch.ones(1, 4, requires_grad=True)  # a box without area
    loss = iou_loss(point, torch.full((1, 4), 2.0)).sum()
    loss.backward()
    assert loss == 1 and torch.isfinite(point.grad).all()


def test_without_a_cfg(tiny_config, make_batch):
    """@configurable: explicit arguments, a stock head refused; nor with one that lacks the plugin's keys."""
    cfg = tiny_config()
    del cfg.MODEL["FOCAL"]
    with pytest.raises(ValueError, match="add_focal_config"):
        build_model(cfg)
    add_focal_config(cfg)
    model = build(cfg)
    names = ("backbone", "head_in_features", "anchor_generator", "box2box_transform", "anchor_matcher", "num_classes")
    parts = {name: getattr(model, name) for name in names} | {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    again = FocalRetinaNet(head=model.head, normalizer="batch", **parts)
    assert torch.isfinite(sum(again(make_batch([1])).values()))
    for wrong in ({"focal_loss_alpha": 0.7}, {"focal_loss_gamma": 0.0}, {"num_classes": 80}):
        with pytest.raises(ValueError, match=next(iter(wrong)) + "=.* but the head"):
            FocalRetinaNet(head=model.head, **{**parts, **wrong})
    with pytest.raises(TypeError, match="Identity has no method losses"):
        FocalRetinaNet(head=nn.Identity(), **parts)
