"""The runner, with a script that only pretends to train."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from focal_plugin.experiments import runner
from focal_plugin.experiments.progress import RowState, format_left, seconds_left
from focal_plugin.experiments.runner import Row, run_rows

TRAIN_NET = """\
import json, os, sys, time
from pathlib import Path

values = dict(zip(sys.argv[3::2], sys.argv[4::2]))
out = Path(values["OUTPUT_DIR"])
(out / "begun").write_text(str(time.time()))
(out / "pid").write_text(str(os.getpid()))
(out / "threads").write_text(os.environ["OMP_NUM_THREADS"])
if "FAIL" in values:
    raise FloatingPointError("Loss became infinite or NaN at iteration=3!")
(out / "config.yaml").write_text("SOLVER: {MAX_ITER: 40}\\n")
ap = float(values.get("AP", 10))
lines = [{"iteration": step - 1, "total_loss": 1 / step, "time": 0.01} for step in (20, 40)]
lines.append({"iteration": 40, "bbox/AP": ap})
(out / "metrics.json").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "inference").mkdir()
(out / "inference" / "coco_instances_results.json").write_text("[]")
print("training")
time.sleep(float(values.get("SLEEP", 0)))
(out / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def train_net(tmp_path):
    path = tmp_path / "train_net.py"
    path.write_text(TRAIN_NET)
    return path


@pytest.fixture
def make_row(tmp_path):
    (tmp_path / "base.yaml").write_text("A: 1\n")
    (tmp_path / "row.yaml").write_text("_BASE_: base.yaml\n")
    return lambda key, *overrides: Row(key, key.upper(), tmp_path / "row.yaml", overrides)


@pytest.fixture
def run(tmp_path, train_net):
    return lambda *rows, **options: run_rows(rows, tmp_path / "out", train_net=train_net, **options)


def test_results_come_in_the_order_of_the_rows(run, make_row):
    slow, quick = run(make_row("slow", "AP", "20", "SLEEP", "0.5"), make_row("quick", "AP", "30"), parallel=2)
    assert (slow.title, slow.ap, quick.ap) == ("SLOW", 20, 30)
    assert slow.ok and slow.exit_code == 0 and slow.seconds >= 0.5 > 0
    assert slow.config() == {"SOLVER": {"MAX_ITER": 40}} and len(slow.history()) == 3
    assert (slow.folder / "console.txt").read_text() == "training\n"


def test_a_rows_overrides_come_last(run, make_row):
    (result,) = run(make_row("a", "AP", "20"), overrides=["AP", "5"], threads=3)
    assert result.ap == 20 and result.command[-6:-2] == ["AP", "5", "AP", "20"]
    assert (result.folder / "threads").read_text() == "3"


def test_a_failure_is_recorded_and_the_rest_goes_on(run, make_row, capsys):
    failed, fine = run(make_row("a", "FAIL", "1"), make_row("b"), parallel=1)
    assert not failed.ok and failed.exit_code == 1 and fine.ok
    assert failed.error == "FloatingPointError: Loss became infinite or NaN at iteration=3!"
    assert "A: FAILED" in capsys.readouterr().err
    assert run(make_row("a", "FAIL", "1"))[0].reused is False


def test_a_run_without_an_ap_has_failed(run, make_row, train_net):
    train_net.write_text("")
    (result,) = run(make_row("a"))
    assert result.exit_code == 0 and "no AP" in result.error


def test_a_model_that_detects_nothing_has_ap_0(run, make_row):
    assert run(make_row("a", "AP", "nan"))[0].ap == 0


def test_a_finished_row_is_reused(run, make_row, capsys):
    (first,) = run(make_row("a"))
    (second,) = run(make_row("a"))
    assert second.reused and second.metrics == first.metrics and second.seconds == first.seconds
    assert "A: reused, AP 10.0" in capsys.readouterr().err
    assert not run(make_row("a"), fresh=True)[0].reused


@pytest.mark.parametrize("changed", ["row.yaml", "base.yaml", "train_net.py"])
def test_a_row_is_trained_again_after_a_change(run, make_row, tmp_path, changed):
    run(make_row("a"))
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    assert not run(make_row("a"))[0].reused
    assert not run(make_row("a"), overrides=["SEED", "2"])[0].reused


def test_only_code_that_trains_counts(make_row, train_net, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_PACKAGE", tmp_path / "package")
    hashes = []
    for name in ("heads.py", "losses/focal.py", "experiments/report.py", "analysis/detections.py"):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
        hashes.append(runner.fingerprint(make_row("a"), train_net, []))
    assert len(set(hashes)) == 2 and hashes[1] == hashes[3]


def test_no_more_rows_at_a_time_than_asked_for(run, make_row):
    results = run(*[make_row(key, "SLEEP", "0.4") for key in "abc"], parallel=2)
    times = [[float((r.folder / name).read_text()) for name in ("begun", "ended")] for r in results]
    at_once = [sum(begun <= moment < ended for begun, ended in times) for moment, _ in times]
    assert max(at_once) == 2


def test_foreign_files_are_not_deleted(run, make_row, tmp_path):
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        run(make_row("a"))
    assert (folder / "thesis.txt").read_text() == "precious"


def test_keys_are_unique(run, make_row):
    with pytest.raises(ValueError, match="not unique"):
        run(make_row("a"), make_row("a"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_keeps_what_is_done(run, make_row, train_net, tmp_path, number):
    run(make_row("done"))
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(f"""\
        import signal
        from pathlib import Path
        from focal_plugin.experiments.runner import Row, run_rows

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        root = Path({str(tmp_path)!r})
        done = Row("done", "DONE", root / "row.yaml")
        long = Row("long", "LONG", root / "row.yaml", ("SLEEP", "60"))
        run_rows([done, long], root / "out", train_net=root / "train_net.py")
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, env=env)
    inference = tmp_path / "out" / "long" / "inference" / "coco_instances_results.json"
    _wait_for(inference.is_file)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode != 0
    assert "reused next time: DONE. The other rows start over." in errors
    child = int((tmp_path / "out" / "long" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert json.loads((tmp_path / "out" / "done" / "result.json").read_text())["metrics"] == {"bbox/AP": 10}


def test_time_left_is_unknown_until_something_is_measured():
    running = RowState("a", status="running", total=100, started=0)
    assert seconds_left([running, RowState("b")], 1, now=5) is None
    running.step, running.step_seconds = 20, 0.5
    # 80 steps to go; then a row as long as this one, which will have taken 10 + 40 s.
    assert seconds_left([running, RowState("b")], 1, now=10) == pytest.approx(40 + 50)
    assert seconds_left([running, RowState("b")], 2, now=10) == pytest.approx(50)


def test_time_left_learns_how_long_evaluation_takes():
    done = RowState("a", "done", step=10, total=10, step_seconds=1, started=0, trained=10, ended=13)
    running = RowState("b", "running", step=4, total=10, step_seconds=1, started=9)
    assert seconds_left([done, running], 1, now=13) == pytest.approx(6 + 3)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "estimating"), (2, "almost"), (64, "about 60 s"), (200, "about 3 min"), (7500, "about 2 h 05")],
)
def test_time_left_in_words(seconds, words):
    assert format_left(seconds).startswith(words)


def _wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
