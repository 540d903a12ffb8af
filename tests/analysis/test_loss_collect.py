"""A model run over images: what is counted equals what it would be trained on, and what OHEM would keep of it."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from focal_plugin.analysis.loss_collect import build_loader, build_ohem_head, collect
from focal_plugin.analysis.loss_distribution import GROUPS, LossDistribution
from focal_plugin.data import make_digits, register_coco_json
from focal_plugin.engine.checkpoint import build_trained_model
from focal_plugin.mining import mine_hard_examples

OHEM = ["MODEL.OHEM.BATCH_SIZE", "16", "MODEL.OHEM.NMS_THRESH", "0.1"]


@pytest.fixture
def make_model(tiny_config):
    def make(*opts):
        torch.manual_seed(0)
        cfg = tiny_config(*opts)
        model = build_model(cfg)
        # From the prior of .01 alone all losses would be equal.
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
        return cfg, model

    return make


@torch.no_grad()
def run(model, batch):
    """(N, R, K) logits, (N, R) labels and (R, 4) anchors, by upstream's own transposition."""
    images = model.preprocess_image(batch)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    predictions = model.head(features)
    anchors = model.anchor_generator(features)
    labels, _ = model.label_anchors(anchors, [image["instances"] for image in batch])
    logits, _ = model._transpose_dense_predictions(predictions, [model.num_classes, 4])
    return torch.cat(logits, dim=1), torch.stack(labels), Boxes.cat(anchors).tensor


def same(a, b):
    return all(a.count(g) == b.count(g) for g in GROUPS) and all(
        a.total(g, gamma) == pytest.approx(b.total(g, gamma), rel=1e-5) for g in GROUPS for gamma in a.gammas
    )


def test_counts_every_window_of_every_level(make_model, make_batch):
    _, model = make_model()
    batches = [make_batch([3], seed=1), make_batch([0], seed=2), make_batch([2, 4], seed=3)]
    model.train()
    counted = collect(model, batches, gammas=[0.5, 2])
    assert model.training and counted.ohem is None
    assert counted.losses.gammas == (0.5, 2.0)
    assert (counted.images, counted.empty_images) == (4, 1)
    expected = LossDistribution([0.5, 2])
    model.eval()
    all_labels = []
    for batch in batches:
        logits, labels, _ = run(model, batch)
        expected.update(logits, labels)
        all_labels.append(labels.flatten())
    labels = torch.cat(all_labels)
    assert same(counted.losses, expected)
    assert counted.positives == counted.losses.count("positive") == ((labels >= 0) & (labels < 3)).sum() > 0
    assert counted.negatives == (labels == 3).sum()


def test_equals_the_loss_that_the_model_trains_on(make_model, make_batch):
    """FocalRetinaNet.losses divides by a normaliser that is known for "batch": the number of positives."""
    _, model = make_model("MODEL.FOCAL.NORMALIZER", "batch")
    model.eval()  # the norms of inference, in which the loss is counted
    batch = make_batch([3, 2])
    counted = collect(model, [batch], gammas=[2])
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
        instances = [image["instances"] for image in batch]
        model._scalars.put = lambda scalars: None  # there is no event storage
        losses = model.forward_training(images, features, model.head(features), instances)
    total = 0.25 * counted.losses.total("positive", 2) + 0.75 * counted.losses.total("negative", 2)
    assert total / counted.positives == pytest.approx(float(losses["loss_cls"]), rel=1e-5)


def test_stops_after_num_images(make_model, make_batch):
    _, model = make_model()
    assert collect(model, [make_batch([1])] * 5, num_images=2, gammas=[0]).images == 2


@pytest.mark.parametrize("ratio", ["0.0", "3.0"])
def test_ohem_keeps_what_mining_by_hand_keeps(make_model, make_batch, ratio):
    """On a model trained with the focal loss: mined by plain cross entropy, whatever the config's alpha and gamma."""
    cfg, model = make_model(*OHEM, "MODEL.OHEM.NEG_POS_RATIO", ratio)
    batches = [make_batch([3], seed=1), make_batch([4], seed=2)]
    counted = collect(model, batches, gammas=[2], ohem=build_ohem_head(cfg))
    assert counted.losses.gammas == (0.0, 2.0)

    kept, hardest, positives, negatives = LossDistribution([0, 2]), LossDistribution([0, 2]), 0, 0
    model.eval()
    for batch in batches:
        (logits,), (labels,), anchors = run(model, batch)
        target = torch.nn.functional.one_hot(labels.clamp(min=0), 4)[:, :3].float()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
        chosen = mine_hard_examples(
            losses, anchors, labels, num_classes=3, batch_size=16, nms_thresh=0.1, neg_pos_ratio=float(ratio)
        )
        kept.update(logits[chosen], labels[chosen])
        positives += int((labels[chosen] < 3).sum())
        negatives += int((labels[chosen] == 3).sum())
        top = losses.masked_fill(labels < 0, -1).topk(len(chosen)).indices
        hardest.update(logits[top], labels[top])
    assert positives > 0 and negatives > 0
    assert (counted.ohem.positives, counted.ohem.negatives) == (positives, negatives)
    assert same(counted.ohem.kept, kept) and same(counted.ohem.hardest, hardest)
    loss_of = {name: sum(d.total(g, 0) for g in GROUPS) for name, d in (("kept", kept), ("hardest", hardest))}
    assert loss_of["kept"] < loss_of["hardest"] < sum(counted.losses.total(g, 0) for g in GROUPS)


