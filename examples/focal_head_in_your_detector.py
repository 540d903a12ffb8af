#!/usr/bin/env python3
"""A head of focal_plugin in a detector of your own: what it needs (AnchorTargets), and what it gives (HeadLosses).

The detector is a plain module in Detectron2's META_ARCH_REGISTRY, no FocalRetinaNet. It has a backbone, anchors and a
matcher; the head owns the classification loss and says which anchors' boxes are trained and what to divide by. It is
trained for some steps on a few scenes of the embedded digits, with FocalHead and, by name, with OHEMHead.

python examples/focal_head_in_your_detector.py
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_backbone, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from focal_plugin import build_retinanet_head, get_config
from focal_plugin.data.digits import draw_scene
from focal_plugin.heads import AnchorTargets


@META_ARCH_REGISTRY.register()
class MyDetector(nn.Module):
    """One of your own: here no more than it takes to train the head.

    Args:
        cfg: with the keys of focal_plugin.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.features = cfg.MODEL.RETINANET.IN_FEATURES
        shapes = [self.backbone.output_shape()[name] for name in self.features]
        self.anchor_generator = build_anchor_generator(cfg, shapes)
        self.matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        self.transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
        self.num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
        self.head = build_retinanet_head(cfg, shapes)  # the class that MODEL.FOCAL.HEAD names

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Losses of a batch in Detectron2's format."""
        images = ImageList.from_tensors([(x["image"] - 128) / 60 for x in batch], self.backbone.size_divisibility)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.features]
        anchors = Boxes.cat(self.anchor_generator(features)).tensor
        # The head's logits stay as the convolution wrote them: one (N, A * K, Hi, Wi) per level.
        pred_logits, pred_deltas = self.head(features)
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in pred_deltas]
        return self.losses(anchors, pred_logits, torch.cat(deltas, dim=1), [x["instances"] for x in batch])

    def losses(self, anchors: Tensor, logits: list[Tensor], deltas: Tensor, gt: list[Instances]) -> dict[str, Tensor]:
        """
        Args:
            anchors: (R, 4).
            logits: per level, (N, A * K, Hi, Wi).
            deltas: (N, R, 4).
            gt: of N images.
        """
        labels, boxes = zip(*(self.label(anchors, x) for x in gt))
        labels, boxes = torch.stack(labels), torch.stack(boxes)
        gt_deltas = self.transform.get_deltas(anchors.repeat(len(gt), 1), boxes.flatten(0, 1)).view_as(deltas)
        foreground = (labels >= 0) & (labels < self.num_classes)

        def box_losses(mask: Tensor) -> Tensor:
            return smooth_l1_loss(deltas[mask], gt_deltas[mask], beta=0.0).sum(dim=1)

        @torch.no_grad()
        def box_loss_map() -> Tensor:
            losses = torch.zeros(labels.shape)
            losses[foreground] = box_losses(foreground)
            return losses

        @torch.no_grad()
        def pred_boxes() -> Tensor:
            flat = self.transform.apply_deltas(deltas.flatten(0, 1), anchors.repeat(len(deltas), 1))
            return flat.view_as(deltas)

        # The two functions are called only by an OHEMHead that ranks by the box loss or suppresses predicted boxes.
        out = self.head.losses(logits, AnchorTargets(labels, anchors, box_loss_map, pred_boxes))
        # FocalHead leaves the division to the detector (None): by the positives. OHEMHead says: by the examples kept.
        positives = foreground.sum()
        num_examples = positives if out.num_examples is None else out.num_examples
        num_boxes = positives if out.num_boxes is None else out.num_boxes
        return {
            "loss_cls": out.loss_cls / num_examples.clamp(min=1),
            "loss_box": box_losses(out.box_mask).sum() / num_boxes.clamp(min=1),
        }

    @torch.no_grad()
    def label(self, anchors: Tensor, gt: Instances) -> tuple[Tensor, Tensor]:
        """(R,) labels of one image: a class, K for background, -1 for ignored; and the (R, 4) matched boxes."""
        matches, kinds = self.matcher(pairwise_iou(gt.gt_boxes, Boxes(anchors)))
        if len(gt) == 0:
            return torch.full((len(anchors),), self.num_classes), torch.zeros_like(anchors)
        labels = gt.gt_classes[matches]
        labels[kinds == 0] = self.num_classes
        labels[kinds == -1] = -1
        return labels, gt.gt_boxes.tensor[matches]


def scenes(count: int) -> list[dict]:
    """Of the embedded digits, as a batch; drawn in memory."""
    batch = []
    for index in range(count):
        image, boxes, classes = draw_scene("train", index, image_size=64)
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]  # XYWH to XYXY
        gt = Instances(image.shape[:2], gt_boxes=Boxes(corners), gt_classes=torch.tensor(classes, dtype=torch.long))
        batch.append({"image": torch.tensor(image).permute(2, 0, 1).float(), "instances": gt})
    return batch


def fit(model: nn.Module, steps: int = 20) -> list[dict[str, float]]:
    """Trains a model on four scenes; the losses of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch, history = scenes(4), []
    for _ in range(steps):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


def train(head: str, steps: int = 20) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained detector, and the losses of each step."""
    torch.manual_seed(0)
    # Any config with the plugin's keys will do, such as get_cfg() of Detectron2 after add_focal_config(cfg).
    config = "digits/focal.yaml" if head == "FocalHead" else "digits/ohem.yaml"
    model = build_model(get_config(config, ["MODEL.META_ARCHITECTURE", "MyDetector", "MODEL.FOCAL.HEAD", head]))
    return model, fit(model, steps)


def main() -> dict[str, tuple[nn.Module, list[dict[str, float]]]]:
    trained = {head: train(head) for head in ("FocalHead", "OHEMHead")}
    for head, (_, history) in trained.items():
        first, last = ({name: round(loss, 3) for name, loss in history[i].items()} for i in (0, -1))
        print(f"{head:<10} step 1 {first}, step {len(history)} {last}")
    return trained


if __name__ == "__main__":
    main()
