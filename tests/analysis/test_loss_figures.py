"""What is counted equals what a model trains on and what OHEM keeps of it; the tool shows and writes it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes

from focal_plugin.analysis import loss_figures
from focal_plugin.analysis.loss_distribution import GROUPS, LossDistribution
from focal_plugin.analysis.loss_figures import Counted, build_loader, build_ohem_head, collect, summarize
from focal_plugin.data import register_coco_json
from focal_plugin.engine.checkpoint import build_trained_model
from focal_plugin.mining import mine_hard_examples

OHEM = ["MODEL.OHEM.BATCH_SIZE", "16", "MODEL.OHEM.NMS_THRESH", "0.1"]


def run(model, batch):
    """(N, R, K) logits, (N, R) labels and (R, 4) anchors, by Detectron2's own transposition, and the loss_cls."""
    images, instances = model.preprocess_image(batch), [image["instances"] for image in batch]
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    predictions, anchors = model.head(features), model.anchor_generator(features)
    labels, _ = model.label_anchors(anchors, instances)
    logits, _ = model._transpose_dense_predictions(predictions, [model.num_classes, 4])
    model._scalars.put = lambda scalars: None  # there is no event storage
    loss = model.forward_training(images, features, predictions, instances)["loss_cls"]
    return torch.cat(logits, dim=1).detach(), torch.stack(labels), Boxes.cat(anchors).tensor, loss.item()


def same(a, b):
    return all(a.count(g) == b.count(g) for g in GROUPS) and all(
        a.total(g, gamma) == pytest.approx(b.total(g, gamma), rel=1e-5) for g in GROUPS for gamma in a.gammas
    )


@pytest.mark.parametrize("ratio", ["0.0", "3.0"])
def test_counts_what_the_model_trains_on_and_what_mining_by_hand_keeps(make_model, make_batch, ratio):
    """Mined by plain cross entropy, whatever alpha and gamma the model is trained with.

    The model divides its loss by a normalizer that is known for "batch": the number of positives.
    """
    cfg, model = make_model(*OHEM, "MODEL.OHEM.NEG_POS_RATIO", ratio, "MODEL.FOCAL.NORMALIZER", "batch")
    batches = [make_batch([3], seed=1), make_batch([0], seed=2), make_batch([2, 4], seed=3)]
    model.train()
    counted = collect(model, batches, gammas=[0.5, 2], ohem=build_ohem_head(cfg))
    assert model.training
    plain = collect(model, batches[:1], gammas=[0.5, 2])
    assert plain.losses.gammas == (0.5, 2) and not plain.ohem

    losses, kept, hardest = (LossDistribution([0, 0.5, 2]) for _ in range(3))
    anchors, trained = torch.zeros(4, dtype=torch.long), 0
    model.eval()  # the norms of inference, in which the loss is counted
    for batch in batches:
        logits, labels, boxes, loss = run(model, batch)
        losses.update(logits, labels)
        anchors += torch.bincount(labels[labels >= 0], minlength=4)
        trained += loss * max(int(((labels >= 0) & (labels < 3)).sum()), 1)
        for x, y in zip(logits, labels):
            target = torch.nn.functional.one_hot(y.clamp(min=0), 4)[:, :3].float()
            ce = torch.nn.functional.binary_cross_entropy_with_logits(x, target, reduction="none").sum(dim=1)
            settings = {"num_classes": 3, "batch_size": 16, "nms_thresh": 0.1, "neg_pos_ratio": float(ratio)}
            chosen = mine_hard_examples(ce, boxes, y, **settings)
            kept.update(x[chosen], y[chosen])
            top = ce.masked_fill(y < 0, -1).topk(len(chosen)).indices
            hardest.update(x[top], y[top])
    assert counted.losses.gammas == (0, 0.5, 2) and same(counted.losses, losses)
    assert trained == pytest.approx(0.25 * losses.total("positive", 2) + 0.75 * losses.total("negative", 2))
    assert same(counted.ohem["OHEM"], kept) and same(counted.ohem["hardest"], hardest)
    loss_of = [sum(d.total(group, 0) for group in GROUPS) for d in (kept, hardest, losses)]
    assert loss_of == sorted(set(loss_of))
    numbers, _ = summarize(counted, cfg)
    assert (numbers["images"], numbers["empty_images"]) == (4, 1)
    assert numbers["anchors"] == {"positive": anchors[:3].sum(), "negative": anchors[3]} and anchors[:3].sum() > 0
    positive, negative = (kept.count(group) / 4 for group in GROUPS)
    assert list(numbers["ohem"]["anchors_per_image"].values()) == [positive, (positive + negative) / 3 - positive]


