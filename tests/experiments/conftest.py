"""A script that only pretends to train, and runs of it; tools/reproduce.py."""

import runpy
import time
from pathlib import Path

import pytest

from focal_plugin.experiments.plan import TRAIN_NET
from focal_plugin.experiments.results import Run
from focal_plugin.experiments.runner import InlineExecutor, run_all

PRETENDING = """\
import json, os, signal, subprocess, sys, time, zipfile
from pathlib import Path

words = sys.argv[sys.argv.index("--resume") + 1 :]
values = dict(zip(words[::2], words[1::2]))
out = Path(values["OUTPUT_DIR"])
worker = subprocess.Popen(["sleep", "60"]).pid if "WORKER" in values else os.getpid()
with (out / "attempts").open("a") as file:
    file.write(f"{os.getpid()} {worker} {time.time()} {os.environ['OMP_NUM_THREADS']}\\n")
(out / "sigint").write_text(str(signal.getsignal(signal.SIGINT)))
(out / "config.yaml").write_text("SOLVER: {MAX_ITER: 40}\\n")
if values.get("FAIL") == "1":  # what the guard of FocalTrainer leaves, in whatever words it says it
    (out / "diverged.json").write_text('{"iteration": 3, "message": "no number"}')
    raise FloatingPointError("no number")
if values.get("FAIL") == "2":
    raise RuntimeError("CUDA out of memory")
if values.get("FAIL") == "3":
    sys.exit(0)  # without an AP
last = out / "last_checkpoint"
start = int(last.read_text().removeprefix("model_").removesuffix(".pth")) if last.exists() else 0
for step in range(start, 40):
    time.sleep(float(values.get("SLEEP", 0)) / 40)
    with (out / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": step, "total_loss": 1 / (step + 1), "time": 0.01}) + "\\n")
    if step % 4 == 3:
        with zipfile.ZipFile(out / f"model_{step + 1:07d}.pth", "w") as file:  # as torch.save's
            file.writestr("step", str(step))
        (out / "new").write_text(f"model_{step + 1:07d}.pth")
        (out / "new").rename(last)
with (out / "metrics.json").open("a") as file:
    file.write(json.dumps({"iteration": 40, "bbox/AP": float(values.get("AP", 10))}) + "\\n")
(out / "model_final.pth").write_text("")
last.write_text("model_final.pth")
(out / "inference").mkdir(exist_ok=True)
(out / "inference" / "coco_instances_results.json").write_text("[]")
print("trained")
(out / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def make_run(tmp_path):
    """make_run("a", "KEY", "VALUE"): a run in out/a/seed1."""
    script = tmp_path / "train_net.py"
    script.write_text(PRETENDING)

    def make(key, *overrides, fingerprint="1"):
        folder = tmp_path / "out" / key / "seed1"
        command = ("python", str(script), "--resume", *overrides, "OUTPUT_DIR", str(folder))
        return Run(key, key.upper(), 1, folder, command, fingerprint, max_iter=40)

    return make


@pytest.fixture
def run():
    """run(*runs, parallel=1, threads=1, fresh=False): their results."""
    return lambda *runs, parallel=1, threads=1, fresh=False: run_all(runs, InlineExecutor(parallel, threads), fresh)


@pytest.fixture
def attempts():
    """attempts(folder): [pid, pid of its worker, when, threads] of each process that was started in it."""
    return lambda folder: [
        [int(word.split(".")[0]) for word in line.split()] for line in (folder / "attempts").read_text().splitlines()
    ]


@pytest.fixture
def wait_for():
    def wait(condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    return wait


@pytest.fixture
def alive():
    """alive(pid): whether it runs; a zombie has ended, only nobody has asked for its exit code."""

    def check(pid):
        try:
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except (ProcessLookupError, FileNotFoundError):
            return False

    return check


@pytest.fixture(scope="session")
def reproduce():
    """What tools/reproduce.py defines: main, parse_args."""
    return runpy.run_path(str(TRAIN_NET.with_name("reproduce.py")))
