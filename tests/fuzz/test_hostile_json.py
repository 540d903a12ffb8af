"""The COCO json checker and --register: a report or one error, and what passes is read by those who train on it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO

from focal_plugin import get_config
from focal_plugin.data import make_digits
from focal_plugin.data.check_coco import Report, check_coco
from focal_plugin.data.register import parse_register_arg, register_coco_json, register_from_args

NUM_CASES = {"bytes": 450, "trees": 650, "registered": 150, "arguments": 400}
WORDS = [
    b'"images": [], ',
    b'"id": 1, ',
    b'"segmentation": [[1, 2, 3]], ',
    b'"segmentation": {"counts": [1, 2], "size": [3, 4]}, ',
    b'"file_name": "../../x.png", ',
    b'"file_name": "/etc/passwd", ',
    b'"iscrowd": 1, ',
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 500,
    b'{"a":' * 500,
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"\xef\xbb\xbf",
    b", ",
    b"}",
    b"]",
    b'"',
]
JUNK = [
    "../../../etc/passwd",
    "/etc/passwd",
    "a/../..",
    [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
    [[1, 2, 3]],
    {"counts": [1, 2, 3], "size": [2, 3]},
    {"counts": "abc", "size": [64, 64]},
    {"counts": [2**40], "size": [2**30, 2**30]},
    [1, 2, 2] * 5,
    [0, 0, 1e308, 1e308],
    [float("nan")] * 4,
    [1, 1, -5, 5],
    1.0,
    "1",
    "\ud800",
    10**5000,
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with train.json and its 4 images, in ``train``."""
    return make_digits(tmp_path_factory.mktemp("json"), num_train=4, num_val=1, image_size=64)


@pytest.fixture(scope="module")
def content(digits):
    """Of train.json, with masks and keypoints, which upstream reads even to train on boxes."""
    content = json.loads((digits / "train.json").read_text())
    content["annotations"] = content["annotations"][:6]
    for annotation, mask in zip(
        content["annotations"], ([[1, 1, 9, 1, 9, 9]], {"counts": [3, 2, 1], "size": [2, 3]}, [])
    ):
        annotation["segmentation"] = mask
    content["annotations"][3]["keypoints"] = [1, 2, 2]
    return content


@pytest.fixture(scope="module")
def cfg():
    return get_config("digits/focal.yaml")


pytestmark = pytest.mark.usefixtures("restore_catalogs")


def checks(path, image_root, **kwargs) -> bool:
    """Property: a report, and without a fatal finding Detectron2 and pycocotools can read the file."""
    report = check_coco(path, image_root, max_workers=1, **kwargs)
    assert isinstance(report, Report)
    json.dumps(report.to_dict(), allow_nan=False)
    report.to_text().encode("utf-8")  # something that can be printed
    if report.fatal:
        return False
    with contextlib.redirect_stdout(io.StringIO()):
        records = load_coco_json(str(path), str(image_root))
        coco = COCO(str(path))
    assert len(records) == report.summary["images"] and len(coco.anns) == report.summary["annotations"]
    return True


def mutant_of(rng, mutate, content) -> str:
    return json.dumps(mutate.tree(rng, content, JUNK))


# ------------------------------ mutants


def test_mutants_of_the_file(fuzz, mutate, digits, content, tmp_path):
    original, path = json.dumps(content).encode(), tmp_path / "mutant.json"

    def case(rng):
        path.write_bytes(mutate.bytes(rng, original, WORDS))
        return checks(path, digits / "train", images=rng.choice(("none", "none", "sample")))

    fuzz.run("bytes", NUM_CASES["bytes"], case)


def test_other_values_in_it(fuzz, mutate, digits, content, cfg, tmp_path):
    path = tmp_path / "mutant.json"

    def case(rng):
        path.write_text(dumps(mutate.tree(rng, content, JUNK)))
        images = rng.choice(("none", "none", "none", "sample", "all"))
        return checks(path, digits / "train", images=images, cfg=cfg if rng.random() < 0.2 else None)

    fuzz.run("trees", NUM_CASES["trees"], case)


def dumps(tree) -> str:
    """Numbers of thousands of digits, too, which Python would not write."""
    huge = JUNK[-1]
    text = json.dumps(_without(tree, huge))
    return text.replace('"HUGE"', "1" + "0" * 5000)


def _without(tree, huge):
    if isinstance(tree, dict):
        return {key: _without(value, huge) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, huge) for value in tree]
    return "HUGE" if type(tree) is int and tree == huge else tree