def test_every_setting_of_ohem_runs(make_model, tiny_config, make_batch):
    _, model = make_model()
    everything = "BATCH_SIZE 100000 MODEL.OHEM.NMS_THRESH 0.0", None
    for opts, kept in (("RANK_BY cls+box", 32), ("NMS_BOXES predicted", 32), ("SCOPE batch", 16), everything):
        cfg = tiny_config(*OHEM, *f"MODEL.OHEM.{opts}".split())
        counted = collect(model, [make_batch([2, 1])], ohem=build_ohem_head(cfg))
        numbers, _ = summarize(counted, cfg)
        assert 2 * sum(numbers["ohem"]["anchors_per_image"].values()) == (kept or sum(numbers["anchors"].values()))
        assert all(same(of, counted.losses) == (kept is None) for of in counted.ohem.values())


def test_what_cannot_be_analyzed(make_model, make_batch, tiny_config, restore_catalogs):
    def refused(message, call, *args):
        with pytest.raises(ValueError, match=message):
            call(*args)

    refused("SSDHead is a softmax", collect, make_model("MODEL.FOCAL.HEAD", "SSDHead")[1], [make_batch([1])])
    refused("name a data set with --dataset", build_loader, tiny_config("DATASETS.TEST", "()"))
    DatasetCatalog.register("bare", lambda: [{"file_name": "a.png", "annotations": []}, {"file_name": "b.png"}])
    refused("bare: no image has an annotation", build_loader, tiny_config("DATASETS.TEST", "('bare',)"))
    cfg, model = make_model()
    for name in ("FocalRetinaNet", "RetinaNet"):  # as which it can be read, too
        cfg.MODEL.META_ARCHITECTURE = name
        assert torch.equal(build_trained_model(cfg).head.cls_score.weight, model.head.cls_score.weight)
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    refused(r"no trained model of this config.* such as head.cls_score", build_trained_model, cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    refused("GeneralizedRCNN is neither FocalRetinaNet nor RetinaNet", build_trained_model, cfg)


def test_the_loader_keeps_annotations_and_chooses_the_same_images_again(tiny_config, scenes, restore_catalogs):
    register_coco_json("some", scenes / "train.json", scenes / "train")
    cfg = tiny_config("DATASETS.TEST", "('some',)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.RANDOM_FLIP", "horizontal")
    images = [image for (image,) in build_loader(cfg)]
    assert len(images) == 14 and sum(len(image["instances"].gt_boxes) for image in images) > 0
    assert all(min(image["image"].shape[1:]) == 64 for image in images)
    some = [[image["image_id"] for (image,) in build_loader(cfg, num_images=3)] for _ in range(2)]
    assert some[0] == some[1] and len(set(some[0])) == 3
    cfg.MODEL.OHEM.SCOPE = "batch"  # which is then a batch of training
    assert [len(batch) for batch in build_loader(cfg)] == [*3 * [cfg.SOLVER.IMS_PER_BATCH], 2]


@pytest.fixture
def tool(scenes, tmp_path, monkeypatch, call_tool, restore_catalogs):
    """tool(words): the exit code, stdout and stderr of tools/analyze_loss.py; FLAGS: a config and its data."""
    flags = ["--config-file", "digits/focal.yaml", "--dataset", "scenes"]
    flags += ["--register", f"scenes={scenes / 'train.json'}:{scenes / 'train'}"]
    monkeypatch.chdir(tmp_path)
    return lambda *words: call_tool(
        "analyze_loss", *(x for word in words for x in (flags if word == "FLAGS" else [word]))
    )


def test_a_model_on_a_data_set(tool, make_model):
    _, model = make_model("MODEL.RETINANET.NUM_CLASSES", "10")
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.01)  # untrained: every window about p = .01
    torch.save({"model": model.state_dict()}, "model.pth")
    code, printed, _ = tool("FLAGS", "--num-images", "4", "--output", "new/out", "MODEL.WEIGHTS", "model.pth")
    written = {f"figure{n}.{suffix}" for n in (1, 4) for suffix in ("png", "svg")}
    written |= {"loss_distribution.md", "loss_distribution.json"}
    assert code == 0 and {path.name for path in Path("new/out").iterdir()} == written
    report = Path("new/out/loss_distribution.md").read_text(encoding="utf-8")
    assert "hardest 20 %" in printed
    assert all(text in report for text in ("| negative, γ 2", "![figure4](figure4.png)", "scenes", "model.pth"))

    numbers = json.loads(Path("new/out/loss_distribution.json").read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "weights", "data sets"} <= set(numbers["environment"])
    anchors, windows, totals = numbers["anchors"], numbers["windows"], numbers["total_loss"]["γ 0"]
    assert numbers["images"] == 4 and windows["positive"] == anchors["positive"] > 0
    assert windows["positive"] + windows["negative"] == 10 * (anchors["positive"] + anchors["negative"])
    assert numbers["hardest_share"]["negative, γ 0"]["hardest 20 %"] == pytest.approx(0.2, abs=0.1)
    assert totals["negatives"] / windows["negative"] == pytest.approx(-np.log(0.99), rel=0.5)
    assert sum(numbers["ohem"]["anchors_per_image"].values()) == pytest.approx(32)


