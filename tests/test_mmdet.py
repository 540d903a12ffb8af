"""FocalPluginLoss against mmdet's own focal loss, the plugin's functions where mmdet has none, and inside RetinaNet."""

import importlib
import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from torch.testing import assert_close

from focal_plugin.config import config_dir
from focal_plugin.losses import sigmoid_focal_loss, sigmoid_focal_loss_star, softmax_focal_loss

CONFIG = config_dir() / "mmdet" / "retinanet_focal_plugin.py"
N, C = 12, 3
LOGITS, LABELS = torch.zeros(N, C), torch.zeros(N).long()


@pytest.fixture(scope="module")
def registry():
    pytest.importorskip("mmdet")
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = MagicMock()  # mmcv-lite has no operators: to be imported, not to be called
    importlib.import_module("focal_plugin.mmdet")
    importlib.import_module("mmdet.models")
    return importlib.import_module("mmdet.registry").MODELS


@pytest.fixture(scope="module")
def ours(registry):
    return registry.module_dict["FocalPluginLoss"]


def make_case(scale=3.0, dtype=torch.float64, n=N, channels=C):
    g = torch.Generator().manual_seed(0)
    pred = scale * torch.randn(n, channels, generator=g, dtype=torch.float64)
    return pred.to(dtype), torch.randint(0, C + 1, (n,), generator=g)


def make_weight(*shape):
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.where(weight < 0.3, 0.0, weight)


@pytest.mark.parametrize("shape", [None, (N,), (N, 1), (N, C), (N * C,)], ids=str)
def test_equals_mmdets(ours, registry, shape):
    (pred, labels), options = make_case(), {"gamma": 2.0, "alpha": 0.3, "loss_weight": 1.7}
    one_hot, weight = F.one_hot(labels, C + 1)[:, :C], None if shape is None else make_weight(*shape)
    for reduction, factor in (("mean", None), ("mean", 0.0), ("mean", torch.tensor(5.0)), ("sum", None), ("none", 5.0)):
        for target, reference in ((labels, labels), (one_hot.double(), one_hot.double()), (one_hot, one_hot.double())):
            theirs = registry.module_dict["FocalLoss"](**options, reduction=reduction)
            expected = value_and_gradient(theirs, pred, reference, weight, factor)
            # Once as the constructor's reduction, once as the call's.
            for loss, override in ((ours(**options, reduction=reduction), None), (ours(**options), reduction)):
                actual = value_and_gradient(loss, pred, target, weight, factor, reduction_override=override)
                assert_close(actual, expected, rtol=1e-9, atol=0 if factor == 0 else 1e-14)


def test_finite_and_refusing_where_mmdets_is_and_nothing_is_0(ours, registry):
    theirs = registry.module_dict["FocalLoss"]
    pred, target = make_case(scale=40.0, dtype=torch.float32)
    assert value_and_gradient(ours(gamma=0.5), pred, target)[1].isfinite().all()
    assert value_and_gradient(theirs(gamma=0.5), pred, target)[1].isnan().any()
    for loss in (ours(), theirs()):
        with pytest.raises(ValueError, match=r"avg_factor can.*not be used with reduction=.sum"):
            loss(pred, target, None, 5.0, "sum")
    for weight, avg_factor in ((None, None), (None, 0.0), (torch.zeros(0), 0.0), (torch.zeros(0, C), None)):
        loss, grad = value_and_gradient(ours(), *make_case(n=0), weight, avg_factor)
        assert loss == 0 and grad.shape == (0, C)