def test_registering_mutants(fuzz, mutate, digits, content, tmp_path):
    """What can be registered can be asked for its classes, and the two agree with Detectron2 or are refused by it."""
    path = tmp_path / "mutant.json"

    def case(rng):
        tree = {**content, "images": content["images"][:1], "annotations": content["annotations"][:1]}
        path.write_text(dumps(mutate.tree(rng, tree, JUNK)))
        DatasetCatalog.pop("mutant", None)
        MetadataCatalog.pop("mutant", None)
        try:
            register_coco_json("mutant", str(path), str(digits / "train"))
        except ValueError as error:
            assert "--register mutant=" in str(error) and "mutant.json" in str(error) and len(str(error)) < 5_000
            return False
        classes = MetadataCatalog.get("mutant").thing_classes
        assert classes and all(isinstance(name, str) for name in classes)
        return True

    fuzz.run("registered", NUM_CASES["registered"], case)


def test_register_arguments(fuzz, mutate, digits, content, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content))
    good = f"cells={tmp_path}/a.json:{digits}/train".encode()
    words = [
        b"=",
        b":",
        b"..",
        b"/",
        b"\0",
        b" ",
        b"~",
        b"=~nobody/",
        b":~nobody/",
        b"\n",
        b"-",
        b"x" * 5000,
        b"\\",
        b"//",
        b"\xff",
        b"digits_train=",
    ]

    def case(rng):
        text = os.fsdecode(mutate.bytes(rng, good, words) if rng.random() < 0.97 else good)
        try:
            register_from_args([text])
        except (ValueError, FileNotFoundError) as error:
            assert "--register" in str(error)
            return False
        name, json_file, image_root = parse_register_arg(text)
        assert not set(name) & set("/\\\0 \n") and ".." not in name and not name.startswith("-")
        assert os.path.samefile(os.path.expanduser(json_file), tmp_path / "a.json") and os.path.isdir(image_root)
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
        return True

    fuzz.run("arguments", NUM_CASES["arguments"], case)


# ------------------------------ one by one


def fatal_codes(report) -> set[str]:
    return {finding.code for finding in report.fatal}


@pytest.mark.parametrize("images", ["all", "sample", "none"])
@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "a/../../x.png",
        "../train/../x.png",
        "link/../x.png",
        "..",
        "link/../../x.png",
        "../train/../val/a.png",
    ],
)
def test_file_names_that_leave_the_image_folder(digits, content, tmp_path, guard, name, images):
    """``link`` goes elsewhere, so that ``link/..`` is not the image folder, though it reads as if."""
    root = tmp_path / "train"
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    broken = copy.deepcopy(content)
    broken["images"][0]["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(broken))
    with guard():
        report = check_coco(tmp_path / "a.json", root, images=images)
    assert "escaping_file_names" in fatal_codes(report)


def test_file_names_with_dots_that_stay_inside(digits, content, tmp_path):
    inside = copy.deepcopy(content)
    first = inside["images"][0]
    first["file_name"] = f"../train/{first['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(inside))
    assert "escaping_file_names" in fatal_codes(check_coco(tmp_path / "a.json", digits / "train", images="none"))
    first["file_name"] = f"x/../{content['images'][0]['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(inside))
    assert "escaping_file_names" not in fatal_codes(check_coco(tmp_path / "a.json", digits / "train", images="none"))


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"images": ' + "[" * 200_000, '{"a":' * 200_000, '{"images": [' + '{"a":' * 200_000]
)
def test_nesting(digits, tmp_path, guard, text):
    (tmp_path / "a.json").write_text(text)
    with guard():
        assert not checks(tmp_path / "a.json", digits / "train", images="none")
    with guard(), pytest.raises(ValueError, match=r"--register x=.*is not json"):
        register_coco_json("x", str(tmp_path / "a.json"), str(digits / "train"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "missing"])
def test_what_is_no_file(digits, tmp_path, guard, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"device": "/dev/zero", "loop": path}[kind])
    with guard():
        assert fatal_codes(check_coco(path, digits / "train", images="none"))
    with guard(), pytest.raises(FileNotFoundError, match=r"--register x=.*there is no file"):
        register_coco_json("x", str(path), str(digits / "train"))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", "a\0b", "-x", "a..b", "/etc/x"])
def test_names_that_would_leave_the_output_folder(digits, name):
    """Detectron2 writes OUTPUT_DIR/inference/NAME_coco_format.json."""
    with pytest.raises(ValueError, match="becomes part of file names"):
        register_coco_json(name, str(digits / "train.json"), str(digits / "train"))


@pytest.mark.parametrize(
    "paths", [("a\0.json", "train"), ("train.json", "a\0b"), ("x" * 5000, "train"), ("train.json", "x" * 5000)]
)
def test_paths_that_no_file_can_have(digits, guard, paths):
    json_file, image_root = (path if path.startswith("~") else str(digits / path) for path in paths)
    with guard(), pytest.raises((FileNotFoundError, ValueError), match="--register x="):
        register_coco_json("x", json_file, image_root)
    with guard():
        assert check_coco(json_file, image_root).fatal


def test_as_many_cases_as_promised(fuzz):
    fuzz.assert_ran(set(NUM_CASES), 1650)
