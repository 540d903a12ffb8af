"""retina_ohem.yaml as a Python config: OHEM 128 / nms .5, the best OHEM row of the paper's Table 1d."""

from focal_plugin.heads import OHEMHead

from .retina_focal import dataloader, lr_multiplier, model, optimizer, train

model.focal_loss_alpha = -1.0
model.focal_loss_gamma = 0.0

model.head._target_ = OHEMHead
model.head.ohem_batch_size = 128
model.head.nms_thresh = 0.5
model.head.neg_pos_ratio = 0.0
model.head.scope = "image"
model.head.rank_by = "cls"
model.head.nms_boxes = "anchors"
model.head.nms_per_label = True
model.head.normalizer = "selected"
model.head.box_loss_on = "selected"

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
