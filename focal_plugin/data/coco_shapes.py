"""Which segmentations and keypoints Detectron2's `load_coco_json` can take: it looks at them even to train on boxes."""

from __future__ import annotations

_MAX_RUN = 1 << 32  # pycocotools holds run lengths in 32 bits
_MAX_SIDE = 1 << 31
_MAX_COORDINATE = 1 << 63


def segmentation_problem(segmentation) -> str:
    """Why a segmentation that is there (not null, not empty) makes `load_coco_json` raise; empty if it does not.

    Args:
        segmentation: anything that json can hold; meant are a list of polygons, each a flat list of coordinates,
            or an RLE ``{"size": [height, width], "counts": string or list of run lengths}``.
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation)
    if not isinstance(segmentation, list):
        return "is neither a list of polygons nor an RLE"
    # Coordinates are not looked at, as upstream does not either until masks are trained.
    return "" if all(type(polygon) is list for polygon in segmentation) else "is a list of something else than polygons"


def segmentation_is_dropped(segmentation) -> bool:
    """Whether `load_coco_json` leaves the whole annotation out: polygons, but none with three points or more."""
    if isinstance(segmentation, dict):
        return False
    return not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def keypoints_problem(keypoints) -> str:
    """Why keypoints that are there (not null, not empty) cannot be read; empty if they can."""
    if not isinstance(keypoints, list) or len(keypoints) % 3:
        return "is no list of x, y, visibility, x, y, ..."
    if not all(type(x) is float or (type(x) is int and abs(x) < _MAX_COORDINATE) for x in keypoints):
        return "holds something else than numbers"
    return ""


def _rle_problem(rle: dict) -> str:
    counts, size = rle.get("counts"), rle.get("size")
    is_size = isinstance(size, list) and len(size) == 2
    if not is_size or not all(type(side) is int and 0 <= side < _MAX_SIDE for side in size):
        return "is an RLE whose size is not [height, width]"
    if isinstance(counts, str):
        return ""
    if isinstance(counts, list) and all(type(run) is int and 0 <= run < _MAX_RUN for run in counts):
        return ""
    return "is an RLE whose counts are neither a string nor a list of run lengths"
