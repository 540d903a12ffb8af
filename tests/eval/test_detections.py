import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_plugin.eval.detections import Method, choose_images, draw_mosaic, match, precision_recall


def write_truth(path, boxes_per_image):
    """COCO ground truth from one list of (class, box) per image; class 3 has no objects."""
    objects = [(image, *rest) for image, boxes in enumerate(boxes_per_image, 1) for rest in boxes]
    truth = {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1}.png", "width": 64, "height": 64} for i in range(len(boxes_per_image))
        ],
        "categories": [{"id": c, "name": f"class{c}"} for c in (1, 2, 3)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image, c, box) in enumerate(objects, 1)
        ],
    }
    path.write_text(json.dumps(truth))
    return path


def detection(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


@pytest.fixture
def truth(tmp_path):
    one, two = (0, 0, 10, 10), (30, 30, 20, 20)
    return write_truth(tmp_path / "truth.json", [[(1, one), (1, two)], [(2, one)], []])


@pytest.fixture
def results(tmp_path):
    # Class 1: right, wrong, right. Class 2: right only at IoU .5 (2/3).
    detections = [
        detection(1, 1, (0, 0, 10, 10), 0.9),
        detection(3, 1, (0, 0, 10, 10), 0.8),
        detection(1, 1, (30, 30, 20, 20), 0.7),
        detection(2, 2, (2, 0, 10, 10), 0.4),
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(detections))
    return path


def test_precision_recall_by_hand(truth, results):
    curve = precision_recall(truth, results, 0.5)
    # Class 1 has precision 1 up to recall 1/2, then 2/3; class 2 has 1 throughout; class 3 does not count.
    expected = np.where(curve.recall <= 0.5, 1, (2 / 3 + 1) / 2)
    np.testing.assert_allclose(curve.precision, expected)
    assert curve.ap == pytest.approx(expected.mean())
    strict = precision_recall(truth, results, 0.75)
    np.testing.assert_allclose(strict.precision, np.where(curve.recall <= 0.5, 1, 2 / 3) / 2)


def test_precision_recall_agrees_with_the_summary(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [
        [(int(rng.integers(1, 3)), (*rng.integers(0, 40, 2).tolist(), 12, 14)) for _ in range(3)] for _ in range(12)
    ]
    truth = write_truth(tmp_path / "truth.json", scenes)
    detections = [
        detection(image, c, (np.array(box) + rng.normal(0, 0.7, 4)).tolist(), rng.random())
        for image, boxes in enumerate(scenes, 1)
        for c, box in [*boxes, (1, (0, 0, 9, 9))]
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(detections))
    coco = COCO(str(truth))
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.1 < evaluation.stats[2] < evaluation.stats[1] < 1
    assert precision_recall(truth, results, 0.5).ap == pytest.approx(evaluation.stats[1])
    assert precision_recall(truth, results, 0.75).ap == pytest.approx(evaluation.stats[2])


def test_no_detections_at_all(truth, tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    curve = precision_recall(truth, empty)
    assert curve.ap == 0 and not curve.precision.any()


def test_match_gives_an_object_to_the_highest_score():
    truth = [{"category_id": 1, "bbox": [0, 0, 10, 10]}, {"category_id": 2, "bbox": [20, 20, 10, 10]}]
    detections = [
        detection(1, 1, (0, 0, 10, 9), 0.5),  # found already
        detection(1, 1, (1, 0, 10, 10), 0.6),
        detection(1, 1, (20, 20, 10, 10), 0.9),  # another class
        detection(1, 2, (26, 20, 10, 10), 0.9),  # too far off
    ]
    assert match(truth, detections) == ([False, True, False, False], [True, False])
    assert match([], detections[:1]) == ([False], [])
    assert match(truth, []) == ([], [False, False])


def test_chosen_images_vary_and_hold_one_empty(tmp_path):
    box = (1, (0, 0, 10, 10))
    path = write_truth(tmp_path / "truth.json", [[box] * n for n in (3, 0, 1, 5, 2, 0, 4)])
    assert choose_images(COCO(str(path)), 4) == [3, 1, 4, 2]  # 1, 3, 5 and 0 objects
    assert choose_images(COCO(str(path)), 20) == [3, 5, 1, 7, 4, 2]


def test_mosaic_is_drawn(truth, results, tmp_path):
    for image in (1, 2, 3):
        Image.new("L", (64, 64), 90).save(tmp_path / f"{image}.png")
    path = tmp_path / "mosaic.png"
    assert draw_mosaic(truth, tmp_path, [Method("a", results), Method("b", results)], path) == [2, 1, 3]
    with Image.open(path) as image:
        assert image.width > 3 * 2 * 64 and image.height > 3 * 2 * 64
