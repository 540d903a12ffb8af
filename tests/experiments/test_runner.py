"""The runner and its executors, with a script that only pretends to train."""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from focal_plugin.experiments import runner
from focal_plugin.experiments.results import Run
from focal_plugin.experiments.runner import InlineExecutor, SubmititExecutor, run_all

PRETENDING = """\
import json, os, signal, subprocess, sys, time
from pathlib import Path

def add(name, **record):
    with open(name, "a") as file:
        print(json.dumps(record), file=file)

words = sys.argv[sys.argv.index("--resume") + 1 :]
values = {"SLEEP": "0", "AP": "10", "FAIL": ""} | dict(zip(words[::2], words[1::2]))
os.chdir(values["OUTPUT_DIR"])
worker = subprocess.Popen(["sleep", "60"]).pid if "WORKER" in values else os.getpid()
facts = {"threads": int(os.environ["OMP_NUM_THREADS"]), "sigint": str(signal.getsignal(signal.SIGINT))}
add("attempts", pid=os.getpid(), worker=worker, **facts)
Path("config.yaml").write_text("SOLVER: {MAX_ITER: 40}")
if values["FAIL"] == "diverged":  # what the guard of FocalTrainer leaves, in whatever words it says it
    add("diverged.json", iteration=3, message="no number")
if values["FAIL"]:
    raise RuntimeError("CUDA out of memory")
last = Path("last_checkpoint")
for step in range(int(last.read_text()) if last.exists() else 0, 40):
    time.sleep(float(values["SLEEP"]) / 40)
    add("metrics.json", iteration=step, total_loss=1 / (step + 1), time=0.01)
    if step % 4 == 3:
        Path(f"model_{step + 1:07d}.pth").touch()
        Path("new").write_text(str(step + 1))
        Path("new").rename(last)
if values["AP"]:
    add("metrics.json", **{"iteration": 40, "bbox/AP": float(values["AP"])})
Path("model_final.pth").touch()
Path("inference").mkdir(exist_ok=True)
Path("inference/coco_instances_results.json").write_text("[]")
print("trained")
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


def run(*runs, parallel=1, threads=1, fresh=False):
    return run_all(runs, InlineExecutor(parallel, threads), fresh)


def attempts(run):
    """What each process that was started in the folder of a run said of itself."""
    return [SimpleNamespace(**json.loads(line)) for line in (run.folder / "attempts").read_text().splitlines()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def has_ended(pid):
    """Whether it does not run; a zombie has ended, only nobody has asked for its exit code."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_results_come_in_the_order_of_the_runs_and_no_more_run_at_a_time_than_asked_for(make_run):
    results = run(*[make_run(key, "SLEEP", "0.4", "AP", ap) for key, ap in zip("abc", "234")], parallel=2, threads=3)
    assert [(result.title, result.status, result.ap) for result in results] == list(zip("ABC", ["done"] * 3, (2, 3, 4)))
    times = [[(r.folder / name).stat().st_mtime for name in ("attempts", "model_final.pth")] for r in results]
    assert max(sum(begun <= moment < ended for begun, ended in times) for moment, _ in times) == 2

    first = results[0]
    assert first.exit_code == 0 and first.seconds >= 0.4 and first.attempts == 1
    assert first.config() == {"SOLVER": {"MAX_ITER": 40}} and len(first.history()) == 41
    assert (first.folder / "console.txt").read_text() == "trained\n"
    assert 2**20 < first.peak_memory < 2**32 and first.peak_memory_of == "process"
    assert attempts(first)[0].threads == first.threads == 3 and first.parallel == 2
    assert "cores" in first.machine and first.date.startswith("20")
    assert [path.name for path in first.folder.glob("*.pth")] == ["model_final.pth"]  # those between were for going on


def test_a_failure_is_recorded_and_the_rest_goes_on(make_run, capsys):
    runs = [make_run("a", "FAIL", "memory", "WORKER", "1"), make_run("b"), make_run("c", "AP", "")]
    runs.append(make_run("d", "FAIL", "diverged"))
    failed, fine, without_ap, diverged = run(*runs)
    assert (failed.status, failed.exit_code, failed.error) == ("failed", 1, "RuntimeError: CUDA out of memory")
    assert (without_ap.status, without_ap.exit_code) == ("failed", 0) and "no AP" in without_ap.error
    assert (diverged.status, diverged.step) == ("diverged", 3) and fine.ok and not diverged.ok
    said = capsys.readouterr().err
    assert "A seed 1: FAILED" in said and "D seed 1: DIVERGED at step 3" in said
    wait_for(lambda: has_ended(attempts(failed)[0].worker))  # what a training has started ends with it

    failed, _, _, diverged = run(*runs, threads=2)
    assert (failed.attempts, failed.threads) == (2, 2)
    assert "CUDA out of memory" in (failed.folder / "console.1.txt").read_text()
    assert diverged.reused and diverged.step == 3
    assert [len(attempts(run)) for run in runs] == [2, 1, 2, 1]  # a failure may have been an accident


