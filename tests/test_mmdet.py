"""FocalPluginLoss against mmdet's own focal loss, brute force where that is wrong, and inside mmdet's RetinaNet."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from focal_plugin.config import config_dir
from focal_plugin.losses import sigmoid_focal_loss_star

N, C = 12, 3


def has_operators():
    return importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec("mmcv._ext") is not None


@pytest.fixture(scope="module")
def registry():
    pytest.importorskip("mmdet")
    importlib.import_module("focal_plugin.mmdet")
    return importlib.import_module("mmdet.registry").MODELS


@pytest.fixture(scope="module")
def ours(registry):
    return registry.module_dict["FocalPluginLoss"]


@pytest.fixture(scope="module")
def theirs(registry):
    """mmdet's focal_loss.py. Without mmcv's compiled operators its package cannot be imported, but the file can."""
    if has_operators():
        return importlib.import_module("mmdet.models.losses.focal_loss")
    package, operators = ModuleType("mmdet_losses"), ModuleType("mmcv.ops")
    package.__path__ = [str(Path(sys.modules["mmdet"].__file__).parent / "models" / "losses")]
    operators.sigmoid_focal_loss = None  # the CUDA kernel, which is not called on a CPU
    with mock.patch.dict(sys.modules, {"mmdet_losses": package, "mmcv.ops": operators}):
        return importlib.import_module("mmdet_losses.focal_loss")


def make_case(num_classes=C, scale=3.0, dtype=torch.float64, n=N, channels=None):
    g = torch.Generator().manual_seed(0)
    pred = scale * torch.randn(n, channels or num_classes, generator=g, dtype=torch.float64)
    target = torch.randint(0, num_classes + 1, (n,), generator=g)
    return pred.to(dtype).requires_grad_(), target


def make_weight(kind, num_classes=C):
    shapes = {"row": (N,), "column": (N, 1), "entry": (N, num_classes), "flat": (N * num_classes,)}
    if kind is None:
        return None
    weight = torch.rand(shapes[kind], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.where(weight < 0.3, 0.0, weight)


def value_and_grad(loss, pred, *args, **kwargs):
    out = loss(pred, *args, **kwargs)
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, pred, upstream)[0]


# ------------------------------ where mmdet's is right


@pytest.mark.parametrize(
    "reduction, avg_factor",
    [("mean", None), ("mean", 7.0), ("mean", 0.0), ("mean", torch.tensor(5.0)), ("sum", None), ("none", None)],
)
@pytest.mark.parametrize("kind", [None, "row", "column", "entry", "flat"])
@pytest.mark.parametrize("num_classes", [1, 2, 80])
def test_equals_mmdets(ours, theirs, num_classes, kind, reduction, avg_factor):
    pred, target = make_case(num_classes)
    args = target, make_weight(kind, num_classes), avg_factor
    options = {"gamma": 2.0, "alpha": 0.3, "loss_weight": 1.7}
    expected = value_and_grad(theirs.FocalLoss(**options, reduction=reduction), pred, *args)
    # Once as the constructor's reduction, once as the call's.
    for loss, override in ((ours(**options, reduction=reduction), None), (ours(**options), reduction)):
        actual = value_and_grad(loss, pred, *args, reduction_override=override)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0 if avg_factor == 0 else 1e-14)


@pytest.mark.parametrize("kind", [None, "row", "entry"])
def test_dense_targets(ours, theirs, kind):
    pred, target = make_case()
    one_hot = F.one_hot(target, C + 1)[:, :C].double()
    expected = value_and_grad(theirs.FocalLoss(), pred, one_hot, make_weight(kind))
    for dense in (one_hot, one_hot.long()):
        torch.testing.assert_close(value_and_grad(ours(), pred, dense, make_weight(kind)), expected)


def test_none_takes_an_avg_factor_and_leaves_it(ours, theirs):
    pred, target = make_case()
    args = pred, target, None, 5.0, "none"
    torch.testing.assert_close(ours()(*args), theirs.FocalLoss()(*args))
    for loss in (ours(), theirs.FocalLoss()):
        with pytest.raises(ValueError, match=r"avg_factor can.*not be used with reduction=.sum"):
            loss(pred, target, None, 5.0, "sum")


# ------------------------------ where it is not


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_easy_logits(ours, theirs, gamma, dtype, rtol):
    pred, target = make_case(scale=40.0, dtype=dtype)
    pred = pred.detach().clamp(-60, 60).requires_grad_()
    loss, grad = value_and_grad(ours(gamma=gamma, alpha=0.3), pred, target)
    x = pred.detach().double().requires_grad_()
    present = F.one_hot(target, C + 1)[:, :C].bool()
    s = torch.where(present, -x, x)
    alpha = torch.where(present, torch.tensor(0.3, dtype=x.dtype), torch.tensor(1 - 0.3, dtype=x.dtype))
    entries = alpha * torch.sigmoid(s) ** gamma * F.softplus(s, threshold=100)
    expected = entries.mean()
    (expected_grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(grad.double(), 0.5 * expected_grad, rtol=rtol, atol=1e-30)
    if gamma < 1 and dtype == torch.float32:  # which is what this class is for
        assert value_and_grad(theirs.FocalLoss(gamma=gamma), pred, target)[1].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "targets, kind",
    [
        *((targets, kind) for targets in ("labels", "dense") for kind in ("row", "column", "entry", "flat")),
        *(("softmax", kind) for kind in ("row", "column")),
    ],
)
def test_weight_0_ignores_whatever_the_logit_is(ours, targets, kind, bad):
    use_sigmoid = targets != "softmax"
    pred, target = make_case(channels=C if use_sigmoid else C + 1)
    weight = make_weight(kind)
    weight.view(N, -1)[0] = 0  # a whole row, for every kind of weight
    loss = ours(use_sigmoid)
    gone = (weight.view(N, -1) == 0).expand_as(pred)
    assert gone.any() and not gone.all()
    poisoned = pred.detach().masked_fill(gone, bad).requires_grad_()
    labels = target.clone()
    if targets != "dense":
        labels[gone.all(dim=1)] = 255  # neither does it matter what the label is
    if targets == "dense":
        target = labels = F.one_hot(target, C + 1)[:, :C].double()
    for reduction in ("mean", "none"):
        expected = value_and_grad(loss, pred, target, weight, reduction_override=reduction)
        actual = value_and_grad(loss, poisoned, labels, weight, reduction_override=reduction)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert actual[1][gone].eq(0).all() and actual[1][~gone].ne(0).all()


def test_label_minus_1_is_ignored_as_weight_0_is(ours):
    pred, target = make_case()
    weight = make_weight("row")
    expected = value_and_grad(ours(), pred, target, (weight > 0).double())
    actual = value_and_grad(ours(), pred, target.masked_fill(weight == 0, -1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_integers(ours, dtype):
    pred, target = make_case()
    args = make_weight("row"), 3.0
    assert ours()(pred, target.to(dtype), *args) == ours()(pred, target, *args)


# ------------------------------ what mmdet has not


@pytest.mark.parametrize("alpha", [-1.0, 0.3, [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", [None, "row", "column"])
def test_softmax(ours, alpha, gamma, kind):
    pred, target = make_case(channels=C + 1)
    weight = make_weight(kind)
    actual = value_and_grad(ours(use_sigmoid=False, gamma=gamma, alpha=alpha), pred, target, weight, 7.0)

    def brute_force(x):
        p = x.softmax(1)[range(N), target]
        by_class = {-1.0: [1.0] * 4, 0.3: [0.3, 0.3, 0.3, 0.7]}.get(alpha if isinstance(alpha, float) else None, alpha)
        entries = torch.tensor(by_class, dtype=x.dtype)[target] * (1 - p) ** gamma * -p.log()
        return (entries if weight is None else entries * weight.flatten()).sum() / 7.0

    # mmdet divides by 7 and the epsilon of float32.
    torch.testing.assert_close(actual, value_and_grad(brute_force, pred), rtol=1e-7, atol=1e-12)


def test_one_alpha_a_class(ours):
    pred, target = make_case()
    alpha = (0.1, 0.5, 0.9)
    actual = ours(alpha=alpha)(pred, target, reduction_override="none")
    for k, a in enumerate(alpha):
        torch.testing.assert_close(actual[:, k], ours(alpha=a)(pred, target, reduction_override="none")[:, k])
    with pytest.raises(ValueError, match=r"one value a class.*3"):
        ours(alpha=(0.1, 0.5))(pred, target)


def test_focal_star(ours):
    pred, target = make_case()
    actual = ours(loss="focal_star", gamma=3.0, beta=0.5, alpha=0.3, loss_weight=2.0)(pred, target, avg_factor=4)
    expected = sigmoid_focal_loss_star(pred, target, 0.3, 3.0, "sum", beta=0.5) * 2 / 4
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_half_precision_is_computed_in_single(ours):
    pred, target = make_case(dtype=torch.bfloat16)
    loss, grad = value_and_grad(ours(), pred, target)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, ours()(pred.detach().float(), target))


@pytest.mark.parametrize("avg_factor", [None, 0.0, 3.0])
@pytest.mark.parametrize("weight", [None, torch.zeros(0), torch.zeros(0, 1), torch.zeros(0, C)])
def test_nothing_is_0_and_connected(ours, weight, avg_factor):
    pred, target = make_case(n=0)
    loss, grad = value_and_grad(ours(), pred, target, weight, avg_factor)
    assert loss == 0 and grad.shape == (0, C)


# ------------------------------ refused


@pytest.mark.parametrize("label", [C + 1, -2])
def test_labels_out_of_range(ours, label):
    pred, target = make_case()
    target[3] = label
    for weight in (None, torch.ones(N)):
        with pytest.raises(ValueError, match=rf"labels must be in \[-1, {C}\].*{label}"):
            ours()(pred, target, weight)
        with pytest.raises(ValueError, match=rf"labels must be in \[-1, {C - 1}\]"):
            ours(use_sigmoid=False)(pred, target.clamp(0, C), weight)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activated": True}, "activated=True.*logits, not probabilities"),
        ({"loss": "ohem"}, "'focal' or 'focal_star', got 'ohem'"),
        ({"loss": "focal_star", "use_sigmoid": False}, "focal_star.*needs use_sigmoid=True"),
        ({"loss": "focal_star", "gamma": 0}, "gamma must be .* > 0"),
        ({"gamma": -1}, "gamma must be .*>= 0, got -1"),
        ({"alpha": 1.5}, "alpha .* got 1.5"),
        ({"reduction": "avg"}, "reduction must be .*'avg'"),
    ],
)
def test_bad_options(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours(**options)


@pytest.mark.parametrize(
    "use_sigmoid, pred, target, weight, message",
    [
        (True, torch.zeros(N), torch.zeros(N), None, r"pred must be logits \(N, C\)"),
        (True, torch.zeros(N, C), torch.zeros(N), None, "integer labels .* got .*float32"),
        (True, torch.zeros(N, C), torch.zeros(N - 1).long(), None, r"shape \(11,\)"),
        (False, torch.zeros(N, C), torch.zeros(N, C), None, "use_sigmoid=False"),
        (True, torch.zeros(N, C), torch.zeros(N).long(), torch.ones(5), "12 rows.*36 entries; got shape .5,"),
        (False, torch.zeros(N, C), torch.zeros(N).long(), torch.ones(N, C), "12 rows of pred; got"),
    ],
)
def test_bad_shapes(ours, use_sigmoid, pred, target, weight, message):
    with pytest.raises(ValueError, match=message):
        ours(use_sigmoid)(pred, target, weight)


def test_bad_reduction_override(ours):
    with pytest.raises(ValueError, match="reduction must be"):
        ours()(*make_case(), reduction_override="avg")


@pytest.mark.parametrize(
    "missing, error, message", [("mmdet", ImportError, "mim install"), ("mmengine", None, "mmengine")]
)
def test_without_mmdet(missing, error, message, monkeypatch):
    if missing != "mmdet":
        pytest.importorskip("mmdet")
    for name in [n for n in sys.modules if n.split(".")[0] == "mmdet" or n == "focal_plugin.mmdet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(error or ModuleNotFoundError, match=message):
        importlib.import_module("focal_plugin.mmdet")


# ------------------------------ inside mmdet


@pytest.fixture
def config(registry):
    from mmengine.config import Config

    return Config.fromfile(config_dir() / "mmdet" / "retinanet_focal_plugin.py")


def test_config_is_mmdets_but_for_the_loss(config, ours, tmp_path):
    from mmengine.config import Config

    (tmp_path / "stock.py").write_text('_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"')
    stock = Config.fromfile(tmp_path / "stock.py")
    mine = config.to_dict()
    assert mine.pop("custom_imports")["imports"] == ["focal_plugin.mmdet"]
    loss = mine["model"]["bbox_head"].pop("loss_cls")
    theirs = stock.to_dict()
    of_stock = theirs["model"]["bbox_head"].pop("loss_cls")
    assert mine == theirs
    assert loss == {**of_stock, "type": "FocalPluginLoss", "loss": "focal"}
    loss.pop("type")
    assert isinstance(ours(**loss), torch.nn.Module)


@pytest.mark.skipif(not has_operators(), reason="mmdet's heads need mmcv's compiled operators")
@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_retina_head(config, registry, use_sigmoid):
    from mmdet.structures.bbox import HorizontalBoxes  # noqa: F401, registers the type
    from mmengine.structures import InstanceData

    head = config.model.bbox_head
    head.update(num_classes=C, in_channels=8, feat_channels=8, stacked_convs=1, train_cfg=config.model.train_cfg)
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 90, 60]])
    instances = [
        InstanceData(bboxes=boxes, labels=torch.tensor([0, 2])),
        InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long()),  # an image without objects
    ]
    metas = [{"img_shape": (64, 96), "pad_shape": (64, 96)}] * 2
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 8, 64 // s, 96 // s, generator=g) for s in (8, 16, 32)]
    head.anchor_generator.strides = [8, 16, 32]
    # The softmax form of gamma 0 is mmdet's cross entropy.
    mine = {"type": "FocalPluginLoss", "use_sigmoid": use_sigmoid, **({} if use_sigmoid else {"gamma": 0, "alpha": -1})}
    stock = {"type": "FocalLoss" if use_sigmoid else "CrossEntropyLoss", "use_sigmoid": use_sigmoid}
    results = []
    for loss_cls in (mine, stock):
        torch.manual_seed(0)
        model = registry.build({**head, "loss_cls": loss_cls})
        losses = model.loss_by_feat(*model(features), instances, metas)
        total = sum(sum(level) for level in losses.values())
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters())])
    assert results[0][0] > 0
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
