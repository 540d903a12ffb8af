"""Draw boxes on images, side by side or cut out, and curves; the product's colours."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO

from ..files import printable
from .coco import match, read_predictions, read_truth

# Okabe and Ito's, which colour-blind readers can tell apart as well, without the yellow.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#CC79A7", "#D55E00", "#56B4E9")
TRUTH, CORRECT, WRONG, MISSED = "#56B4E9", "#009E73", "#E69F00", "#FFFFFF"
SIDE = 240  # pixels of a crop; 2 of them stand side by side on a phone
_CELL, _GAP = 260, 6  # pixels of a column of the mosaic, and between two
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


Box = tuple[Sequence[float], str, str]  # XYWH in pixels of the image, colour, label


class Method(NamedTuple):
    """A column of the mosaic."""

    title: str
    detections: str | os.PathLike  # in COCO's result format


def save_svg(figure: Figure, path: str | os.PathLike) -> None:
    """Save letters as outlines, so it looks the same everywhere; the same numbers give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "focal_plugin", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def draw_curves(table: pd.DataFrame, curves: Mapping[str, np.ndarray], folder: Path) -> list[dict[str, str]]:
    """Draw what ``evaluate`` returns: all classes and, the worst first, each, if there are several; name the files."""
    panels = []
    rows = table.index[table.AP.notna()][: 1 if len(table) == 2 else None]
    for row in sorted(rows, key=lambda row: (row > 0, table.AP[row])):
        figure = Figure(figsize=(2.6, 2.0) if row else (4.4, 3.2), layout="constrained")
        axis = figure.subplots()
        for (name, values), color, style in zip(curves.items(), COLORS, ("-", "--", "-.")):
            axis.plot(np.linspace(0, 1, 101), values[row], style, color=color, linewidth=1.8, label=name)
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7 if row else 10)
        if row == 0:
            axis.set(xlabel="recall", ylabel="precision, mean over classes")
            figure.legend(loc="outside upper left", ncols=len(curves), fontsize=8, frameon=False)
        areas = ", ".join(f"{name}: {100 * values[row].mean():.1f}" for name, values in curves.items())
        panels.append({"file": f"curve{row}.svg", "name": table.name[row], "areas": areas})
        save_svg(figure, folder / panels[-1]["file"])
    return panels


