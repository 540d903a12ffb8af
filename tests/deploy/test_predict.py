"""What predict draws and writes: the model's own boxes, names that do not collide, inputs that cannot be read."""

import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode
from PIL import Image

from focal_plugin import get_config
from focal_plugin.deploy.predict import SHORTEST_EDGE, Predictor, name_classes, predict

SMALL = ("INPUT.MIN_SIZE_TEST", "64")


def noise(size=(40, 56), seed=0):
    """Coarse noise, h x w, BGR."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)


def make_inputs(folder):
    """Each path with the BGR images that it should be read as."""
    folder.mkdir()
    cv2.imwrite(str(folder / "line.png"), noise((1, 3000)))
    writer = cv2.VideoWriter(str(folder / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (56, 40))
    for seed in range(3):
        writer.write(noise(seed=seed))
    writer.release()
    reader, exif = cv2.VideoCapture(str(folder / "v.avi")), Image.Exif()
    inputs = {folder / "line.png": [], folder / "v.avi": [reader.read()[1] for _ in range(3)]}
    exif[0x0112] = 6  # the camera was held upright
    for mode in ("RGB", "L", "RGBA"):
        image = Image.fromarray(noise(seed=len(mode))[:, :, ::-1]).convert(mode)
        image.save(folder / f"{mode}.png")
        inputs[folder / f"{mode}.png"] = [np.asarray(image.convert("RGB"))[:, :, ::-1]]
    for name, content in {"a.jpg": b"no", "b.avi": b"no", "c.png": (folder / "L.png").read_bytes()[:100]}.items():
        (folder / name).write_bytes(content)
        inputs[folder / name] = []
    Image.fromarray(noise(seed=6)).save(folder / "turned.png", exif=exif)
    return {**inputs, folder / "turned.png": [np.rot90(noise(seed=6)[:, :, ::-1], -1)]}


def check_results(predictor, image, results):
    """They are the model's, run by hand as its evaluation does: resized, boxes scaled back; return their labels."""
    height, width = image.shape[:2]
    image = image[:, :, ::-1] if predictor.cfg.INPUT.FORMAT == "RGB" else image
    resized = ResizeShortestEdge(64, 1333).get_transform(image).apply_image(image)
    inputs = {"image": torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1)), "height": height, "width": width}
    with torch.no_grad():
        found = predictor.model([inputs])[0]["instances"]
    found = found[found.scores >= predictor.score_threshold]
    assert len(found) == len(results) > 0
    boxes = BoxMode.convert(torch.tensor([r["bbox"] for r in results]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    torch.testing.assert_close(boxes, found.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor([result["score"] for result in results]), found.scores)
    return found.pred_classes.tolist()


@pytest.mark.parametrize(
    "opts",
    [(), ("MODEL.RETINANET.NUM_CLASSES", "1"), ("MODEL.META_ARCHITECTURE", "RetinaNet"), ("INPUT.FORMAT", "RGB")],
    ids=["focal", "one class", "stock", "RGB"],
)
def test_results_are_the_models(make_model, tmp_path, opts):
    """Of images and videos; what cannot be read is named and skipped."""
    cfg, model = make_model(*SMALL, *opts)
    predictor = Predictor(cfg, "abc"[: model.num_classes], 0.2)
    predictor.category_ids = ids = [7, 3, 5][: model.num_classes]
    inputs, output, image_id = make_inputs(tmp_path / "in"), tmp_path / "out", 0
    output.mkdir()
    done = list(predict(predictor, {path: output / path.name for path in inputs}, output))
    results = json.loads((output / "detections.json").read_text())
    assert [path for path, _ in done] == list(inputs) and len(results) == sum(n for _, n in done if isinstance(n, int))
    for (path, count), images in zip(done, inputs.values()):
        reader, is_video = cv2.VideoCapture(str(output / path.name)), path.suffix == ".avi"
        if not images:
            image_id += not is_video
            assert isinstance(count, ValueError) and str(path) in str(count) and not (output / path.name).exists()
        elif is_video:
            assert reader.get(cv2.CAP_PROP_FPS) == 5
        for number, image in enumerate(images):
            mine = [result for result in results if result["image_id"] == image_id]
            names = [(ids[label], "abc"[label]) for label in check_results(predictor, image, mine)]
            assert [(result["category_id"], result["category"]) for result in mine] == names
            assert {(r["file_name"], r.get("frame")) for r in mine} == {(str(path), number if is_video else None)}
            picture = reader.read()[1]
            assert picture.shape == (4 * image.shape[0], 4 * image.shape[1], 3)
            assert (picture != cv2.resize(image, picture.shape[1::-1])).any()
            image_id += 1
        assert not reader.read()[0]
    assert "line.png, 3000 x 1 pixels" in str(dict(done)[tmp_path / "in" / "line.png"])


def test_a_python_snippet(make_model, tmp_path):
    """That of the docs: a config, weights, one image. Each class is drawn in one colour, whatever it is called."""
    make_model(*SMALL, stored={"thing_classes": ["a $x", "b $^", "c"], "score_threshold": 0.25})
    opts = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "MODEL.RETINANET.NUM_CLASSES", "3"]
    cfg = get_config("digits/focal.yaml", [*opts, "MODEL.DEVICE", "cuda", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"])
    image, predictor = noise((SHORTEST_EDGE, SHORTEST_EDGE + 3)), Predictor(cfg)
    assert predictor.classes == ["a $x", "b $^", "c"] and predictor.score_threshold == 0.25
    high, low = (Predictor(cfg, score_threshold=score)(image) for score in (0.4, 0.1))
    assert 0 < len(high) < len(low) and high.scores.min() >= 0.4 and 0.1 <= low.scores.min() < 0.3
    found, image = high[[0, 0, 0, 0]], np.zeros_like(image)
    found.pred_boxes.tensor = torch.tensor([[x, 100.0, x + 50, 160] for x in (20, 120, 220, 320)])
    found.pred_classes = torch.tensor([0, 1, 0, 1])
    picture = predictor.draw(image, found)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    one, two, three, four = (picture[130, x - 2 : x + 3].max(axis=0).tolist() for x in (20, 120, 220, 320))
    assert one == three != two == four
    predictor = Predictor(cfg, ["a", "b", "c"], 0.2)  # what is given comes first
    assert (predictor.classes, predictor.score_threshold) == (["a", "b", "c"], 0.2)


def test_inputs_and_where_they_are_drawn(tmp_path, monkeypatch):
    find_inputs = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "predict.py"))["find_inputs"]
    monkeypatch.chdir(tmp_path)
    files = "a/x.png a/b/x.JPG a/b/note c/[1].png out/x.png v/y.mov v/y.avi v/y.gif v/y.gif.png v/y.JPG v/y.jpg empty/x"
    for path in map(tmp_path.joinpath, files.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def find(*arguments):
        found = find_inputs(arguments, tmp_path / "out")
        return {path.as_posix(): target.relative_to(tmp_path / "out").as_posix() for path, target in found.items()}

    a = {"a/b/x.JPG": "b/x.JPG", "a/x.png": "x.png"}
    assert find("a") == a and list(find("a")) == list(a)
    assert find("a/*.png", "a", "a/x.png", "a/b/../x.png") == a
    assert find("a/x.png", "c/[1].png") == {"a/x.png": "a/x.png", "c/[1].png": "c/[1].png"}
    assert list(find("**/x.*")) == ["a/b/x.JPG", "a/x.png", "out/x.png"]
    assert find("a/b/note") == {"a/b/note": "note.png"}
    assert not any(path.startswith("out") for path in find("."))  # its pictures are of the last run
    drawn = "y.JPG y.avi y.gif.png y.gif.png.png y.jpg.png y.mov.mp4"  # no two of one name, in upper case or lower
    assert list(find("v").values()) == drawn.split() and list(find("v")) == sorted(find("v"))
    with pytest.raises(ValueError, match="would overwrite"):
        find("out")
    nothing = {"empty": "no image or video in this folder", "gone.png": "there is no such file or folder"}
    for wrong, why in {**nothing, "gone/*.png": "nothing matches", "a/*.gif": "nothing matches"}.items():
        with pytest.raises(FileNotFoundError, match="^" + re.escape(wrong) + ".*" + why):
            find("a", wrong)


def test_names_and_ids_of_classes(tiny_config):
    digits = tiny_config("MODEL.RETINANET.NUM_CLASSES", "10", "DATASETS.TEST", '("digits_val",)')
    three = tiny_config("DATASETS.TEST", '("digits_val",)')
    names = list("0123456789")
    assert name_classes(digits) == (names, list(range(1, 11)))
    assert name_classes(digits, names[::-1]) == (names[::-1], list(range(10, 0, -1)))  # the ids go by name
    assert name_classes(digits, list("abcdefghij")) == (list("abcdefghij"), list(range(10)))
    assert name_classes(three, ["a", "b", "c"]) == (["a", "b", "c"], [0, 1, 2])
    wrong = {"digits_val has 10": [], "--classes a,b has 2": ["a", "b"], "--classes a, has 2": ["a", ""]}
    for problem, given in wrong.items():
        with pytest.raises(ValueError, match=f"{problem} class names and the model 3"):
            name_classes(three, given)
    assert name_classes(tiny_config("DATASETS.TEST", '("unknown",)')) == (["0", "1", "2"], [0, 1, 2])


@pytest.mark.parametrize(
    ("thing_classes", "score_threshold"),
    [(["a"], 1.5), (["a", "b", ""], float("nan")), (["a", "b", 3], "0.3"), ("abc", -0.1), (7, [0.3]), (None, None)],
)
def test_what_a_checkpoint_cannot_mean_is_left_out(make_model, caplog, thing_classes, score_threshold):
    stored = {"thing_classes": thing_classes, "score_threshold": score_threshold}
    predictor = Predictor(make_model("DATASETS.TEST", "()", stored=stored)[0])
    assert predictor.classes == ["0", "1", "2"] and predictor.score_threshold == 0.5
    assert "thing_classes" in caplog.text and "score_threshold" in caplog.text


def test_tool(make_model, tmp_path, call_tool, restore_catalogs):
    make_model(*SMALL)
    weights = ["MODEL.WEIGHTS", tmp_path / "weights.pth", "MODEL.RETINANET.NUM_CLASSES", "3", *SMALL]
    (tmp_path / "in").mkdir()
    cv2.imwrite(good := str(tmp_path / "in" / "a.png"), noise())
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.2"]

    def predicted(expected_code, *words):
        code, out, err = call_tool("predict", *words, *weights)
        assert code == expected_code, err
        found = json.loads((tmp_path / "out" / "detections.json").read_text())
        return out, err, [(result["category_id"], result["category"]) for result in found]

    names = ["--classes", "cat, dog,cow"]
    out, _, before = predicted(0, good, *flags, *names)
    assert f"{len(before)} objects in 1 files" in out and f"{tmp_path / 'out'}" in out and "0; --register" in out
    assert {*before} <= {(0, "cat"), (1, "dog"), (2, "cow")}
    # Those of a registered data set, which is not loaded for it, named by DATASETS.TEST or not.
    truth = [{"id": id_, "name": name} for id_, name in ((30, "cow"), (4, "cat"), (17, "dog"))]
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [], "categories": truth}))
    registered = ["--register", f"animals={tmp_path / 'truth.json'}:{tmp_path / 'in'}", "--score-threshold", "0.0"]
    for more in ([], ["DATASETS.TEST", '("animals",)']):
        out, _, found = predicted(0, good, *flags, *registered, *more)
        assert "--register" not in out and {*found} == {(4, "cat"), (17, "dog"), (30, "cow")}
    (tmp_path / "in" / "b.png").touch()
    _, err, after = predicted(1, *flags, *names, tmp_path / "in")  # the images behind the flags
    assert "b.png cannot be read" in err and after == before


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        ("predict", "gone.png MODEL.WEIGHTS w.pth", "gone.png: there is no such file or folder"),
        ("predict", "{root}/bad.pth MODEL.WEIGHTS {root}/w.pth", "w.pth"),
        ("predict", "{root}/bad.pth SEED 1", "MODEL.WEIGHTS"),
        ("predict", "MODEL.WEIGHTS w.pth", "no images"),
        ("export_model", "MODEL.RETINANET.PRIOR_PROB 0.01", "MODEL.WEIGHTS"),
        ("export_model", "--sample-image {root}/bad.pth MODEL.WEIGHTS {root}/bad.pth", "cannot be read as an image"),
        ("export_model", "--format torchscript MODEL.WEIGHTS {root}/bad.pth", "bad.pth"),
        ("export_model", "MODEL.WEIGHTS w.pth", "pip install onnx\n"),
        ("export_model", "MODEL.WEIGHTS w.pth", "pip install onnxruntime\n"),
    ],
)
def test_tools_refuse(tmp_path, monkeypatch, call_tool, tool, words, message):
    for missing in re.findall("pip install (.*)\n", message):
        _ = missing == "onnx" or pytest.importorskip("onnx")  # which is asked for first
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out"]
    words = words.format(root=tmp_path).split()
    words = [*flags, *words] if tool == "export_model" else [words[0], *flags, *words[1:]]
    code, _, err = call_tool(tool, *words)
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
