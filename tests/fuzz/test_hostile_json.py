"""The COCO json checker and --register: a report or one error, and what passes is read by those who train on it."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from mutants import guarded, mutate_bytes, mutate_tree, run_cases

from focal_plugin import get_config
from focal_plugin.data import check_coco, make_digits
from focal_plugin.data.register import register_coco_json

WORDS = [b'"id": 1, ', b'"segmentation": [[1, 2, 3]], ', b'"iscrowd": 1, ', b"NaN", b"1e999", b"9" * 5000, b"[" * 500]
WORDS += [b"\\u0000", b"\\ud800", b"null", b"\xef\xbb\xbf", b", ", b"}", b"]", b'"']
JUNK = ["../../../etc/passwd", "/etc/passwd", "a/../..", [[1.0, 2, 3, 4, 5, 6]], [[1, 2, 3]], [1, 2, 2] * 5, 1.0, "1"]
JUNK += [{"counts": [1, 2, 3], "size": [2, 3]}, {"counts": "abc", "size": [64, 64]}, [0, 0, 1e308, 1e308], "\ud800"]
JUNK += [{"counts": [2**40], "size": [2**30, 2**30]}, [float("nan")] * 4, [1, 1, -5, 5], 10**4000]

pytestmark = pytest.mark.usefixtures("restore_catalogs")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 4 images, and its json with masks and keypoints, which Detectron2 reads even to train on boxes."""
    folder = make_digits(tmp_path_factory.mktemp("json"), num_train=4, num_val=1, image_size=64)
    content = json.loads((folder / "train.json").read_text())
    del content["annotations"][6:]
    masks = [[1, 1, 9, 1, 9, 9]], {"counts": [3, 2, 1], "size": [2, 3]}, []
    for annotation, mask in zip(content["annotations"], masks):
        annotation.update(segmentation=mask, keypoints=[1, 2, 2])
    return folder / "train", content


def survives(path, image_root, **kwargs) -> bool:
    """Property: a report that can be printed; without a fatal finding, a file that Detectron2 loads and registers."""
    report = check_coco(path, image_root, **kwargs)
    assert json.dumps(report.to_dict(), allow_nan=False) and report.to_text().encode("utf-8")
    DatasetCatalog.pop("mutant", None)
    MetadataCatalog.pop("mutant", None)
    try:
        register_coco_json("mutant", path, image_root)
    except (FileNotFoundError, ValueError) as error:
        assert report.fatal and "--register mutant=" in str(error) and len(str(error)) < 4_000 + 2 * len(str(path))
        return False
    classes = MetadataCatalog.get("mutant").thing_classes
    assert classes and all(isinstance(name, str) for name in classes)
    if not report.fatal:
        assert len(load_coco_json(str(path), str(image_root), "mutant")) == report.summary["images"]
    return not report.fatal


@pytest.mark.parametrize("name, num_cases", [("bytes", 450), ("trees", 650)])
def test_mutants_of_the_file(digits, tmp_path, name, num_cases):
    images_folder, content = digits
    original, path, cfg = json.dumps(content).encode(), tmp_path / "mutant.json", get_config("digits/focal.yaml")

    def case(rng):
        if name == "bytes":
            path.write_bytes(mutate_bytes(rng, original, WORDS))
        else:
            path.write_text(json.dumps(mutate_tree(rng, content, JUNK)))
        images = rng.choice(("none", "none", "none", "sample", "all"))
        return survives(path, images_folder, images=images, cfg=cfg if rng.random() < 0.2 else None)

    run_cases(name, num_cases, case)


def test_what_is_no_file(digits, no_files, tmp_path):
    for path in (tmp_path / name for names in no_files for name in names):
        with guarded():
            assert not survives(path, digits[0], images="none"), path
            assert [finding.code for finding in check_coco(path, digits[0]).fatal] == ["not_json"]
