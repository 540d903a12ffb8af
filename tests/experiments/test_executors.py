"""submitit's local jobs, and its SLURM jobs as far as the commands that it gives."""

import os
import stat
import time

import pytest

from focal_plugin.experiments.executors import SubmititExecutor
from focal_plugin.experiments.runner import run_all

pytest.importorskip("submitit")


@pytest.fixture
def local(tmp_path):
    return SubmititExecutor("local", tmp_path / "submitit", parallel=2, threads=1, num_gpus=0)


def test_local_jobs_train_and_a_failure_does_not_stop_the_rest(local, make_run):
    runs = [make_run("a", "AP", "20"), make_run("b", "FAIL", "2"), make_run("c", "FAIL", "1")]
    a, b, c = run_all(runs, local, parallel=2)
    assert (a.status, a.ap) == ("done", 20)
    assert (b.status, b.error) == ("failed", "RuntimeError: CUDA out of memory")
    assert (c.status, c.step) == ("diverged", 3)
    assert run_all(runs[:1], local)[0].reused


def test_cancelling_ends_the_training(local, make_run, attempts, alive):
    run = make_run("a", "SLEEP", "60")
    (job,) = local.submit([run])
    wait_for((run.folder / "attempts").is_file)
    (pid, *_) = attempts(run.folder)[0]
    local.cancel([job])
    wait_for(lambda: not alive(pid))


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--executor local: .*slurm_partitoin"):
        SubmititExecutor("local", tmp_path, 1, 1, 0, {"slurm_partitoin": "gpu"})


def test_no_slurm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--executor slurm: .*(srun|slurm)"):
        SubmititExecutor("slurm", tmp_path, 1, 1, 0)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM whose queue takes every job and finishes none, until $STATE says otherwise."""
    folder = tmp_path / "bin"
    folder.mkdir()
    state = tmp_path / "state"
    state.write_text("RUNNING")
    scripts = {
        "sbatch": f"cp \"$1\" {tmp_path}/batch.sh; echo 'Submitted batch job 12'",
        "sacct": f'echo "JobID|State|NodeList"; for i in 0 1; do echo "12_$i|$(cat {state})|n1"; done',
        "srun": "true",
        "scancel": f"echo $@ >> {tmp_path}/cancelled",
    }
    for name, line in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_what_sbatch_refuses_is_said(slurm, make_run):
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: gpus' >&2; exit 1\n")
    with pytest.raises(ValueError, match=r"--executor slurm: .*invalid partition"):
        SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8).submit([make_run("a")])


def test_slurm_gets_one_array_with_the_gpus_asked_for(slurm, make_run):
    executor = SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8, {"slurm_partition": "gpu", "timeout_min": 600})
    jobs = executor.submit([make_run("a"), make_run("b")])
    script = (slurm / "batch.sh").read_text()
    for line in ("--array=0-1%2", "--gpus-per-node=8", "--cpus-per-task=4", "--partition=gpu", "--time=600"):
        assert f"#SBATCH {line}" in script
    assert [job.job_id for job in jobs] == ["12_0", "12_1"] and not jobs[0].done()


def test_a_second_call_follows_the_jobs_of_the_first(slurm, make_run):
    """What is in the queue is not handed in twice, whoever asks."""
    runs = [make_run("a"), make_run("b")]
    first = SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8).submit(runs)
    (slurm / "batch.sh").unlink()
    second = SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8).submit(runs)
    assert [job.job_id for job in second] == [job.job_id for job in first]
    assert not (slurm / "batch.sh").exists()

    SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8).submit([make_run("a", fingerprint="2")])
    assert (slurm / "batch.sh").exists()  # another training is another job
    (slurm / "batch.sh").unlink()

    (slurm / "state").write_text("FAILED")
    assert len(SubmititExecutor("slurm", slurm / "jobs", 2, 4, 8).submit(runs)) == 2
    assert (slurm / "batch.sh").exists()  # what has ended without a result is handed in again


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
