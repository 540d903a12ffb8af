"""Draw boxes on images, side by side or one crop at a time, and curves; the product's colours."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO

from ..files import printable
from .coco import match, read_predictions, read_truth

# Okabe and Ito's, which colour-blind readers can tell apart as well, without the yellow.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#CC79A7", "#D55E00", "#56B4E9")
TRUTH, CORRECT, WRONG, MISSED = "#56B4E9", "#009E73", "#E69F00", "#FFFFFF"
SIDE = 240  # pixels of a crop; 2 of them stand side by side on a phone
_CONTEXT = 2.0  # of the box's longer side
_SMALLEST = 48  # pixels of the image that a crop shows at least
_CELL, _GAP = 260, 6  # pixels of a column of the mosaic
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


class Method(NamedTuple):
    """A column of the mosaic."""

    title: str
    detections: str | os.PathLike  # in COCO's result format


class Box(NamedTuple):
    """XYWH in pixels of the image."""

    box: Sequence[float]
    color: str
    label: str = ""


def save_svg(figure: Figure, path: str | os.PathLike) -> None:
    """Save letters as outlines, so it looks the same everywhere; the same numbers give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "focal_plugin", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def draw_curves(curves: Mapping[str, np.ndarray], small: bool = False) -> Figure:
    """Draw precisions, (101,) each, over recall."""
    figure = Figure(figsize=(2.6, 2.0) if small else (4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, curve), color, style in zip(curves.items(), COLORS, ("-", "--", "-.")):
        axis.plot(np.linspace(0, 1, len(curve)), curve, style, color=color, linewidth=1.8, label=name)
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    if small:
        axis.tick_params(labelsize=7)
    else:
        axis.set(xlabel="recall", ylabel="precision, mean over classes")
        figure.legend(loc="outside upper left", ncols=len(curves), fontsize=8, frameon=False)
    return figure


def open_image(folder: str | os.PathLike, file_name: object) -> Image.Image | None:
    """Open an image as RGB, turned as its EXIF says, as Detectron2 reads it.

    Returns:
        None if there is no such file, it is no image, or its name leads out of the folder. Links are followed: they are
        of whoever made the folder, the names of whoever made the json.
    """
    name = os.path.normpath(file_name) if isinstance(file_name, str) else ".."
    if os.path.isabs(name) or name.split(os.sep)[0] == "..":
        return None
    try:
        with Image.open(Path(folder, name)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow raises what its decoders do
        return None


def crop(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Cut out a square, of :data:`SIDE` pixels, around the first box, with all boxes drawn."""
    x, y, width, height = boxes[0].box
    side = min(max(_CONTEXT * max(width, height), _SMALLEST), 4.0 * max(image.size))  # a box can be anything
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    window = (left, top, left + side, top + side)
    shown = image.transform((SIDE, SIDE), Image.Transform.EXTENT, window, Image.Resampling.BICUBIC, fillcolor="#777")
    _draw_boxes(shown, boxes, SIDE / side, (left, top))
    return shown


def draw_mosaic(
    coco_gt_json: str | os.PathLike,
    image_root: str | os.PathLike,
    methods: Sequence[Method],
    path: str | os.PathLike,
    *,
    num_images: int = 7,
    score_threshold: float = 0.3,
    iou: float = 0.5,
) -> list[int]:
    """Draw a few images, one per row, with the ground truth and every method's detections side by side.

    Returns:
        The ids of the images that were drawn.
    """
    truth = read_truth(coco_gt_json)
    chosen = choose_images(truth, num_images)
    names = {key: printable(category["name"], 20, quotes=False) for key, category in truth.cats.items()}
    objects = {i: [a for a in truth.imgToAnns[i] if not a["iscrowd"]] for i in chosen}
    columns = [{i: [Box(a["bbox"], TRUTH, names[a["category_id"]]) for a in objects[i]] for i in chosen}]
    for _, detections in methods:
        found = read_predictions(detections, truth)
        images = match(truth, [d for d in found if d["score"] >= score_threshold and d["image_id"] in objects], iou)
        columns.append({i: _method_boxes(*images[i], names) for i in chosen})
    rows = []
    for image_id in chosen:
        image = open_image(image_root, truth.imgs[image_id].get("file_name")) or Image.new("RGB", (128, 128), "#777")
        scale = min(_CELL / image.width, 1.5 * _CELL / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        rows.append([image.resize(size, Image.Resampling.BICUBIC) for _ in columns])
        for cell, boxes in zip(rows[-1], columns):
            _draw_boxes(cell, boxes[image_id], scale)
    titles = ["ground truth", *(method.title for method in methods)]
    head = f"Detections with a score of at least {score_threshold:g}, same validation images"
    key = [
        (TRUTH, "ground truth"),
        (CORRECT, f"correct: right class, IoU ≥ {iou:g}"),
        (WRONG, "false: wrong class or place, or found twice"),
        (MISSED, "missed object"),
    ]
    _compose(head, key, titles, rows).save(path, quality=85)
    return chosen


def choose_images(coco: COCO, count: int) -> list[int]:
    """Choose image ids from the fewest objects to the most, evenly spread, and one without any if there is one."""
    objects = {i: len(coco.getAnnIds(imgIds=[i], iscrowd=False)) for i in coco.getImgIds()}
    ranked = sorted(objects, key=lambda i: (objects[i], i))
    empty = [i for i in ranked if not objects[i]][: int(count > 1)]
    filled = [i for i in ranked if objects[i]]
    places = np.linspace(0, len(filled) - 1, min(count - len(empty), len(filled))).round().astype(int)
    return [filled[place] for place in places] + empty


def _method_boxes(correct: list[dict], false: list[dict], missed: list[dict], names: Mapping) -> list[Box]:
    """Of the highest score first, and what is missed below all."""
    colored = sorted([(d, CORRECT) for d in correct] + [(d, WRONG) for d in false], key=lambda pair: -pair[0]["score"])
    label = "{}  {:.2f}".format
    boxes = [Box(d["bbox"], c, label(names[d["category_id"]], d["score"]).replace("  0.", "  .")) for d, c in colored]
    return boxes + [Box(m["bbox"], MISSED) for m in missed]


def _draw_boxes(image: Image.Image, boxes: Sequence[Box], scale: float, origin: tuple[float, float] = (0, 0)) -> None:
    """Draw boxes, the first on top, and then their labels, each where it hides the least."""
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(_FONT, 13)
    corners = []
    for (x, y, width, height), _, _ in boxes:
        x0, y0 = (x - origin[0]) * scale, (y - origin[1]) * scale
        edges = (x0, y0, x0 + max(width * scale, 2), y0 + max(height * scale, 2))
        # Pillow goes through every pixel of a line, also of those that nobody sees.
        x0, y0, x1, y1 = (round(min(max(v, -9), max(image.size) + 9)) for v in edges)
        corners.append((x0, y0, x1, y1))
    for (x0, y0, x1, y1), (_, color, _) in reversed(list(zip(corners, boxes))):
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=4)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
        if color == MISSED:  # dashed
            for x in range(x0 + 5, x1, 10):
                for y in (y0, y1 - 1):
                    draw.rectangle((x, y, min(x + 4, x1), y + 1), fill="black")
            for y in range(y0 + 5, y1, 10):
                for x in (x0, x1 - 1):
                    draw.rectangle((x, y, x + 1, min(y + 4, y1)), fill="black")
    taken: list[tuple] = []
    for (x0, y0, x1, y1), (_, color, label) in zip(corners, boxes):
        if label:
            width, height = (int(v) + 4 for v in draw.textbbox((0, 0), label, font)[2:])
            places = [
                (x0, y0 - height),
                (x0, y1),
                (x1 - width, y0 - height),
                (x1 - width, y1),
                (x1, y0),
                (x0 - width, y0),
            ]
            places = [(max(0, min(x, image.width - width)), max(0, min(y, image.height - height))) for x, y in places]
            hidden = [
                10 * sum(_common((x, y, x + width, y + height), other) for other in taken)
                + sum(_common((x, y, x + width, y + height), other) for other in corners)
                for x, y in places
            ]
            x, y = places[hidden.index(min(hidden))]
            taken.append((x, y, x + width, y + height))
            draw.rectangle(taken[-1], fill=color)
            draw.text((x + 2, y + 1), label, "black", font)


def _common(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _compose(
    head: str, key: Sequence[tuple[str, str]], titles: Sequence[str], rows: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    font = ImageFont.truetype(_FONT, 16)
    width = len(titles) * (_CELL + _GAP) - _GAP
    titles = [
        "\n".join(textwrap.fill(printable(line, 90, quotes=False), 26) for line in t.splitlines()) for t in titles
    ]
    top = 110 + 20 * max(t.count("\n") + 1 for t in titles)
    sheet = Image.new("RGB", (width, top + sum(row[0].height + _GAP for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), head, "black", ImageFont.truetype(_FONT, 20))
    x, y = 4, 42
    for color, text in key:
        room = 40 + draw.textlength(text, font)
        if x + room > width:
            x, y = 4, y + 26
        draw.rectangle((x, y, x + 26, y + 16), "#777", "black")
        draw.rectangle((x + 1, y + 1, x + 25, y + 15), outline=color, width=3)
        draw.text((x + 34, y - 2), text, "black", font)
        x += room + 20
    for column, title in enumerate(titles):
        draw.multiline_text((column * (_CELL + _GAP) + 2, top - 6), title, "black", font, anchor="ld")
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (_CELL + _GAP), top))
        top += row[0].height + _GAP
    return sheet
