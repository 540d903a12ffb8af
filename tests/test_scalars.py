"""Scalars reach the event storage under the step that they belong to."""

import copy
import pickle

import torch
from detectron2.utils.events import EventStorage

from focal_plugin.scalars import DeferredScalars, flush_scalars

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_on_the_cpu_nothing_is_put_off_and_copies_and_pickles_start_empty():
    scalars = DeferredScalars()
    scalars.put({"a": torch.tensor(1.0)})  # outside a training loop nothing happens
    with EventStorage(7) as storage:
        scalars.put({"a": torch.tensor(1), "b": torch.tensor(2)})
        assert storage.latest() == {"a": (1.0, 7), "b": (2.0, 7)}
    scalars._pending = object()
    for clone in (copy.deepcopy(scalars), pickle.loads(pickle.dumps(scalars))):
        assert clone._pending is None


class OnGPU(DeferredScalars):
    """Puts off what it takes as it is put off on a GPU."""

    def put(self, scalars):
        flush, self.flush = self.flush, lambda: None
        flush()
        super().put(scalars)
        del self.flush


def test_a_step_is_flushed_under_its_own_iteration_and_scope_and_nothing_waits():
    scalars = DeferredScalars() if DEVICE == "cuda" else OnGPU()
    with EventStorage(7) as storage:
        with storage.name_scope("one"):
            scalars.put({"a": torch.tensor(1.0, device=DEVICE)})
        assert storage.latest() == {}
        storage.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with storage.name_scope("two"):
            scalars.put({"a": torch.full((), 2.0, device=DEVICE)})
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        assert storage.latest() == {"one/a": (1.0, 7)}
        flush_scalars()
        assert storage.latest() == {"one/a": (1.0, 7), "two/a": (2.0, 8)}
