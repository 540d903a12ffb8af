"""The look at the data before a training: what is wrong with them, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass, field

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .dataset_check import check_coco


@dataclass
class Found:
    """What :func:`check_training_data` found.

    Attributes:
        sizes: images by data set name, where it is known.
        lines: for the log.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def check_training_data(cfg: CfgNode) -> Found:
    """The fast form of ``tools/check_dataset.py``, on every data set of a config that has a COCO json on this machine.

    Raises:
        ValueError: training or evaluation on one of them would crash or be wrong.
    """
    found, fatal = Found(), []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        meta = MetadataCatalog.get(name)
        if meta.get("lazily_generated"):
            found.sizes[name] = len(DatasetCatalog.get(name))
            continue
        json_file = meta.get("json_file")
        if not json_file or "://" in json_file or meta.get("evaluator_type") != "coco":
            continue  # Cityscapes, LVIS and others have a json of another form
        report = check_coco(json_file, meta.get("image_root", ""), cfg, images="sample")
        found.sizes[name] = report.summary["images"]
        full = f"tools/check_dataset.py {json_file} {meta.get('image_root', '')}"
        if report.fatal:
            fatal.append(f"'{name}' cannot be trained on:\n" + _listed(report.fatal) + f"\n  All that is wrong: {full}")
        others = [finding for finding in report.findings if finding.severity != "note" and not finding.fatal]
        if others:
            found.lines.append(f"'{name}' has faults ({full} says more):\n" + _listed(others))
    if fatal:
        raise ValueError("\n".join(fatal))
    return found


def _listed(findings) -> str:
    return "\n".join(f"  {finding.to_text()}" for finding in findings)