def test_figure_1_needs_no_model_and_bad_input_is_one_message(tool):
    for words, folder in (((), "a"), (("--figure", "1", "--gammas", "0", "3"), "b")):
        code, _, error = tool(*words, "--output", folder)
        assert (code, error) == (0, "")
        assert {path.name for path in Path(folder).iterdir()} == {"figure1.png", "figure1.svg"}
    Path("damaged.pth").write_bytes(b"no checkpoint")
    for words, message in (
        ("MODEL.WEIGHTS w.pth", "no config: give --config-file"),
        ("--figure 4", "no config: give --config-file"),
        ("FLAGS", "add MODEL.WEIGHTS path/to"),
        ("FLAGS MODEL.WEIGHTS damaged.pth", "is refused: it is damaged"),
        ("FLAGS --dataset nowhere", "no data set 'nowhere' is registered"),
        ("FLAGS MODEL.RETINANET.NUM_CLASSES 7", "set MODEL.RETINANET.NUM_CLASSES 10"),
        ("--output damaged.pth", "File exists"),
        ("--gammas -1 --figure 1", "-1 is not a finite number >= 0"),
        ("--gammas 0 2 MODEL.WEIGHTS", "'MODEL.WEIGHTS' is no number"),
        ("--num-images 0", "argument --num-images: must be at least 1, got 0"),
    ):
        code, _, error = tool(*words.split())
        assert code == 2 and message in error and "Traceback" not in error, words


def test_the_ratio_with_the_configs_alpha_and_a_report_without_a_positive(tiny_config, tmp_path):
    """Dashes and nulls instead of divisions by zero, and the figure still has its background."""
    counted = Counted(LossDistribution([0, 2]), {name: LossDistribution([0, 2]) for name in ("OHEM", "hardest")}, 1)
    for of in (counted.losses, *counted.ohem.values()):
        of.update(torch.randn(30, 3), torch.full((30,), 3))
    numbers, tables = summarize(counted, tiny_config())
    (row,) = [row for row in tables.splitlines() if row.startswith("| positive, γ 2")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-", "-", "-"]
    figures = loss_figures.draw_figure4(counted, tmp_path)
    _, path = loss_figures.write_report(numbers, tables, {"command": "this"}, figures, tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["total_loss"]["γ 0"]["ratio"] is None

    counted.losses.update(torch.randn(30, 3), torch.arange(30) % 4)
    alpha = "MODEL.RETINANET.FOCAL_LOSS_ALPHA"
    unknown = ((alpha, "0", np.nan), ("MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.2, 0.3]", np.nan))
    for key, value, factor in ((alpha, "0.25", 3), (alpha, "-1", 1), *unknown):
        totals = summarize(counted, tiny_config(key, value))[0]["total_loss"].loc["γ 2"]
        assert totals["ratio"] == pytest.approx(totals["negatives"] / totals["positives"])
        assert totals["ratio with the config's α"] == pytest.approx(factor * totals["ratio"], nan_ok=True)
