"""Exported models against the model: two sizes, nothing found, and a comparison that can fail."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from focal_plugin.deploy.export import EXPORTERS, FILES, MissingPackageError, export_onnx, read_sample
from focal_plugin.deploy.export_check import (
    Difference,
    check_export,
    check_images,
    compare,
    detect,
    format_differences,
    load_exported,
)
from focal_plugin.deploy.model import class_names

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["torchscript", "onnx"]


def make_model(cfg, spread=16.0, seed=0):
    """Random weights whose scores lie far apart, so that rounding cannot change which are found."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.head.cls_score.weight *= spread
        model.head.bbox_pred.weight *= 10
    return model


def need(name):
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def load_tool():
    def load(name):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.RETINANET.NUM_CLASSES", "1"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.FOCAL.HEAD", "OHEMHead", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20"),
        ("MODEL.FOCAL.HEAD", "SSDHead", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.6"),
    ],
    ids=["focal", "one class", "stock", "few candidates", "softmax"],
)
def test_exported_finds_what_the_model_finds(tiny_config, tmp_path, name, opts):
    need(name)
    cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96", *opts)
    model = make_model(cfg).train(bool(opts))
    sample = read_sample(cfg)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    path = tmp_path / FILES[name]
    EXPORTERS[name](model, sample, path)
    assert list(tmp_path.iterdir()) == [path]
    differences = check_export(model, path, sample)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert len(differences) == 5 and not any(d.problems or d.cut for d in differences.values()), differences
    counts = [d.count for d in differences.values()]
    assert counts[-1] == 0 and min(counts[:4]) > 3, counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_exported_with_a_sample_in_which_nothing_is_found(tiny_config, tmp_path, name):
    need(name)
    cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.99", "INPUT.MIN_SIZE_TEST", "96")
    model = make_model(cfg, spread=1.0)
    sample = read_sample(cfg)
    EXPORTERS[name](model, sample, tmp_path / FILES[name])
    differences = check_export(model, tmp_path / FILES[name], sample)
    assert [(d.count, d.problems) for d in differences.values()] == [(0, [])] * 5
    assert "which says little" in format_differences(differences)
    boxes, classes, scores = load_exported(tmp_path / FILES[name])(torch.zeros(3, 40, 56))
    assert boxes.shape == (0, 4) and classes.shape == scores.shape == (0,)


@pytest.mark.filterwarnings("ignore")
def test_check_sees_other_weights(tiny_config, tmp_path):
    cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96")
    model = make_model(cfg)
    sample = read_sample(cfg)
    EXPORTERS["torchscript"](model, sample, tmp_path / "model.ts")
    with torch.no_grad():
        model.head.bbox_pred.bias += 0.01
    differences = check_export(model, tmp_path / "model.ts", sample)
    assert all(d.problems for d in list(differences.values())[:4])
    assert "NOT the same" in format_differences(differences)


class Thresholds:
    test_score_thresh, test_nms_thresh, max_detections_per_image = 0.05, 0.5, 4


BOXES = torch.tensor([[0.0, 0, 10, 10], [50, 50, 80, 90], [0, 50, 20, 70]])
WANT = (BOXES, torch.tensor([0, 1, 1]), torch.tensor([0.9, 0.5, 0.3]))


def changed(row=0, box=0.0, label=None, score=0.0):
    boxes, classes, scores = (x.clone() for x in WANT)
    boxes[row, 2] += box
    scores[row] += score
    if label is not None:
        classes[row] = label
    return boxes, classes, scores


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_compare_does_not_mind_the_order(order):
    got = tuple(x[order] for x in changed(1, box=0.005, score=5e-5))
    found = compare(WANT, got, Thresholds)
    assert (found.count, found.cut, found.problems) == (3, 0, [])
    assert found.box == pytest.approx(0.005, rel=1e-2) and found.score == pytest.approx(5e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("got", "problems"),
    [
        (changed(box=0.02), 1),
        (changed(score=-2e-4), 1),
        (changed(label=1), 2),
        (changed(2, box=float("nan")), 2),
        (tuple(x[:2] for x in WANT), 1),
        (tuple(torch.cat([x, x[1:2]]) for x in WANT), 1),
        (tuple(x[:0] for x in WANT), 3),
    ],
    ids=["box", "score", "class", "nan", "missing", "twice", "nothing"],
)
def test_compare_finds_each_difference(got, problems):
    found = compare(WANT, got, Thresholds)
    assert len(found.problems) == problems and found.cut == 0


