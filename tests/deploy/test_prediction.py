"""What predict draws and writes: the model's own boxes, names that do not collide, inputs that cannot be read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from focal_plugin.deploy.model import category_ids
from focal_plugin.deploy.prediction import Predictor, UnreadableError, find_inputs, output_names, predict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_predictor(tiny_config, tmp_path):
    """make_predictor("KEY", "VALUE", threshold=.2): random weights with which something is found."""

    def make(*opts, threshold=0.2):
        cfg = tiny_config("INPUT.MIN_SIZE_TEST", "64", *opts)
        torch.manual_seed(0)
        model = build_model(cfg)
        with torch.no_grad():
            model.head.cls_score.weight *= 15
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        return Predictor(cfg, threshold)

    return make


def make_image(path, size=(40, 56), seed=0, **save):
    """Coarse noise, h x w."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size[::-1], Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **save)
    return path


def make_video(path, frames=3, size=(40, 56)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, size[::-1])
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for seed in range(frames):
        noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        writer.write(cv2.resize(noise, size[::-1], interpolation=cv2.INTER_NEAREST))
    writer.release()
    return path


def run(predictor, paths, output, classes="abc", **kwargs):
    """What predict yields, and its json."""
    output.mkdir(exist_ok=True)
    done = list(predict(predictor, paths, output, list(classes), **kwargs))
    return done, json.loads((output / "detections.json").read_text())


