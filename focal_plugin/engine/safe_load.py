"""Read checkpoint files that one need not trust: they hold tensors, arrays and plain values, and no code is run."""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..files import printable


def load_plain(path: str) -> Any:
    """Return what ``torch.save`` has written, if it is tensors, numbers, strings and containers of them; on the CPU.

    Raises:
        ValueError: it is damaged, or would run code.
        OSError: it cannot be read.
    """
    check_regular(path)
    with refusing(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":  # the format since torch 1.6, which itself checks no sums
                damaged = zipfile.ZipFile(file).testzip()
                if damaged:
                    raise ValueError(f"the sum of {damaged} is wrong: it was not stored as it was written")
        return torch.load(path, map_location="cpu", weights_only=True)


def load_zoo(path: str) -> dict[str, Any]:
    """Return a ``.pkl`` of Detectron2's or Caffe2's zoo, or a ``.pyth`` of pycls, as DetectionCheckpointer reads it.

    It is refused, as by :func:`load_plain`, if it holds anything but arrays, numbers, strings and containers of them.
    """
    with refusing(path):
        if path.endswith(".pyth"):
            weights, author = load_plain(path)["model_state"], "pycls"
        else:
            with open(path, "rb") as file:
                data = _ArrayUnpickler(file, encoding="latin1").load()
            if "model" in data and "__author__" in data:
                return data
            weights, author = data.get("blobs", data), "Caffe2"
        # Momentum and counts are of no use for a model.
        model = {k: v for k, v in weights.items() if not k.endswith(("_momentum", "num_batches_tracked"))}
        return {"model": model, "__author__": author, "matching_heuristics": True}


def check_weights(checkpoint: Any, filename: str) -> None:
    """Raise a ValueError unless a checkpoint's "model" is a dict of names to tensors or arrays of numbers."""
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{filename} is refused: it holds no state_dict of a model")
    for name, value in model.items():
        is_numbers = isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")
        # Names are logged: no control characters for somebody's terminal.
        if not isinstance(name, str) or not name.isprintable() or not is_numbers:
            kind = type(value).__name__
            raise ValueError(f"{filename} is refused: {printable(name)} in its state_dict is no tensor but {kind}")


def check_regular(path: str) -> None:
    """Refuse a pipe, which would be waited for, a device, which never ends, and a folder."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no checkpoint {path!r}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is refused: it is no regular file")


@contextmanager
def refusing(filename: str, why: str = "") -> Iterator[None]:
    """Turn whatever a damaged or hostile file raises (anything, from KeyError to EOFError) into one error."""
    try:
        yield
    except OSError as e:
        if filename in str(e):
            raise
        way_out = "; without a network, fetch it elsewhere and give the path of the file as weights, or none"
        raise OSError(f"{filename} cannot be read ({e}){way_out if '://' in filename else ''}") from e
    except Exception as e:
        if " is refused: " in str(e):
            raise
        way_out = "if you trust it, load it yourself and save its state_dict again"
        why = why or f"it is damaged, or no plain checkpoint but one that would run code when loaded; {way_out}"
        raise ValueError(f"{filename} is refused: {why} ({printable(e, 500)})") from e


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle containers of numbers, strings and numpy's arrays, which is all that the zoos' files have."""

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {name}")
        return _ALLOWED[name]


class _DType:
    """Stand in for numpy's dtype, which would believe a file that eight bytes in it are the address of an object."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcSU][1-9]\d{0,3}", code):  # of objects numpy would read pointers
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # and none of the fields that the state may have


class _Array(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        if math.prod(shape) * dtype.dtype.itemsize != len(data):  # before numpy makes room for what a file claims
            raise pickle.UnpicklingError(f"it holds an array of another size than its {len(data)} bytes")
        super().__setstate__((version, shape, dtype.dtype, bool(is_fortran), data))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode(encoding)


def _numbers(data: Any, dtype: _DType, shape: Any = -1, order: str = "C") -> np.ndarray:
    # Of an integer bytearray would make that many bytes; memoryview refuses it.
    data = data.encode("latin1") if isinstance(data, str) else bytearray(memoryview(data))
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


_ALLOWED = {
    "collections.OrderedDict": dict,
    "builtins.bytes": lambda: b"",  # the empty bytes, and _codecs.encode the others, in protocols without bytes
    "_codecs.encode": _encode,
    "numpy.ndarray": str,  # only named, for _reconstruct
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(0, "b"),
    "numpy.core.multiarray.scalar": lambda dtype, data: _numbers(data, dtype)[0],
    "numpy.core.numeric._frombuffer": _numbers,
}
