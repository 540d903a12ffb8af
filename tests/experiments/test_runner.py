"""The runner and its executors, with a script that only pretends to train."""

import io
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from focal_plugin.experiments import runner
from focal_plugin.experiments.runner import InlineExecutor, SubmititExecutor, run_all

# --- how runs end ---


def test_results_come_in_the_order_of_the_runs(run, make_run, attempts):
    slow, quick = run(
        make_run("slow", "AP", "20", "SLEEP", "0.5"), make_run("quick", "AP", "30"), parallel=2, threads=3
    )
    assert (slow.title, slow.status, slow.ap, quick.ap) == ("SLOW", "done", 20, 30)
    assert slow.ok and slow.exit_code == 0 and slow.seconds >= 0.5 and slow.attempts == 1
    assert slow.config() == {"SOLVER": {"MAX_ITER": 40}} and len(slow.history()) == 41
    assert (slow.folder / "console.txt").read_text() == "trained\n"
    assert 2**20 < slow.peak_memory < 2**32 and slow.peak_memory_of == "process"
    assert attempts(slow.folder)[0][-1] == slow.threads == 3 and slow.parallel == 2
    assert "cores" in slow.machine and slow.date.startswith("20")
    assert [path.name for path in slow.folder.glob("*.pth")] == ["model_final.pth"]  # those between were for going on


def test_a_failure_is_recorded_and_the_rest_goes_on(run, make_run, attempts, alive, wait_for, capsys):
    runs = make_run("a", "FAIL", "2", "WORKER", "1"), make_run("b"), make_run("c", "FAIL", "3")
    failed, fine, without_ap = run(*runs)
    assert (failed.status, failed.exit_code, failed.error) == ("failed", 1, "RuntimeError: CUDA out of memory")
    assert (without_ap.status, without_ap.exit_code) == ("failed", 0) and "no AP" in without_ap.error
    assert fine.ok and "A seed 1: FAILED" in capsys.readouterr().err
    wait_for(lambda: not alive(attempts(failed.folder)[0][1]))  # what a training has started ends with it
    again, *_ = run(*runs, threads=2)
    assert (again.attempts, again.threads) == (2, 2)
    assert len(attempts(failed.folder)) == 2 and len(attempts(fine.folder)) == 1  # a failure may have been an accident
    assert "CUDA out of memory" in (failed.folder / "console.1.txt").read_text()


def test_divergence_is_an_outcome_with_its_step(run, make_run, attempts, capsys):
    (result,) = run(make_run("a", "FAIL", "1"))
    assert (result.status, result.step) == ("diverged", 3) and not result.ok
    assert "A seed 1: DIVERGED at step 3" in capsys.readouterr().err
    (again,) = run(make_run("a", "FAIL", "1"))
    assert again.reused and again.step == 3 and len(attempts(again.folder)) == 1  # it would diverge again


