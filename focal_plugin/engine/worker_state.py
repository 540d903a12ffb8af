"""Save and restore what one worker has for itself, beyond the weights, optimizer and schedule that all share."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)


def gather_worker_states(model: nn.Module) -> list[dict[str, Any]]:
    """Return the states of all workers on the main one, an empty list elsewhere. A collective call.

    They are random number generators and buffers (running statistics, ``loss_normalizer``), of which Detectron2's
    checkpoint has the main worker's only.
    """
    model = unwrap_ddp(model)
    saved = model.state_dict()
    buffers = {name: saved[name].cpu().clone() for name, _ in model.named_buffers() if name in saved}
    normalizer = getattr(model, "loss_normalizer", None)
    # Stock RetinaNet's is a plain number, which no state_dict has.
    normalizer = normalizer if isinstance(normalizer, (int, float)) else None
    states = comm.gather({"rng": get_rng_state(), "buffers": buffers, "normalizer": normalizer})
    # The main worker's are in the checkpoint already, and so is what equals them, such as frozen statistics.
    main = states[0]["buffers"] if states else {}
    for state in states:
        state["buffers"] = {k: v for k, v in state["buffers"].items() if not torch.equal(v, main[k])}
    return states


def restore_worker_state(model: nn.Module, states: Sequence[dict[str, Any]]) -> None:
    """Put back this worker's part of :func:`gather_worker_states`, after the model has been loaded."""
    if len(states) != (count := comm.get_world_size()):
        saved = f"{len(states)} worker(s)" if states else "a version without the workers' own state"
        logger.warning(f"the checkpoint was saved by {saved}, this run has {count}: it goes on, but not bit for bit")
        return
    model, state = unwrap_ddp(model), states[comm.get_rank()]
    own = model.state_dict()  # the buffers themselves, detached
    for name in state["buffers"].keys() & own.keys():
        own[name].copy_(state["buffers"][name])
    if state["normalizer"] is not None:
        model.loss_normalizer = state["normalizer"]
    set_rng_state(state["rng"])


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def get_rng_state() -> dict:
    """Return the states of Python's, NumPy's and torch's generators (of the current GPU too), as plain values."""
    version, words, gauss_next = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": (version, torch.tensor(words), gauss_next),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Put back what :func:`get_rng_state` returned; a GPU's only where there is one."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Let all generators go on outside as if nothing had been drawn inside."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
