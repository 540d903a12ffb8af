import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image
from pycocotools.coco import COCO

from focal_plugin.data import digits
from focal_plugin.data.digits import draw_labels, draw_scene, make_digits, register_digits, source_indices

pytest.importorskip("sklearn")

SMALL = {"num_train": 12, "num_val": 6}


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """`digits_train` and `digits_val` as they come, but small and in a folder of their own."""
    small_make, small_folder = digits.make_digits, digits._folder
    monkeypatch.setattr(digits, "make_digits", lambda root, image_size: small_make(root, **SMALL))
    monkeypatch.setattr(digits, "_folder", lambda root, *a, **size: small_folder(root, *(a or SMALL.values()), **size))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_digits()
    yield tmp_path / "digits"
    monkeypatch.undo()
    register_digits()


def written(root):
    """What is in a folder of data sets, drafts included; the lock's file stays when the lock is given back."""
    return [path for path in root.iterdir() if path.suffix != ".lock"]


def read_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_roots_hold_the_same_bytes_and_parameters_do_not_share_a_folder(tmp_path):
    first, second = (make_digits(tmp_path / root, **SMALL) for root in ("a", "b"))
    assert len(read_bytes(first)) == 12 + 6 + 2 and read_bytes(first) == read_bytes(second)
    times = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert make_digits(tmp_path / "a", **SMALL) == first  # and rewrites nothing
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == times
    small = make_digits(tmp_path / "a", **SMALL, image_size=64)
    assert len({first, small, make_digits(tmp_path / "a", num_train=1, num_val=1, seed=1)}) == 3
    assert COCO(str(small / "train.json")).imgs[1]["width"] == 64
    assert draw_scene("train", 0, image_size=192)[0].shape == (192, 192, 3)


