"""Real runs of train_net without its six seconds of imports: a process that has imported everything, and forks.

Started by :class:`Zygote`; run as a script it serves one JSON request a line on its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One thread: a process with more cannot be forked safely, and the CPU on every machine.
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Zygote:
    """Starts runs by forking; close it when done."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv, console, env=None, fault=None) -> int:
        """Starts ``train_net.py argv``; returns its process id.

        Args:
            console: file that its output is appended to.
            env: more environment variables.
            fault: see :func:`_prepare_fault`.
        """
        return self._ask("start", list(map(str, argv)), str(console), env or {}, fault)

    def wait(self, pid: int, timeout: float = 120) -> int:
        """Its exit code, negative for a signal; after the timeout (s) it is killed and that is a failure."""
        timer = threading.Timer(timeout, os.kill, (pid, signal.SIGABRT))
        timer.start()
        try:
            code = self._ask("wait", pid)
        finally:
            timer.cancel()
        assert code != -signal.SIGABRT, f"hung for {timeout} s"
        return code

    def run(self, argv, console, timeout: float = 120, **kwargs) -> int:
        return self.wait(self.start(argv, console, **kwargs), timeout)

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)

    def _ask(self, *request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    # Replies go where nothing else is printed.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import pycocotools.cocoeval  # noqa: F401

    import focal_plugin.engine  # noqa: F401

    for line in sys.stdin:
        kind, *rest = json.loads(line)
        if kind == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(*rest)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _child(argv, console, env, fault) -> None:
    code = 70
    try:
        os.setpgrp()
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        _prepare_fault(fault)
        from focal_plugin.engine import argument_parser, run

        code = run(argument_parser().parse_args(argv))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare_fault(fault) -> None:
    """What shall go wrong in the run: a kind, and its arguments.

    "kill after", s: SIGKILL, so many seconds after its first step has begun.
    "kill at", "os.replace", n, "before" or "after": SIGKILL at the n-th call of a function.
    "signal in step", n, number: a signal at the beginning of step n; "signal in step of", n, number, rank: there only.
    "signal in evaluation", n, number: at the n-th image that is evaluated; "... of", and a rank.
    "no loss", n, rank: the losses of step n are NaN on that worker.
    "no gradient", n, rank: a gradient of step n is NaN, on that worker before it is averaged.
    "raise in step", n, rank: an error there.
    "file size", bytes: no file may grow larger.
    """
    if fault is None:
        return
    kind, *rest = fault
    from detectron2.utils import comm

    from focal_plugin.engine import trainer

    def kill(number=signal.SIGKILL):
        os.kill(os.getpid(), number)

    def in_step(step, action, rank=None):
        run_step = trainer.FocalTrainer.run_step

        def run_step_with_fault(self):
            if self.iter == step and rank in (None, comm.get_rank()):
                action(self)
            run_step(self)

        trainer.FocalTrainer.run_step = run_step_with_fault

    def at_call(owner, name, number, before, action):
        original, calls = getattr(owner, name), []

        def with_fault(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and before:
                action()
            result = original(*args, **kwargs)
            if len(calls) == number and not before:
                action()
            return result

        setattr(owner, name, with_fault)

    def spoil(self):
        nan = float("nan")
        self.model.register_forward_hook(lambda m, a, losses: {k: v * nan for k, v in losses.items()}, prepend=True)

    def fail(self):
        raise KeyError("a made-up fault")

    if kind == "kill after":
        at_call(trainer.FocalTrainer, "run_step", 1, True, threading.Timer(rest[0], kill).start)
    elif kind == "signal in step":
        in_step(rest[0], lambda self: kill(rest[1]))
    elif kind == "kill at":
        owner, name = rest[0].split(".")
        at_call({"os": os}[owner], name, rest[1], rest[2] == "before", kill)
    elif kind == "signal in step of":
        in_step(rest[0], lambda self: kill(rest[1]), rest[2])
    elif kind == "signal in evaluation":
        at_call(trainer._Evaluator, "process", rest[0], True, lambda: kill(rest[1]))
    elif kind == "signal in evaluation of":
        at_call(trainer._Evaluator, "process", rest[0], True, lambda: comm.get_rank() == rest[2] and kill(rest[1]))
    elif kind == "no loss":
        in_step(rest[0], spoil, rest[1])
    elif kind == "no gradient":
        in_step(rest[0], lambda self: next(self.model.parameters()).register_hook(lambda g: g * float("nan")), rest[1])
    elif kind == "raise in step":
        in_step(rest[0], fail, rest[1])
    elif kind == "file size":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (rest[0], rest[0]))
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    _serve()
