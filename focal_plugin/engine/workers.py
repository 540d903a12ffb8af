"""What the workers of a distributed run tell each other outside of its collectives: that one has failed, or must stop.

A worker that fails leaves the others in a collective, where they would wait for it until the process group's timeout
(half an hour). Each therefore has a thread that looks into the process group's key-value store once a second.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from detectron2.utils import comm

from .interrupt import Interrupted, request_stop, stop_requested

logger = logging.getLogger(__name__)

_PERIOD = 0.5  # seconds between two looks into the store
_GRACE = 3.0  # seconds for a worker to end by itself, as when all fail alike
_LINGER = 1.5  # seconds that a failed worker stays, for the others to learn why: more than _PERIOD, less than _GRACE
_SAVING = 300.0  # seconds that an interrupted run may take to write its last checkpoint
_FAILED, _INTERRUPTED = "focal_plugin/failed", "focal_plugin/interrupted"


@contextmanager
def ending_together() -> Iterator[None]:
    """Inside, an exception or an interruption of one worker ends all, each saying why.

    With one worker it does nothing.
    """
    if comm.get_world_size() == 1:
        yield
        return
    watch = _Watch()
    watch.start()
    try:
        yield
    except Interrupted:
        _wait_for_the_main_worker()
        raise
    except Exception as error:
        watch.tell_failure(f"{type(error).__name__}: {error}")
        time.sleep(_LINGER)
        raise
    finally:
        watch.ended.set()


class _Watch(threading.Thread):
    def __init__(self):
        super().__init__(name="focal_plugin watch", daemon=True)
        self.ended = threading.Event()
        store = torch.distributed.distributed_c10d._get_default_store()
        # A connection of its own: one that the main thread waits on would be locked.
        self._store = store.clone() if hasattr(store, "clone") else store

    def tell_failure(self, why: str) -> None:
        """Tells all other workers, unless one has told them before."""
        with suppress(Exception):  # the store may be gone, with the main worker
            self._store.compare_set(_FAILED, "", f"worker {comm.get_rank()} has failed: {why}")

    def run(self) -> None:
        while not self.ended.wait(_PERIOD):
            try:
                failed = self._look(_FAILED)
                if stop_requested():
                    self._store.set(_INTERRUPTED, "1")
                elif self._look(_INTERRUPTED):
                    request_stop()
            except Exception:
                failed = "the main worker is gone"
            if failed and not self.ended.wait(_GRACE):
                # The main thread is stuck in a collective that will never end.
                print(f"worker {comm.get_rank()} stops: {failed}", file=sys.stderr, flush=True)
                os._exit(1)

    def _look(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _wait_for_the_main_worker() -> None:
    """Until it has saved: the first worker to leave takes the others with it."""
    store, key = torch.distributed.distributed_c10d._get_default_store(), "focal_plugin/left"
    with suppress(Exception):
        if comm.is_main_process():
            store.set(key, "1")
        else:
            deadline = time.monotonic() + _SAVING
            while not store.check([key]) and time.monotonic() < deadline:
                time.sleep(_PERIOD)
