"""A script that only pretends to train, and runs of it."""

import os
from pathlib import Path

import pytest

from focal_plugin.experiments.executors import InlineExecutor
from focal_plugin.experiments.runner import run_all
from focal_plugin.experiments.worker import Run

TRAIN_NET = """\
import json, os, signal, sys, time, zipfile
from pathlib import Path

words = sys.argv[sys.argv.index("--resume") + 1 :]
values = dict(zip(words[::2], words[1::2]))
out = Path(values["OUTPUT_DIR"])
with (out / "attempts").open("a") as file:
    file.write(f"{os.getpid()} {time.time()} {os.environ['OMP_NUM_THREADS']}\\n")
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
        last.write_text(f"model_{step + 1:07d}.pth")
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
def train_net(tmp_path):
    path = tmp_path / "train_net.py"
    path.write_text(TRAIN_NET)
    return path


@pytest.fixture
def make_run(tmp_path, train_net):
    def make(key, *overrides, fingerprint="1", seed=1):
        folder = tmp_path / "out" / key / f"seed{seed}"
        config = tmp_path / "base.yaml"
        return Run(key, key.upper(), seed, folder, train_net, config, (), overrides, fingerprint, max_iter=40)

    return make


@pytest.fixture
def run():
    """run(*runs, parallel=1, threads=1, fresh=False): their results."""

    def call(*runs, parallel=1, threads=1, fresh=False):
        return run_all(runs, InlineExecutor(parallel, threads, fresh), parallel=parallel, threads=threads)

    return call


@pytest.fixture
def attempts():
    """attempts(folder): (pid, when, threads) of each process that was started in it."""

    def read(folder: Path):
        lines = (folder / "attempts").read_text().splitlines()
        return [(int(pid), float(when), int(threads)) for pid, when, threads in map(str.split, lines)]

    return read


@pytest.fixture
def alive():
    def check(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        try:  # a zombie has ended, only nobody has asked for its exit code
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:
            return False

    return check
