"""The tables of the focal loss paper as data: what each row trains, and what its authors measured; and one of ours.

Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002v2. What it leaves open (warm-up, smooth L1's
beta, frozen layers, most of OHEM) is chosen in ``configs/paper/Base-paper.yaml``, with the reason beside it; one YAML
per distinct recipe in that folder is written from this file by ``python -m focal_plugin.experiments.paper``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import config_dir
from ..config_yaml import lookup
from .naming import BOX_LOSSES

_CE = ("0.10", "0.25", "0.50", "0.75", "0.90", "0.99", "0.999")
_PAPER_OHEM_BATCH = 128  # what a profile's own MODEL.OHEM.BATCH_SIZE stands for


@dataclass(frozen=True)
class Method:
    """What distinguishes a row whatever it is trained on: its loss, or its anchors.

    Attributes:
        key: names it in files and on the command line.
        title: as in the paper.
        settings: config keys and values.
        ohem_batch: examples that OHEM keeps, in the paper's numbers; 0: not OHEM.
        anchors: number of scales and of aspect ratios per position; None: the profile's own.
    """

    key: str
    title: str
    settings: tuple[tuple[str, Any], ...]
    ohem_batch: int = 0
    anchors: tuple[int, int] | None = None

    def overrides(self, base: Any) -> list[tuple[str, Any]]:
        """Config keys and values on top of ``base``, the profile's config.

        OHEM's batch sizes are to the base's ``MODEL.OHEM.BATCH_SIZE`` as the paper's are to its 128; anchors start
        from the first size that the base has on each level.
        """
        values = list(self.settings)
        if self.ohem_batch:
            batch = max(1, round(base.MODEL.OHEM.BATCH_SIZE * self.ohem_batch / _PAPER_OHEM_BATCH))
            values.append(("MODEL.OHEM.BATCH_SIZE", batch))
        if self.anchors:
            values += anchor_settings(*self.anchors, [sizes[0] for sizes in base.MODEL.ANCHOR_GENERATOR.SIZES])
        return values


@dataclass(frozen=True)
class Network:
    """Backbone depth and image size, which only the coco profile varies."""

    depth: int = 50
    image_size: int = 600

    @property
    def key(self) -> str:
        return f"R-{self.depth}-{self.image_size}"


@dataclass(frozen=True)
class Published:
    """In percent, as COCO defines them; ms per image on the paper's Nvidia M40. None: the paper does not say."""

    AP: float
    AP50: float
    AP75: float
    APs: float | None = None
    APm: float | None = None
    APl: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class PaperRow:
    """A line of a table. ``published`` is None for a row of ours that the table has not."""

    table: str
    method: Method
    published: Published | None
    network: Network = Network()

    @property
    def recipe(self) -> str:
        """The YAML in configs/paper/ and the folder of a coco run: the same for rows that train the same."""
        method = self.method.key.removesuffix("_anchors3x3")  # 3x3 are the base's own
        return f"{self.network.key}_{method}"

    @property
    def title(self) -> str:
        """As the paper calls it."""
        if self.table == "1e":
            return f"{self.network.depth}-{self.network.image_size}"
        if self.method.anchors:
            return "{} scales x {} ratios".format(*self.method.anchors)
        return self.method.title

    @property
    def key(self) -> str:
        """Unique within its table: the method, or the network where all rows have one method."""
        return self.network.key if self.table == "1e" else self.method.key


def anchor_settings(scales: int, ratios: int, first_sizes: Sequence[float]) -> list[tuple[str, Any]]:
    """``scales`` sub-octave sizes, first * 2^(k / scales), on each level; 1:1, or 1:2, 1:1 and 2:1."""
    if ratios not in (1, 3):
        raise ValueError(f"the paper has 1 or 3 aspect ratios, not {ratios}")
    sizes = [[first * 2 ** (k / scales) for k in range(scales)] for first in first_sizes]
    return [
        ("MODEL.ANCHOR_GENERATOR.SIZES", sizes),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0] if ratios == 1 else [0.5, 1.0, 2.0]]),
    ]


def focal(gamma: float, alpha: float, anchors: tuple[int, int] | None = None) -> Method:
    key = f"fl_gamma{gamma:g}_alpha{alpha:g}" + (f"_anchors{anchors[0]}x{anchors[1]}" if anchors else "")
    title = f"FL (γ {gamma:g}, α {_short(alpha)})"
    return Method(key, title, _head("FocalHead", alpha, gamma), anchors=anchors)


def cross_entropy(alpha: str) -> Method:
    return Method(f"ce_alpha{float(alpha):g}", f"CE (α {_short(float(alpha))})", _head("FocalHead", float(alpha), 0.0))


def focal_star(gamma: float, beta: float) -> Method:
    settings = (("MODEL.FOCAL.LOSS", "focal_star"), ("MODEL.FOCAL.STAR_BETA", float(beta)))
    title = f"FL* (γ {gamma:g}, β {beta:g})"
    return Method(f"flstar_gamma{gamma:g}_beta{beta:g}", title, _head("FocalHead", 0.25, gamma) + settings)


