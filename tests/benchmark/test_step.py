"""The measurement of a training step runs, on a small data set, and says what it measured."""

import json
import logging
from pathlib import Path

import pytest
import torch

from benchmark import step
from focal_plugin.data import make_digits, register_coco_json


def test_both_train_in_turns(tmp_path, capsys, monkeypatch, restore_catalogs):
    scenes = make_digits(tmp_path / "scenes", num_train=6, num_val=2, image_size=96)
    register_coco_json("t_train", scenes / "train.json", scenes / "train")
    trained, original = [], step.Run.measure

    def measure(run, num_steps):
        done, milliseconds = run.done, original(run, num_steps)
        name = f"{type(run.trainer).__name__}, {type(run.trainer.model).__name__}"
        trained.append((name, run.done - done, milliseconds, Path(run.trainer.cfg.OUTPUT_DIR).parent))
        return milliseconds

    monkeypatch.setattr(step.Run, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the other tests' threads stay as they are
    logger = logging.getLogger("detectron2")
    before = list(logger.handlers), logger.level
    path = tmp_path / "step.json"
    step.main(["--steps", "4", "--blocks", "2", "--json", str(path), "DATASETS.TRAIN", '("t_train",)'])

    ours, stock = "FocalTrainer, FocalRetinaNet", "DefaultTrainer, RetinaNet"
    names, steps, milliseconds, folders = zip(*trained)
    assert names == (ours, stock, ours, stock, stock, ours) and set(steps) == {2}
    result, (a, b, c, d) = json.loads(path.read_text()), milliseconds[2:]
    assert result["milliseconds"] == {"focal_plugin": [a, d], "stock": [b, c]} and min(a, b, c, d) > 0
    assert (
        result["ratios"] == [a / b, d / c] and f"{sum(result['ratios']) / 2:.3f}, quartiles" in capsys.readouterr().out
    )
    # Nothing is left behind.
    assert not folders[0].exists() and (logger.handlers, logger.level) == before


@pytest.mark.parametrize("blocks", ["1", "5"])
def test_a_ratio_needs_pairs_of_blocks(blocks, capsys):
    with pytest.raises(SystemExit):
        step.main(["--steps", "4", "--blocks", blocks])
    assert f"--steps 4, got {blocks}" in capsys.readouterr().err
