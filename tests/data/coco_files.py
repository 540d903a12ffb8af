"""A small data set in COCO format, for the tests of what reads one."""

SIZE = 64, 48  # of every image


def content(num_images=4):
    """A data set with nothing to find: two classes, a box of each in every image."""
    boxes = [[4, 4, 20, 20], [30.5, 10, 30, 34]]
    annotations = [
        {"id": 2 * i + j + 1, "image_id": i, "category_id": 3 + 4 * j, "bbox": boxes[j], "area": 400, "iscrowd": 0}
        for i in range(num_images)
        for j in range(2)
    ]
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }


def found(report):
    return {finding.code: finding for finding in report.findings}