def ohem(batch: int, nms: float, ratio: float = 0.0) -> Method:
    """Mined on cross entropy without alpha."""
    key = f"ohem{'1to3' if ratio else ''}_{batch}_nms{nms:g}"
    settings = (("MODEL.OHEM.NMS_THRESH", nms), ("MODEL.OHEM.NEG_POS_RATIO", float(ratio)))
    title = f"OHEM{' 1:3' if ratio else ''} {batch}/{_short(nms)}"
    return Method(key, title, _head("OHEMHead", -1.0, 0.0) + settings, ohem_batch=batch)


def ssd() -> Method:
    """SSD's whole loss: softmax, all positives and three hard negatives for each, smooth L1 on deltas of its scale."""
    settings = (
        ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 1.0),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)),
    )
    return Method("ssd", "SSD (softmax, 1:3)", _head("SSDHead", -1.0, 0.0) + settings)


def with_box_loss(method: Method, name: str) -> Method:
    """With another box loss: a value of ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``."""
    settings = (*method.settings, ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", name))
    return replace(method, key=f"{method.key}_{name}", title=f"{method.title}, {BOX_LOSSES[name]}", settings=settings)


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0")


def _head(head: str, alpha: float, gamma: float) -> tuple[tuple[str, Any], ...]:
    return (
        ("MODEL.FOCAL.HEAD", head),
        ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", float(alpha)),
        ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", float(gamma)),
    )


FL, CE, BEST_OHEM = focal(2, 0.25), cross_entropy("0.75"), ohem(128, 0.5)
FL_R50 = Published(34.0, 52.5, 36.5)  # in Tables 1b, 1c and 3
CE_R50 = Published(31.1, 49.4, 33.0)  # in Tables 1a, 1b and 3
_R101 = Network(depth=101)


def _table_1a() -> list[PaperRow]:
    published = {
        "0.10": Published(0.0, 0.0, 0.0),
        "0.25": Published(10.8, 16.0, 11.7),
        "0.50": Published(30.2, 46.7, 32.8),
        "0.75": CE_R50,
        "0.90": Published(30.8, 49.7, 32.3),
        "0.99": Published(28.7, 47.4, 29.9),
        "0.999": Published(25.1, 41.7, 26.1),
    }
    return [PaperRow("1a", cross_entropy(alpha), published[alpha]) for alpha in _CE]


def _table_1b() -> list[PaperRow]:
    return [
        PaperRow("1b", CE, CE_R50),
        PaperRow("1b", focal(0.1, 0.75), Published(31.4, 49.9, 33.1)),
        PaperRow("1b", focal(0.2, 0.75), Published(31.9, 50.7, 33.4)),
        PaperRow("1b", focal(0.5, 0.50), Published(32.9, 51.7, 35.2)),
        PaperRow("1b", focal(1, 0.25), Published(33.7, 52.0, 36.2)),
        PaperRow("1b", FL, FL_R50),
        PaperRow("1b", focal(5, 0.25), Published(32.2, 49.6, 34.8)),
    ]


def _table_1c() -> list[PaperRow]:
    published = {
        (1, 1): Published(30.3, 49.0, 31.8),
        (2, 1): Published(31.9, 50.0, 34.0),
        (3, 1): Published(31.8, 49.4, 33.7),
        (1, 3): Published(32.4, 52.3, 33.9),
        (2, 3): Published(34.2, 53.1, 36.5),
        (3, 3): FL_R50,
        (4, 3): Published(33.8, 52.1, 36.2),
    }
    return [PaperRow("1c", focal(2, 0.25, anchors), numbers) for anchors, numbers in published.items()]


def _table_1d() -> list[PaperRow]:
    # The paper prints the same three numbers for OHEM 128/.7 and OHEM 1:3 128/.5, in all its copies.
    twins = Published(31.1, 47.2, 33.2)
    published = {
        ohem(128, 0.7): twins,
        ohem(256, 0.7): Published(31.8, 48.8, 33.9),
        ohem(512, 0.7): Published(30.6, 47.0, 32.6),
        BEST_OHEM: Published(32.8, 50.3, 35.1),
        ohem(256, 0.5): Published(31.0, 47.4, 33.0),
        ohem(512, 0.5): Published(27.6, 42.0, 29.2),
        ohem(128, 0.5, ratio=3): twins,
        ohem(256, 0.5, ratio=3): Published(28.3, 42.4, 30.3),
        ohem(512, 0.5, ratio=3): Published(24.0, 35.5, 25.8),
        FL: Published(36.0, 54.9, 38.7),
        CE: None,  # ours, to have all three losses in one table
    }
    return [PaperRow("1d", method, numbers, _R101) for method, numbers in published.items()]


def _table_1e() -> list[PaperRow]:
    published = {
        (50, 400): Published(30.5, 47.8, 32.7, 11.2, 33.8, 46.1, 64),
        (50, 500): Published(32.5, 50.9, 34.8, 13.9, 35.8, 46.7, 72),
        (50, 600): Published(34.3, 53.2, 36.9, 16.2, 37.4, 47.4, 98),
        (50, 700): Published(35.1, 54.2, 37.7, 18.0, 39.3, 46.4, 121),
        (50, 800): Published(35.7, 55.0, 38.5, 18.9, 38.9, 46.3, 153),
        (101, 400): Published(31.9, 49.5, 34.1, 11.6, 35.8, 48.5, 81),
        (101, 500): Published(34.4, 53.1, 36.8, 14.7, 38.5, 49.1, 90),
        (101, 600): Published(36.0, 55.2, 38.7, 17.4, 39.6, 49.7, 122),
        (101, 700): Published(37.1, 56.6, 39.8, 19.1, 40.6, 49.4, 154),
        (101, 800): Published(37.8, 57.5, 40.8, 20.2, 41.1, 49.2, 198),
    }
    return [PaperRow("1e", FL, numbers, Network(*network)) for network, numbers in published.items()]


def _table_3() -> list[PaperRow]:
    return [
        PaperRow("3", CE, CE_R50),
        PaperRow("3", FL, FL_R50),
        PaperRow("3", focal_star(2, 1), Published(33.8, 52.7, 36.3)),
        PaperRow("3", focal_star(4, 0), Published(33.9, 51.8, 36.4)),
    ]


def _table_extra() -> list[PaperRow]:
    methods = [ohem(128, 0.5, ratio=3), ssd(), with_box_loss(FL, "iou"), with_box_loss(FL, "giou")]
    return [PaperRow("extra", FL, FL_R50), *(PaperRow("extra", method, None) for method in methods)]


TABLES: dict[str, tuple[PaperRow, ...]] = {
    "1a": tuple(_table_1a()),
    "1b": tuple(_table_1b()),
    "1c": tuple(_table_1c()),
    "1d": tuple(_table_1d()),
    "1e": tuple(_table_1e()),
    "3": tuple(_table_3()),
    "extra": tuple(_table_extra()),
}
CAPTIONS = {
    "1a": "Table 1a: cross entropy weighted by α; ResNet-50-FPN, 600 px, minival",
    "1b": "Table 1b: focal loss over γ, each with its best α; ResNet-50-FPN, 600 px, minival",
    "1c": "Table 1c: anchors per position, scales x aspect ratios; ResNet-50-FPN, 600 px, minival",
    "1d": "Table 1d: focal loss against online hard example mining; ResNet-101-FPN, 600 px, minival",
    "1e": "Table 1e: depth and image size; test-dev, ms per image on an Nvidia M40",
    "3": "Table 3: FL and FL*; ResNet-50-FPN, 600 px, minival",
    "extra": "Table extra: SSD's loss and IoU box losses, which the paper has not; ResNet-50-FPN, 600 px, minival",
}


def config_texts() -> dict[str, str]:
    """The YAML of each distinct recipe, by its file name in configs/paper/."""
    rows = {row.recipe: row for table in TABLES.values() for row in table}
    return {f"{recipe}.yaml": _config_text(row) for recipe, row in rows.items()}


def _config_text(row: PaperRow) -> str:
    from ..config import load_config

    base = load_config(config_dir() / "paper" / "Base-paper.yaml")
    settings = row.method.overrides(base) + _network_settings(row.network)
    tree: dict[str, Any] = {}
    for key, value in settings:
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if lookup(base, key) != value:
            node[name] = value
    used = [f"{t} {r.key}" for t, rows in TABLES.items() for r in rows if r.recipe == row.recipe]
    lines = [f"# Written by python -m focal_plugin.experiments.paper. Tables and rows: {', '.join(used)}."]
    return "\n".join([*lines, '_BASE_: "Base-paper.yaml"', *_yaml_lines(tree)]) + "\n"


def _network_settings(network: Network) -> list[tuple[str, Any]]:
    size = network.image_size
    return [
        ("MODEL.WEIGHTS", f"detectron2://ImageNetPretrained/MSRA/R-{network.depth}.pkl"),
        ("MODEL.RESNETS.DEPTH", network.depth),
        ("INPUT.MIN_SIZE_TRAIN", (size,)),
        ("INPUT.MIN_SIZE_TEST", size),
        ("INPUT.MAX_SIZE_TRAIN", round(size * 1000 / 600)),  # Detectron v1's 600 / 1000 and 800 / 1333
        ("INPUT.MAX_SIZE_TEST", round(size * 1000 / 600)),
    ]


def _yaml_lines(tree: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            inner = _yaml_lines(value, indent + "  ")
            lines += [f"{indent}{name}:", *inner] if inner else []
        elif isinstance(value, str):
            lines.append(f'{indent}{name}: "{value}"')
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines


def write_configs(folder: Path) -> list[Path]:
    """Writes one YAML per distinct recipe and removes those of rows that are gone."""
    texts = config_texts()
    for path in set(folder.glob("R-*.yaml")) - {folder / name for name in texts}:
        path.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    print(f"{len(write_configs(config_dir() / 'paper'))} configs written to {config_dir() / 'paper'}")