def test_seeds_splits_and_scenes_differ_and_hash_seed_threads_and_registering_change_nothing():
    keys = itertools.product(("train", "val"), (0, 1), (0, 1))
    assert len({draw_scene(split, index, seed=seed)[0].tobytes() for split, index, seed in keys}) == 8
    code = (
        "import hashlib, sys; from focal_plugin.data.digits import draw_scene, register_digits\n"
        "register_digits(); assert 'sklearn' not in sys.modules\n"
        "for index in range(3): print(hashlib.sha256(draw_scene('val', index)[0]).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    elsewhere = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = [hashlib.sha256(draw_scene("val", index)[0]).hexdigest() for index in range(3)]
    assert elsewhere.stdout.split() == here


def test_no_handwriting_is_in_both_splits():
    train, val = (np.concatenate(source_indices(split)) for split in ("train", "val"))
    assert sorted([*train, *val]) == list(range(1797))
    images = [image.tobytes() for image in digits._load_handwriting()[0]]
    assert not {images[i] for i in train} & {images[i] for i in val}
    rng = np.random.default_rng(0)  # nor is scrambled ink anyone's
    assert not any(digits._draw_scrambled_source(rng, "train").tobytes() in images for _ in range(50))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_is_in_both_splits_with_a_long_tail(seed):
    for split, count in (("train", 4000), ("val", 300)):
        labels = [draw_labels(split, index, seed=seed) for index in range(count)]
        per_class = np.bincount(list(itertools.chain(*labels)), minlength=10)
        assert (np.diff(per_class) < 0).all() and 4 < per_class[0] / per_class[-1] < 7 and per_class.min() >= 19
        assert 0.08 <= sum(not scene for scene in labels) / count <= 0.10
        assert set(map(len, labels)) == set(range(7))


def test_boxes_are_inside_small_apart_and_tight_to_visible_ink(monkeypatch):
    """What the digits change in a scene is inside their boxes, and reaches all four edges of each."""
    lay_ink, laid = digits._lay_ink, []

    def spy(rng, image, glyph, box):
        before = image.copy()
        lay_ink(rng, image, glyph, box)
        laid.append((box, np.abs(image - before).max(-1)))

    monkeypatch.setattr(digits, "_lay_ink", spy)
    for index in range(30):
        laid.clear()
        image, boxes, labels = draw_scene("train", index)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert labels == draw_labels("train", index) and len(boxes) == len(labels) <= 6
        assert [box for box, _ in laid[: len(boxes)]] == boxes
        for (x, y, width, height), change in laid[: len(boxes)]:
            assert x >= 0 and y >= 0 and x + width <= 128 and y + height <= 128
            assert digits.MIN_SIDE <= max(width, height) <= digits.MAX_SIDE
            inside = change[y : y + height, x : x + width]
            assert change.sum() == inside.sum() and inside.max() >= 40
            assert all(edge.max() >= 8 for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        for one, other in itertools.combinations(boxes, 2):
            shared = digits._intersection(one, other)
            assert shared / (one[2] * one[3] + other[2] * other[3] - shared) < 0.1


def test_json_is_valid_coco_that_detectron2_and_the_coco_api_read(tmp_path):
    folder = make_digits(tmp_path, num_train=40, num_val=10)
    for split, count in (("train", 40), ("val", 10)):
        content = json.loads((folder / f"{split}.json").read_text())
        images, annotations = content["images"], content["annotations"]
        assert [image["id"] for image in images] == list(range(1, count + 1))
        assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
        assert content["categories"] == [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        assert "CC BY 4.0" in content["info"]["source"]
        for index, row in enumerate(images):  # each file is its scene, however many others there are
            image, boxes, labels = draw_scene(split, index)
            own = [a for a in annotations if a["image_id"] == index + 1]
            with Image.open(folder / split / row["file_name"]) as file:
                assert file.size == (row["width"], row["height"]) == (128, 128)
                assert file.mode == "RGB" and (np.asarray(file) == image).all()
            assert [(tuple(a["bbox"]), a["category_id"] - 1) for a in own] == list(zip(boxes, labels))
            assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in own)
        loaded = load_coco_json(str(folder / f"{split}.json"), str(folder / split))
        assert len(loaded) == count and all(os.path.isfile(record["file_name"]) for record in loaded)
        assert sum(len(record["annotations"]) for record in loaded) == len(annotations)
        assert len(COCO(str(folder / f"{split}.json")).loadRes(annotations).getAnnIds()) == len(annotations)
        assert split == "val" or not all(record["annotations"] for record in loaded)  # some scenes have no object


def test_numbers_out_of_range_and_missing_scikit_learn_say_what_to_do(tmp_path, monkeypatch):
    for wrong in ({"num_train": 0}, {"num_val": 0}, {"image_size": 32}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"not .*{next(iter(wrong.values()))}"):
            make_digits(tmp_path, **wrong)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load_handwriting.cache_clear()
    source_indices.cache_clear()
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        make_digits(tmp_path, **SMALL)
    assert not written(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    def die(split, index, **kwargs):
        if split == "val":
            raise error
        return draw_scene(split, index, **kwargs)

    monkeypatch.setattr(digits, "draw_scene", die)
    with pytest.raises(error):
        make_digits(tmp_path, **SMALL)
    assert not written(tmp_path)


@pytest.mark.parametrize("lost", ["train.json", "val/000003.png", "all but a draft"])
def test_what_is_damaged_or_left_by_a_killed_run_is_replaced(tmp_path, lost):
    folder = make_digits(tmp_path, **SMALL)
    before = read_bytes(folder)
    if (folder / lost).exists():
        (folder / lost).unlink()
    else:
        shutil.rmtree(folder)
        digits._write_split(tmp_path / f".{folder.name}.draft", "train", 2, 128, 0)
    assert read_bytes(make_digits(tmp_path, **SMALL)) == before
    assert written(tmp_path) == [folder]


def test_of_several_at_once_one_draws_and_all_end_with_a_whole_set(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(digits, "draw_scene", lambda *args, **kwargs: drawn.append(args) or draw_scene(*args, **kwargs))
    with ThreadPool(3) as pool:  # a lock on a file tells threads apart as it does processes
        results = pool.map(lambda _: read_bytes(make_digits(tmp_path, **SMALL)), range(3), 1)
    assert results[0] == results[1] == results[2] and len(results[0]) == 12 + 6 + 2 and len(drawn) == 12 + 6
    assert written(tmp_path) == [make_digits(tmp_path, **SMALL)]


def test_registering_draws_nothing_until_the_first_load(registered, monkeypatch, tmp_path, caplog):
    assert not registered.exists()
    meta = MetadataCatalog.get("digits_val")
    assert meta.thing_classes == [str(digit) for digit in range(10)] and meta.evaluator_type == "coco"
    assert len(DatasetCatalog.get("digits_train")) == 12
    register_digits()  # again is harmless
    assert len(DatasetCatalog.get("digits_val")) == len(DatasetCatalog.get("digits_val")) == 6
    assert os.path.isfile(meta.json_file) and os.path.isdir(meta.image_root)
    assert registered in Path(meta.json_file).parents
    assert meta.thing_dataset_id_to_contiguous_id == {digit + 1: digit for digit in range(10)}
    for name, size in (("digits", 128), ("digits_192px", 192), ("digits_256px", 256)):
        meta = MetadataCatalog.get(f"{name}_val")
        assert f"size{size}-" in meta.json_file and meta.lazily_generated and f"{name}_train" in DatasetCatalog
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))  # which the metadata follow
    assert str(tmp_path / "elsewhere") in DatasetCatalog.get("digits_val")[0]["file_name"]
    assert tmp_path / "elsewhere" in Path(MetadataCatalog.get("digits_val").json_file).parents
    monkeypatch.setitem(DatasetCatalog.data, "digits_val", list)
    register_digits()
    assert DatasetCatalog.get("digits_val") == [] and "'digits_val' is registered already" in caplog.text
