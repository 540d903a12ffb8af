"""train_net.py started on several workers by itself, and by torchrun. Slow: each worker imports everything."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from zygote import ENV, ROOT

TRAIN_NET = str(ROOT / "tools" / "train_net.py")


def start(command, console):
    with open(console, "a") as out:
        return subprocess.Popen(command, env=ENV, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(path, process, console, seconds=90):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, console.read_text()
        time.sleep(0.05)


def children(pid):
    """The processes that another has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def test_sigterm_to_the_process_that_started_the_workers(command, tmp_path):
    """To train_net.py, which hands it on to its workers and waits for their checkpoint; as often as it is sent."""
    flags = ("--resume", "--num-gpus", "2", "--dist-url", "auto")
    argv = command(tmp_path / "run", "SOLVER.MAX_ITER", "2000", flags=flags)
    process = start([sys.executable, TRAIN_NET, *argv], tmp_path / "console.txt")
    wait_for(tmp_path / "run" / "last_checkpoint", process, tmp_path / "console.txt")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 75, (tmp_path / "console.txt").read_text()
    saved = (tmp_path / "run" / "last_checkpoint").read_text()
    assert len(torch.load(tmp_path / "run" / saved, weights_only=True)["workers"]) == 2
    assert "type the same command with --resume to go on" in (tmp_path / "console.txt").read_text()


def test_sigterm_ends_an_evaluation(run, tmp_path):
    """Before the next image, as in a training: at once, it would leave workers that were started here behind."""
    assert run("SOLVER.MAX_ITER", "1") == 0, run.text()
    weights = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    assert run(*weights, flags=("--eval-only",), fault=("signal in evaluation", 2, signal.SIGTERM)) == 75, run.text()


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds torchrun's workers in /proc")
def test_torchrun_starts_again_what_was_killed_and_it_resumes(command, unused_port, tmp_path):
    """Without --resume on the command line: the restart is what says so."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-port", str(unused_port()), "--monitor-interval", "0.2", TRAIN_NET]
    argv = command(tmp_path / "run", "SOLVER.MAX_ITER", "80", "TEST.EVAL_PERIOD", "0", flags=())
    process = start([*torchrun, *argv], tmp_path / "console.txt")
    wait_for(tmp_path / "run" / "last_checkpoint", process, tmp_path / "console.txt")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "console.txt").read_text()
    text = (tmp_path / "console.txt").read_text()
    assert "FRESH, with random weights" in text and "RESUMING after step" in text
    assert (tmp_path / "run" / "model_final.pth").is_file()