def check_results(predictor, image, results):
    """The results of a BGR image are the model's, run by hand as its evaluation does: resized, boxes scaled back."""
    height, width = image.shape[:2]
    resized = predictor.aug.get_transform(image).apply_image(image)
    inputs = {"image": torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1)), "height": height, "width": width}
    with torch.no_grad():
        found = predictor.model([inputs])[0]["instances"]
    found = found[found.scores >= predictor.score_threshold]
    assert len(found) == len(results) > 0
    boxes = torch.tensor([result["bbox"] for result in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, found.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor([result["score"] for result in results]), found.scores)
    return found.pred_classes.tolist()


@pytest.mark.parametrize(
    "opts",
    [(), ("MODEL.RETINANET.NUM_CLASSES", "1"), ("MODEL.META_ARCHITECTURE", "RetinaNet")],
    ids=["focal", "one class", "stock"],
)
def test_results_are_the_models(make_predictor, tmp_path, opts):
    predictor = make_predictor(*opts)
    num_classes = predictor.model.num_classes
    paths = [make_image(tmp_path / "in" / f"{seed}.png", seed=seed) for seed in range(2)]
    classes, ids = "abc"[:num_classes], [7, 3, 5][:num_classes]
    done, results = run(predictor, paths, tmp_path / "out", classes, category_ids=ids)
    assert [path for path, _ in done] == paths
    for number, (path, count) in enumerate(done):
        mine = [result for result in results if result["image_id"] == number]
        labels = check_results(predictor, cv2.imread(str(path)), mine)
        assert len(mine) == count and {result["file_name"] for result in mine} == {str(path)}
        assert [(result["category_id"], result["category"]) for result in mine] == [
            (ids[i], classes[i]) for i in labels
        ]
        drawn = cv2.imread(str(tmp_path / "out" / path.name))
        assert drawn.shape == (40, 56, 3) and (drawn != cv2.imread(str(path))).any()


def test_threshold_above_and_below_the_configs(make_predictor, tmp_path):
    image = cv2.imread(str(make_image(tmp_path / "a.png")))
    opts = "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"
    high = make_predictor(*opts, threshold=0.4).detect(image).scores
    low = make_predictor(*opts, threshold=0.1).detect(image).scores
    assert 0 < len(high) < len(low) and high.min() >= 0.4 and 0.1 <= low.min() < 0.3


def save_grey(path):
    Image.open(make_image(path)).convert("L").save(path)


def save_rgba(path):
    Image.open(make_image(path)).convert("RGBA").save(path)


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.open(make_image(path)).save(path, exif=exif)


@pytest.mark.parametrize(
    ("save", "size"), [(save_grey, (40, 56)), (save_rgba, (40, 56)), (save_turned, (56, 40))], ids=["L", "RGBA", "EXIF"]
)
def test_images_that_are_no_plain_rgb(make_predictor, tmp_path, save, size):
    predictor, path = make_predictor(), tmp_path / "a.png"
    save(path)
    _, results = run(predictor, [path], tmp_path / "out")
    assert cv2.imread(str(tmp_path / "out" / "a.png")).shape[:2] == size
    image = Image.open(path).convert("RGB")
    image = image.transpose(Image.Transpose.ROTATE_270) if size == (56, 40) else image
    check_results(predictor, np.asarray(image)[:, :, ::-1], results)


def test_unreadable_inputs_are_skipped(make_predictor, tmp_path):
    good = make_image(tmp_path / "in" / "good.png")
    bad = [tmp_path / "in" / name for name in ("a.jpg", "b.avi", "c.png")]
    for path in bad[:2]:
        path.write_bytes(b"nothing")
    bad[2].write_bytes(good.read_bytes()[:100])
    done, results = run(make_predictor(), [*bad, good], tmp_path / "out")
    for path, why in done[:3]:
        assert isinstance(why, UnreadableError) and str(path) in str(why)
    assert done[3][1] == len(results) > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detections.json", "good.png"]


def test_video(make_predictor, tmp_path):
    predictor = make_predictor()
    video, image = make_video(tmp_path / "v.avi"), make_image(tmp_path / "w.png")
    seen = []

    def progress(frames, total):
        seen.append(total)
        return frames

    done, results = run(predictor, [video, image], tmp_path / "out", progress=progress)
    assert seen == [3] and sum(count for _, count in done) == len(results)
    reader, drawn = cv2.VideoCapture(str(video)), cv2.VideoCapture(str(tmp_path / "out" / "v.avi"))
    for number in range(3):
        mine = [result for result in results if result.get("frame") == number]
        assert {result["image_id"] for result in mine} == {number}
        check_results(predictor, reader.read()[1], mine)
        is_read, frame = drawn.read()
        assert is_read and frame.shape == (40, 56, 3)
    assert not drawn.read()[0]
    assert {result["image_id"] for result in results if "frame" not in result} == {3}


def test_find_inputs(tmp_path, monkeypatch):
    for name in ("a/x.png", "a/b/x.JPG", "a/note.txt", "c/[1].png", "out/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def find(*arguments, **kwargs):
        return [path.as_posix() for path in find_inputs(arguments, **kwargs)]

    assert find("a") == ["a/b/x.JPG", "a/x.png"]
    assert find("a/*.png", "a", "a/x.png") == ["a/x.png", "a/b/x.JPG"]
    assert find("**/x.*") == ["a/b/x.JPG", "a/x.png", "out/x.png"]
    assert find("c/[1].png") == ["c/[1].png"]
    assert find("a/note.txt") == ["a/note.txt"]
    assert find(".", output="out") == ["a/b/x.JPG", "a/x.png", "c/[1].png"]
    assert find("out", output="out") == ["out/x.png"]
    for wrong in ("empty", "gone.png", "gone/*.png", "a/*.gif"):
        with pytest.raises(FileNotFoundError, match="^" + wrong.replace("*", r"\*")):
            find("a", wrong)
    with pytest.raises(FileNotFoundError, match="no images"):
        find()


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["a/x.png"], ["x.png"]),
        (["a/x.png", "b/x.png"], ["a/x.png", "b/x.png"]),
        (["a/x.png", "a/b/x.png"], ["x.png", "b/x.png"]),
        (["a/x.png", "a/x.gif", "a/x.JPG", "a/x.jpg"], ["x.png", "x_2.png", "x.jpg", "x_2.jpg"]),
        (["a/x.gif", "a/x_2.png", "a/x.png"], ["x.png", "x_2.png", "x_3.png"]),
        (["a/x.mov", "a/x.avi", "a/x.mp4"], ["x.mp4", "x.avi", "x_2.mp4"]),
        ([], []),
    ],
)
def test_names_do_not_collide(inputs, names):
    assert [name.as_posix() for name in output_names([Path(path) for path in inputs])] == names