def test_what_cannot_start_is_a_failure(make_run, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    (result,) = run(make_run("a"))
    assert result.status == "failed" and "/no/python" in result.error
    make_run("b").folder.parent.write_text("a file in the place of a folder")
    with pytest.raises(OSError):
        run(make_run("b"))


def test_what_is_saved_is_strict_json_and_of_steps_done_twice_the_later_counts(make_run):
    assert run(make_run("nothing detected", "AP", "nan"))[0].ap == 0
    first = make_run("a").result()
    (first.folder / "inference").mkdir(parents=True)
    lines = [{"iteration": step, "total_loss": loss} for step, loss in [(0, 1), (1, 2), (2, 3), (1, 20), (2, 30)]]
    lines.append({"iteration": 3, "bbox/AP": 1.0, "bbox/APl": math.nan})
    text = "".join('{"iterat' * (step == 3) + json.dumps(line) + "\n" for step, line in enumerate(lines))
    (first.folder / "metrics.json").write_text(text + '{"iteration": 3, "tot')
    assert first.history()[:-1] == [lines[0], *lines[-3:-1]] and first.last_step() == lines[-2]
    first.finish(1, 2.0)
    saved = json.loads((first.folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved["metrics"] == {"bbox/AP": 1.0, "bbox/APl": None}
    second = make_run("a").result()
    assert math.isnan(second.metrics.pop("bbox/APl")) and (second.ap, second.seconds) == (1, 2)


def test_after_a_change_nothing_is_lost_unasked(make_run, capsys):
    make_run("a").folder.mkdir(parents=True)
    for name in ("run.json.tmp", "slurm_job.tmp", "lock"):  # what a kill leaves
        (make_run("a").folder / name).touch()
    (first,), (second,) = run(make_run("a", "AP", "20")), run(make_run("a", "AP", "20"))
    assert second.reused and not first.reused and "A seed 1: reused, done in" in capsys.readouterr().err
    assert (second.metrics, second.seconds, second.peak_memory) == (first.metrics, first.seconds, first.peak_memory)
    with pytest.raises(FileExistsError, match=r"another config, data or code: --fresh .* --output"):
        run(make_run("b"), make_run("a", "AP", "30", fingerprint="other"))
    assert (first.folder / "model_final.pth").is_file() and not make_run("b").folder.exists()
    (changed,) = run(make_run("a", "AP", "30", fingerprint="other"), fresh=True)
    assert not changed.reused and changed.attempts == len(attempts(changed)) == 1
    assert changed.ap == 30 and len(changed.history()) == 41
    (changed.folder / "model_final.pth").unlink()  # its numbers are worth keeping, too
    with pytest.raises(FileExistsError, match="another config"):
        run(make_run("a", fingerprint="third"))

    with ThreadPoolExecutor() as pool:  # and asked, not before its turn
        both = pool.submit(run, make_run("b", "SLEEP", "1"), make_run("a", "AP", "40", fingerprint="other"), fresh=True)
        wait_for((make_run("b").folder / "attempts").is_file)
        assert (changed.folder / "result.json").is_file()
    assert [result.ap for result in both.result()][1] == 40

    run(make_run("c", "FAIL", "memory"))
    (mended,) = run(make_run("c", fingerprint="other"))  # nothing was there to lose
    assert mended.ok and mended.attempts == 1 and not (mended.folder / "console.1.txt").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_nothing_is_deleted_on_suspicion(make_run, fresh):
    (result,) = run(make_run("a"))
    for content in ("", "{}", "\0\0"):
        (result.folder / "run.json").write_text(content)
        with pytest.raises(FileExistsError, match="cannot be read"):
            run(make_run("a", fingerprint="2"), fresh=fresh)
    file = make_run("b").folder / "thesis.txt"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(FileExistsError, match="not empty"):
        run(make_run("b"), fresh=fresh)
    assert file.is_file() and (result.folder / "model_final.pth").is_file()
    with pytest.raises(ValueError, match="share a folder"):
        run(make_run("c"), make_run("c"), fresh=fresh)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_another_process_trains_is_waited_for(make_run, fresh):
    """Two people, or the orphan of a call that was killed: nobody trains beside it, or empties its folder."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, make_run("a", "SLEEP", "1"))
        wait_for((make_run("a").folder / "attempts").is_file)
        (second,) = run(make_run("a", "SLEEP", "1"), fresh=fresh)
    assert first.result()[0].status == second.status == "done" and len(attempts(second)) == 1


def test_a_training_can_be_interrupted_in_the_background_and_needs_no_terminal(make_run, monkeypatch):
    """torch ends the workers of a dead training by SIGINT, which a shell has a background job ignore."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull) as unwritable:
        monkeypatch.setattr(sys, "stderr", unwritable)
        (result,) = run(make_run("a"))
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
    assert result.ok and "default_int_handler" in attempts(result)[0].sigint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_anywhere_the_same_command_goes_on(make_run, tmp_path, number):
    runs = make_run("short"), make_run("long", "SLEEP", "2", "WORKER", "1")

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        with (tmp_path / "stderr").open("w") as sys.stderr:
            run(*runs)

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    wait_for((runs[1].folder / "model_0000012.pth").is_file)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    (stopped,) = attempts(runs[1])
    wait_for(lambda: has_ended(stopped.pid))
    if number == signal.SIGKILL:
        os.kill(stopped.worker, signal.SIGKILL)  # a data worker of torch would look for its parent
    else:
        assert "1 of 2 runs have ended and are kept; the same command goes on" in (tmp_path / "stderr").read_text()
        wait_for(lambda: has_ended(stopped.worker))

    short, long = run(*runs)
    assert short.reused and len(attempts(short)) == 1  # what was finished is not repeated
    assert long.ok and long.attempts == len(attempts(long)) == 2
    steps = [json.loads(line)["iteration"] for line in (long.folder / "metrics.json").read_text().splitlines()]
    again = steps.index(40) - len(set(steps)) + 1
    assert 0 <= again < 40 - 12  # only what was after the last checkpoint was done twice


def test_a_line_now_and_then_says_how_far_it_is(make_run, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_LOG", 0)
    run(make_run("c", "FAIL", "diverged"), make_run("a", "SLEEP", "1"), make_run("b"))
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\[00:\d\d\] [AB] seed 1", line)]
    pattern = r"\[..:..\] A seed 1 \d+/40 loss 0\.\d+; 1 diverged, 1 running, 1 waiting; about \d s left"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    events = [line[8:21] for line in lines if re.search(r"1: (started|done)", line)]
    assert events == ["A seed 1: sta", "A seed 1: don", "B seed 1: sta", "B seed 1: don"]


@pytest.fixture
def submitit(tmp_path):
    """submitit("local"): an executor."""
    pytest.importorskip("submitit")
    return lambda kind, **options: SubmititExecutor(kind, tmp_path / "jobs", 2, 4, 8 * (kind == "slurm"), options)


def test_local_jobs_train_and_end_when_they_are_cancelled(submitit, make_run):
    executor, sleeping = submitit("local"), make_run("b", "SLEEP", "60")
    sleeping.folder.mkdir(parents=True)
    jobs = executor.submit([sleeping])  # beside it:
    (result,) = run_all([make_run("a", "FAIL", "memory")], executor)
    assert (result.status, result.error) == ("failed", "RuntimeError: CUDA out of memory")
    wait_for((sleeping.folder / "attempts").is_file)
    executor.cancel(jobs)
    wait_for(lambda: has_ended(attempts(sleeping)[0].pid))


def test_what_submitit_refuses_is_said(submitit, monkeypatch):
    with pytest.raises(ValueError, match=r"--executor local: .*slurm_partitoin"):
        submitit("local", slurm_partitoin="gpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--executor slurm: .*(srun|slurm)"):
        submitit("slurm")


def test_slurm_gets_one_array_which_a_second_call_follows(submitit, make_run, tmp_path, monkeypatch):
    """A SLURM whose queue takes every job and finishes none, until the file "state" says otherwise."""
    batch, state, bin_dir = (tmp_path / name for name in ("batch.sh", "state", "bin"))
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")

    def install(name, line):
        bin_dir.mkdir(exist_ok=True)
        (bin_dir / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_dir / name).chmod(0o755)

    install("srun", "true")
    install("sbatch", f"cp \"$1\" {batch}; echo 'Submitted batch job 12'")
    install("sacct", f'echo "JobID|State|NodeList"; for i in 0 1; do echo "12_$i|$(cat {state})|n1"; done')
    state.write_text("RUNNING")
    runs = [make_run("a"), make_run("b")]
    for run in runs:
        run.folder.mkdir(parents=True)
    jobs = submitit("slurm", slurm_partition="gpu", timeout_min=600).submit(runs)
    for line in ("--array=0-1%2", "--gpus-per-node=8", "--cpus-per-task=4", "--partition=gpu", "--time=600"):
        assert f"#SBATCH {line}" in batch.read_text()
    assert [job.job_id for job in jobs] == ["12_0", "12_1"] and not jobs[0].done()

    batch.unlink()
    followed = submitit("slurm").submit(runs)  # what is in the queue is not handed in twice, whoever asks
    assert [job.job_id for job in followed] == ["12_0", "12_1"] and not batch.exists()
    submitit("slurm").submit([make_run("a", fingerprint="2")])
    assert batch.exists()  # another training is another job
    batch.unlink()
    state.write_text("FAILED")
    submitit("slurm").submit(runs)
    assert batch.exists()  # what has ended without a result is handed in again

    install("sbatch", "echo 'invalid partition: gpus' >&2; exit 1")
    with pytest.raises(ValueError, match=r"--executor slurm: .*invalid partition"):
        submitit("slurm").submit([make_run("c")])
