"""What predict draws and writes: the model's own boxes, names that do not collide, inputs that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from focal_plugin import get_config
from focal_plugin.deploy.predict import SHORTEST_EDGE, Predictor, find_inputs, name_classes, output_names, predict


@pytest.fixture
def make_predictor(make_model, tmp_path):
    """make_predictor("KEY", "VALUE", stored={"thing_classes": ...}, score_threshold=.2): something is found."""

    def make(*opts, stored=(), **kwargs):
        cfg, model = make_model("INPUT.MIN_SIZE_TEST", "64", *opts)
        torch.save({"model": model.state_dict(), **dict(stored)}, tmp_path / "weights.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        given = {"classes": "a,b,c"[: 2 * model.num_classes - 1], "score_threshold": 0.2}
        return Predictor(cfg, **{**given, **kwargs})

    return make


def noise(size=(40, 56), seed=0):
    """Coarse noise, h x w."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)


def make_image(path, size=(40, 56), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), noise(size, seed))
    return path


def run(predictor, paths, output):
    """What predict yields, and its json."""
    output.mkdir(exist_ok=True)
    return list(predict(predictor, paths, output)), json.loads((output / "detections.json").read_text())


def check_results(predictor, image, results):
    """The results of a BGR image are the model's, run by hand as its evaluation does: resized, boxes scaled back."""
    height, width = image.shape[:2]
    resized = predictor.resize.get_transform(image).apply_image(image)
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
    predictor.category_ids = ids = [7, 3, 5][: predictor.model.num_classes]
    paths = [make_image(tmp_path / "in" / f"{name}.png", seed=len(name)) for name in ("RGB", "L", "RGBA", "turned")]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    images = [Image.open(path).convert(mode) for path, mode in zip(paths, ("RGB", "L", "RGBA", "RGB"))]
    for path, image in zip(paths, images):
        image.save(path, **({"exif": exif} if path.stem == "turned" else {}))
    images[3] = images[3].transpose(Image.Transpose.ROTATE_270)
    done, results = run(predictor, paths, tmp_path / "out")
    assert [path for path, _ in done] == paths
    for number, ((path, count), image) in enumerate(zip(done, images)):
        mine = [result for result in results if result["image_id"] == number]
        image = np.asarray(image.convert("RGB"))[:, :, ::-1]
        labels = check_results(predictor, image, mine)
        assert len(mine) == count and {result["file_name"] for result in mine} == {str(path)}
        assert [(result["category_id"], result["category"]) for result in mine] == [(ids[i], "abc"[i]) for i in labels]
        picture = cv2.imread(str(tmp_path / "out" / path.name))
        assert picture.shape == (4 * image.shape[0], 4 * image.shape[1], 3)
        assert (picture != cv2.resize(image, picture.shape[1::-1])).any()


def test_a_python_snippet(make_predictor, tmp_path):
    """That of the docs: a config, weights, one image."""
    make_predictor(stored={"thing_classes": ["a $x", "b $^", "c"]})
    opts = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "MODEL.RETINANET.NUM_CLASSES", "3"]
    predictor = Predictor(get_config("digits/focal.yaml", [*opts, "MODEL.DEVICE", "cuda"]), score_threshold=0.2)
    image = noise((SHORTEST_EDGE, SHORTEST_EDGE + 3))
    found = predictor(image)
    assert len(found) > 0 and found.scores.min() >= 0.2 and predictor.classes == ["a $x", "b $^", "c"]
    picture = predictor.draw(image, found)
    assert picture.shape == image.shape and picture.dtype == np.uint8 and (picture != image).any()


def test_one_colour_a_class(make_predictor):
    predictor, image = make_predictor(), np.zeros((SHORTEST_EDGE, SHORTEST_EDGE, 3), np.uint8)
    found = predictor(noise())[[0, 0, 0, 0]]
    found.pred_boxes.tensor = torch.tensor([[x, 100.0, x + 50, 160] for x in (20, 120, 220, 320)])
    found.pred_classes = torch.tensor([0, 1, 0, 1])
    picture = predictor.draw(image, found)
    one, two, three, four = (picture[130, x - 2 : x + 3].max(axis=0).tolist() for x in (20, 120, 220, 320))
    assert one == three != two == four


def test_threshold_above_and_below_the_configs(make_predictor):
    opts = "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"
    high = make_predictor(*opts, score_threshold=0.4)(noise()).scores
    low = make_predictor(*opts, score_threshold=0.1)(noise()).scores
    assert 0 < len(high) < len(low) and high.min() >= 0.4 and 0.1 <= low.min() < 0.3