def test_nothing_is_overwritten(make_predictor, tmp_path):
    path = make_image(tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite .*a\.png"):
        list(predict(make_predictor(), [path], tmp_path, list("abc")))
    assert path.read_bytes() == before


def test_an_image_that_cannot_be_resized_is_skipped(make_predictor, tmp_path):
    line, good = make_image(tmp_path / "a.png", size=(1, 3000)), make_image(tmp_path / "b.png")
    done, results = run(make_predictor(), [line, good], tmp_path / "out")
    assert isinstance(done[0][1], UnreadableError) and "a.png, 3000 x 1 pixels" in str(done[0][1])
    assert done[1][1] == len(results) > 0


def test_one_image_under_two_names_is_one(tmp_path, monkeypatch):
    make_image(tmp_path / "a.png")
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_inputs(["a.png", "x/../a.png", "*.png"]) == [Path("a.png")]


def test_categories_have_the_ids_of_the_json(make_predictor, tmp_path, call, restore_catalogs):
    """Of a registered data set, which is not loaded for it, and of the digits, which are not even drawn."""
    make_predictor()
    image = make_image(tmp_path / "in" / "a.png")
    categories = [{"id": id_, "name": name} for id_, name in ((30, "cow"), (4, "cat"), (17, "dog"))]
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.0"]
    flags += ["--register", f"animals={tmp_path / 'truth.json'}:{tmp_path / 'in'}"]
    opts = ["MODEL.WEIGHTS", tmp_path / "weights.pth", "MODEL.RETINANET.NUM_CLASSES", "3"]
    opts += ["DATASETS.TEST", '("animals",)', "INPUT.MIN_SIZE_TEST", "64"]
    assert call(image, *flags, *opts)[0] == 0
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(r["category_id"], r["category"]) for r in results} == {(4, "cat"), (17, "dog"), (30, "cow")}
    assert category_ids(10, "digits_val") == list(range(1, 11))
    assert category_ids(3) == [0, 1, 2]


@pytest.fixture
def call(monkeypatch, capsys):
    """call("a.png", ...) runs the tool: its exit code, stdout and stderr."""
    spec = importlib.util.spec_from_file_location("tool_predict", ROOT / "tools" / "predict.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run_tool(*words):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        return (tool.main(), *capsys.readouterr())

    return run_tool


def test_tool(make_predictor, tmp_path, call):
    make_predictor()
    weights = ["MODEL.WEIGHTS", tmp_path / "weights.pth"]
    weights += ["MODEL.RETINANET.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"]
    good, bad = make_image(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png"
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.2"]
    code, _, err = call(good, *flags, *weights)
    assert code == 2 and "digits_val has 10 class names and the model 3" in err
    flags += ["--classes", "cat,dog,cow"]
    code, out, _ = call(good, *flags, *weights)
    assert code == 0 and f"{tmp_path / 'out'}" in out
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {r["category"] for r in results} <= {"cat", "dog", "cow"} and f"{len(results)} objects in 1 files" in out
    bad.touch()
    code, _, err = call(*flags, tmp_path / "in", *weights)  # the images behind the flags
    assert code == 1 and "b.png cannot be read" in err
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == [
        {**result, "file_name": str(good)} for result in results
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.png", "MODEL.WEIGHTS", "w.pth"], "gone.png: there is no such file or folder"),
        (["{root}", "MODEL.WEIGHTS", "w.pth"], "no image or video in this folder"),
        (["{root}/*.png", "MODEL.WEIGHTS", "w.pth"], "nothing matches"),
        (["{root}/note.txt", "MODEL.WEIGHTS", "{root}/w.pth"], "w.pth"),
        (["{root}/note.txt", "SEED", "1"], "MODEL.WEIGHTS"),
        (["{root}/note.txt", "MODEL.WEIGHT", "w.pth"], "MODEL.WEIGHT"),
    ],
)
def test_tool_refuses(tmp_path, call, words, message):
    (tmp_path / "note.txt").touch()
    words = [word.format(root=tmp_path) for word in words]
    code, _, err = call(*words[:1], "--config-file", "digits/focal.yaml", "--output", tmp_path / "out", *words[1:])
    assert code == 2 and err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()
