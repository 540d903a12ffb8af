"""The runner and its workers, with a script that only pretends to train."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from focal_plugin.experiments import runner, worker
from focal_plugin.experiments.executors import InlineExecutor
from focal_plugin.experiments.progress import Lines, RowState, format_left, seconds_left, summary
from focal_plugin.experiments.runner import run_all

ROOT = Path(runner.__file__).parents[2]


def test_results_come_in_the_order_of_the_runs(run, make_run):
    slow, quick = run(make_run("slow", "AP", "20", "SLEEP", "0.5"), make_run("quick", "AP", "30"), parallel=2)
    assert (slow.title, slow.status, slow.ap, quick.ap) == ("SLOW", "done", 20, 30)
    assert slow.ok and slow.exit_code == 0 and slow.seconds >= 0.5 and slow.attempts == 1
    assert slow.config() == {"SOLVER": {"MAX_ITER": 40}} and len(slow.history()) == 41
    assert (slow.folder / "console.txt").read_text() == "trained\n"
    assert 2**20 < slow.peak_memory < 2**32 and slow.peak_memory_of == "process"


def test_a_process_gets_its_overrides_and_threads(run, make_run, attempts):
    (result,) = run(make_run("a", "SEED", "1", "AP", "20"), threads=3)
    assert result.command[-6:-1] == ["SEED", "1", "AP", "20", "OUTPUT_DIR"]
    assert [threads for _, _, threads in attempts(result.folder)] == [3] and result.threads == 3


def test_a_failure_is_recorded_and_the_rest_goes_on(run, make_run, attempts, capsys):
    failed, fine = run(make_run("a", "FAIL", "2"), make_run("b"))
    assert (failed.status, failed.exit_code, failed.error) == ("failed", 1, "RuntimeError: CUDA out of memory")
    assert fine.ok and "A seed 1: FAILED" in capsys.readouterr().err
    again, _ = run(make_run("a", "FAIL", "2"), make_run("b"), threads=2)
    assert (again.attempts, again.threads) == (2, 2)
    assert len(attempts(failed.folder)) == 2 and len(attempts(fine.folder)) == 1  # a failure may have been an accident
    assert "CUDA out of memory" in (failed.folder / "console.1.txt").read_text()


def test_divergence_is_an_outcome_with_its_step(run, make_run, attempts, capsys):
    (result,) = run(make_run("a", "FAIL", "1"))
    assert (result.status, result.step) == ("diverged", 3) and not result.ok
    assert "A seed 1: DIVERGED at step 3" in capsys.readouterr().err
    (again,) = run(make_run("a", "FAIL", "1"))
    assert again.reused and again.step == 3 and len(attempts(again.folder)) == 1  # it would diverge again


def test_a_run_without_an_ap_has_failed(run, make_run):
    (result,) = run(make_run("a", "FAIL", "3"))
    assert result.status == "failed" and result.exit_code == 0 and "no AP" in result.error


def test_a_script_that_cannot_start_is_a_failure(run, make_run, train_net):
    train_net.unlink()
    (result,) = run(make_run("a"))
    assert result.status == "failed" and "No such file" in result.error


def test_a_model_that_detects_nothing_has_ap_0(run, make_run):
    assert run(make_run("a", "AP", "nan"))[0].ap == 0


def test_what_is_saved_is_strict_json_with_its_origin(run, make_run):
    first = make_run("a").result()
    first.folder.mkdir(parents=True)
    first.metrics = {"bbox/AP": 1.0, "bbox/APl": float("nan")}
    first.status = "failed"
    first._save()
    assert (
        json.loads((first.folder / "result.json").read_text(), parse_constant=pytest.fail)["metrics"]["bbox/APl"]
        is None
    )
    second = make_run("a").result()
    assert second.load() and math.isnan(second.metrics["bbox/APl"]) and second.ap == 1
    (third,) = run(make_run("b"))
    assert "cores" in third.machine and third.date.startswith("20")


def test_a_finished_run_is_reused(run, make_run, capsys):
    (first,) = run(make_run("a"))
    (second,) = run(make_run("a"))
    assert second.reused and not first.reused
    assert (second.metrics, second.seconds, second.peak_memory) == (first.metrics, first.seconds, first.peak_memory)
    assert "A seed 1: reused, done in" in capsys.readouterr().err
    assert not run(make_run("a"), fresh=True)[0].reused


def test_after_a_change_a_run_starts_from_nothing_and_the_earlier_one_is_kept(run, make_run, attempts, capsys):
    (first,) = run(make_run("a", "AP", "20"))
    (changed,) = run(make_run("a", "AP", "30", fingerprint="other"))
    assert not changed.reused and changed.attempts == 1 and changed.ap == 30
    assert len(attempts(first.folder)) == 1 and len(changed.history()) == 41
    aside = first.folder.with_name("seed1.1")
    assert f"the earlier run moves to {aside}" in capsys.readouterr().err
    assert json.loads((aside / "result.json").read_text())["metrics"]["bbox/AP"] == 20
    assert (aside / "model_final.pth").is_file()

    (back,) = run(make_run("a", "AP", "20"))  # and the other way round
    assert back.ap == 20 and (first.folder.with_name("seed1.other") / "result.json").is_file()


def test_what_left_nothing_worth_keeping_is_not_kept(run, make_run):
    (first,) = run(make_run("a", "FAIL", "2"))
    (first.folder / "result.json").unlink()
    run(make_run("a", fingerprint="2"))
    assert [path.name for path in first.folder.parent.iterdir()] == ["seed1"]


@pytest.mark.parametrize("content", ["", "{}", "\0\0"])
def test_a_folder_that_cannot_be_read_is_not_emptied(run, make_run, content):
    (result,) = run(make_run("a"))
    (result.folder / "run.json").write_text(content)
    with pytest.raises(FileExistsError, match="cannot be read"):
        run(make_run("a", fingerprint="2"))
    assert (result.folder / "model_final.pth").is_file()


def test_what_a_kill_leaves_half_written_does_not_stop_the_table(run, make_run):
    folder = make_run("a").folder
    folder.mkdir(parents=True)
    for name in ("run.json.tmp", "slurm_job.tmp", "lock"):
        (folder / name).touch()
    assert run(make_run("a"))[0].ok


def test_an_ended_run_keeps_its_last_model_only(run, make_run):
    (result,) = run(make_run("a"))
    assert [path.name for path in result.folder.glob("*.pth")] == ["model_final.pth"]


def test_no_more_runs_at_a_time_than_asked_for(run, make_run, attempts):
    results = run(*[make_run(key, "SLEEP", "0.4") for key in "abc"], parallel=2)
    times = [(attempts(r.folder)[0][1], float((r.folder / "ended").read_text())) for r in results]
    assert max(sum(begun <= moment < ended for begun, ended in times) for moment, _ in times) == 2


def test_foreign_files_are_not_deleted(run, make_run, tmp_path):
    for fresh in (False, True):
        folder = tmp_path / "out" / "a" / "seed1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "thesis.txt").write_text("precious")
        with pytest.raises(FileExistsError, match="not empty"):
            run(make_run("a"), fresh=fresh)
        assert (folder / "thesis.txt").read_text() == "precious"


def test_two_runs_in_one_folder_are_refused(run, make_run):
    with pytest.raises(ValueError, match="share a folder"):
        run(make_run("a"), make_run("a"))


def test_what_another_process_trains_is_waited_for(run, make_run, attempts):
    """Two people, or the orphan of a call that was killed: nobody trains beside it, and its result is taken."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(worker.train, make_run("a", "SLEEP", "1"))
        wait_for((make_run("a").folder / "attempts").is_file)
        (second,) = run(make_run("a", "SLEEP", "1"))
    assert first.result() == second.status == "done" and len(attempts(second.folder)) == 1