def test_unreadable_inputs_are_skipped(make_predictor, tmp_path):
    good = make_image(tmp_path / "in" / "good.png")
    bad = [tmp_path / "in" / name for name in ("a.jpg", "b.avi", "c.png")]
    for path in bad[:2]:
        path.write_bytes(b"nothing")
    bad[2].write_bytes(good.read_bytes()[:100])
    line = make_image(tmp_path / "in" / "line.png", size=(1, 3000))
    done, results = run(make_predictor(), [*bad, line, good], tmp_path / "out")
    for path, why in done[:4]:
        assert isinstance(why, ValueError) and str(path) in str(why)
    assert "line.png, 3000 x 1 pixels" in str(done[3][1])
    assert done[4][1] == len(results) > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detections.json", "good.png"]


def test_video(make_predictor, tmp_path):
    predictor, video = make_predictor(), tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 5, (56, 40))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for seed in range(3):
        writer.write(noise(seed=seed))
    writer.release()
    done, results = run(predictor, [video, make_image(tmp_path / "w.png")], tmp_path / "out")
    assert sum(count for _, count in done) == len(results)
    reader, drawn = cv2.VideoCapture(str(video)), cv2.VideoCapture(str(tmp_path / "out" / "v.avi"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    for number in range(3):
        mine = [result for result in results if result.get("frame") == number]
        assert {result["image_id"] for result in mine} == {number}
        check_results(predictor, reader.read()[1], mine)
        is_read, frame = drawn.read()
        assert is_read and frame.shape == (160, 224, 3)
    assert not drawn.read()[0]
    assert {result["image_id"] for result in results if "frame" not in result} == {3}


def test_find_inputs(tmp_path, monkeypatch):
    for name in ("a/x.png", "a/b/x.JPG", "a/note.txt", "c/[1].png", "out/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def find(*arguments, output="elsewhere"):
        return [path.as_posix() for path in find_inputs(arguments, output)]

    assert find("a") == ["a/b/x.JPG", "a/x.png"]
    assert find("a/*.png", "a", "a/x.png", "a/b/../x.png") == ["a/x.png", "a/b/x.JPG"]
    assert find("**/x.*") == ["a/b/x.JPG", "a/x.png", "out/x.png"]
    assert find("c/[1].png") == ["c/[1].png"]
    assert find("a/note.txt") == ["a/note.txt"]
    assert find(".", output="out") == ["a/b/x.JPG", "a/x.png", "c/[1].png"]
    assert find("out", output="out") == ["out/x.png"]
    for wrong in ("empty", "gone.png", "gone/*.png", "a/*.gif"):
        with pytest.raises(FileNotFoundError, match="^" + wrong.replace("*", r"\*")):
            find("a", wrong)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["a/x.png"], ["x.png"]),
        (["a/x.png", "b/x.png"], ["a/x.png", "b/x.png"]),
        (["a/x.png", "a/b/x.png"], ["x.png", "b/x.png"]),
        (["a/x.png", "a/x.gif", "a/x.JPG", "a/x.jpg"], ["x.png", "x_2.png", "x.jpg", "x_2.jpg"]),
        (["a/x.gif", "a/x_2.png", "a/x.png"], ["x.png", "x_2.png", "x_3.png"]),
        (["a/x.mov", "a/x.avi", "a/x.mp4"], ["x.mp4", "x.avi", "x_2.mp4"]),
    ],
)
def test_names_do_not_collide(inputs, names):
    assert [name.as_posix() for name in output_names([Path(path) for path in inputs])] == names


def test_names_and_ids_of_classes(tiny_config):
    digits = tiny_config("MODEL.RETINANET.NUM_CLASSES", "10", "DATASETS.TEST", '("digits_val",)')
    names = list("0123456789")
    assert name_classes(digits) == (names, list(range(1, 11)))
    assert name_classes(digits, stored=names[::-1]) == (names[::-1], list(range(10, 0, -1)))  # the ids go by name
    assert name_classes(digits, stored=list("abcdefghij")) == (list("abcdefghij"), list(range(10)))
    three = tiny_config("DATASETS.TEST", '("digits_val",)')
    assert name_classes(three, stored=["a", "b", "c"]) == (["a", "b", "c"], [0, 1, 2])
    assert name_classes(three, "x, y,z", ["a", "b", "c"]) == (["x", "y", "z"], [0, 1, 2])
    with pytest.raises(ValueError, match="digits_val has 10 class names and the model 3"):
        name_classes(three)
    with pytest.raises(ValueError, match="--classes a,b has 2 class names and the model 3"):
        name_classes(three, "a,b")
    assert name_classes(tiny_config("DATASETS.TEST", '("unknown",)')) == (["0", "1", "2"], [0, 1, 2])


