"""Names the methods by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BOX_LOSSES = {"iou": "IoU", "giou": "GIoU", "diou": "DIoU", "ciou": "CIoU"}


def kind_of(config: Mapping[str, Any]) -> str:
    """`OHEM`, `SSD`, `CE`, `FL*` or `FL`, by what a configuration does."""
    model = config["MODEL"]
    if model["FOCAL"]["HEAD"] == "SSDHead":
        return "SSD"
    if model["FOCAL"]["HEAD"] == "OHEMHead":
        return "OHEM"
    if model["FOCAL"]["LOSS"] == "focal_star":
        return "FL*"
    return "FL" if model["RETINANET"]["FOCAL_LOSS_GAMMA"] else "CE"


def title_of(config: Mapping[str, Any]) -> str:
    """The method with its settings, such as `FL (γ 2, α .25)` or `OHEM 1:3 128/.5` (examples / NMS)."""
    box_loss = config["MODEL"]["RETINANET"].get("BBOX_REG_LOSS_TYPE", "smooth_l1")
    return _title(config) + (f", {BOX_LOSSES.get(box_loss, box_loss)}" if box_loss != "smooth_l1" else "")


def _title(config: Mapping[str, Any]) -> str:
    model, kind = config["MODEL"], kind_of(config)
    if kind == "SSD":
        return f"SSD (softmax, 1:{model['SSD']['NEG_POS_RATIO']:g})"
    if kind == "OHEM":
        ohem = model["OHEM"]
        ratio = f" 1:{ohem['NEG_POS_RATIO']:g}" if ohem["NEG_POS_RATIO"] else ""
        nms = _short(ohem["NMS_THRESH"]) if ohem["NMS_THRESH"] > 0 else "no NMS"
        return f"OHEM{ratio} {ohem['BATCH_SIZE']}/{nms}"
    gamma, alpha = model["RETINANET"]["FOCAL_LOSS_GAMMA"], model["RETINANET"]["FOCAL_LOSS_ALPHA"]
    if kind == "FL*":
        return f"FL* (γ {gamma:g}, β {model['FOCAL']['STAR_BETA']:g})"
    weight = f"α {_short(alpha)}" if alpha >= 0 else "no α"
    return f"CE ({weight})" if kind == "CE" else f"FL (γ {gamma:g}, {weight})"


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0") or "0"
