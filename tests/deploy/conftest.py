"""A model that finds something in noise, and the tools as functions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_model(tiny_config):
    """make_model("KEY", "VALUE"): its config, and random weights whose scores lie far apart: no rounding matters."""

    def make(*opts, spread=16.0):
        cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96", *opts)
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            model.head.cls_score.weight *= spread
            model.head.bbox_pred.weight *= 10
        return cfg, model

    return make


@pytest.fixture
def call(monkeypatch, capsys):
    """call("predict", "a.png", ...) runs a tool in this process: its exit code, stdout and stderr."""

    def run(name, *words):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return (tool.main(), *capsys.readouterr())

    return run
