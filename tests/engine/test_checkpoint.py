"""What is saved, kept and found again; upstream's own hooks and checkpointer drive it."""

import os
from contextlib import nullcontext
from urllib.error import URLError

import pytest
import torch
from detectron2.engine import TrainerBase

from focal_plugin.engine import SafeCheckpointer
from focal_plugin.engine.hooks import BestCheckpointer, EvalHook, PeriodicCheckpointer
from focal_plugin.engine.preemption import FinishedEarly
from focal_plugin.engine.safe_load import refusing
from focal_plugin.files import atomic_write


class Trainer(TrainerBase):
    """One weight, which counts the steps; stops when it is told to."""

    def __init__(self, folder, metrics=(), period=1, keep=0, eval_period=2, patience=0, metric="bbox/AP"):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.model.weight)
        self.guard = self
        self.stopping = self.finishing = False
        self.metrics, self.evaluated = dict(metrics), []  # by steps done; None is a crash
        self.checkpointer = SafeCheckpointer(self.model, str(folder), trainer=self)
        checkpoints = PeriodicCheckpointer(self.checkpointer, period, keep)
        evaluation = EvalHook(eval_period, self.evaluate, checkpoints)
        self.best = BestCheckpointer(eval_period, self.checkpointer, metric, patience)
        self.register_hooks([checkpoints, evaluation, self.best])

    def finish(self):
        self.finishing = True

    def run_step(self):
        with torch.no_grad():
            self.model.weight += 1

    def evaluate(self):
        self.evaluated.append((self.done, self.model.weight.item()))
        self.storage.put_scalar("score_threshold", self.done / 100)
        if (ap := self.metrics.get(self.done, 0.0)) is None:
            raise KeyError("crash")
        return {"bbox": {"AP": ap}}

    def after_step(self):
        super().after_step()
        if self.iter == self.crash_at:
            raise KeyError("crash")

    @property
    def done(self):
        return min(self.storage.iter + 1, self.max_iter)

    def go(self, steps, resume=False, crash_at=None):
        """Train; with ``crash_at`` to an error at the end of that step."""
        start = 0
        if resume:
            self.checkpointer.resume_or_load("", resume=True)
            start = self.iter + 1
        self.crash_at = crash_at
        with nullcontext() if crash_at is None else pytest.raises(KeyError):
            self.train(start, steps)


def weight_in(path):
    return torch.load(path, weights_only=True)["model"]["weight"].item()


def numbers(folder):
    """Of the checkpoints that are there, but for the final one."""
    return sorted(int(path.stem.partition("_")[2]) for path in folder.glob("model_0*.pth"))


@pytest.mark.parametrize("keep, kept", [(0, range(7)), (1, [6]), (3, [4, 5, 6])])
def test_the_last_are_kept(keep, kept, tmp_path):
    Trainer(tmp_path, keep=keep, eval_period=0).go(7)
    assert numbers(tmp_path) == list(kept) and weight_in(tmp_path / "model_final.pth") == 7


def test_those_kept_of_before_a_resume_count(tmp_path):
    """Detectron2's hook knows only those that it has written itself."""
    Trainer(tmp_path, keep=2, eval_period=0).go(3)
    Trainer(tmp_path, keep=2, eval_period=0).go(6, resume=True)
    assert numbers(tmp_path) == [4, 5]


def test_later_ones_of_another_run_are_kept(tmp_path):
    """Where one went back to an earlier checkpoint by hand, the later ones are not the trainer's to delete."""
    Trainer(tmp_path, eval_period=0).go(6)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = Trainer(tmp_path, keep=1, eval_period=0)
    trainer.go(4, resume=True)
    assert trainer.checkpointer.resumed_from.endswith("model_0000001.pth")
    assert {4, 5} <= set(numbers(tmp_path))


def test_the_best_is_kept_and_does_not_move_last_checkpoint(tmp_path):
    """Trap: upstream's makes a run that is killed then resume from its best model."""
    Trainer(tmp_path, {2: 10.0, 4: 30.0, 6: 20.0}, period=5).go(8, crash_at=6)
    assert weight_in(tmp_path / "model_best.pth") == 4
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["score_threshold"] == 0.04
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"


@pytest.mark.parametrize(
    "before, crash_at, after, resume, best, metric",
    [
        # Trap: after a resume Detectron2's takes the first evaluation for the best.
        ({2: 30.0}, 2, {4: 10.0, 6: 20.0}, True, 2, 30),
        # Evaluated, saved as the best, and killed before the next checkpoint (of step 6).
        ({2: 10.0, 4: 30.0}, 4, {4: 30.0, 6: 20.0}, True, 4, 30),
        ({2: 90.0, 4: 90.0}, None, {2: 10.0, 4: 20.0}, False, 4, 20),
        ({2: float("nan"), 4: 1.0, 6: float("nan")}, None, {}, True, 4, 1),
    ],
    ids=["not its first", "not in the last checkpoint", "not of the run before", "not NaN"],
)
def test_the_best_so_far_survives_a_resume(before, crash_at, after, resume, best, metric, tmp_path):
    period = 3 if crash_at == 4 else 1
    Trainer(tmp_path, before, period).go(6, crash_at=crash_at)
    second = Trainer(tmp_path, after, period)
    second.go(6, resume=resume)
    assert weight_in(tmp_path / "model_best.pth") == best and second.best.best_metric == metric


def test_a_best_that_is_torn_is_replaced(tmp_path):
    Trainer(tmp_path, {2: 30.0}).go(6, crash_at=2)
    (tmp_path / "model_best.pth").write_bytes(b"PK\3\4 and no end")
    Trainer(tmp_path, {4: 10.0, 6: 20.0}).go(6, resume=True)
    assert weight_in(tmp_path / "model_best.pth") == 6


