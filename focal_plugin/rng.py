"""The state of every random number generator of a process, and a way to borrow them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def get_rng_state() -> dict:
    """The state of Python's, NumPy's and torch's generators (of the current GPU too), in types that any checkpoint
    may hold: tensors, numbers and strings."""
    version, words, gauss_next = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": (version, torch.tensor(words), gauss_next),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Puts back what :func:`get_rng_state` returned; a GPU's only where there is one."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def rng_kept() -> Iterator[None]:
    """Whatever is drawn inside, all generators go on outside as if nothing had been."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