def test_fresh_does_not_touch_what_another_process_trains(run, make_run, attempts):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(worker.train, make_run("a", "SLEEP", "1"))
        wait_for((make_run("a").folder / "attempts").is_file)
        (second,) = run(make_run("a"), fresh=True)
    assert first.result() == second.status == "done" and len(attempts(second.folder)) == 1  # of the second alone


def test_a_training_can_be_interrupted_in_the_background_too(run, make_run):
    """torch ends the workers of a dead training by SIGINT, which a shell has a background job ignore."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (result,) = run(make_run("a"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in (result.folder / "sigint").read_text()


def test_nothing_starts_after_a_stop(make_run):
    executor = InlineExecutor(1, 1)
    (job,) = executor.submit([make_run("a")])
    executor.cancel([job])
    assert job.cancelled() or isinstance(job.exception(), KeyboardInterrupt)
    assert not (make_run("a").folder / "model_final.pth").exists()


def test_a_dead_terminal_does_not_end_the_table(make_run):
    class Dead(io.StringIO):
        def write(self, text):
            raise OSError("Input/output error")

    (result,) = run_all([make_run("a")], InlineExecutor(1, 1), stream=Dead())
    assert result.ok


def test_of_steps_done_twice_the_later_counts(make_run):
    result = make_run("a").result()
    result.folder.mkdir(parents=True)
    lines = [{"iteration": step, "total_loss": loss} for step, loss in [(0, 1), (1, 2), (2, 3), (1, 20), (2, 30)]]
    (result.folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iterat')
    assert [record["total_loss"] for record in result.history()] == [1, 20, 30]


# --- stopped ---


@pytest.fixture
def start(tmp_path, make_run, train_net):
    """start(runs): a process that trains a short run and a long one."""
    script = tmp_path / "reproduce.py"
    script.write_text(
        textwrap.dedent(f"""\
        import signal
        from pathlib import Path
        from focal_plugin.experiments.executors import InlineExecutor
        from focal_plugin.experiments.runner import run_all
        from focal_plugin.experiments.worker import Run

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        root = Path({str(tmp_path)!r})
        def make(key, sleep):
            folder, config = root / "out" / key / "seed1", root / "base.yaml"
            return Run(key, key.upper(), 1, folder, root / "train_net.py", config, (), ("SLEEP", sleep), "1", 40)
        run_all([make("short", "0"), make("long", "2")], InlineExecutor(1, 1))
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return lambda: subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_anywhere_the_same_command_goes_on(start, tmp_path, attempts, alive, number):
    long, short = (tmp_path / "out" / key / "seed1" for key in ("long", "short"))
    process = start()
    wait_for((long / "model_0000012.pth").is_file)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert "1 of 2 runs have ended and are kept" in errors
    (pid, *_) = attempts(long)[0]
    wait_for(lambda: not alive(pid))

    process = start()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert len(attempts(short)) == 1  # what was finished is not repeated
    assert len(attempts(long)) == 2
    steps = [json.loads(line)["iteration"] for line in (long / "metrics.json").read_text().splitlines()]
    again = steps.index(40) - len(set(steps)) + 1
    assert 0 <= again < 40 - 12  # only what was after the last checkpoint was done twice
    saved = json.loads((long / "result.json").read_text())
    assert saved["status"] == "done" and saved["attempts"] == 2