def test_what_cannot_start_is_a_failure(run, make_run, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    (result,) = run(make_run("a"))
    assert result.status == "failed" and "/no/python" in result.error
    make_run("b").folder.parent.write_text("a file in the place of a folder")
    with pytest.raises(OSError):
        run(make_run("b"))


def test_what_is_saved_is_strict_json(run, make_run):
    assert run(make_run("nothing detected", "AP", "nan"))[0].ap == 0
    first = make_run("a").result()
    (first.folder / "inference").mkdir(parents=True)
    (first.folder / "metrics.json").write_text('{"iteration": 1, "bbox/AP": 1.0, "bbox/APl": NaN}\n')
    first.finish(1, 2.0)
    saved = json.loads((first.folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved["metrics"] == {"bbox/AP": 1.0, "bbox/APl": None}
    second = make_run("a").result()
    assert math.isnan(second.metrics.pop("bbox/APl")) and (second.ap, second.seconds) == (1, 2)


def test_of_steps_done_twice_the_later_counts(make_run):
    result = make_run("a").result()
    result.folder.mkdir(parents=True)
    lines = [{"iteration": step, "total_loss": loss} for step, loss in [(0, 1), (1, 2), (2, 3), (1, 20), (2, 30)]]
    text = "".join('{"iterat' * (step == 3) + json.dumps(line) + "\n" for step, line in enumerate(lines))
    (result.folder / "metrics.json").write_text(text + '{"iteration": 3, "tot')
    assert [record["total_loss"] for record in result.history()] == [1, 20, 30]
    assert result.last_step() == lines[-1]


# --- the same command again ---


def test_a_finished_run_is_reused(run, make_run, capsys):
    make_run("a").folder.mkdir(parents=True)
    for name in ("run.json.tmp", "slurm_job.tmp", "lock"):  # what a kill leaves
        (make_run("a").folder / name).touch()
    (first,) = run(make_run("a"))
    (second,) = run(make_run("a"))
    assert second.reused and not first.reused
    assert (second.metrics, second.seconds, second.peak_memory) == (first.metrics, first.seconds, first.peak_memory)
    assert "A seed 1: reused, done in" in capsys.readouterr().err
    assert not run(make_run("a"), fresh=True)[0].reused


def test_after_a_change_nothing_is_lost_unasked(run, make_run, attempts):
    (first,) = run(make_run("a", "AP", "20"))
    with pytest.raises(FileExistsError, match=r"another config, data or code: --fresh .* --output"):
        run(make_run("b"), make_run("a", "AP", "30", fingerprint="other"))
    assert (first.folder / "model_final.pth").is_file() and not make_run("b").folder.exists()
    (changed,) = run(make_run("a", "AP", "30", fingerprint="other"), fresh=True)
    assert not changed.reused and changed.attempts == 1 and changed.ap == 30
    assert len(attempts(first.folder)) == 1 and len(changed.history()) == 41

    run(make_run("c", "FAIL", "2"))
    (mended,) = run(make_run("c", fingerprint="other"))  # nothing was there to lose
    assert mended.ok and mended.attempts == 1 and not (mended.folder / "console.1.txt").exists()


def test_nothing_is_deleted_on_suspicion(run, make_run):
    (result,) = run(make_run("a"))
    for content in ("", "{}", "\0\0"):
        (result.folder / "run.json").write_text(content)
        for fresh in (False, True):
            with pytest.raises(FileExistsError, match="cannot be read"):
                run(make_run("a", fingerprint="2"), fresh=fresh)
    assert (result.folder / "model_final.pth").is_file()

    file = make_run("b").folder / "thesis.txt"
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for fresh in (False, True):
        with pytest.raises(FileExistsError, match="not empty"):
            run(make_run("b"), fresh=fresh)
    assert file.read_text() == "precious"
    with pytest.raises(ValueError, match="share a folder"):
        run(make_run("c"), make_run("c"))


# --- at the same time ---


def test_no_more_runs_at_a_time_than_asked_for(run, make_run):
    results = run(*[make_run(key, "SLEEP", "0.4") for key in "abc"], parallel=2)
    times = [((r.folder / "attempts").read_text().split()[2], (r.folder / "ended").read_text()) for r in results]
    times = [(float(begun), float(ended)) for begun, ended in times]
    assert max(sum(begun <= moment < ended for begun, ended in times) for moment, _ in times) == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_what_another_process_trains_is_waited_for(run, make_run, attempts, wait_for, fresh):
    """Two people, or the orphan of a call that was killed: nobody trains beside it, or empties its folder."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, make_run("a", "SLEEP", "1"))
        wait_for((make_run("a").folder / "attempts").is_file)
        (second,) = run(make_run("a", "SLEEP", "1"), fresh=fresh)
    assert first.result()[0].status == second.status == "done" and len(attempts(second.folder)) == 1


def test_a_training_can_be_interrupted_in_the_background_too(run, make_run):
    """torch ends the workers of a dead training by SIGINT, which a shell has a background job ignore."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (result,) = run(make_run("a"))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in (result.folder / "sigint").read_text()


# --- stopped ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_anywhere_the_same_command_goes_on(run, make_run, attempts, alive, wait_for, tmp_path, number):
    runs = make_run("short"), make_run("long", "SLEEP", "2", "WORKER", "1")

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        with (tmp_path / "stderr").open("w") as sys.stderr:
            run_all(runs, InlineExecutor(1, 1))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    wait_for((runs[1].folder / "model_0000012.pth").is_file)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    ((pid, worker, *_),) = attempts(runs[1].folder)
    wait_for(lambda: not alive(pid))
    if number == signal.SIGKILL:
        os.kill(worker, signal.SIGKILL)  # a data worker of torch would look for its parent
    else:
        assert "1 of 2 runs have ended and are kept; the same command goes on" in (tmp_path / "stderr").read_text()
        wait_for(lambda: not alive(worker))

    short, long = run(*runs)
    assert short.reused and len(attempts(short.folder)) == 1  # what was finished is not repeated
    assert long.ok and long.attempts == len(attempts(long.folder)) == 2
    steps = [json.loads(line)["iteration"] for line in (long.folder / "metrics.json").read_text().splitlines()]
    again = steps.index(40) - len(set(steps)) + 1
    assert 0 <= again < 40 - 12  # only what was after the last checkpoint was done twice


# --- what a person sees ---


def test_a_line_now_and_then_says_how_far_it_is(run, make_run, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_LOG", 0)
    run(make_run("c", "FAIL", "1"), make_run("a", "SLEEP", "1"), make_run("b"))
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\[00:\d\d\] [AB] seed 1", line)]
    pattern = r"\[..:..\] A seed 1 \d+/40 loss 0\.\d+; 1 diverged, 1 running, 1 waiting; about \d s left"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    events = [line[8:21] for line in lines if re.search(r"1: (started|done)", line)]
    assert events == ["A seed 1: sta", "A seed 1: don", "B seed 1: sta", "B seed 1: don"]


def test_a_dead_terminal_does_not_end_the_table(run, make_run, monkeypatch):
    class Dead(io.StringIO):
        def write(self, text):
            raise OSError("Input/output error")

    monkeypatch.setattr(sys, "stderr", Dead())
    assert run(make_run("a"))[0].ok


# --- submitit ---


@pytest.fixture
def submitit(tmp_path):
    """submitit("local"): an executor."""
    pytest.importorskip("submitit")
    return lambda kind, **options: SubmititExecutor(kind, tmp_path / "jobs", 2, 4, 8 * (kind == "slurm"), options)


def test_local_jobs_train_and_end_when_they_are_cancelled(submitit, make_run, attempts, alive, wait_for):
    (result,) = run_all([make_run("a", "FAIL", "2")], submitit("local"))
    assert (result.status, result.error) == ("failed", "RuntimeError: CUDA out of memory")

    run, executor = make_run("b", "SLEEP", "60"), submitit("local")
    run.folder.mkdir(parents=True)
    jobs = executor.submit([run])
    wait_for((run.folder / "attempts").is_file)
    executor.cancel(jobs)
    wait_for(lambda: not alive(attempts(run.folder)[0][0]))


def test_what_submitit_refuses_is_said(submitit, monkeypatch):
    with pytest.raises(ValueError, match=r"--executor local: .*slurm_partitoin"):
        submitit("local", slurm_partitoin="gpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--executor slurm: .*(srun|slurm)"):
        submitit("slurm")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a SLURM whose queue takes every job and finishes none, until its file "state" says otherwise."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "state").write_text("RUNNING")
    scripts = {
        "sbatch": f"cp \"$1\" {tmp_path}/batch.sh; echo 'Submitted batch job 12'",
        "sacct": f'echo "JobID|State|NodeList"; for i in 0 1; do echo "12_$i|$(cat {tmp_path}/state)|n1"; done',
        "srun": "true",
    }
    for name, line in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_slurm_gets_one_array_which_a_second_call_follows(submitit, slurm, make_run):
    runs, batch = [make_run("a"), make_run("b")], slurm / "batch.sh"
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
    (slurm / "state").write_text("FAILED")
    submitit("slurm").submit(runs)
    assert batch.exists()  # what has ended without a result is handed in again

    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: gpus' >&2; exit 1\n")
    with pytest.raises(ValueError, match=r"--executor slurm: .*invalid partition"):
        submitit("slurm").submit([make_run("c")])
