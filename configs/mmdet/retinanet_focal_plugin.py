# MMDetection's RetinaNet, R-50-FPN 1x on COCO, with the focal loss of this project: the same values at gamma 2 and
# alpha .25, and finite gradients for any gamma. Train it with MMDetection's own tools/train.py.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = {"imports": ["focal_plugin.mmdet"], "allow_failed_imports": False}
model = {
    "bbox_head": {
        "loss_cls": {
            "_delete_": True,
            "type": "FocalPluginLoss",
            "use_sigmoid": True,  # read by the head as well, whose default is softmax
            "gamma": 2.0,
            "alpha": 0.25,
            "loss": "focal",
            "loss_weight": 1.0,
        }
    }
}
