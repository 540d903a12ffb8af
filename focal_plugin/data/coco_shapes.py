"""Which segmentations and keypoints Detectron2's `load_coco_json` can take: it looks at them even to train on boxes."""

from __future__ import annotations

from typing import Any

_MAX_RUN = 1 << 32  # pycocotools holds run lengths in 32 bits
_MAX_SIDE = 1 << 31
_MAX_COORDINATE = 1 << 63
_NUMBERS = {int, float}


def segmentation_problem(segmentation: Any) -> tuple[str, bool] | None:
    """What is wrong with a segmentation that is there (not null, not empty).

    Args:
        segmentation: anything that json can hold; meant are a list of polygons, each a flat list of coordinates,
            or an RLE ``{"size": [height, width], "counts": string or list of run lengths}``.

    Returns:
        None, or (what, whether `load_coco_json` raises). Coordinates are not looked at, nor does upstream before it
        trains masks.
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation)
    if isinstance(segmentation, str):
        return "is a string", False
    if not isinstance(segmentation, list):
        return "is neither a list of polygons nor an RLE", True
    if all(type(polygon) is list for polygon in segmentation):
        return None
    raises = not all(isinstance(polygon, (list, dict, str)) for polygon in segmentation)  # these have a len
    return "is a list of something else than polygons", raises


def segmentation_is_dropped(segmentation: Any) -> bool:
    """Whether `load_coco_json`, if it does not raise, leaves out the annotation: no polygon with three points."""
    if isinstance(segmentation, dict):
        return False
    return not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def keypoints_problem(keypoints: Any) -> tuple[str, bool] | None:
    """What is wrong with keypoints that are there (not null, not empty); returns as :func:`segmentation_problem`."""
    if not isinstance(keypoints, list):
        return "is no list of x, y, visibility, x, y, ...", True
    if not _NUMBERS.issuperset(map(type, keypoints)) or any(abs(x) >= _MAX_COORDINATE for x in keypoints):
        return "holds something else than numbers", True
    return ("has a length that is no multiple of three", False) if len(keypoints) % 3 else None


def _rle_problem(rle: dict) -> tuple[str, bool] | None:
    counts, size = rle.get("counts"), rle.get("size")
    if "counts" not in rle:
        return "is an RLE without counts", True
    # Only counts in a list are looked at, to compress them.
    raises = isinstance(counts, list)
    is_size = isinstance(size, list) and len(size) == 2
    if not is_size or not all(type(side) is int and 0 <= side < _MAX_SIDE for side in size):
        return "is an RLE whose size is not [height, width]", raises
    if isinstance(counts, str) or (raises and all(type(run) is int and 0 <= run < _MAX_RUN for run in counts)):
        return None
    return "is an RLE whose counts are neither a string nor a list of run lengths", raises
