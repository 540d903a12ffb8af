#!/usr/bin/env python3
"""A head with your own loss and a value for it in the config: the focal Poly-1 loss of Leng et al. (arXiv 2204.12511).

python examples/your_own_head.py
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import build_model
from focal_head_in_your_detector import fit

from focal_plugin import RETINANET_HEAD_REGISTRY, FocalHead, extend_config, get_config


@extend_config
def add_poly_config(cfg):
    cfg.MODEL.FOCAL.POLY_EPSILON = 1.0


@RETINANET_HEAD_REGISTRY.register()
class PolyHead(FocalHead):  # subclass OHEMHead instead to mine by this loss
    @configurable
    def __init__(self, *, poly_epsilon: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        if self.class_alpha is not None:
            raise ValueError("PolyHead has one alpha for all classes: leave MODEL.FOCAL.CLASS_ALPHA empty")
        self.poly_epsilon = poly_epsilon

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), "poly_epsilon": cfg.MODEL.FOCAL.POLY_EPSILON}

    def classification_loss(self, logits, labels):
        """FL + epsilon * alpha_t * (1 - p_t)^(gamma + 1), summed over the classes of each anchor."""
        present = labels[..., None] == torch.arange(self.num_classes, device=labels.device)  # background: nowhere
        weight = torch.where(present, self.alpha, 1 - self.alpha) if self.alpha >= 0 else 1.0
        poly = weight * torch.where(present, -logits, logits).sigmoid() ** (self.gamma + 1)
        poly = poly.sum(dim=-1).masked_fill(labels < 0, 0)  # -1: ignored
        return super().classification_loss(logits, labels) + self.poly_epsilon * poly


def main(steps: int = 20, epsilon: float = 1.0):
    cfg = get_config("digits/focal.yaml", ["MODEL.FOCAL.HEAD", "PolyHead", "MODEL.FOCAL.POLY_EPSILON", str(epsilon)])
    torch.manual_seed(0)
    model = build_model(cfg)
    history = fit(model, steps)
    print(f"{type(model.head).__name__}, epsilon {epsilon}: {history[0]} -> {history[-1]}")
    return model, history


if __name__ == "__main__":
    main()
