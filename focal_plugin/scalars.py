"""Scalars of a training step for Detectron2's event storage, without making the host wait for the GPU."""

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor


class DeferredScalars:
    """Puts 0-dim tensors into the event storage of the step in which they were made, but not before the next step.

    The storage takes Python numbers. To read one off a GPU in the middle of a step would make the host wait until
    everything before it has been computed; copied in the background, they are there when the next step begins. The
    last step of a run stays unread on a GPU. On the CPU nothing is put off.
    """

    def __init__(self):
        self._pending = None

    def put(self, scalars: dict[str, Tensor]) -> None:
        """Hands on what the last call left, and takes ``scalars`` of this step; nothing outside a training loop."""
        self._flush()
        if not has_event_storage():
            return
        storage = get_event_storage()
        values, ready = torch.stack([v.detach().float() for v in scalars.values()]), None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending = storage, storage.iter, list(scalars), values, ready
        if ready is None:
            self._flush()

    def _flush(self) -> None:
        if self._pending is None:
            return
        (storage, step, names, values, ready), self._pending = self._pending, None
        if ready is not None:
            ready.synchronize()
        storage.put_scalars(**dict(zip(names, values.tolist())), cur_iter=step)

    def __reduce__(self):
        # A copied or pickled model starts with none: an event of a GPU cannot be copied.
        return DeferredScalars, ()
