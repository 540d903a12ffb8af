"""The examples run, and do what their docstrings say."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from focal_plugin import RETINANET_HEAD_REGISTRY, FocalRetinaNet, OHEMHead, get_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
load = importlib.import_module


@pytest.fixture(autouse=True)
def forget_what_is_registered(monkeypatch):
    """The examples register classes on import, and are imported as their own scripts see them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("focal_plugin.config._EXTENSIONS", [])
    for registry in (META_ARCH_REGISTRY, RETINANET_HEAD_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    yield
    for path in EXAMPLES.glob("*.py"):
        importlib.sys.modules.pop(path.stem, None)


def total(losses):
    return sum(losses.values())


def test_every_example_says_how_it_is_run():
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in load(path.stem).__doc__


def test_heads_train_in_another_detector(capsys):
    trained = load("focal_head_in_your_detector").main()
    assert {type(model.head).__name__ for model, _ in trained.values()} == {"FocalHead", "OHEMHead"}
    for model, history in trained.values():
        assert not isinstance(model, FocalRetinaNet)
        assert all(math.isfinite(total(losses)) for losses in history)
        assert total(history[-1]) < total(history[0]) / 2
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
        assert any(p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("head, config", [("FocalHead", "focal"), ("OHEMHead", "ohem")])
def test_other_detector_divides_as_focal_retinanet_does(head, config):
    """The same weights, images and anchors give the losses of FocalRetinaNet with the paper's normalizer."""
    example = load("focal_head_in_your_detector")
    mine, _ = example.train(head, steps=1)
    cfg = example.get_config(f"digits/{config}.yaml", ["MODEL.FOCAL.NORMALIZER", "batch"])
    reference = example.build_model(cfg)
    reference.load_state_dict(mine.state_dict(), strict=False)
    batch = example.scenes(6)
    batch.append(next(x for x in example.scenes(40) if len(x["instances"]) == 0))
    ours, theirs = mine(batch), reference(batch)
    torch.testing.assert_close(ours["loss_cls"], theirs["loss_cls"])
    torch.testing.assert_close(ours["loss_box"], theirs["loss_box_reg"])


def test_own_head_trains_in_focal_retinanet_and_its_loss_is_poly_1():
    """Against the formula, in probabilities, of every class, with background and ignored anchors."""
    example = load("your_own_head")
    model, history = example.main(epsilon=0.7)
    head = model.head
    assert isinstance(model, FocalRetinaNet) and type(head).__name__ == "PolyHead"
    assert total(history[-1]) < total(history[0]) / 2
    assert all(p.grad is not None for p in head.parameters())
    logits, labels = torch.randn(6, 5, head.num_classes), torch.tensor([[0, 3, 9, 10, -1]] * 6)
    p = logits.sigmoid()
    is_class = torch.nn.functional.one_hot(labels.clamp(min=0), head.num_classes + 1)[..., :-1].bool()
    p_t = torch.where(is_class, p, 1 - p)
    alpha_t = torch.where(is_class, head.alpha, 1 - head.alpha)
    want = alpha_t * ((1 - p_t) ** head.gamma * -p_t.log() + 0.7 * (1 - p_t) ** (head.gamma + 1))
    want[labels == -1] = 0
    torch.testing.assert_close(head.classification_loss(logits, labels), want.sum(dim=-1))
    shape = {"input_shape": [ShapeSpec(channels=8)], "num_anchors": 1, "conv_dims": [8]}
    with pytest.raises(ValueError, match=r"leave MODEL\.FOCAL\.CLASS_ALPHA empty"):
        example.PolyHead(num_classes=2, class_alpha=[0.2, 0.3], **shape)


def test_own_loss_is_logged_in_its_two_parts_and_mined():
    """Whatever owns the loss, what follows from it is the plugin's: the log, and what OHEM keeps."""
    RETINANET_HEAD_REGISTRY.register(type("MinedHead", (load("your_own_head").PolyHead, OHEMHead), {}))
    cfg = get_config("digits/focal.yaml", ["MODEL.FOCAL.HEAD", "MinedHead", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.0"])
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage() as storage:
        loss = model(load("focal_head_in_your_detector").scenes(3))["loss_cls"]
        logged = {key: value for key, (value, _) in storage.latest().items()}
    positive, negative = logged["loss_cls/positive"], logged["loss_cls/negative"]
    assert positive > 0 and negative > 0 and positive + negative == pytest.approx(loss.item(), rel=1e-5)
    # The anchors kept are harder by this loss than those dropped.
    assert loss.item() == pytest.approx(logged["ohem/loss_kept"], rel=1e-5)
    assert logged["ohem/loss_kept"] > logged["ohem/loss_dropped"]


def test_per_class_alpha_finds_more_of_the_rare():
    pytest.importorskip("sklearn")
    (frequent, rare), (frequent_with, rare_with) = load("per_class_alpha").main().values()
    assert rare_with > rare + 0.1 and frequent_with > frequent - 0.1
