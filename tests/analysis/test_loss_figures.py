"""What is counted equals what a model trains on and what OHEM keeps of it; the tool shows and writes it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from focal_plugin import get_config
from focal_plugin.analysis.loss_distribution import GROUPS, LossDistribution
from focal_plugin.analysis.loss_figures import (
    Counted,
    build_loader,
    build_ohem_head,
    collect,
    draw_figure4,
    summarize,
    write_report,
)
from focal_plugin.data import make_digits, register_coco_json
from focal_plugin.engine.checkpoint import build_trained_model
from focal_plugin.mining import mine_hard_examples

OHEM = ["MODEL.OHEM.BATCH_SIZE", "16", "MODEL.OHEM.NMS_THRESH", "0.1"]
TOOL = Path(__file__).resolve().parents[2] / "tools" / "analyze_loss.py"
WRITTEN = {f"figure{n}.{suffix}" for n in (1, 4) for suffix in ("png", "svg")}
WRITTEN |= {"loss_distribution.md", "loss_distribution.json"}


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
    """(N, R, K) logits, (N, R) labels and (R, 4) anchors, by Detectron2's own transposition."""
    features = model.backbone(model.preprocess_image(batch).tensor)
    features = [features[name] for name in model.head_in_features]
    anchors = model.anchor_generator(features)
    labels, _ = model.label_anchors(anchors, [image["instances"] for image in batch])
    logits, _ = model._transpose_dense_predictions(model.head(features), [model.num_classes, 4])
    return torch.cat(logits, dim=1), torch.stack(labels), Boxes.cat(anchors).tensor


def same(a, b):
    return all(a.count(g) == b.count(g) for g in GROUPS) and all(
        a.total(g, gamma) == pytest.approx(b.total(g, gamma), rel=1e-5) for g in GROUPS for gamma in a.gammas
    )


# ------------------------------ counting


def test_counts_every_window_of_every_level(make_model, make_batch):
    cfg, model = make_model()
    batches = [make_batch([3], seed=1), make_batch([0], seed=2), make_batch([2, 4], seed=3)]
    model.train()
    counted = collect(model, batches, gammas=[0.5, 2])
    assert model.training and not counted.ohem and counted.losses.gammas == (0.5, 2.0)
    expected, anchors = LossDistribution([0.5, 2]), torch.zeros(4, dtype=torch.long)
    model.eval()
    for batch in batches:
        logits, labels, _ = run(model, batch)
        expected.update(logits, labels)
        anchors += torch.bincount(labels[labels >= 0], minlength=4)
    assert same(counted.losses, expected)
    numbers, _ = summarize(counted, cfg)
    assert (numbers["images"], numbers["empty_images"]) == (4, 1)
    assert numbers["anchors"] == {"positive": anchors[:3].sum(), "negative": anchors[3]} and anchors[:3].sum() > 0


def test_equals_the_loss_that_the_model_trains_on(make_model, make_batch):
    """FocalRetinaNet.losses divides by a normalizer that is known for "batch": the number of positives."""
    _, model = make_model("MODEL.FOCAL.NORMALIZER", "batch")
    model.eval()  # the norms of inference, in which the loss is counted
    batch = make_batch([3, 2])
    losses = collect(model, [batch], gammas=[2]).losses
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
        instances = [image["instances"] for image in batch]
        model._scalars.put = lambda scalars: None  # there is no event storage
        trained = model.forward_training(images, features, model.head(features), instances)["loss_cls"]
    total = 0.25 * losses.total("positive", 2) + 0.75 * losses.total("negative", 2)
    assert total / losses.count("positive") == pytest.approx(float(trained), rel=1e-5)


@pytest.mark.parametrize("ratio", ["0.0", "3.0"])
def test_ohem_keeps_what_mining_by_hand_keeps(make_model, make_batch, ratio):
    """On a model trained with the focal loss: mined by plain cross entropy, whatever the config's alpha and gamma."""
    cfg, model = make_model(*OHEM, "MODEL.OHEM.NEG_POS_RATIO", ratio)
    batches = [make_batch([3], seed=1), make_batch([4], seed=2)]
    counted = collect(model, batches, gammas=[2], ohem=build_ohem_head(cfg))
    kept, hardest, anchors = LossDistribution([0, 2]), LossDistribution([0, 2]), np.zeros(2)
    model.eval()
    for batch in batches:
        (logits,), (labels,), boxes = run(model, batch)
        target = torch.nn.functional.one_hot(labels.clamp(min=0), 4)[:, :3].float()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
        chosen = mine_hard_examples(
            losses, boxes, labels, num_classes=3, batch_size=16, nms_thresh=0.1, neg_pos_ratio=float(ratio)
        )
        kept.update(logits[chosen], labels[chosen])
        anchors += [(labels[chosen] < 3).sum(), (labels[chosen] == 3).sum()]
        top = losses.masked_fill(labels < 0, -1).topk(len(chosen)).indices
        hardest.update(logits[top], labels[top])
    assert counted.losses.gammas == kept.gammas
    assert same(counted.ohem["OHEM"], kept) and same(counted.ohem["hardest"], hardest)
    numbers, _ = summarize(counted, cfg)
    assert list(numbers["ohem"]["anchors_per_image"].values()) == (anchors / 2).tolist() and min(anchors) > 0
    loss_of = [sum(d.total(group, 0) for group in GROUPS) for d in (kept, hardest, counted.losses)]
    assert loss_of == sorted(set(loss_of))


