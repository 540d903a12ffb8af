"""End all workers of a run together: preempted by SIGTERM with a checkpoint, or because one of them has failed.

Schedulers and spot machines send SIGTERM; training then stops at the end of the step. A worker that fails would leave
the others in a collective for half an hour: a thread of each looks into the process group's store twice a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from detectron2.utils import comm

EXIT_PREEMPTED = getattr(os, "EX_TEMPFAIL", 75)
"""The exit code of a run that was stopped and can be resumed: "try again later" in sysexits.h."""

_PERIOD = 0.5  # seconds between two looks into the store
_GRACE = 3.0  # seconds for a worker to end by itself, as when all fail alike
_LINGER = 1.5  # seconds that a failed worker stays, for the others to learn why: more than _PERIOD, less than _GRACE
_SAVING = 300.0  # seconds that a preempted run may take to write its last checkpoint
_FAILED, _PREEMPTED, _LEFT = "focal_plugin/failed", "focal_plugin/preempted", "focal_plugin/left"

_requested = threading.Event()


class Preempted(SystemExit):
    """The run was asked to stop and can be resumed; no error, and so no Exception."""

    code = EXIT_PREEMPTED


class FinishedEarly(SystemExit):
    """Training has ended before its last step because it does not improve any more; no error."""


def stop_requested() -> bool:
    """Return whether this process has been asked to stop when the step is over."""
    return _requested.is_set()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM a request to stop, inside, and hand it on to the processes that ``multiprocessing`` started here.

    Python handles signals in the main thread only; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _request_stop)
    if before is not _request_stop:  # inside another one, a request from before is still one
        _requested.clear()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _request_stop(number, frame) -> None:
    _requested.set()
    for process in multiprocessing.active_children():
        if not process.daemon:  # data workers are daemons, and stopped by whoever reads from them
            os.kill(process.pid, signal.SIGTERM)


@contextmanager
def fail_together() -> Iterator[None]:
    """End all workers when one of them fails or is preempted inside, each saying why; nothing with one worker."""
    if comm.get_world_size() == 1:
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    # A connection of its own: one that the main thread waits on would be locked.
    store = store.clone() if hasattr(store, "clone") else store
    ended = threading.Event()
    threading.Thread(target=_watch, args=(store, ended), name="focal_plugin watch", daemon=True).start()
    try:
        yield
    except Preempted:
        # The first worker to leave takes the others with it: they wait for the main one, which saves.
        with suppress(Exception):
            if comm.is_main_process():
                store.set(_LEFT, "1")
            deadline = time.monotonic() + _SAVING
            while not store.check([_LEFT]) and time.monotonic() < deadline:
                time.sleep(_PERIOD)
        raise
    except Exception as error:
        with suppress(Exception):  # the store may be gone, with the main worker
            store.compare_set(_FAILED, "", f"worker {comm.get_rank()} has failed: {type(error).__name__}: {error}")
        time.sleep(_LINGER)
        raise
    finally:
        ended.set()


def _watch(store: torch.distributed.Store, ended: threading.Event) -> None:
    while not ended.wait(_PERIOD):
        try:
            failed = store.get(_FAILED).decode() if store.check([_FAILED]) else ""
            if stop_requested():
                store.set(_PREEMPTED, "1")
            elif store.check([_PREEMPTED]):
                _requested.set()
        except Exception:
            failed = "the main worker is gone"
        if failed and not ended.wait(_GRACE):
            # The main thread is stuck in a collective that will never end.
            print(f"worker {comm.get_rank()} stops: {failed}", file=sys.stderr, flush=True)
            os._exit(1)
