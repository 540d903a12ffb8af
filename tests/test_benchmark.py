"""The baselines are what they stand for, memory is counted to the byte, errors are found; training steps are timed."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from benchmark import accuracy, step
from benchmark.baselines import CASES, FORMATS, STOCK, Case, function_candidates, head_candidates, make_batch
from benchmark.loss import peak_bytes
from focal_plugin.data import register_coco_json
from focal_plugin.losses import sigmoid_focal_loss

CPU = torch.device("cpu")
TINY = Case(2, (48, 64), (8, 16), num_anchors=3, num_classes=4)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_candidates_compute_what_retinanet_does(memory_format, tiny_config):
    """Loss and gradients equal those of Detectron2's own model on the batch's logits, labels and anchors."""
    batch = make_batch(TINY, torch.float32, memory_format, CPU)
    assert all(x.is_contiguous(memory_format=FORMATS[memory_format]) for x in batch.logits)
    assert [int(((row >= 0) & (row < 4)).sum()) for row in batch.labels] == [20, 20] and batch.normalizer == 40
    assert (batch.labels == -1).any()
    model = build_model(tiny_config("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "4"))
    anchors = [Boxes(a) for a in batch.anchors.split([144, 36])]
    with EventStorage():
        pred_logits = [permute_to_N_HWA_K(x, TINY.num_classes) for x in batch.logits]
        deltas, boxes = [torch.zeros(2, len(a), 4) for a in anchors], [batch.anchors] * 2
        loss = model.losses(anchors, pred_logits, list(batch.labels), deltas, boxes)["loss_cls"]
    batch.normalizer = model.loss_normalizer
    expected = torch.autograd.grad(loss, batch.logits)
    ours, ohem, stock = head_candidates(batch)
    assert stock.name == STOCK
    for candidate in (ours, stock):
        torch.testing.assert_close(candidate.loss(), loss)
        torch.testing.assert_close(candidate.step(), expected)
    # 128 of 180 anchors an image at most, 4 classes each.
    assert 0 < sum(int((g != 0).sum()) for g in ohem.step()) <= 2 * 128 * 4
    # Without ignored anchors the functions compute it, too.
    batch.labels[batch.labels == -1] = TINY.num_classes
    for function in function_candidates(batch):
        torch.testing.assert_close(function.loss() / batch.normalizer, ours.loss())


def test_peak_of_known_allocations():
    existing, x = torch.empty(10_000), torch.randn(100_000, requires_grad=True)

    def step():
        a, b = torch.empty(1000), torch.empty(3000)
        del a
        c = torch.empty(2000)  # here b and c: 5000
        del b
        return existing, c, torch.empty(500)

    assert peak_bytes(step, CPU) == 4 * 5000
    assert peak_bytes(lambda: existing.view(100, 100), CPU) == 0
    # The result of exp is saved for the backward pass; it and the gradient are there at once.
    assert peak_bytes(lambda: x.exp().sum().backward(), CPU) == pytest.approx(2 * 400_000, abs=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_loss_needs_no_more_than_its_gradient_and_a_block(dtype, memory_format):
    """Law 3: beside the gradient, three float32 buffers of 2**16 logits and a few numbers an anchor."""
    batch = make_batch(Case(1, (256, 256), (8, 16), 9, 80), dtype, memory_format, CPU)
    num_bytes = sum(x.numel() * x.element_size() for x in batch.logits)
    ours, _, stock = head_candidates(batch)
    assert num_bytes <= peak_bytes(ours.step, CPU) <= num_bytes + 3 * 4 * 2**16 + 32 * batch.labels.numel()
    assert peak_bytes(stock.step, CPU) > 12 * num_bytes


@pytest.mark.parametrize("gamma", accuracy.GAMMAS)
def test_the_reference_is_our_loss_in_float64(gamma):
    """Which tests/losses/test_focal.py holds against hundreds of digits."""
    x, targets = accuracy.grid(torch.float64, CPU)
    loss = sigmoid_focal_loss(x.requires_grad_(), targets, 0.25, gamma)
    ours, truth = (loss, *torch.autograd.grad(loss.sum(), x)), accuracy.reference(x.detach(), targets, 0.25, gamma)
    for values, true in zip(ours, truth):
        torch.testing.assert_close(values.detach(), true, rtol=1e-11, atol=1e-300)


def test_errors_and_what_is_not_finite_are_found():
    def percent(logits, targets, alpha, gamma):
        return (1.01 * accuracy.reference(logits.detach(), targets, alpha, gamma)[0]).float() + 0 * logits

    functions = {"percent": percent, "torchvision": torchvision_loss, "nan": lambda x, *_: x * torch.nan}
    rows = accuracy.measure_accuracy(CPU, functions)
    assert [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3 + ["float16"] * 3
    off, usual, nan = rows[:3]
    assert (off["function"], off["loss_error"]) == ("percent", pytest.approx(0.01, rel=1e-3))
    assert off["gradient_error"] == pytest.approx(1) and off["non_finite_losses"] == off["non_finite_gradients"] == 0
    assert usual["non_finite_gradients"] > 1000 and usual["non_finite_losses"] == 0
    assert usual["non_finite_gammas"] == [0.1, 0.2, 0.5]
    assert nan["loss_error"] is None and nan["non_finite_losses"] == nan["values"]


def test_tool(call_tool, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "small", TINY)
    monkeypatch.setattr(accuracy, "GAMMAS", (0.1, 2.0))
    path = tmp_path / "losses.json"
    words = f"--cases small --dtypes float32 --device cpu --rounds 2 --json {path}".split()
    code, printed, _ = call_tool("benchmark_loss", *words)
    assert code == 0
    assert all(words in printed for words in (torch.__version__, "float32, channels_last", "fvcore jit", "2 rounds"))
    results = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert "--rounds 2" in results["environment"]["command"] and "fvcore" in results["environment"]["versions"]
    losses = [row for row in results["losses"] if row["format"] == "contiguous"]
    assert (len(losses), len(results["losses"])) == (7, 7 + 3)  # the functions once
    (stock,) = (row for row in losses if row["name"] == STOCK)
    for row in losses:
        assert row["ratios"] == [theirs / own for theirs, own in zip(stock["seconds"], row["seconds"])]
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["peak"] >= 1  # the gradient alone
    assert {row["function"] for row in results["accuracy"]} >= {"focal_plugin", "fvcore", "torchvision"}


def test_bad_arguments(call_tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in (
        ("--cases huge", "invalid choice: 'huge'"),
        ("--rounds 0", "--rounds: must be at least 1, got 0"),
        ("--json no/such/folder/x.json", "--json: there is no folder"),
        ("--device cuda", "finds no CUDA GPU"),
    ):
        code, _, error = call_tool("benchmark_loss", *words.split())
        assert code == 2 and message in error


def test_both_train_in_turns(scenes, tmp_path, capsys, monkeypatch, restore_catalogs):
    for blocks in ("1", "5"):  # a ratio needs pairs of blocks
        with pytest.raises(SystemExit):
            step.main(["--steps", "4", "--blocks", blocks])
        assert f"--steps 4, got {blocks}" in capsys.readouterr().err
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
    assert result["ratios"] == [a / b, d / c]
    assert f"{sum(result['ratios']) / 2:.3f}, quartiles" in capsys.readouterr().out
    # Nothing is left behind.
    assert not folders[0].exists() and (logger.handlers, logger.level) == before