@pytest.mark.parametrize(
    "opts", [["MODEL.OHEM.RANK_BY", "cls+box"], ["MODEL.OHEM.NMS_BOXES", "predicted"], ["MODEL.OHEM.SCOPE", "batch"]]
)
def test_every_setting_of_ohem_runs(make_model, make_batch, opts):
    cfg, model = make_model(*OHEM, *opts)
    counted = collect(model, [make_batch([2, 1])], ohem=build_ohem_head(cfg))
    anchors = sum(summarize(counted, cfg)[0]["ohem"]["anchors_per_image"].values())
    assert 2 * anchors == 16 * (1 if "batch" in opts else 2)


def test_ohem_of_an_image_that_has_fewer_anchors_than_it_would_keep(make_model, make_batch):
    cfg, model = make_model("MODEL.OHEM.BATCH_SIZE", "100000", "MODEL.OHEM.NMS_THRESH", "0.0")
    counted = collect(model, [make_batch([2])], ohem=build_ohem_head(cfg))
    assert all(same(of, counted.losses) for of in counted.ohem.values())


def test_what_cannot_be_counted_is_refused(make_model, make_batch):
    batch = make_batch([1])
    with pytest.raises(ValueError, match="SSDHead is a softmax"):
        collect(make_model("MODEL.FOCAL.HEAD", "SSDHead")[1], [batch])
    del batch[0]["instances"]
    with pytest.raises(ValueError, match="without annotations"):
        collect(make_model()[1], [batch])


