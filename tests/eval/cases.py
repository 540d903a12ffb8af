"""Annotations and results in COCO's format, as dicts and files."""

import json

import numpy as np

BOX = [20.0, 20.0, 40.0, 40.0]


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], **more}


def result(image, category, bbox, score, **more):
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score, **more}


def write(folder, annotations, results, names=("cat", "dog"), num_images=3):
    """The paths of results and annotations, of images 0, 1, ... and categories 7, 8, ..."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 150} for i in range(num_images)]
    categories = [{"id": 7 + k, "name": name} for k, name in enumerate(names)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(results))
    return folder / "found.json", folder / "truth.json"


def random_case(num_classes, seed=0):
    """Objects of all sizes in six images, detections near some and elsewhere; ids from 0, as in some files."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(6):
        for size in rng.choice([12, 50, 120], 8):
            box = [*rng.uniform(0, 80, 2).tolist(), *(size * rng.uniform(0.7, 1.3, 2)).tolist()]
            category, crowd = int(7 + rng.integers(num_classes)), int(rng.random() < 0.1)
            annotations.append(annotation(len(annotations), image, category, box, iscrowd=crowd))
            for _ in range(rng.integers(3)):
                near = [float(x + size * rng.normal(0, 0.08)) for x in box]
                wrong = int(7 + rng.integers(num_classes)) if rng.random() < 0.2 else category
                results.append(result(image, wrong, near, float(rng.random())))
        results.append(result(image, 7, [float(x) for x in rng.uniform(5, 60, 4)], float(rng.random())))
    return annotations, results