@pytest.mark.parametrize(
    ("thing_classes", "score_threshold"),
    [(["a"], 1.5), (["a", "b", ""], float("nan")), (["a", "b", 3], "0.3"), ("abc", -0.1), (7, [0.3]), (None, None)],
)
def test_what_a_checkpoint_cannot_mean_is_left_out(make_predictor, caplog, thing_classes, score_threshold):
    stored = {"thing_classes": thing_classes, "score_threshold": score_threshold}
    predictor = make_predictor("DATASETS.TEST", "()", stored=stored, classes=None, score_threshold=None)
    assert predictor.classes == ["0", "1", "2"] and predictor.score_threshold == 0.5
    assert "thing_classes" in caplog.text and "score_threshold" in caplog.text


def test_a_checkpoint_knows_its_names_and_threshold(make_predictor):
    stored = {"thing_classes": ["cat", "dog", "cow"], "score_threshold": 0.25}
    predictor = make_predictor(stored=stored, classes=None, score_threshold=None)
    assert (predictor.classes, predictor.score_threshold) == (["cat", "dog", "cow"], 0.25)
    predictor = make_predictor(stored=stored)  # what is given comes first
    assert (predictor.classes, predictor.score_threshold) == (["a", "b", "c"], 0.2)


def test_categories_have_the_ids_of_the_json(make_predictor, tmp_path, call, restore_catalogs):
    """Of a registered data set, which is not loaded for it, named by DATASETS.TEST or not."""
    make_predictor()
    image = make_image(tmp_path / "in" / "a.png")
    categories = [{"id": id_, "name": name} for id_, name in ((30, "cow"), (4, "cat"), (17, "dog"))]
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.0"]
    flags += ["--register", f"animals={tmp_path / 'truth.json'}:{tmp_path / 'in'}"]
    opts = ["MODEL.WEIGHTS", tmp_path / "weights.pth", "MODEL.RETINANET.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"]
    for more in ([], ["DATASETS.TEST", '("animals",)']):
        code, out, _ = call("predict", image, *flags, *opts, *more)
        assert code == 0 and "--register" not in out
        results = json.loads((tmp_path / "out" / "detections.json").read_text())
        assert {(r["category_id"], r["category"]) for r in results} == {(4, "cat"), (17, "dog"), (30, "cow")}


def test_tool(make_predictor, tmp_path, call):
    make_predictor()
    weights = ["MODEL.WEIGHTS", tmp_path / "weights.pth"]
    weights += ["MODEL.RETINANET.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"]
    good, bad = make_image(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png"
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.2"]
    code, _, err = call("predict", good, *flags, *weights)
    assert code == 2 and "digits_val has 10 class names and the model 3" in err
    flags += ["--classes", "cat,dog,cow"]
    code, out, _ = call("predict", good, *flags, *weights)
    assert code == 0 and f"{tmp_path / 'out'}" in out and "ids count from 0; --register" in out
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {r["category"] for r in results} <= {"cat", "dog", "cow"} and f"{len(results)} objects in 1 files" in out
    bad.touch()
    code, _, err = call("predict", *flags, tmp_path / "in", *weights)  # the images behind the flags
    assert code == 1 and "b.png cannot be read" in err
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == results
    before = good.read_bytes()
    code, _, err = call("predict", good, *flags, "--output", tmp_path / "in", *weights)
    assert code == 2 and "would overwrite" in err and "a.png" in err and good.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.png", "MODEL.WEIGHTS", "w.pth"], "gone.png: there is no such file or folder"),
        (["{root}", "MODEL.WEIGHTS", "w.pth"], "no image or video in this folder"),
        (["{root}/*.png", "MODEL.WEIGHTS", "w.pth"], "nothing matches"),
        (["{root}/note.txt", "MODEL.WEIGHTS", "{root}/w.pth"], "w.pth"),
        (["{root}/note.txt", "SEED", "1"], "MODEL.WEIGHTS"),
        (["{root}/note.txt", "MODEL.WEIGHT", "w.pth"], "MODEL.WEIGHT"),
        (["MODEL.WEIGHTS", "w.pth"], "no images"),
    ],
)
def test_tool_refuses(tmp_path, call, words, message):
    (tmp_path / "note.txt").touch()
    words = [word.format(root=tmp_path) for word in words]
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out"]
    code, _, err = call("predict", *words[:1], *flags, *words[1:])
    assert code == 2 and err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()
