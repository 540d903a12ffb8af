"""What one worker has for itself, beyond the weights, optimizer and schedule that all share and upstream saves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from ..rng import get_rng_state, set_rng_state

logger = logging.getLogger(__name__)


def gather_worker_states(model: nn.Module) -> list[dict[str, Any]]:
    """The states of all workers, on the main one; elsewhere an empty list. A collective call.

    A worker's own are its random number generators and its buffers: the running statistics of batch norms, and
    ``loss_normalizer``, of which a checkpoint of upstream has the main worker's only.
    """
    states = comm.gather({"rng": get_rng_state(), "buffers": _buffers(model), "normalizer": _plain_normalizer(model)})
    for state in states[1:]:
        # Frozen statistics and the like are equal everywhere and in the checkpoint already.
        mine = states[0]["buffers"]
        state["buffers"] = {k: v for k, v in state["buffers"].items() if not torch.equal(v, mine[k])}
    if states:
        states[0]["buffers"] = {}
    return states


def restore_worker_state(model: nn.Module, states: Sequence[dict[str, Any]]) -> None:
    """Puts back this worker's part of :func:`gather_worker_states`, after the model has been loaded."""
    if len(states) != comm.get_world_size():
        saved = f"{len(states)} worker(s)" if states else "a version without the workers' own state"
        logger.warning(
            f"the checkpoint was saved by {saved}, this run has {comm.get_world_size()}: it goes on, but not bit for "
            "bit as it would have"
        )
        return
    state = states[comm.get_rank()]
    own = _named_buffers(model)
    with torch.no_grad():
        for name, value in state["buffers"].items():
            if name in own:
                own[name].copy_(value)
    if state["normalizer"] is not None:
        unwrapped(model).loss_normalizer = state["normalizer"]
    set_rng_state(state["rng"])


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().cpu().clone() for name, buffer in _named_buffers(model).items()}


def _named_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that checkpoints hold, by their names there."""
    model = unwrapped(model)
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _plain_normalizer(model: nn.Module) -> float | None:
    """That of upstream's RetinaNet, which is a plain number in no state_dict."""
    value = getattr(unwrapped(model), "loss_normalizer", None)
    return value if isinstance(value, (int, float)) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