def test_the_model_must_be_a_retinanet_and_its_weights_complete(make_model, tmp_path):
    cfg, model = make_model("MODEL.WEIGHTS", str(tmp_path / "weights.pth"))
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    assert torch.equal(build_trained_model(cfg).head.cls_score.weight, model.head.cls_score.weight)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # as which it can be read, too
    build_trained_model(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    with pytest.raises(ValueError, match=r"no trained model of this config.* such as head.cls_score"):
        build_trained_model(cfg)
    torch.save({"model": model.backbone.state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="no trained model of this config"):
        build_trained_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="GeneralizedRCNN is neither FocalRetinaNet nor RetinaNet"):
        build_trained_model(cfg)


def test_a_data_set_needs_annotations(tiny_config, restore_catalogs):
    with pytest.raises(ValueError, match="name a data set with --dataset"):
        build_loader(tiny_config("DATASETS.TEST", "()"))
    DatasetCatalog.register("bare", lambda: [{"file_name": "a.png", "annotations": []}, {"file_name": "b.png"}])
    with pytest.raises(ValueError, match="bare: no image has an annotation"):
        build_loader(tiny_config("DATASETS.TEST", "('bare',)"))


def test_the_loader_keeps_annotations_and_chooses_the_same_images_again(tiny_config, digits, restore_catalogs):
    register_coco_json("some", str(digits / "val.json"), str(digits / "val"))
    cfg = tiny_config("DATASETS.TEST", "('some',)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.RANDOM_FLIP", "horizontal")
    batches = list(build_loader(cfg))
    assert [len(batch) for batch in batches] == [1] * 8
    assert all(len(image["instances"]) == len(image["instances"].gt_boxes) for (image,) in batches)
    assert sum(len(image["instances"]) for (image,) in batches) > 0
    assert all(min(image["image"].shape[1:]) == 64 for (image,) in batches)
    some = [[image["image_id"] for (image,) in build_loader(cfg, num_images=3)] for _ in range(2)]
    assert some[0] == some[1] and len(set(some[0])) == 3
    cfg.MODEL.OHEM.SCOPE = "batch"  # which is then a batch of training
    assert [len(batch) for batch in build_loader(cfg)] == [cfg.SOLVER.IMS_PER_BATCH] * (8 // cfg.SOLVER.IMS_PER_BATCH)


# ------------------------------ tables, pictures and the tool


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits"), num_train=1, num_val=8)


@pytest.fixture
def tool(digits, monkeypatch, capsys, restore_catalogs):
    """tool(words): the exit code, stdout and stderr of tools/analyze_loss.py, in this process."""
    spec = importlib.util.spec_from_file_location("analyze_loss", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register = f"analyze_val={digits / 'val.json'}:{digits / 'val'}"
    flags = ["--config-file", "digits/focal.yaml", "--register", register, "--dataset", "analyze_val"]

    def run(*words):
        words = [str(w) for word in words for w in (flags if word == "FLAGS" else [word])]
        monkeypatch.setattr(sys, "argv", ["analyze_loss.py", *words])
        # pytest's streams do not know this of real ones.
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_model_on_a_data_set(tool, tmp_path):
    torch.manual_seed(0)
    weights, out = tmp_path / "model.pth", tmp_path / "out"
    torch.save({"model": build_model(get_config("digits/focal.yaml")).state_dict()}, weights)
    code, printed, _ = tool("FLAGS", "--num-images", "4", "--output", out, "MODEL.WEIGHTS", weights)
    assert code == 0 and {path.name for path in out.iterdir()} == WRITTEN
    report = (out / "loss_distribution.md").read_text(encoding="utf-8")
    assert "hardest 20 %" in printed and "| negative, γ 2" in report and "![figure4](figure4.png)" in report
    assert "analyze_val" in report and str(weights) in report

    numbers = json.loads((out / "loss_distribution.json").read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "weights", "data sets"} <= set(numbers["environment"])
    assert numbers["images"] == 4
    anchors, windows, totals = numbers["anchors"], numbers["windows"], numbers["total_loss"]["γ 0"]
    assert windows["positive"] == anchors["positive"] > 0
    assert windows["positive"] + windows["negative"] == 10 * (anchors["positive"] + anchors["negative"])
    # An untrained model gives every window about p = .01, and each about the same loss.
    assert numbers["hardest_share"]["negative, γ 0"]["hardest 20 %"] == pytest.approx(0.2, abs=0.1)
    assert totals["negatives"] / windows["negative"] == pytest.approx(-np.log(0.99), rel=0.5)
    assert sum(numbers["ohem"]["anchors_per_image"].values()) == pytest.approx(32)


@pytest.mark.parametrize("words", [[], ["--figure", "1", "--gammas", "0", "3"]])
def test_figure_1_needs_no_model(tool, tmp_path, words):
    code, _, error = tool(*words, "--output", tmp_path / "new" / "out")
    assert (code, error) == (0, "")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"figure1.png", "figure1.svg"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL.WEIGHTS", "w.pth"], "no config: give --config-file"),
        (["--figure", "4"], "no config: give --config-file"),
        (["--config-file", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["FLAGS"], "add MODEL.WEIGHTS path/to"),
        (["FLAGS", "MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: there is no file 'nowhere.pth'"),
        (["FLAGS", "MODEL.WEIGHTS", "damaged.pth"], "is refused: it is damaged"),
        (["FLAGS", "MODEL.WEIGHTS", "foreign.pth"], "is no trained model of this config"),
        (["FLAGS", "MODEL.WEIGHT", "w.pth"], "did you mean MODEL.WEIGHTS"),
        (["FLAGS", "--dataset", "nowhere"], "no data set 'nowhere' is registered"),
        (["FLAGS", "MODEL.RETINANET.NUM_CLASSES", "7"], "set MODEL.RETINANET.NUM_CLASSES 10"),
        (["--output", "damaged.pth"], "File exists"),
        (["--gammas", "-1", "--figure", "1"], "-1 is not a finite number >= 0"),
        (["--gammas", "0", "2", "MODEL.WEIGHTS"], "'MODEL.WEIGHTS' is no number"),
        (["--num-images", "0"], "argument --num-images: must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_message(tool, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.zeros(3)}}, "foreign.pth")
    Path("damaged.pth").write_bytes(b"no checkpoint")
    code, _, error = tool(*words)
    assert code == 2 and message in error and "Traceback" not in error


def counted_of(logits, labels):
    counted = Counted(LossDistribution([0, 2]), {name: LossDistribution([0, 2]) for name in ("OHEM", "hardest")}, 1)
    counted.losses.update(logits, labels)
    for of in counted.ohem.values():
        of.update(logits[:3], labels[:3])
    return counted


def test_report_without_a_positive(tiny_config, tmp_path):
    """Dashes and nulls instead of divisions by zero, and the figure still has its background."""
    counted = counted_of(torch.randn(30, 3), torch.full((30,), 3))
    numbers, tables = summarize(counted, tiny_config())
    (row,) = [row for row in tables.splitlines() if row.startswith("| positive, γ 2")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-", "-", "-"]
    _, path = write_report(numbers, tables, {"command": "this"}, draw_figure4(counted, tmp_path), tmp_path)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["total_loss"]["γ 0"]["ratio"] is None


@pytest.mark.parametrize(
    "opts, factor",
    [
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0.25"], 3),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1"], 1),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0"], np.nan),
        (["MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.2, 0.3]"], np.nan),
    ],
)
def test_ratio_with_the_configs_alpha(tiny_config, opts, factor):
    numbers, _ = summarize(counted_of(torch.randn(30, 3), torch.arange(30) % 4), tiny_config(*opts))
    totals = numbers["total_loss"].loc["γ 2"]
    assert totals["ratio"] == pytest.approx(totals["negatives"] / totals["positives"])
    assert totals["ratio with the config's α"] == pytest.approx(factor * totals["ratio"], nan_ok=True)