# --- what a person sees ---


def test_time_left_is_unknown_until_something_is_measured():
    running = RowState("a", status="running", total=100, started=1)
    assert seconds_left([running, RowState("b")], 1, now=5) is None
    running.step, running.step_seconds = 20, 0.5
    # 80 steps to go; then a run as long as this one, which will have taken 10 + 40 s.
    assert seconds_left([running, RowState("b", status="waiting")], 1, now=11) == pytest.approx(40 + 50)
    assert seconds_left([running, RowState("b")], 2, now=11) == pytest.approx(50)


def test_time_left_learns_how_long_evaluation_takes():
    done = RowState("a", "done", step=10, total=10, step_seconds=1, started=1, trained=11, ended=14)
    running = RowState("b", "running", step=4, total=10, step_seconds=1, started=10)
    assert seconds_left([done, running], 1, now=14) == pytest.approx(6 + 3)


def test_one_line_says_how_far_the_table_is():
    states = [
        RowState("FL seed 1", "done", ap=47.6, ended=2),
        RowState("CE seed 1", "done", ap=41.2, ended=1),
        RowState("CE (α .1) seed 1", "diverged", ended=3),
        RowState("b", "running"),
        RowState("c", "waiting"),
        RowState("d"),
    ]
    assert summary(states, 300) == "2 done, 1 diverged, 1 running, 2 left; last AP 47.6 (FL seed 1); about 5 min left"


def test_a_log_gets_a_line_now_and_then(capsys):
    state = RowState("a", "running", step=3, total=10, loss=0.5)
    lines = Lines([state], sys.stderr, period=0)
    lines.show(None)
    lines.show(None)  # nothing has changed
    assert (
        capsys.readouterr().err == "[00:00] a 3/10 loss 0.5; 0 done, 1 running, 0 left; estimating the time left...\n"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "estimating"), (2, "almost"), (64, "about 60 s"), (200, "about 3 min"), (7500, "about 2 h 05")],
)
def test_time_left_in_words(seconds, words):
    assert format_left(seconds).startswith(words)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