def open_image(folder: str | os.PathLike, file_name: object) -> Image.Image | None:
    """Open an image as RGB, turned as its EXIF says; None if it cannot be read or its name leads out of the folder.

    Links are followed: they are of whoever made the folder, the names of whoever made the json.
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
    """Cut out a square around the first box, shown with :data:`SIDE` pixels and all boxes."""
    x, y, width, height = boxes[0][0]
    # Twice the box, at least 48 pixels; a box can be anything.
    side = min(max(2.0 * width, 2.0 * height, 48.0), 4.0 * max(image.size))
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    window = (left, top, left + side, top + side)
    shown = image.transform((SIDE, SIDE), Image.Transform.EXTENT, window, Image.Resampling.BICUBIC, fillcolor="#777")
    return _draw_boxes(shown, boxes, SIDE / side, left, top)


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
    """Draw a few images, one a row, with the ground truth and every method's detections; return the images' ids."""
    truth = read_truth(coco_gt_json)
    names = {id_: printable(category["name"], 20, quotes=False) for id_, category in truth.cats.items()}
    chosen, found, rows = choose_images(truth, num_images), [], []
    for method in methods:
        detections = [d for d in read_predictions(method.detections, truth) if d["score"] >= score_threshold]
        found.append(match(truth, [d for d in detections if d["image_id"] in chosen], iou))
    for image_id in chosen:
        image = open_image(image_root, truth.imgs[image_id].get("file_name")) or Image.new("RGB", (128, 128), "#777")
        scale = min(_CELL / image.width, 1.5 * _CELL / image.height)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        objects = truth.loadAnns(truth.getAnnIds(image_id, iscrowd=False))
        columns = [[(o["bbox"], TRUTH, names[o["category_id"]]) for o in objects]]
        columns += [_boxes(*images[image_id], names) for images in found]
        rows.append([_draw_boxes(image.copy(), boxes, scale) for boxes in columns])
    key = {
        TRUTH: "ground truth",
        CORRECT: f"correct: right class, IoU ≥ {iou:g}",
        WRONG: "false: wrong class or place, or found twice",
        MISSED: f"missed object: no score ≥ {score_threshold:g} is right",
    }
    _sheet(key, ["ground truth", *(method.title for method in methods)], rows).save(path, quality=85)
    return chosen


def choose_images(coco: COCO, count: int) -> list[int]:
    """Choose image ids from the fewest objects to the most, evenly spread, and one without any if there is one."""
    objects = {i: len(coco.getAnnIds(i, iscrowd=False)) for i in coco.getImgIds()}
    ranked = sorted(objects, key=lambda i: (objects[i], i))
    empty = [i for i in ranked if not objects[i]][: int(count > 1)]
    filled = [i for i in ranked if objects[i]]
    places = np.linspace(0, len(filled) - 1, min(count - len(empty), len(filled))).round().astype(int)
    return [filled[place] for place in places] + empty


def _boxes(correct: list[dict], false: list[dict], missed: list[dict], names: Mapping) -> list[Box]:
    """Those of detections, the highest score first, then those of missed objects."""
    found = [(d, CORRECT) for d in correct] + [(d, WRONG) for d in false]
    found.sort(key=lambda pair: -pair[0]["score"])
    labels = [f"{names[d['category_id']]}  " + f"{d['score']:.2f}".lstrip("0") for d, _ in found]
    boxes = [(d["bbox"], color, label) for (d, color), label in zip(found, labels)]
    return boxes + [(o["bbox"], MISSED, "") for o in missed]


def _draw_boxes(
    image: Image.Image, boxes: Sequence[Box], scale: float, left: float = 0.0, top: float = 0.0
) -> Image.Image:
    """Draw boxes, the first on top, then each label where it hides the least of other labels and of boxes."""
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(_FONT, 13)
    edges = [(x, y, x + max(width, 2 / scale), y + max(height, 2 / scale)) for (x, y, width, height), _, _ in boxes]
    edges = (np.array(edges).reshape(-1, 4) - (left, top) * 2) * scale
    # Pillow goes through every pixel of a line, also of those that nobody sees.
    taken = np.clip(edges, -9, max(image.size) + 9).round().astype(int)
    for corners, (_, color, _) in reversed([*zip(taken, boxes)]):
        draw.rectangle(np.add(corners, (-1, -1, 1, 1)).tolist(), outline="black", width=4)
        draw.rectangle(corners.tolist(), outline=color, width=2)
    labels, weights = [], np.ones(len(taken))
    for (x0, y0, x1, y1), box in zip(taken, boxes):
        if box[2]:
            width, height = (int(edge) + 4 for edge in draw.textbbox((0, 0), box[2], font)[2:])
            spots = [(x, y) for y in (y0 - height, y1, y0 - 2 * height, y1 + height) for x in (x0, x1 - width)]
            spots = np.clip([*spots, (x1, y0), (x0 - width, y0)], 0, (image.width - width, image.height - height))
            spots = np.hstack([spots, np.add(spots, (width, height))])
            common = np.minimum(spots[:, None, 2:], taken[:, 2:]) - np.maximum(spots[:, None, :2], taken[:, :2])
            labels.append((spots[(common.clip(0).prod(-1) @ weights).argmin()].tolist(), box))
            taken, weights = np.vstack([taken, labels[-1][0]]), np.append(weights, 9)
    for spot, (_, color, label) in reversed(labels):
        draw.rectangle(spot, fill=color)
        draw.text((spot[0] + 2, spot[1] + 1), label, "black", font)
    return image


def _sheet(key: Mapping[str, str], titles: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The cells in rows, under the titles of the columns and what the colours say."""
    font, step = ImageFont.truetype(_FONT, 16), _CELL + _GAP
    titles = [[printable(line, 60, quotes=False) for line in title.splitlines()] for title in titles]
    titles = ["\n".join(textwrap.fill(line, 27) for line in lines) for lines in titles]
    top = 26 * len(key) + 20 * max(title.count("\n") + 1 for title in titles) + 16
    sheet = Image.new("RGB", (len(titles) * step, top + sum(row[0].height + _GAP for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (color, text) in zip(range(4, top, 26), key.items()):
        draw.rectangle((0, y, 26, y + 16), "#777", "black")
        draw.rectangle((1, y + 1, 25, y + 15), outline=color, width=3)
        draw.text((32, y - 2), text, "black", font)
    for column, title in enumerate(titles):
        draw.multiline_text((column * step, top - 6), title, "black", font, anchor="ld")
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * step, top))
        top += row[0].height + _GAP
    return sheet
