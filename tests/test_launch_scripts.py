"""tools/launch: the scripts parse, name what there is, and do with exit codes what their comments say."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_launch_scripts_parse_and_name_what_there_is(name):
    path = ROOT / "tools" / "launch" / name
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    configs = re.findall(r"configs/([\w/]+\.yaml)", text)
    tools = re.findall(r"(?:tools|\$TOOLS)/([\w/]+\.\w+)", text)
    assert configs and tools and f"launch/{name}" in tools
    assert [c for c in configs if not (ROOT / "configs" / c).is_file()] == []
    assert [t for t in tools if not (ROOT / "tools" / t).is_file()] == []


def run_script(tmp_path, name, *words, torchrun="exit 0", **env):
    """A launch script with stand-ins for what it calls, which leave their arguments in the file `calls`."""
    stand_ins = tmp_path / "bin"
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
    calls = tmp_path / "calls"
    env = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT), **env}
    script = ROOT / "tools" / "launch" / name
    done = subprocess.run(["bash", script, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines() if calls.is_file() else []


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "host[1-2]"}


@pytest.mark.parametrize(
    "torchrun, code",
    [
        ("exit 0", 0),
        ("exit 1", 1),
        # TERM reaches the inner shell and torchrun, whose workers save: it ends with 1.
        ("kill -TERM $PPID; exit 1", 75),
        ("kill -TERM $PPID; exit 0", 0),
    ],
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
def test_launch_scripts_without_a_config_say_how_to_call_them(tmp_path, name):
    done, calls = run_script(tmp_path, name, **SLURM)
    assert done.returncode != 0 and "usage: " in done.stderr and calls == []
