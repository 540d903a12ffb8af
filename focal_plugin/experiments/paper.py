"""The tables of the focal loss paper, read from paper_tables.yaml: what each row trains, and what its authors measured.

configs/paper/ has one YAML for each distinct recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_PAPER_EXAMPLES = 128  # what a profile's own MODEL.OHEM.BATCH_SIZE stands for


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
    """A row of a table of the paper, or of ours."""

    table: str  # such as "1d"
    kind: str  # FL, FL*, CE, OHEM or SSD
    method: str  # key of its loss or anchors, such as "ohem_128_nms0.5"
    title: str  # as in the paper
    network: str  # backbone and image size, such as "R-50-600", which only the coco profile varies
    settings: tuple[tuple[str, Any], ...]  # config keys and values of the method
    anchors: tuple[int, int] | None  # numbers of scales and of aspect ratios at a position; None: the profile's own
    published: Published | None  # None for a row of ours

    @property
    def key(self) -> str:
        """Return its name in its table: the method, or the network where all rows have one method."""
        return self.network if self.table == "1e" else self.method

    @property
    def recipe(self) -> str:
        """Return the name of its YAML in configs/paper/, the same for rows that train the same."""
        return f"{self.network}_{self.method.removesuffix('_anchors3x3')}"  # 3x3 are the base's own

    def overrides(self, base: Any) -> dict[str, Any]:
        """Return config keys and values on top of ``base``, the profile's config.

        OHEM's examples are to the base's ``MODEL.OHEM.BATCH_SIZE`` as the paper's are to its 128. Anchors have
        ``scales`` sub-octave sizes, first * 2^(k / scales), from the first size that the base has on each level.
        """
        values = dict(self.settings)
        if "MODEL.OHEM.BATCH_SIZE" in values:
            examples = base.MODEL.OHEM.BATCH_SIZE * values["MODEL.OHEM.BATCH_SIZE"] / _PAPER_EXAMPLES
            values["MODEL.OHEM.BATCH_SIZE"] = max(1, round(examples))
        if self.anchors:
            scales, ratios = self.anchors
            firsts = [sizes[0] for sizes in base.MODEL.ANCHOR_GENERATOR.SIZES]
            values["MODEL.ANCHOR_GENERATOR.SIZES"] = [[f * 2 ** (k / scales) for k in range(scales)] for f in firsts]
            values["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] = [[1.0] if ratios == 1 else [0.5, 1.0, 2.0]]
        return values


def title_of(config: Mapping[str, Any]) -> str:
    """Return what a config trains, such as `FL (γ 2, α .25)` or `OHEM 1:3 128/.5` (examples / NMS)."""
    model = config["MODEL"]
    focal, retinanet, ohem = model["FOCAL"], model["RETINANET"], model["OHEM"]

    def short(number: float) -> str:
        return f"{number:g}".removeprefix("0") or "0"

    weight = f"α {short(retinanet['FOCAL_LOSS_ALPHA'])}" if retinanet["FOCAL_LOSS_ALPHA"] >= 0 else "no α"
    gamma = f"γ {retinanet['FOCAL_LOSS_GAMMA']:g}"
    if focal["HEAD"] == "SSDHead":
        title = f"SSD (softmax, 1:{model['SSD']['NEG_POS_RATIO']:g})"
    elif focal["HEAD"] == "OHEMHead":
        ratio = f" 1:{ohem['NEG_POS_RATIO']:g}" if ohem["NEG_POS_RATIO"] else ""
        title = f"OHEM{ratio} {ohem['BATCH_SIZE']}/{short(ohem['NMS_THRESH']) if ohem['NMS_THRESH'] > 0 else 'no NMS'}"
    elif focal["LOSS"] == "focal_star":
        title = f"FL* ({gamma}, β {focal['STAR_BETA']:g})"
    else:
        title = f"FL ({gamma}, {weight})" if retinanet["FOCAL_LOSS_GAMMA"] else f"CE ({weight})"
    box_loss = retinanet.get("BBOX_REG_LOSS_TYPE", "smooth_l1")
    return title if box_loss == "smooth_l1" else f"{title}, {box_loss.upper().replace('IOU', 'IoU')}"


def _row(content: dict[str, Any], table: str, key: str, published: list[float] | None) -> PaperRow:
    """Return a row of the YAML's content; in Table 1e ``key`` names its network, elsewhere its method."""
    about = content["tables"][table]
    name = about.get("method", key)
    kind, method = next((kind, methods[name]) for kind, methods in content["methods"].items() if name in methods)
    values = {content["settings"][name]: value for name, value in method.items() if name in content["settings"]}
    return PaperRow(
        table=table,
        kind=kind,
        method=name,
        title=key.removeprefix("R-") if "method" in about else method["title"],
        network=about.get("network", key),
        settings=tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items()),
        anchors=tuple(method["anchors"]) if "anchors" in method else None,
        published=Published(*published) if published else None,
    )


_CONTENT = yaml.safe_load(Path(__file__).with_name("paper_tables.yaml").read_text(encoding="utf-8"))
CAPTIONS: dict[str, str] = {name: table["caption"] for name, table in _CONTENT["tables"].items()}
TABLES: dict[str, tuple[PaperRow, ...]] = {
    name: tuple(_row(_CONTENT, name, *row) for row in table["rows"].items())
    for name, table in _CONTENT["tables"].items()
}
_ROWS = {(row.table, row.key): row for rows in TABLES.values() for row in rows}
FL, CE = _ROWS["1b", "fl_gamma2_alpha0.25"], _ROWS["1b", "ce_alpha0.75"]  # the paper's own, on ResNet-50 at 600 px
BEST_OHEM = _ROWS["1d", "ohem_128_nms0.5"]
LEADS = {  # by kind of the rival: AP of the focal loss, of the rival, and where
    "OHEM": (_ROWS["1d", FL.key].published.AP, BEST_OHEM.published.AP, "Table 1d: COCO, ResNet-101-FPN, 600 px"),
    "CE": (FL.published.AP, CE.published.AP, "Table 1b: COCO, ResNet-50-FPN, 600 px"),
}
