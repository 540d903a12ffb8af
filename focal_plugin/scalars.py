"""Scalars of a training step for Detectron2's event storage, without making the host wait for the GPU."""

from weakref import WeakSet

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

_PENDING: "WeakSet[DeferredScalars]" = WeakSet()


class DeferredScalars:
    """Scalars that are handed to the event storage when they can be read without waiting; on the CPU at once.

    To read a Python number off a GPU makes the host wait for all before it. Copied in the background it is there when
    the step is over and :func:`flush_scalars` is called, or else in the next step, which keeps its iteration.
    """

    def __init__(self):
        self._pending = None

    def put(self, scalars: dict[str, Tensor]) -> None:
        """Take the ``scalars`` of this step, 0-dim tensors; outside a training loop, nothing."""
        self.flush()
        if not has_event_storage():
            return
        storage = get_event_storage()
        values, ready = torch.stack([v.detach().float() for v in scalars.values()]), None
        if values.is_cuda:
            ready = torch.cuda.Event()
            stream = torch.cuda.current_stream(values.device)
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            ready.record(stream)
        # With the scope of now: a model can run several times a step, each under a name of its own.
        self._pending = storage, storage._current_prefix, storage.iter, list(scalars), values, ready
        _PENDING.add(self)
        if ready is None:
            self.flush()

    def flush(self) -> None:
        """Hand what was taken to the storage that it was taken for."""
        if self._pending is None:
            return
        (storage, prefix, step, names, values, ready), self._pending = self._pending, None
        _PENDING.discard(self)
        if ready is not None:
            ready.synchronize()
        now, storage._current_prefix = storage._current_prefix, prefix
        try:
            storage.put_scalars(**dict(zip(names, values.tolist())), cur_iter=step)
        finally:
            storage._current_prefix = now

    def __reduce__(self):
        # A copied or pickled model starts with none: an event of a GPU cannot be copied.
        return DeferredScalars, ()


def flush_scalars() -> None:
    """Flush all :class:`DeferredScalars`, for the end of a step, when the GPU has been waited for."""
    for scalars in list(_PENDING):
        scalars.flush()