@pytest.mark.parametrize(
    "targets, shape",
    [("labels", (N,)), ("labels", (N, C)), ("dense", (N, 1)), ("dense", (N * C,)), ("softmax", (N,))],
)
def test_weight_0_ignores_whatever_the_logit_is(ours, targets, shape):
    use_sigmoid = targets != "softmax"
    pred, target = make_case(channels=C if use_sigmoid else C + 1)
    weight = make_weight(*shape)
    weight.view(N, -1)[0] = 0  # a whole row, for every kind of weight
    gone = (weight.view(N, -1) == 0).expand_as(pred)
    assert gone.any() and not gone.all()
    labels = target.masked_fill(gone.all(dim=1), 255)  # neither does it matter what the label is
    if targets == "dense":
        target = labels = F.one_hot(target, C + 1)[:, :C].double()
    for reduction, bad in (("mean", float("nan")), ("none", float("inf"))):
        loss, poisoned = ours(use_sigmoid, reduction=reduction), pred.masked_fill(gone, bad)
        arguments = (pred, target), (poisoned, labels)
        expected, actual = (value_and_gradient(loss, *each, weight) for each in arguments)
        assert_close(actual, expected, rtol=0, atol=0)
        assert actual[1][gone].eq(0).all() and actual[1][~gone].ne(0).all()
    if shape == (N,) and use_sigmoid:  # as does the label -1
        calls = (target.to(torch.uint8), (weight > 0).double()), (target.masked_fill(weight == 0, -1),)
        assert_close(*(value_and_gradient(ours(), pred, *args) for args in calls), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function, arguments, options",
    [
        (softmax_focal_loss, {"alpha": 0.3, "gamma": 0.5}, {"use_sigmoid": False}),
        (softmax_focal_loss, {"alpha": [0.1, 0.2, 0.3, 0.4]}, {"use_sigmoid": False}),
        (sigmoid_focal_loss, {"alpha": (0.1, 0.5, 0.9)}, {}),
        (sigmoid_focal_loss_star, {"gamma": 3.0, "beta": 0.5}, {"loss": "focal_star"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_mmdet_has_not_is_the_plugins_function(ours, function, arguments, options, dtype):
    pred, target = make_case(channels=C + 1 if function is softmax_focal_loss else C, dtype=dtype)
    weight = make_weight(N).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def expected(x):
        loss = function(x, target, **arguments)
        return 2 * (loss if loss.dim() == 1 else loss.sum(dim=1)).mul(weight).sum() / 7.0

    actual = value_and_gradient(ours(**options, **arguments, loss_weight=2.0), pred, target, weight, 7.0)
    # mmdet divides by 7 and the epsilon of float32.
    rtol = 1e-7 if dtype == torch.float64 else 1e-2
    assert_close(actual, value_and_gradient(expected, pred), rtol=rtol, atol=1e-7)
    assert actual[1].dtype == dtype and actual[0].dtype == weight.dtype


def test_bad_values_are_named(ours):
    for options, arguments, message in (
        ({"activated": True}, (), "activated=True.*logits, not probabilities"),
        ({"loss": "ohem"}, (), "focal, focal_star; got 'ohem'"),
        ({"loss": "focal_star", "use_sigmoid": False}, (), "focal_star.*needs use_sigmoid=True"),
        ({"loss": "focal_star", "gamma": 0}, (), "gamma must be .* > 0"),
        *(({"reduction": r}, (LOGITS, LABELS, None, None, "avg"), "reduction must be .*'avg'") for r in ("avg", "sum")),
        ({}, (torch.zeros(N), torch.zeros(N)), r"pred must be logits \(N, C\)"),
        ({}, (LOGITS, torch.zeros(N, dtype=torch.bool)), "target of torch.bool"),
        ({}, (LOGITS, LABELS[1:]), r"shape \(11,\)"),
        ({}, (LOGITS, LABELS, torch.ones(5)), r"12 values.*36 entries of pred.*, got shape \(5,\)"),
        ({"use_sigmoid": False}, (LOGITS, LABELS, torch.ones(N, C)), "weight must have 12 values"),
        ({}, (LOGITS, LABELS - 2, torch.ones(N)), r"labels must be in \[-1, 3\].*-2"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**options)(*arguments)


@pytest.mark.parametrize("missing, message", [("mmdet", "mim install"), ("mmengine", "mmengine")])
def test_without_mmdet(missing, message, monkeypatch):
    if missing != "mmdet":
        pytest.importorskip("mmdet")
    for name in [n for n in sys.modules if n.split(".")[0] == "mmdet" or n == "focal_plugin.mmdet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("focal_plugin.mmdet")


def load_config(path):
    return importlib.import_module("mmengine.config").Config.fromfile(path)


def test_config_is_mmdets_but_for_the_loss(ours, tmp_path):
    (tmp_path / "stock.py").write_text('_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"')
    stock, mine = load_config(tmp_path / "stock.py"), load_config(CONFIG).to_dict()
    assert mine.pop("custom_imports")["imports"] == ["focal_plugin.mmdet"]
    loss, expected = mine["model"]["bbox_head"]["loss_cls"], stock.to_dict()
    expected["model"]["bbox_head"]["loss_cls"].update(type="FocalPluginLoss", loss="focal")
    assert mine == expected
    loss.pop("type")
    assert isinstance(ours(**loss), torch.nn.Module)


@pytest.mark.parametrize(
    "mine, stock",
    # The softmax form of gamma 0 is mmdet's cross entropy.
    [({"use_sigmoid": True}, "FocalLoss"), ({"use_sigmoid": False, "gamma": 0, "alpha": -1}, "CrossEntropyLoss")],
)
def test_retina_head(registry, mine, stock):
    from mmdet.structures.bbox import HorizontalBoxes  # noqa: F401, registers the type
    from mmengine.structures import InstanceData

    model = load_config(CONFIG).model
    head = model.bbox_head
    head.update(num_classes=C, in_channels=8, feat_channels=8, stacked_convs=1, train_cfg=model.train_cfg)
    objects = InstanceData(bboxes=torch.tensor([[4.0, 4, 40, 50], [20, 10, 90, 60]]), labels=torch.tensor([0, 2]))
    instances = [objects, objects[:0]]  # one image has none
    metas = [{"img_shape": (64, 96), "pad_shape": (64, 96)}] * 2
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 8, 64 // s, 96 // s, generator=g) for s in (8, 16, 32)]
    head.anchor_generator.strides = [8, 16, 32]
    results = []
    for loss_cls in ({**mine, "type": "FocalPluginLoss"}, {"use_sigmoid": mine["use_sigmoid"], "type": stock}):
        torch.manual_seed(0)
        model = registry.build({**head, "loss_cls": loss_cls})
        losses = model.loss_by_feat(*model(features), instances, metas)
        total = sum(map(sum, losses.values()))
        results.append([total.detach(), *torch.autograd.grad(total, [*model.parameters()])])
    assert results[0][0] > 0
    assert_close(*results, rtol=1e-4, atol=1e-6)
