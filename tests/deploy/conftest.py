"""A model that finds something in noise."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model


@pytest.fixture
def make_model(tiny_config, tmp_path):
    """make_model("KEY", "VALUE", stored={"thing_classes": ...}): its config and itself, with a checkpoint.

    Its weights are random, with scores that lie far apart: no rounding matters.
    """

    def make(*opts, spread=16.0, stored=()):
        cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96", *opts)
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            model.head.cls_score.weight *= spread
            model.head.bbox_pred.weight *= 10
        torch.save({"model": model.state_dict(), **dict(stored)}, cfg.MODEL.WEIGHTS)
        return cfg, model

    return make
