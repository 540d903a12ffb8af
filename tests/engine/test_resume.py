"""Runs that are stopped, at any moment and in any way, and resumed: bit for bit what the run that never stopped is."""

import functools
import os
import random
import signal
import time

import pytest
import torch
import zygote

from focal_plugin.engine.preemption import EXIT_PREEMPTED

FINAL = "model_final.pth"
DATA_WORKERS = ("DATALOADER.NUM_WORKERS", "2")
OHEM = ("MODEL.FOCAL.HEAD", "OHEMHead", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.0", "SOLVER.OPTIMIZER", "SGD")
NO_SEED = ("SEED", "-1")


def load(path):
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint.pop("run")) == 32  # an id that no two runs share
    return checkpoint


def assert_same(got, want, where="checkpoint"):
    """Bit for bit, whatever the types."""
    assert type(got) is type(want), where
    if isinstance(want, (list, tuple)):
        got, want = dict(enumerate(got)), dict(enumerate(want))
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            assert_same(got[key], want[key], f"{where}[{key!r}]")
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, where
        # As bytes, for two NaNs are not equal.
        assert got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes(), where
    else:
        assert got == want, where


@pytest.fixture(scope="session")
def never_stopped(command, tmp_path_factory):
    """never_stopped(KEY, VALUE, ...): the last checkpoint of such a run, trained once."""

    @functools.cache
    def train(*opts):
        folder = tmp_path_factory.mktemp("never_stopped")
        assert zygote.run(command(folder, *opts), folder / "console.txt") == 0, (folder / "console.txt").read_text()
        return load(folder / FINAL)

    return train


def test_killed_at_twenty_random_moments(command, never_stopped, tmp_path):
    """Steps, checkpoints and evaluations are about equally likely to be hit: the run does little else."""
    moments, killed, folders = random.Random(0), 0, 0
    while killed < 20:
        folder, console, code = tmp_path / f"run{folders}", tmp_path / f"run{folders}.txt", None
        while code != 0:
            fault = ("kill after", moments.uniform(0, 0.5)) if killed < 20 else None
            code = zygote.run(command(folder), console, fault=fault)
            assert code in (0, -signal.SIGKILL), console.read_text()
            killed += code != 0
        assert_same(load(folder / FINAL), never_stopped())
        assert not list(folder.glob("*.tmp"))
        folders += 1


@pytest.mark.parametrize("opts", [DATA_WORKERS, OHEM], ids=["data workers", "OHEM and SGD"])
def test_killed_with(opts, run, never_stopped, tmp_path):
    for delay in (0.15, 0.3, 0.6):
        assert run(*opts, fault=("kill after", delay)) in (0, -signal.SIGKILL)
    assert run(*opts) == 0, run.text()
    assert_same(load(tmp_path / "run" / FINAL), never_stopped(*opts))


def test_the_number_of_data_workers_changes_nothing(never_stopped):
    assert_same(never_stopped(*DATA_WORKERS)["model"], never_stopped()["model"])


