"""Small pictures of single boxes, with what is around them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

SIDE = 240  # pixels of a picture; 2 of them stand side by side on a phone
_CONTEXT = 2.0  # of the box's longer side
_SMALLEST = 48  # pixels of the image that a picture shows at least


def find_image(folder: Path, file_name: object) -> Path | None:
    """The file of an image; None if there is none, or its name leads out of the folder.

    Links are followed: they are of whoever made the folder, the names of whoever made the json.
    """
    if (
        not isinstance(file_name, str)
        or os.path.isabs(file_name)
        or os.path.normpath(file_name).split(os.sep)[0] == ".."
    ):
        return None
    try:
        path = folder / file_name
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long, a NUL, half of a surrogate pair: no file can be called that
        return None


def crop(image: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """A square picture of :data:`SIDE` pixels around the first box, with all boxes drawn.

    Args:
        image: RGB.
        boxes: XYWH in pixels of the image, and colour.
    """
    x, y, width, height = boxes[0][0]
    side = max(_CONTEXT * max(width, height), _SMALLEST)
    side = min(side, 4.0 * max(image.size))  # a box can be anything
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    scale = SIDE / side
    window = (left, top, left + side, top + side)
    shown = image.transform((SIDE, SIDE), Image.Transform.EXTENT, window, Image.Resampling.BICUBIC, fillcolor="#777")
    draw = ImageDraw.Draw(shown)
    for (bx, by, bw, bh), color in reversed(boxes):
        x0, y0 = (bx - left) * scale, (by - top) * scale
        x1, y1 = x0 + max(bw * scale, 2), y0 + max(bh * scale, 2)
        # Pillow goes through every pixel of a line, also of those that nobody sees.
        x0, y0, x1, y1 = (min(max(v, -9), SIDE + 9) for v in (x0, y0, x1, y1))
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=4)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
    return shown


def open_image(path: Path) -> Image.Image:
    """RGB, turned as its EXIF says, as Detectron2 reads it.

    Raises:
        OSError: it is no image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        raise
    except Exception as e:  # Pillow raises what its decoders do
        raise OSError(str(e)) from e