@pytest.mark.parametrize(
    "opts", [["MODEL.OHEM.RANK_BY", "cls+box"], ["MODEL.OHEM.NMS_BOXES", "predicted"], ["MODEL.OHEM.SCOPE", "batch"]]
)
def test_every_setting_of_ohem_runs(make_model, make_batch, opts):
    cfg, model = make_model(*OHEM, *opts)
    counted = collect(model, [make_batch([2, 1])], ohem=build_ohem_head(cfg))
    num_images = 1 if "batch" in opts else 2
    assert counted.ohem.positives + counted.ohem.negatives == 16 * num_images


def test_ohem_of_an_image_that_has_fewer_anchors_than_it_would_keep(make_model, make_batch):
    cfg, model = make_model("MODEL.OHEM.BATCH_SIZE", "100000", "MODEL.OHEM.NMS_THRESH", "0.0")
    counted = collect(model, [make_batch([2])], ohem=build_ohem_head(cfg))
    assert same(counted.ohem.kept, counted.losses) and same(counted.ohem.hardest, counted.losses)


def test_images_without_annotations_are_refused(make_model, make_batch):
    _, model = make_model()
    batch = make_batch([1])
    del batch[0]["instances"]
    with pytest.raises(ValueError, match="without annotations"):
        collect(model, [batch])


def test_a_softmax_has_no_windows(make_model, make_batch):
    with pytest.raises(ValueError, match="SSDHead is a softmax"):
        collect(make_model("MODEL.FOCAL.HEAD", "SSDHead")[1], [make_batch([1])])


def test_weights_must_be_complete(make_model, tmp_path):
    cfg, model = make_model()
    path = tmp_path / "weights.pth"
    cfg.MODEL.WEIGHTS = str(path)
    torch.save({"model": model.state_dict()}, path)
    assert torch.equal(build_trained_model(cfg).head.cls_score.weight, model.head.cls_score.weight)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # as which it can be read, too
    build_trained_model(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    with pytest.raises(ValueError, match=r"no trained model of this config.* such as head.cls_score"):
        build_trained_model(cfg)
    torch.save({"model": model.backbone.state_dict()}, path)
    with pytest.raises(ValueError, match="no trained model of this config"):
        build_trained_model(cfg)


def test_another_meta_architecture_is_refused(tiny_config):
    cfg = tiny_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match="GeneralizedRCNN is neither FocalRetinaNet nor RetinaNet"):
        build_trained_model(cfg)


def test_no_data_set(tiny_config):
    with pytest.raises(ValueError, match="name a data set with --dataset"):
        build_loader(tiny_config("DATASETS.TEST", "()"))


@pytest.fixture
def dataset():
    """dataset(dicts): the name under which they are registered for one test."""
    name = "loss_collect_test"
    yield lambda dicts: DatasetCatalog.register(name, lambda: dicts) or name
    DatasetCatalog.pop(name, None)


def test_a_data_set_without_annotations(tiny_config, dataset):
    name = dataset([{"file_name": "a.png", "annotations": []}, {"file_name": "b.png"}])
    with pytest.raises(ValueError, match=f"{name}: no image has an annotation"):
        build_loader(tiny_config("DATASETS.TEST", repr((name,))))


def test_the_loader_keeps_annotations_and_chooses_the_same_images_again(tiny_config, tmp_path):
    folder = make_digits(tmp_path / "digits", num_train=1, num_val=8)
    name = f"loss_collect_{tmp_path.name}"
    register_coco_json(name, str(folder / "val.json"), str(folder / "val"))
    cfg = tiny_config("DATASETS.TEST", repr((name,)), "INPUT.MIN_SIZE_TEST", "64", "INPUT.RANDOM_FLIP", "horizontal")
    batches = list(build_loader(cfg))
    assert [len(batch) for batch in batches] == [1] * 8
    assert all(len(image["instances"]) == len(image["instances"].gt_boxes) for (image,) in batches)
    assert sum(len(image["instances"]) for (image,) in batches) > 0
    assert all(min(image["image"].shape[1:]) == 64 for (image,) in batches)

    some = [[image["image_id"] for (image,) in build_loader(cfg, num_images=3)] for _ in range(2)]
    assert some[0] == some[1] and len(set(some[0])) == 3
    cfg.MODEL.OHEM.SCOPE = "batch"  # which is then a batch of training
    assert [len(batch) for batch in build_loader(cfg)] == [cfg.SOLVER.IMS_PER_BATCH] * (8 // cfg.SOLVER.IMS_PER_BATCH)
