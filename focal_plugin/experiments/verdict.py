"""Names the methods by their configuration, and says in words how their comparison came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .results import RunResult

# What the paper measured on COCO: AP of the focal loss and of its rival, and where.
PAPER = {
    "OHEM": (36.0, 32.8, "Table 1d: COCO, ResNet-101-FPN, 600 px"),
    "CE": (34.0, 31.1, "Table 1b: COCO, ResNet-50-FPN, 600 px"),
}


def kind_of(config: Mapping[str, Any]) -> str:
    """`OHEM`, `CE` or `FL`, by what a configuration does."""
    model = config["MODEL"]
    if model["FOCAL"]["HEAD"] == "OHEMHead":
        return "OHEM"
    return "FL" if model["RETINANET"]["FOCAL_LOSS_GAMMA"] else "CE"


def title_of(config: Mapping[str, Any]) -> str:
    """The method with its settings, such as `FL (γ 2, α .25)` or `OHEM 1:3 128/.5` (examples / NMS)."""
    model, kind = config["MODEL"], kind_of(config)
    if kind == "OHEM":
        ohem = model["OHEM"]
        ratio = f" 1:{ohem['NEG_POS_RATIO']:g}" if ohem["NEG_POS_RATIO"] else ""
        nms = _short(ohem["NMS_THRESH"]) if ohem["NMS_THRESH"] > 0 else "no NMS"
        return f"OHEM{ratio} {ohem['BATCH_SIZE']}/{nms}"
    alpha = model["RETINANET"]["FOCAL_LOSS_ALPHA"]
    weight = f"α {_short(alpha)}" if alpha >= 0 else "no α"
    if kind == "CE":
        return f"CE ({weight})"
    return f"FL (γ {model['RETINANET']['FOCAL_LOSS_GAMMA']:g}, {weight})"


def verdict(results: Sequence[RunResult], scope: str) -> str:
    """What came out, beside what the paper saw, in words that follow from the numbers."""
    if not results:
        return "No run has finished, so there is nothing to compare."
    ranked = sorted(results, key=lambda r: -r.ap)
    text = ["By AP: " + ", ".join(f"{r.title} {r.ap:.1f}" for r in ranked) + "."]
    best = {kind: [r for r in ranked if kind_of(r.config()) == kind][:1] for kind in ("FL", *PAPER)}
    if ranked[0].ap < 5:
        text.append("No run has learned to detect yet, so the order means nothing.")
    elif best["FL"]:
        text += [_beside_paper(best["FL"][0], best[kind][0], kind) for kind in PAPER if best[kind]]
    seeds = ", ".join(sorted({str(r.config().get("SEED")) for r in results}))
    steps = " or ".join(sorted({str(r.config()["SOLVER"]["MAX_ITER"]) for r in results}))
    text.append(
        f"One seed ({seeds}), {scope}, {steps} steps: another seed may order them differently, and "
        "none of this says how the methods compare at the scale of COCO."
    )
    return " ".join(text)


def _beside_paper(focal: RunResult, rival: RunResult, kind: str) -> str:
    lead = round(focal.ap, 1) - round(rival.ap, 1)
    here = f"{abs(lead):.1f} AP {'ahead of' if lead > 0 else 'behind'}" if lead else "level with"
    order = "the same order" if lead > 0 else "**the order here differs from the paper's**"
    name = "the best OHEM" if kind == "OHEM" else "cross entropy"
    theirs, rivals, where = PAPER[kind]
    return (
        f"FL is {here} {name}, {rival.title}, here; in the paper it is {theirs - rivals:.1f} AP ahead "
        f"({theirs} against {rivals}; {where}): {order}."
    )


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0") or "0"