def test_training_ends_when_it_does_not_improve_any_more(tmp_path):
    """Counted over a resume: 30 is the best, and then there are two evaluations in vain."""
    metrics = {2: 10.0, 4: 30.0, 6: 20.0, 8: 30.0, 10: 99.0}
    Trainer(tmp_path, metrics).go(11)
    assert weight_in(tmp_path / "model_best.pth") == 10, "without the key it goes on"
    Trainer(tmp_path, metrics, patience=2).go(20, crash_at=6)
    with pytest.raises(FinishedEarly):
        Trainer(tmp_path, metrics, patience=2).go(20, resume=True)
    assert weight_in(tmp_path / "model_best.pth") == 4
    assert weight_in(tmp_path / "model_final.pth") == 9, "the step after the evaluation"


def test_patience_is_the_same_after_a_kill(tmp_path):
    """The best is in the folder and not in the checkpoint yet; the evaluation that is made up for ties with it."""
    metrics = {**dict.fromkeys(range(4, 40, 2), 5.0), 2: 1.0}
    Trainer(tmp_path, metrics, period=4, patience=2).go(40, crash_at=4)
    with pytest.raises(FinishedEarly):
        Trainer(tmp_path, metrics, period=4, patience=2).go(40, resume=True)
    assert weight_in(tmp_path / "model_final.pth") == 9, "after 4, the best, two in vain"


def test_a_metric_that_there_is_not_ends_nothing(tmp_path):
    Trainer(tmp_path, patience=1, metric="nothing/AP").go(9)
    assert weight_in(tmp_path / "model_final.pth") == 9


@pytest.mark.parametrize("crash_at, ap, owed", [(1, None, [(2, 2.0)]), (2, 10.0, [])])
def test_an_evaluation_is_made_up_for(crash_at, ap, owed, tmp_path):
    """At step 2 a checkpoint is written, then it is evaluated: killed in between, the evaluation would be lost."""
    Trainer(tmp_path, {2: ap}).go(6, crash_at=crash_at)
    resumed = Trainer(tmp_path, {2: 10.0, 4: 20.0, 6: 30.0})
    resumed.go(6, resume=True)
    assert resumed.evaluated == [*owed, (4, 4.0), (6, 6.0)]


@pytest.fixture
def stopped(tmp_path):
    """A folder with five checkpoints, the last of which is named."""
    Trainer(tmp_path, eval_period=0).go(10, crash_at=5)
    (tmp_path / "model_0000005.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    return tmp_path


def resume(folder):
    trainer = Trainer(folder, eval_period=0)
    trainer.checkpointer.resume_or_load("", resume=True)
    return trainer.iter, os.path.basename(trainer.checkpointer.resumed_from)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\3\4 and no end"),
        lambda path: path.unlink(),
        lambda path: torch.save({"model": {}}, path),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["truncated", "empty", "a beginning", "gone", "without a trainer", "of something else"],
)
def test_a_torn_newest_is_reported_and_the_newest_good_one_used(spoil, stopped, caplog):
    spoil(stopped / "model_0000004.pth")
    spoil(stopped / "model_0000003.pth")
    assert resume(stopped) == (2, "model_0000002.pth")
    assert "model_0000004.pth" in caplog.text


@pytest.mark.parametrize("tag", ["", "model_00", "../elsewhere/model_0000002.pth", "model_0000009.pth", "\0", None])
def test_a_last_checkpoint_that_names_none_or_is_not_there(tag, stopped, caplog):
    (stopped / "last_checkpoint").unlink() if tag is None else (stopped / "last_checkpoint").write_text(tag)
    assert resume(stopped) == (4, "model_0000004.pth")
    assert ("is not there" if tag is None else "names no checkpoint") in caplog.text


def test_none_is_good_or_there(stopped, caplog):
    for path in stopped.glob("*.pth"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"(?s)none of the checkpoints in .*model_0000004.pth.*leave out --resume"):
        resume(stopped)
    assert resume(stopped / "new") == (0, "")
    assert "has no checkpoint to resume from; starting afresh" in caplog.text


def test_parameters_that_were_skipped_are_told(tmp_path):
    torch.save({"weight": torch.ones(5, 1), "bias": torch.ones(1), "more": torch.ones(1)}, tmp_path / "w.pth")
    checkpointer = SafeCheckpointer(torch.nn.Linear(1, 1))
    checkpointer.load(str(tmp_path / "w.pth"))
    other, more = sorted(checkpointer.skipped, reverse=True)  # fvcore has the first among the missing ones, too
    assert "other shape in the model (weight (5, 1) -> (1, 1))" in other and more == "1 not in the model (more)"


def test_weights_that_cannot_be_fetched_are_named():
    """Without a network: urllib's error has neither a number nor the address."""
    want = r"^detectron2://x.pkl cannot be read \(<urlopen error Name or service not known>\); without a network"
    with pytest.raises(OSError, match=want), refusing("detectron2://x.pkl"):
        raise URLError("Name or service not known")


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write("whole")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half of the n")
        raise KeyError
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failing_rename_of_last_checkpoint_keeps_both_checkpoints(stopped, monkeypatch):
    """last_checkpoint moves after the checkpoint, so that it never names one that is not there."""
    replace, calls = os.replace, []

    def fail_at_the_tag(source, target):
        calls.append(os.path.basename(target))
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_tag)
    with pytest.raises(OSError, match="Input/output error"):
        Trainer(stopped, eval_period=0).checkpointer.save("model_0000005", iteration=5)
    assert calls == ["model_0000005.pth", "last_checkpoint"]
    assert (stopped / "last_checkpoint").read_text() == "model_0000004.pth"
