"""To be stopped by SIGTERM, as schedulers and spot machines stop a run: at the end of a step, with a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RESUME_ME = getattr(os, "EX_TEMPFAIL", 75)
"""The exit code of a run that was stopped and can be resumed: that of sysexits.h for "try again later"."""

_requested = threading.Event()


class Interrupted(SystemExit):
    """The run was asked to stop and can be resumed; no error, and so no Exception."""

    def __init__(self):
        super().__init__(RESUME_ME)


class FinishedEarly(SystemExit):
    """Training has ended before its last step because it does not improve any more; no error."""

    def __init__(self):
        super().__init__(0)


def request_stop() -> None:
    """As SIGTERM does: this process shall stop when the step is over."""
    _requested.set()


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _requested.is_set()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM sets a flag inside, and goes on to the processes that ``multiprocessing`` has started from here.

    Only in the main thread, in which alone Python handles signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _take_note)
    if before is not _take_note:  # inside another one, a request from before is still one
        _requested.clear()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _take_note(number, frame) -> None:
    request_stop()
    for process in multiprocessing.active_children():
        if not process.daemon:  # data workers are daemons, and stopped by whoever reads from them
            os.kill(process.pid, signal.SIGTERM)
