"""What predict draws and writes: the model's own boxes, names that do not collide, inputs that cannot be read."""

from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from focal_plugin import get_config
from focal_plugin.deploy.predict import SHORTEST_EDGE, Predictor, find_inputs, name_classes, predict


@pytest.fixture
def make_predictor(make_model, tmp_path):
    """make_predictor("KEY", "VALUE", stored={"thing_classes": ...}, score_threshold=.2): something is found."""

    def make(*opts, stored=(), **kwargs):
        cfg, model = make_model("INPUT.MIN_SIZE_TEST", "64", *opts)
        torch.save({"model": model.state_dict(), **dict(stored)}, tmp_path / "weights.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        return Predictor(cfg, **{"classes": "abc"[: model.num_classes], "score_threshold": 0.2, **kwargs})

    return make


def noise(size=(40, 56), seed=0):
    """Coarse noise, h x w."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)


def make_image(path, size=(40, 56), seed=0):
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), noise(size, seed))
    return path


def run(predictor, output, *paths):
    """What predict yields, and its json."""
    output.mkdir()
    done = list(predict(predictor, find_inputs(list(map(str, paths)), output), output))
    return done, json.loads((output / "detections.json").read_text())


def check_results(predictor, image, results):
    """The results of a BGR image are the model's, run by hand as its evaluation does: resized, boxes scaled back."""
    height, width = image.shape[:2]
    image = image[:, :, ::-1] if predictor.cfg.INPUT.FORMAT == "RGB" else image
    resized = ResizeShortestEdge(64, 1333).get_transform(image).apply_image(image)
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
    [(), ("MODEL.RETINANET.NUM_CLASSES", "1"), ("MODEL.META_ARCHITECTURE", "RetinaNet"), ("INPUT.FORMAT", "RGB")],
    ids=["focal", "one class", "stock", "RGB"],
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
    done, results = run(predictor, tmp_path / "out", *paths)
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
    """That of the docs: a config, weights, one image. Each class is drawn in one colour, whatever it is called."""
    make_predictor(stored={"thing_classes": ["a $x", "b $^", "c"]})
    opts = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "MODEL.RETINANET.NUM_CLASSES", "3"]
    predictor = Predictor(get_config("digits/focal.yaml", [*opts, "MODEL.DEVICE", "cuda"]), score_threshold=0.2)
    found = predictor(noise((SHORTEST_EDGE, SHORTEST_EDGE + 3)))
    assert len(found) > 0 and found.scores.min() >= 0.2 and predictor.classes == ["a $x", "b $^", "c"]
    found, image = found[[0, 0, 0, 0]], np.zeros((SHORTEST_EDGE, SHORTEST_EDGE + 3, 3), np.uint8)
    found.pred_boxes.tensor = torch.tensor([[x, 100.0, x + 50, 160] for x in (20, 120, 220, 320)])
    found.pred_classes = torch.tensor([0, 1, 0, 1])
    picture = predictor.draw(image, found)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    one, two, three, four = (picture[130, x - 2 : x + 3].max(axis=0).tolist() for x in (20, 120, 220, 320))
    assert one == three != two == four


def test_threshold_above_and_below_the_configs(make_predictor):
    opts = "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"
    high = make_predictor(*opts, score_threshold=0.4)(noise()).scores
    low = make_predictor(*opts, score_threshold=0.1)(noise()).scores
    assert 0 < len(high) < len(low) and high.min() >= 0.4 and 0.1 <= low.min() < 0.3


def test_unreadable_inputs_are_skipped(make_predictor, tmp_path):
    good, line = make_image(tmp_path / "good.png"), make_image(tmp_path / "line.png", size=(1, 3000))
    bad = [tmp_path / name for name in ("a.jpg", "b.avi", "c.png")]
    for path, content in zip(bad, (b"nothing", b"nothing", good.read_bytes()[:100])):
        path.write_bytes(content)
    done, results = run(make_predictor(), tmp_path / "out", *bad, line, good)
    for path, why in done[:4]:
        assert isinstance(why, ValueError) and str(path) in str(why)
    assert "line.png, 3000 x 1 pixels" in str(done[3][1])
    assert done[4][1] == len(results) > 0
    assert sorted(os.listdir(tmp_path / "out")) == ["detections.json", "good.png"]


def test_video(make_predictor, tmp_path):
    predictor, video = make_predictor(), tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 5, (56, 40))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for seed in range(3):
        writer.write(noise(seed=seed))
    writer.release()
    done, results = run(predictor, tmp_path / "out", video, make_image(tmp_path / "w.png"))
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


