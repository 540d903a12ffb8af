"""What a run does when its loss breaks, one of its workers fails, or its images cannot be read."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from zygote import ENV, ROOT

SGD = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", "False")


def last_error(text):
    return text[text.rindex("error: ") :]


def test_a_learning_rate_that_breaks_the_loss(run, tmp_path):
    """For real: nothing is patched."""
    assert run(*SGD, "SOLVER.BASE_LR", "1e6", "SOLVER.WARMUP_ITERS", "0", flags=()) == 1
    error = last_error(run.text())
    step = int(re.match(r"error: (?:Loss|Gradients).* infinite or NaN at iteration=(\d+)!", error)[1])
    assert 1 <= step <= 5
    for expected in (
        r"Worker 0 of 1: loss_cls \S+, loss_box_reg \S+, learning rate \S+ \(SOLVER.BASE_LR 1e\+06\)",
        r"normalizer \d+\.\d+, positive anchors per image \d+",
        r"largest \|logit\| (\d\S*|NaN or infinite)\n",
        r"images: \S+\.png, \S+\.png\n",
        r"1\. The learning rate is too high for the batch: per image it is 8e\+08 times .* SOLVER.BASE_LR 0.00125,",
        r"2\. Boxes that are none .*tools/check_dataset\.py",
        r"3\. Numbers too large for the precision \(not likely here",
    ):
        assert re.search(expected, error), (expected, error)
    assert "Traceback" not in error

    saved = tmp_path / "run" / f"broken_{step:07d}_worker0.pth"
    content = torch.load(saved, weights_only=True)
    # The weights of before the step; the norms' running statistics have been through the forward pass.
    assert all(torch.isfinite(v).all() for name, v in content["model"].items() if "running_" not in name)
    # The replay command that the message gives.
    command = [sys.executable, str(ROOT / "tools" / "replay_loss.py"), str(saved)]
    replay = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert replay.returncode == 0, replay.stderr
    for name in ("loss_cls", "loss_box_reg"):
        was = content["facts"][name]
        now = float(re.search(rf"^{name} +(\S+)", replay.stdout, re.MULTILINE)[1])
        assert now == pytest.approx(was, rel=1e-5, nan_ok=True), name
    assert len(re.findall(r"^\S+\.png ", replay.stdout, re.MULTILINE)) == 2, "a line for each image"


def test_gradients_that_break_before_the_loss_does(run, tmp_path):
    """Upstream takes the step, and finds weights of NaN at the next one."""
    assert run(*SGD, fault=("no gradient", 3, 0), flags=()) == 1
    assert "error: Gradients, not the loss, are infinite or NaN at iteration=3!" in run.text()
    content = torch.load(tmp_path / "run" / "broken_0000003_worker0.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in content["model"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_all_workers_stop_at_once_when_the_loss_of_one_breaks(rank, pair, tmp_path):
    assert pair(fault=("no loss", 3, rank), flags=(), timeout=40) == [1, 1]
    for error in map(last_error, pair.texts()):
        assert "Loss became infinite or NaN at iteration=3!" in error
        assert f"Worker {rank} of 2: loss_cls nan" in error and f"Worker {1 - rank} of 2" not in error
    assert [p.name for p in (tmp_path / "run").glob("broken_*")] == [f"broken_0000003_worker{rank}.pth"]


@pytest.mark.parametrize("rank, step", [(1, 3), (0, 19)])
def test_all_workers_stop_when_one_fails(rank, step, pair):
    """The other waits in a collective then; upstream's would for half an hour. 19 is the last step, after which
    upstream evaluates even if it has failed."""
    assert pair(fault=("raise in step", step, rank), flags=(), timeout=40) == [1, 1]
    texts = pair.texts()
    assert "KeyError: 'a made-up fault'" in texts[rank]
    told = f"worker {1 - rank} stops: worker {rank} has failed: KeyError: 'a made-up fault'"
    assert told in texts[1 - rank] or "Connection closed by peer" in texts[1 - rank]


def test_all_workers_stop_when_one_is_killed(pair):
    assert pair(fault=("signal in step", 3, 9, 1), flags=(), timeout=40) == [1, -9], pair.texts()


@pytest.fixture
def spoiled(scenes, command, tmp_path, monkeypatch):
    """spoiled(n): the runs are given a copy of the scenes with n truncated images; their paths."""

    def make(number, split="train"):
        monkeypatch.setattr(command, "scenes", shutil.copytree(scenes, tmp_path / "spoiled"))
        images = sorted((command.scenes / split).iterdir())[:number]
        for image in images:
            image.write_bytes(image.read_bytes()[:150])
        return images

    return make


@pytest.mark.parametrize("workers", ["0", "2"])
def test_truncated_images_are_named_counted_and_skipped(workers, spoiled, run, tmp_path):
    images = spoiled(3)
    assert run("DATALOADER.NUM_WORKERS", workers, "DATALOADER.MAX_BAD_IMAGES", "3", flags=()) == 0, run.text()
    for image in images:
        assert len(re.findall(rf"{image.name} cannot be read \(.+\); another image took its place", run.text())) == 1
    assert "3 of at most 3 (DATALOADER.MAX_BAD_IMAGES)" in run.text()
    assert '"bad_images": 3.0' in (tmp_path / "run" / "metrics.json").read_text()


@pytest.mark.parametrize("limit", ["2", "0"])
def test_more_truncated_images_than_allowed_stop_the_run(limit, spoiled, run):
    images = spoiled(3)
    assert run("DATALOADER.MAX_BAD_IMAGES", limit, flags=()) == 1
    text = run.text()
    assert f"image(s) cannot be read, and DATALOADER.MAX_BAD_IMAGES allows {limit}" in text
    assert any(image.name in text[text.rindex("DATALOADER.MAX_BAD_IMAGES allows") :] for image in images)


def test_a_truncated_image_in_an_evaluation_is_named(spoiled, run):
    (image,) = spoiled(1, "val")
    assert run(flags=()) != 0
    assert f"{image} cannot be read" in run.text() and "an evaluation needs every image" in run.text()


def test_a_disk_that_is_full_stops_the_run_with_the_earlier_files_whole(run, tmp_path):
    assert run(fault=("signal in step", 3, 15), flags=()) == 75
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")}
    size = len(before["model_0000003.pth"])
    assert run(fault=("file size", size // 2)) == 1
    assert re.search(
        r"could not write \S+model_0000005.pth \(.*\)\. The earlier checkpoints are whole, the last one is "
        r"model_0000003\.pth\. Make room",
        run.text(),
    ), run.text()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")} == before
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000003.pth"
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert run() == 0
