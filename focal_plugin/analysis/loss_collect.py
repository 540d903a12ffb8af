"""Runs a trained model over annotated images and counts the loss of its windows, and that of what OHEM would keep."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import inference_context
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import Tensor
from torch.utils.data import DataLoader

from ..heads import AnchorTargets, OHEMHead, per_level_views
from ..retinanet import FocalRetinaNet
from .loss_distribution import GAMMAS, LossDistribution


@dataclass
class OhemCount:
    """What OHEM keeps, over all images.

    Attributes:
        kept: the windows of the anchors that it keeps.
        hardest: those of as many anchors of each image, but the hardest ones: what it would keep without NMS and ratio.
        positives, negatives: anchors kept.
    """

    kept: LossDistribution
    hardest: LossDistribution
    positives: int = 0
    negatives: int = 0


@dataclass
class Collected:
    """What :func:`collect` counted.

    Attributes:
        losses: of all windows.
        ohem: of what OHEM keeps of them, if asked for.
        images: how many.
        empty_images: how many of them have no object.
        positives, negatives: anchors that are not ignored.
    """

    losses: LossDistribution
    ohem: OhemCount | None = None
    images: int = 0
    empty_images: int = 0
    positives: int = 0
    negatives: int = 0


def collect(
    model: FocalRetinaNet,
    data_loader: Iterable[list[dict]],
    num_images: int | None = None,
    gammas: Sequence[float] = GAMMAS,
    ohem: OHEMHead | None = None,
) -> Collected:
    """Counts the loss of every window of the images that a loader gives.

    Args:
        model: in whatever mode; it is run in that of inference, and given back as it was.
        data_loader: batches of upstream's input dicts, with "instances" (:func:`build_loader`).
        num_images: stop after the batch that completes so many; None: go through all.
        gammas: see LossDistribution; with ``ohem``, cross entropy (0), by which it ranks, is added.
        ohem: the head that chooses, as from :func:`build_ohem_head`; None: no OHEM.

    Raises:
        ValueError: a model with a softmax, an image without annotations, or what LossDistribution raises.
    """
    if getattr(model.head, "num_outputs", model.num_classes) != model.num_classes:
        raise ValueError(
            f"MODEL.FOCAL.HEAD {type(model.head).__name__} is a softmax over classes and background; a window is one "
            "sigmoid, of which it has none"
        )
    gammas = tuple(gammas) if ohem is None else tuple(sorted({0.0, *map(float, gammas)}))
    counted = Collected(LossDistribution(gammas))
    if ohem is not None:
        counted.ohem = OhemCount(LossDistribution(gammas), LossDistribution(gammas))
        ohem = ohem.to(model.device)
    with inference_context(model), torch.no_grad():
        for batch in data_loader:
            _count_batch(model, batch, counted, ohem)
            if num_images is not None and counted.images >= num_images:
                break
    return counted


def _count_batch(model: FocalRetinaNet, batch: list[dict], counted: Collected, ohem: OHEMHead | None) -> None:
    if not all("instances" in image for image in batch):
        raise ValueError("the data set has images without annotations, which say nothing of the loss")
    pred_logits, targets = _predict(model, batch)
    labels = targets.labels
    for x, y in per_level_views(pred_logits, labels, model.num_classes):
        counted.losses.update(x, y)
    counted.images += len(batch)
    counted.empty_images += sum(len(image["instances"]) == 0 for image in batch)
    positives, negatives = _count_anchors(labels, model.num_classes)
    counted.positives += positives
    counted.negatives += negatives
    if ohem is not None:
        _count_ohem(ohem, pred_logits, targets, counted.ohem)


def _predict(model: FocalRetinaNet, batch: list[dict]) -> tuple[list[Tensor], AnchorTargets]:
    """The logits per level, (N, A * K, Hi, Wi), and what the model would tell its head of the anchors in training."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    pred_logits, pred_deltas = model.head(features)
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, [image["instances"].to(model.device) for image in batch])
    deltas = model.flatten_deltas(pred_deltas)
    anchors = Boxes.cat(anchors).tensor
    return pred_logits, model.anchor_targets(anchors, deltas, torch.stack(labels), torch.stack(boxes))


def _count_ohem(ohem: OHEMHead, pred_logits: list[Tensor], targets: AnchorTargets, counted: OhemCount) -> None:
    """Chooses as OHEMHead.losses does."""
    labels = targets.labels
    ranks, kept = ohem.sample(pred_logits, targets)
    counted.kept.update(*ohem.gather_anchors(pred_logits, labels, kept))
    hardest = _hardest(ranks.masked_fill(labels < 0, -torch.inf), kept.sum(dim=1))
    counted.hardest.update(*ohem.gather_anchors(pred_logits, labels, hardest))
    positives, negatives = _count_anchors(labels[kept], ohem.num_classes)
    counted.positives += positives
    counted.negatives += negatives


def _hardest(scores: Tensor, numbers: Tensor) -> Tensor:
    """(N, R) bool: the highest of the (N, R) scores, as many in each row as (N,) ``numbers`` says."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, mask, number in zip(scores, chosen, numbers.tolist()):
        mask[row.topk(number).indices] = True
    return chosen


def _count_anchors(labels: Tensor, num_classes: int) -> tuple[int, int]:
    """Foreground and background anchors."""
    return int(((labels >= 0) & (labels < num_classes)).sum()), int((labels == num_classes).sum())


def build_ohem_head(cfg: CfgNode) -> OHEMHead:
    """A head that chooses as ``MODEL.OHEM`` says, by the paper's cross entropy whatever the model was trained with.

    Its convolutions are never run.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.LOSS, cfg.MODEL.FOCAL.CLASS_ALPHA = "focal", []
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = -1.0, 0.0
    shapes = [ShapeSpec(channels=64, stride=2**i) for i, _ in enumerate(cfg.MODEL.RETINANET.IN_FEATURES, start=3)]
    return OHEMHead(cfg, shapes)


def build_loader(cfg: CfgNode, num_images: int | None = None, seed: int = 0) -> DataLoader:
    """The annotated images of ``DATASETS.TEST``, resized as for a test and not flipped, in batches.

    A batch is one image; with ``MODEL.OHEM.SCOPE batch``, which mines a whole batch, it is that of training. Images
    without an object are included: they are background.

    Args:
        cfg: the config.
        num_images: a random choice of so many; None, or more than there are: all.
        seed: of the choice.

    Raises:
        ValueError: ``DATASETS.TEST`` is empty, or no image has an object.
    """
    names = list(cfg.DATASETS.TEST)
    if not names:
        raise ValueError("DATASETS.TEST is empty: name a data set with --dataset")
    images = [d for d in get_detection_dataset_dicts(names, filter_empty=False) if "annotations" in d]
    if not any(d["annotations"] for d in images):
        raise ValueError(f"{', '.join(names)}: no image has an annotation, so there is nothing to compare with")
    if num_images is not None and num_images < len(images):
        images = random.Random(seed).sample(images, num_images)
    mapper = DatasetMapper(
        is_train=True,  # keeps the annotations
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
    )
    batch_size = cfg.SOLVER.IMS_PER_BATCH if cfg.MODEL.OHEM.SCOPE == "batch" else 1
    return build_detection_test_loader(
        images, mapper=mapper, batch_size=batch_size, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
