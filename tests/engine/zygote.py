"""Real runs of train_net without its six seconds of imports: forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from unittest.mock import patch

from detectron2.engine import defaults
from detectron2.utils import comm

from focal_plugin.engine import trainer

ROOT = Path(__file__).resolve().parents[2]
# One thread: a process with more cannot be forked safely, and the CPU on every machine.
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENV["PYTHONWARNINGS"] = "ignore"

_context = multiprocessing.get_context("forkserver")
# With what a run imports as it goes, where it is there.
IMPORTED = ["focal_plugin.engine", "pycocotools.cocoeval", "omegaconf._impl", "PIL.JpegImagePlugin"]
_context.set_forkserver_preload([*IMPORTED, "torch.utils.tensorboard", "pygments.formatters.terminal256"])


def start(argv, console, env=None, fault=None, script="train_net.py", folder="."):
    """Start a script of tools/ in a folder; return its process.

    Args:
        console: file that its output is appended to.
        env: more environment variables.
        fault: see :func:`_prepare_fault`.
    """
    arguments = (list(map(str, argv)), console, env or {}, fault, script, folder)
    process = _context.Process(target=_child, args=arguments)
    with patch.dict(os.environ, ENV):  # of the first call, which starts what is forked
        process.start()
    return process


def wait(process, timeout: float = 120) -> int:
    """Return its exit code, negative for a signal; after the timeout (s) all are killed and that is a failure."""
    process.join(timeout)
    if process.exitcode is None:
        for running in multiprocessing.active_children():
            running.kill()
        raise AssertionError(f"hung for {timeout} s")
    return process.exitcode


def run(argv, console, timeout: float = 120, **kwargs) -> int:
    return wait(start(argv, console, **kwargs), timeout)


def wait_for(path, text="", seconds=90):
    """Wait until a file is there, and has that text in it."""
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.01)


def _child(argv, console, env, fault, script, folder) -> None:
    code = 1
    try:
        multiprocessing.set_start_method("fork", force=True)  # the default again, which data workers are started by
        os.setpgrp()
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(target, stream)
        os.environ.update(env)
        os.chdir(folder)
        defaults.collect_env_info = lambda: "not collected, which takes as long as ten steps"
        if fault:
            _prepare_fault(*fault)
        sys.argv = [script, *argv]
        runpy.run_path(str(ROOT / "tools" / script), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare_fault(kind, *rest) -> None:
    """What shall go wrong in the run: a kind, and its arguments.

    "kill after", s: SIGKILL, so many seconds after its first step has begun.
    "kill at", "fsync", n, "before" or "after": SIGKILL at the n-th call of a function of os.
    "signal in step", n, number[, rank]: a signal at the beginning of step n; with a rank, there only.
    "signal in evaluation", n, number[, rank]: at the n-th image that is evaluated.
    "no loss", n, rank: the losses of step n are NaN on that worker.
    "no gradient", n, rank: a gradient of step n is NaN, on that worker before it is averaged.
    "raise in step", n, rank: an error there.
    "file size", bytes: no file may grow larger.
    """

    def kill(number=signal.SIGKILL, rank=None):
        if rank in (None, comm.get_rank()):
            os.kill(os.getpid(), number)

    def in_step(action, step, rank=None):
        run_step = trainer.FocalTrainer.run_step

        def run_step_with_fault(self):
            if self.iter == step and rank in (None, comm.get_rank()):
                action(self)
            run_step(self)

        trainer.FocalTrainer.run_step = run_step_with_fault

    def at_call(owner, name, number, when, action):
        original, calls = getattr(owner, name), []

        def with_fault(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and when == "before":
                action()
            result = original(*args, **kwargs)
            if len(calls) == number and when == "after":
                action()
            return result

        setattr(owner, name, with_fault)

    def no_loss(self):
        nan = float("nan")
        self.model.register_forward_hook(lambda m, a, losses: {k: v * nan for k, v in losses.items()}, prepend=True)

    def no_gradient(self):
        next(self.model.parameters()).register_hook(lambda g: g * float("nan"))

    def fail(self):
        raise KeyError("a made-up fault")

    {
        "kill after": lambda seconds: at_call(
            trainer.FocalTrainer, "run_step", 1, "before", threading.Timer(seconds, kill).start
        ),
        "kill at": lambda name, number, when: at_call(os, name, number, when, kill),
        "signal in step": lambda step, number, *rank: in_step(lambda self: kill(number), step, *rank),
        "signal in evaluation": lambda image, number, *rank: at_call(
            trainer._Evaluator, "process", image, "before", lambda: kill(number, *rank)
        ),
        "no loss": lambda step, rank: in_step(no_loss, step, rank),
        "no gradient": lambda step, rank: in_step(no_gradient, step, rank),
        "raise in step": lambda step, rank: in_step(fail, step, rank),
        "file size": lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    }[kind](*rest)