@pytest.fixture
def find(tmp_path, monkeypatch):
    """find(names of files, *arguments): inputs, and where below "out" they are drawn."""
    monkeypatch.chdir(tmp_path)

    def make_and_find(names, *arguments):
        for path in map(tmp_path.joinpath, names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = find_inputs(arguments, tmp_path / "out")
        return {path.as_posix(): target.relative_to(tmp_path / "out").as_posix() for path, target in found.items()}

    return make_and_find


def test_find_inputs(find, tmp_path):
    names = ("a/x.png", "a/b/x.JPG", "a/note.txt", "c/[1].png", "out/x.png", "empty/note.txt")
    assert list(find(names, "a")) == ["a/b/x.JPG", "a/x.png"]
    assert list(find((), "a/*.png", "a", "a/x.png", "a/b/../x.png")) == ["a/x.png", "a/b/x.JPG"]
    assert list(find((), "**/x.*")) == ["a/b/x.JPG", "a/x.png", "out/x.png"]
    assert list(find((), "c/[1].png")) == ["c/[1].png"]
    assert list(find((), "a/note.txt")) == ["a/note.txt"]
    assert list(find((), ".")) == ["a/b/x.JPG", "a/x.png", "c/[1].png"]
    with pytest.raises(ValueError, match="would overwrite"):
        find((), "out")
    for wrong in ("empty", "gone.png", "gone/*.png", "a/*.gif"):
        with pytest.raises(FileNotFoundError, match="^" + wrong.replace("*", r"\*")):
            find((), "a", wrong)


@pytest.mark.parametrize(
    "names",
    [
        {"a/x.png": "x.png"},
        {"a/x.png": "a/x.png", "b/x.png": "b/x.png"},
        {"a/x.png": "x.png", "a/b/x.png": "b/x.png"},
        {"a/x.gif": "x.gif.png", "a/x.gif.png": "x.gif.png.png", "a/x.JPG": "x.JPG", "a/x.jpg": "x.jpg.png"},
        {"a/x.mov": "x.mov.mp4", "a/x.avi": "x.avi", "a/x.mp4": "x.mp4", "a/x": "x.png"},
    ],
)
def test_names_do_not_collide(find, names):
    assert find(names, *names) == names


def test_names_and_ids_of_classes(tiny_config):
    digits = tiny_config("MODEL.RETINANET.NUM_CLASSES", "10", "DATASETS.TEST", '("digits_val",)')
    three = tiny_config("DATASETS.TEST", '("digits_val",)')
    names = list("0123456789")
    assert name_classes(digits) == (names, list(range(1, 11)))
    assert name_classes(digits, names[::-1]) == (names[::-1], list(range(10, 0, -1)))  # the ids go by name
    assert name_classes(digits, list("abcdefghij")) == (list("abcdefghij"), list(range(10)))
    assert name_classes(three, ["a", "b", "c"]) == (["a", "b", "c"], [0, 1, 2])
    for given, problem in (
        ([], "digits_val has 10"),
        (["a", "b"], "--classes a,b has 2"),
        (["a", ""], "a, has 2"),
    ):
        with pytest.raises(ValueError, match=f"{problem} class names and the model 3"):
            name_classes(three, given)
    assert name_classes(tiny_config("DATASETS.TEST", '("unknown",)')) == (["0", "1", "2"], [0, 1, 2])


@pytest.mark.parametrize(
    ("thing_classes", "score_threshold"),
    [(["a"], 1.5), (["a", "b", ""], float("nan")), (["a", "b", 3], "0.3"), ("abc", -0.1), (7, [0.3]), (None, None)],
)
def test_what_a_checkpoint_cannot_mean_is_left_out(make_predictor, caplog, thing_classes, score_threshold):
    stored = {"thing_classes": thing_classes, "score_threshold": score_threshold}
    predictor = make_predictor("DATASETS.TEST", "()", stored=stored, classes=(), score_threshold=None)
    assert predictor.classes == ["0", "1", "2"] and predictor.score_threshold == 0.5
    assert "thing_classes" in caplog.text and "score_threshold" in caplog.text


def test_a_checkpoint_knows_its_names_and_threshold(make_predictor):
    stored = {"thing_classes": ["cat", "dog", "cow"], "score_threshold": 0.25}
    predictor = make_predictor(stored=stored, classes=(), score_threshold=None)
    assert (predictor.classes, predictor.score_threshold) == (["cat", "dog", "cow"], 0.25)
    predictor = make_predictor(stored=stored)  # what is given comes first
    assert (predictor.classes, predictor.score_threshold) == (["a", "b", "c"], 0.2)


def test_tool(make_predictor, tmp_path, call, restore_catalogs):
    make_predictor()
    weights = ["MODEL.WEIGHTS", tmp_path / "weights.pth"]
    weights += ["MODEL.RETINANET.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"]
    good, bad = make_image(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png"
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--score-threshold", "0.2"]

    def categories():
        results = json.loads((tmp_path / "out" / "detections.json").read_text())
        return len(results), {(result["category_id"], result["category"]) for result in results}

    code, _, err = call("predict", good, *flags, *weights)
    assert code == 2 and "digits_val has 10 class names and the model 3" in err
    names = ["--classes", "cat, dog,cow"]
    code, out, _ = call("predict", good, *flags, *names, *weights)
    assert code == 0 and f"{tmp_path / 'out'}" in out and "ids count from 0; --register" in out
    before = categories()
    assert before[1] <= {(0, "cat"), (1, "dog"), (2, "cow")} and f"{before[0]} objects in 1 files" in out
    # Those of a registered data set, which is not loaded for it, named by DATASETS.TEST or not.
    truth = [{"id": id_, "name": name} for id_, name in ((30, "cow"), (4, "cat"), (17, "dog"))]
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [], "categories": truth}))
    registered = ["--register", f"animals={tmp_path / 'truth.json'}:{tmp_path / 'in'}", "--score-threshold", "0.0"]
    for more in ([], ["DATASETS.TEST", '("animals",)']):
        code, out, _ = call("predict", good, *flags, *registered, *weights, *more)
        assert code == 0 and "--register" not in out
        assert categories()[1] == {(4, "cat"), (17, "dog"), (30, "cow")}
    bad.touch()
    code, _, err = call("predict", *flags, *names, tmp_path / "in", *weights)  # the images behind the flags
    assert code == 1 and "b.png cannot be read" in err and categories() == before
    content = good.read_bytes()
    code, _, err = call("predict", good, *flags, *names, "--output", tmp_path / "in", *weights)
    assert code == 2 and "would overwrite" in err and "a.png" in err and good.read_bytes() == content


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