def with_more(box, label, score):
    return tuple(torch.cat([x, torch.tensor([y], dtype=x.dtype)]) for x, y in zip(WANT, (box, label, score)))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("more", "cut"),
    [
        (([200.0, 0, 240, 40], 0, 0.05005), True),  # the threshold
        (([200.0, 0, 240, 40], 0, 0.06), False),
        (([0.0, 0, 10, 5.02], 0, 0.4), True),  # an IoU of .502 with a better one
        (([0.0, 0, 10, 5.02], 1, 0.4), False),  # which is of another class
        (([0.0, 0, 10, 5.02], 0, 0.95), False),  # which is no better
        (([0.0, 0, 10, 8.0], 0, 0.4), False),
    ],
)
def test_compare_excuses_what_lies_at_a_cut(more, cut, swap):
    pair = (WANT, with_more(*more))
    found = compare(*(pair[::-1] if swap else pair), Thresholds)
    assert (found.cut, len(found.problems)) == ((1, 0) if cut else (0, 1))


def test_compare_excuses_the_last_of_a_full_image():
    one, other = with_more([200.0, 0, 240, 40], 0, 0.2), with_more([300.0, 0, 340, 40], 2, 0.20005)
    assert compare(one, other, Thresholds) == Difference(4, cut=2)


def test_check_images_have_two_sizes(tiny_config):
    cfg = tiny_config("INPUT.MIN_SIZE_TEST", "96")
    model = make_model(cfg)
    images = check_images(model, read_sample(cfg))
    assert len({image.shape for image in list(images.values())[:4]}) == 2
    assert len(detect(model, images["nothing to find"])[0]) == 0


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(tiny_config, tmp_path, monkeypatch, capsys, load_tool, missing):
    if missing == "onnxruntime":
        pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    argv = ["export", "--config-file", "digits/focal.yaml", "--output", str(tmp_path / "out"), "MODEL.WEIGHTS", "x.pth"]
    monkeypatch.setattr(sys, "argv", argv)
    assert load_tool("export_model").main() == 2
    assert f"pip install {missing}\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if missing == "onnx":
        with pytest.raises(MissingPackageError, match="pip install onnx"):
            export_onnx(None, None, tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore")
def test_tool_exports_and_describes(tiny_config, tmp_path, monkeypatch, capsys, load_tool):
    opts = ["MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96"]
    torch.save({"model": make_model(tiny_config(*opts)).state_dict()}, tmp_path / "model.pth")
    flags = ["--config-file", "digits/focal.yaml", "--output", str(tmp_path / "out"), "--format", "torchscript"]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), *opts]
    tool = load_tool("export_model")
    monkeypatch.setattr(sys, "argv", ["export", *flags, "--classes", "cat, dog,cow", *weights])
    assert tool.main() == 0, capsys.readouterr()
    assert "the same detections" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["classes"] == ["cat", "dog", "cow"] and described["thresholds"]["score"] == 0.2
    assert described["files"] == {"torchscript": "model.ts"} and described["input"]["resize"]["shortest_edge"] == 96
    assert str(tmp_path) not in (tmp_path / "out" / "model.json").read_text()
    # The outputs come in the order that is written there.
    outputs = torch.jit.load(tmp_path / "out" / "model.ts")(torch.rand(3, 40, 56) * 255)
    for output, stated in zip(outputs, described["outputs"], strict=True):
        assert str(output.dtype) == f"torch.{stated['dtype']}" and output.dim() == len(stated["shape"])
    assert outputs[3].tolist() == [40, 56]
    # A difference is exit code 1, and deletes nothing.
    monkeypatch.setattr(tool, "check_export", lambda *_: {"image": Difference(1, problems=["class 0 is missing"])})
    assert tool.main() == 1
    assert "class 0 is missing" in capsys.readouterr().out and (tmp_path / "out" / "model.ts").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
        (["MODEL.RETINANET.PRIOR_PROB", "0.01"], "MODEL.WEIGHTS"),
        (["--classes", "a,b", "MODEL.WEIGHTS", "{weights}"], "--classes a,b has 2 class names and the model 10"),
        (["--sample-image", "{weights}", "MODEL.WEIGHTS", "{weights}"], "cannot be read as an image"),
        (["MODEL.WEIGHTS", "{weights}"], "model.pth"),
    ],
)
def test_tool_refuses(tmp_path, monkeypatch, capsys, load_tool, words, message):
    (tmp_path / "model.pth").write_bytes(b"no checkpoint")
    flags = ["--config-file", "digits/focal.yaml", "--output", str(tmp_path / "out"), "--format", "torchscript"]
    words = [word.format(weights=tmp_path / "model.pth") for word in words]
    monkeypatch.setattr(sys, "argv", ["export", *flags, *words])
    assert load_tool("export_model").main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_class_names():
    assert class_names(10, "digits_val") == list("0123456789")
    assert class_names(2, "never_registered") == class_names(2) == ["0", "1"]
    assert class_names(1, "digits_val", "seven") == ["seven"]
    with pytest.raises(ValueError, match="digits_val has 10 class names and the model 3"):
        class_names(3, "digits_val")
