"""How the workers of a run are started: by train_net.py itself, by torchrun, and by the scripts of tools/launch."""

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.engine.launch import _find_free_port as unused_port
from zygote import ENV, ROOT, wait_for

from focal_plugin.engine.torchrun import Workers

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2"}
KUBEFLOW = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}  # of a machine
STALE = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}  # and nothing to meet at


def find(env, **typed):
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **typed}
    return Workers.find(Namespace(**args), env)


def test_workers_that_torchrun_has_started():
    for workers in (find(TORCHRUN), find(TORCHRUN, num_gpus=4, num_machines=2)):
        assert workers == Workers(per_machine=4, num_machines=2, local_rank=1, restarts=2) and workers.count == 8


@pytest.mark.parametrize("env", [{}, {"RANK": "3"}, KUBEFLOW, STALE, {"SLURM_STEP_NUM_TASKS": ""}])
def test_by_hand(env):
    assert find(env, num_gpus=2) == Workers(per_machine=2)
    assert find({**env, "SLURM_RESTART_COUNT": "2"}) == Workers(restarts=2)


@pytest.mark.parametrize(
    "env, typed, message",
    [
        (TORCHRUN, {"num_gpus": 8}, "torchrun has started 8 workers, 4 of them here: leave out --num-gpus"),
        (TORCHRUN, {"num_machines": 3}, "leave out --num-gpus and --num-machines"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, {}, "has to start as many on each machine"),
        ({}, {"num_gpus": 0}, "--num-gpus 0 --num-machines 1 .*at least 1 of each"),
        ({}, {"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "--machine-rank 2: .* start at 0"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "srun has started 8 tasks .* torchrun once a node"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, {}, "WORLD_SIZE='0', which is no number of workers"),
        ({"SLURM_RESTART_COUNT": "x"}, {}, "SLURM_RESTART_COUNT='x', which is no number"),
        ({}, {"num_machines": 2}, "--dist-url auto is for one machine"),
    ],
)
def test_a_command_line_that_cannot_be(env, typed, message):
    with pytest.raises(ValueError, match=message):
        find(env, **typed)


# ------------------------------ real runs: slow, for each worker imports everything

CHILDREN = "/proc/{0}/task/{0}/children"
TRAIN_NET = str(ROOT / "tools" / "train_net.py")


def start(command, console):
    with open(console, "a") as out:
        return subprocess.Popen(command, env=ENV, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def test_sigterm_to_the_process_that_started_the_workers(command, tmp_path):
    """To train_net.py, which hands it on to its workers and waits for their checkpoint; as often as it is sent."""
    flags = ("--resume", "--num-gpus", "2", "--dist-url", "auto")
    argv = command(tmp_path / "run", "SOLVER.MAX_ITER", "2000", flags=flags)
    process = start([sys.executable, TRAIN_NET, *argv], tmp_path / "console.txt")
    wait_for(tmp_path / "run" / "last_checkpoint")
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


@pytest.mark.skipif(not Path(CHILDREN.format(os.getpid())).is_file(), reason="finds torchrun's workers in /proc")
def test_torchrun_starts_again_what_was_killed_and_it_resumes(command, tmp_path):
    """Without --resume on the command line: the restart is what says so."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-port", str(unused_port()), "--monitor-interval", "0.2", TRAIN_NET]
    argv = command(tmp_path / "run", "SOLVER.MAX_ITER", "80", "TEST.EVAL_PERIOD", "0", flags=())
    process = start([*torchrun, *argv], tmp_path / "console.txt")
    wait_for(tmp_path / "run" / "last_checkpoint")
    os.kill(int(Path(CHILDREN.format(process.pid)).read_text().split()[1]), signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "console.txt").read_text()
    text = (tmp_path / "console.txt").read_text()
    assert "FRESH, with random weights" in text and "RESUMING after step" in text
    assert (tmp_path / "run" / "model_final.pth").is_file()


def run_script(tmp_path, name, *words, torchrun="exit 0", **env):
    """A launch script with stand-ins for what it calls, which leave their arguments in the file `calls`."""
    stand_ins, calls = tmp_path / "bin", tmp_path / "calls"
    stand_ins.mkdir()
    for tool, body in {
        # srun starts one task and returns its exit code, as the real one does for all.
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo host1; echo host2; fi',
        "torchrun": torchrun,
        "sleep": ":",
    }.items():
        (stand_ins / tool).write_text(f'#!/usr/bin/env bash\necho "{tool} $*" >> "$CALLS"\n{body}\n')
        (stand_ins / tool).chmod(0o755)
    env = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT), **env}
    script = ROOT / "tools" / "launch" / name
    done = subprocess.run(["bash", script, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines() if calls.is_file() else []


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "host[1-2]"}


@pytest.mark.parametrize(
    "torchrun, code",  # TERM reaches the inner shell and torchrun, whose workers save: it ends with 1
    [("exit 0", 0), ("exit 1", 1), ("kill -TERM $PPID; exit 1", 75), ("kill -TERM $PPID; exit 0", 0)],
    ids=["done", "failed", "preempted", "done in time"],
)
def test_a_slurm_job_requeues_itself_only_when_it_was_preempted(tmp_path, torchrun, code):
    done, calls = run_script(tmp_path, "slurm.sbatch", "c.yaml", "OUTPUT_DIR", "a b", torchrun=torchrun, **SLURM)
    assert done.returncode == code, done.stderr
    srun = next(call for call in calls if call.startswith("srun"))
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1" in srun
    (call,) = (call for call in calls if call.startswith("torchrun "))
    assert "--nnodes=2 --nproc-per-node=4 " in call and "--rdzv-id=7 " in call and "=host1:20007 " in call
    assert call.endswith("/train_net.py --config-file c.yaml --resume OUTPUT_DIR a b")
    assert ("scontrol requeue 7" in calls) == ("sleep 10" in calls) == (code == 75)


def test_torchrun_is_called_once_with_resume(tmp_path):
    done, calls = run_script(tmp_path, "torchrun.sh", "c.yaml", "SEED", "1", NODES="2", HEAD="h:1", GPUS="3")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert "--nnodes=2 --nproc-per-node=3 --max-restarts=3 " in call and "--rdzv-endpoint=h:1 " in call
    assert call.endswith(f" {ROOT}/tools/train_net.py --config-file c.yaml --resume SEED 1")


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_launch_scripts_say_how_to_call_them_and_name_what_there_is(tmp_path, name):
    done, calls = run_script(tmp_path, name, **SLURM)
    assert done.returncode != 0 and "usage: " in done.stderr and calls == []
    path = ROOT / "tools" / "launch" / name
    configs = re.findall(r"configs/[\w/]+\.yaml", path.read_text())
    tools = re.findall(r"(?:tools|\$TOOLS)/([\w/]+\.\w+)", path.read_text())
    assert configs and f"launch/{name}" in tools and os.access(path, os.X_OK)
    assert [file for file in (*configs, *(f"tools/{tool}" for tool in tools)) if not (ROOT / file).is_file()] == []