# Of one save: sync and rename of the checkpoint, then of last_checkpoint; a sync of the folder after each rename.
@pytest.mark.parametrize("call", [("fsync", 1), ("replace", 1), ("fsync", 3), ("replace", 2)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_a_save(call, when, run, never_stopped, tmp_path):
    """In the second, so that there is one to go on from; and whatever lies there then can be resumed from."""
    assert run(fault=("kill at", call[0], call[1] + (4 if call[0] == "fsync" else 2), when)) == -signal.SIGKILL
    for file in (tmp_path / "run").glob("*.pth"):
        load(file)
    assert run() == 0, run.text()
    assert_same(load(tmp_path / "run" / FINAL), never_stopped())


@pytest.mark.parametrize("opts", [(), DATA_WORKERS], ids=["", "data workers"])
@pytest.mark.parametrize(
    "fault, saved",
    [
        (("signal in step", 4, signal.SIGTERM), "model_0000004.pth"),
        (("signal in step", 5, signal.SIGTERM), "model_0000005.pth"),  # due anyway
        (("signal in evaluation", 6, signal.SIGTERM), "model_0000007.pth"),
        (("signal in evaluation", 18, signal.SIGTERM), FINAL),  # the last one: nothing is left to train
    ],
    ids=["step", "step with a checkpoint", "evaluation", "last evaluation"],
)
def test_sigterm_saves_and_says_resume_me(fault, saved, opts, run, never_stopped, tmp_path):
    assert run(*opts, fault=fault) == EXIT_PREEMPTED == 75
    assert (tmp_path / "run" / "last_checkpoint").read_text() == saved
    assert run(*opts) == 0, run.text()
    assert f"RESUMING after step {5 if '4' in saved else ''}" in run.text()
    assert_same(load(tmp_path / "run" / FINAL), never_stopped(*opts))
    # The evaluations that were interrupted have been made up for.
    assert run.text().count("copypaste: AP,AP50") == 5


def test_a_crash_is_gone_on_from(run, never_stopped, tmp_path):
    assert run(fault=("raise in step", 7, 0)) == 1
    assert "a made-up fault" in run.text()
    assert run() == 0
    assert_same(load(tmp_path / "run" / FINAL), never_stopped())


def test_without_a_seed_too(run, tmp_path):
    """The seed that was drawn goes on with the run: what is drawn after the resume is what would have been drawn."""
    assert run(*NO_SEED, fault=("signal in step", 9, signal.SIGTERM)) == EXIT_PREEMPTED
    at_the_stop = (tmp_path / "run").rename(tmp_path / "kept")
    ends = []
    for _ in range(2):
        (tmp_path / "run").mkdir()
        for name in ("model_0000009.pth", "last_checkpoint"):
            os.link(at_the_stop / name, tmp_path / "run" / name)
        assert run(*NO_SEED) == 0
        ends.append(load(tmp_path / "run" / FINAL))
        (tmp_path / "run").rename(tmp_path / f"end{len(ends)}")
    assert_same(*ends)


def test_sigterm_to_all_processes_in_an_evaluation(command, never_stopped, tmp_path):
    """As a scheduler sends it: to data workers too, which must not die before the trainer has saved."""
    opts = (*DATA_WORKERS, "SOLVER.MAX_ITER", "400")
    process = zygote.start(command(tmp_path / "run", *opts), tmp_path / "console.txt")
    for text in ("Start inference", "Saving checkpoint"):  # once in an evaluation, once in training
        zygote.wait_for(tmp_path / "console.txt", text)
        os.killpg(process.pid, signal.SIGTERM)
        assert zygote.wait(process) == EXIT_PREEMPTED, (tmp_path / "console.txt").read_text()
        (tmp_path / "console.txt").unlink()
        process = zygote.start(command(tmp_path / "run", *opts), tmp_path / "console.txt")
    process.kill()


def test_a_new_run_in_the_folder_of_an_old_one_is_not_taken_for_it(run, tmp_path):
    """Trap: started again by the batch system before its first checkpoint, it would "resume" what the old run left."""
    assert run(*OHEM) == 0
    assert run(fault=("raise in step", 1, 0), flags=()) == 1
    (tmp_path / "console.txt").unlink()
    assert run("SOLVER.MAX_ITER", "3", flags=(), env={"SLURM_RESTART_COUNT": "1"}) == 0
    assert "it is of an earlier run in that folder" in run.text() and "FRESH" in run.text()
    assert "RESUMING" not in run.text() and load(tmp_path / "run" / FINAL)["iteration"] == 2


def test_images_are_counted_over_changes_of_the_batch(run, tmp_path):
    """The place in the data is counted in images, each step's as many as it had."""
    assert run(fault=("signal in step", 3, signal.SIGTERM)) == EXIT_PREEMPTED
    assert run("SOLVER.IMS_PER_BATCH", "4", fault=("signal in step", 6, signal.SIGTERM)) == EXIT_PREEMPTED
    assert load(tmp_path / "run" / "model_0000006.pth")["trainer"]["data"]["images"] == 4 * 2 + 3 * 4


def test_stock_retinanet_keeps_its_normaliser(run, tmp_path):
    """Upstream's is a plain number, which no state_dict has. (Its loss, which torch.jit compiles anew in other steps
    after a resume, is not bit for bit the same; the normaliser does not depend on it.)"""
    stock = ("MODEL.META_ARCHITECTURE", "RetinaNet")
    assert run(*stock) == 0
    want = load((tmp_path / "run").rename(tmp_path / "never_stopped") / FINAL)
    assert run(*stock, fault=("signal in step", 6, signal.SIGTERM)) == EXIT_PREEMPTED
    assert run(*stock) == 0
    got = load(tmp_path / "run" / FINAL)
    assert got["workers"][0]["normalizer"] == want["workers"][0]["normalizer"] < 100


def test_two_workers(pair, tmp_path):
    """Each has batch norms and a running mean of its own, which a checkpoint of upstream has for the first only."""
    assert pair() == [0, 0], pair.texts()
    want = load((tmp_path / "run").rename(tmp_path / "never_stopped") / FINAL)
    assert len(want["workers"]) == 2 and want["workers"][1]["buffers"]
    # Killed, both; and asked to stop, one of them only.
    assert pair(fault=("kill after", 0.3)) == [-signal.SIGKILL] * 2, pair.texts()
    assert pair(fault=("signal in step", 9, signal.SIGTERM, 1)) == [EXIT_PREEMPTED] * 2, pair.texts()
    assert pair(fault=("signal in evaluation", 1, signal.SIGTERM, 1)) == [EXIT_PREEMPTED] * 2, pair.texts()
    assert pair() == [0, 0], pair.texts()
    assert_same(load(tmp_path / "run" / FINAL), want)


def test_sigterm_while_waiting_for_the_other_workers(pair):
    """They may come minutes later, on another machine."""
    assert pair(delay=lambda pid: time.sleep(1.5) or os.kill(pid, signal.SIGTERM)) == [EXIT_PREEMPTED] * 2, pair.texts()


def test_another_number_of_workers_goes_on_and_says_so(pair, run):
    assert pair(fault=("signal in step", 3, signal.SIGTERM)) == [EXIT_PREEMPTED] * 2, pair.texts()
    assert run() == 0
    assert "saved by 2 worker(s), this run has 1" in run.text() and "RESUMING after step 4" in run.text()
