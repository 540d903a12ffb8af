"""Files of weights that one need not trust: read without running code, and without believing what they say of sizes."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

_MAX_WEIGHTS = 20_000  # upstream compares each name of a file with each of the model
_MAX_OBJECTS = 10_000_000  # in a file, one that is used n times counting n times


def load_plain(path: str) -> Any:
    """What ``torch.save`` has written, if it is tensors, numbers, strings and containers of them; on the CPU.

    Raises:
        ValueError: it is damaged, or would run code.
        OSError: it cannot be read.
    """
    check_regular(path)
    with refusing(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":  # how torch tells its two formats apart
                _check_archive(file)
            else:
                _check_stream(file)
        return torch.load(path, map_location="cpu", weights_only=True)


def check_weights(checkpoint: Any, filename: str) -> None:
    """Raises a ValueError unless a checkpoint's "model" is a dict of names to tensors or arrays of numbers."""
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or len(model) > _MAX_WEIGHTS:
        raise ValueError(f"{filename} is refused: it holds no state_dict of a model")
    for name, value in model.items():
        is_numbers = isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")
        # Names are logged: no control characters for somebody's terminal.
        if not isinstance(name, str) or not name.isprintable() or not is_numbers:
            raise ValueError(
                f"{filename} is refused: {str(name)[:80]!r} in its state_dict is no tensor but {type(value).__name__}"
            )


def check_regular(path: str) -> None:
    """A pipe would be waited for, and a device never ends."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no checkpoint {path!r}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is refused: it is no regular file")


@contextmanager
def refusing(filename: str, why: str = "") -> Iterator[None]:
    """Turns whatever a damaged or hostile file raises (anything, from KeyError to EOFError) into one error."""
    why = why or (
        "it is damaged, or no plain checkpoint of tensors and arrays but one that would run code when loaded. If you "
        "trust it, load it yourself and save its state_dict again."
    )
    try:
        yield
    except OSError as e:
        if filename in str(e):
            raise
        message = f"{filename} cannot be read ({e})"
        if "://" in filename:
            message += "; without a network, fetch it elsewhere and give the path of the file as weights, or none"
        # urllib's have no number.
        raise (OSError(message) if e.errno is None else OSError(e.errno, message)) from e
    except Exception as e:
        if " is refused: " in str(e):
            raise
        raise ValueError(f"{filename} is refused: {why} ({repr(e)[:500]})") from e


# ------------------------------ what a pickle says, without doing it


class _Unpickler(pickle._Unpickler):
    """In Python and not in C, whose memory can be exhausted by a few bytes ("store this at place 2**31").

    There are no sets, and no keys but plain ones: the hash of tuples of tuples of tuples may take for ever.
    """

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.EMPTY_SET[0], pickle.FROZENSET[0], pickle.ADDITEMS[0])
    }

    def _set(self, items: list) -> None:
        for key, value in zip(items[::2], items[1::2]):
            if not all(isinstance(k, (str, bytes, int, float, type(None))) for k in _members(key)):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
            self.stack[-1][key] = value

    def _load_dict(self):
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _load_bytearray(self):
        # Python's own makes it first, of any length that is claimed, and then looks whether the file is as long.
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self._set([self.stack.pop(-2), self.stack.pop()])


def _members(key: Any) -> tuple:
    return key if type(key) is tuple else (key,)


class _Made:
    """Stands in for whatever a pickle would import or make; has only what went into it."""

    def __init__(self, *parts: Any):
        self.parts = list(parts)
        self.__new__ = lambda cls, *args: cls(*args)

    def __call__(self, *args: Any) -> _Made:
        self.parts.append(_Made(*args))  # here as well, as a pickle may throw away what it has made
        return self.parts[-1]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append(value)

    def append(self, value: Any) -> None:
        self.parts.append(value)

    extend = __setstate__ = append


class _Reader(_Unpickler):
    """Reads a pickle of ``torch.save`` and makes nothing; ``storages`` is what it would read: (key, bytes)."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.made: list[_Made] = []
        self.storages: list[tuple[str, int]] = []

    def find_class(self, module, name):
        if name == "bytearray":  # which torch would make, of any length
            raise pickle.UnpicklingError("it holds a bytearray")
        self.made.append(_Made(name))
        return self.made[-1]

    def persistent_load(self, pid):
        _, kind, key, _, count, *_ = pid
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that typed storages are deprecated, which are what torch.save names
            dtype = getattr(torch, kind.parts[0]).dtype if kind.parts[0] != "UntypedStorage" else torch.uint8
        self.storages.append((str(key), count * torch.empty(0, dtype=dtype).element_size()))
        return _Made()

    def check(self) -> None:
        """Reads, and raises a ValueError if what it holds grows or nests without end: see ``_count``."""
        known: dict[int, int] = {}
        if _count(self.load(), known) + sum(_count(made, known) for made in self.made) > _MAX_OBJECTS:
            raise ValueError("its objects are used in each other so often that they have no end")


def _count(value: Any, known: dict[int, int]) -> int:
    """Objects in this one; those that are used twice count twice."""
    if isinstance(value, _Made):
        value = value.parts
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_OBJECTS + 1  # if it is in itself
        known[id(value)] = 1 + sum(_count(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _check_archive(file: IO[bytes]) -> None:
    """torch checks no sums, and before 2.9 not that a tensor ends where its record does."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        # torch looks names up without regard to case.
        if len({name.lower() for name in sizes}) < len(archive.infolist()) or sum(sizes.values()) > size:
            raise ValueError("its parts have the same name or, compressed or overlapping, are larger than the file")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the sum of {damaged} is wrong: it was not stored as it was written")
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/data.pkl") as pickled:
            reader = _Reader(pickled)
            reader.check()
        for key, num_bytes in reader.storages:
            if num_bytes != sizes[f"{root}/data/{key}"]:
                raise ValueError(f"a tensor of {num_bytes} bytes, of which it has {sizes[f'{root}/data/{key}']}")


def _check_stream(file: IO[bytes]) -> None:
    """The format before torch 1.6: magic number, version, machine, content, keys; then the numbers."""
    file.seek(0)
    for _ in range(5):
        reader = _Reader(file)
        reader.check()
        if any(num_bytes > os.fstat(file.fileno()).st_size for _, num_bytes in reader.storages):
            raise ValueError("a tensor larger than the file")


# ------------------------------ the pickles of the model zoos


def load_zoo(path: str) -> dict[str, Any]:
    """A ``.pkl`` of a model zoo, Detectron2's or that of Detectron and Caffe2, as upstream's checkpointer wants it.

    Raises:
        ValueError: it is damaged, or holds anything but arrays, numbers, strings and containers of them.
        OSError: it cannot be read.
    """
    check_regular(path)
    with refusing(path):
        with open(path, "rb") as file:
            data = _ArrayUnpickler(file, encoding="latin1").load()
        if "model" in data and "__author__" in data:
            return data
        blobs = data.get("blobs", data)
        model = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def load_pycls(path: str) -> dict[str, Any]:
    """A ``.pyth`` of pycls, as upstream's checkpointer wants it; raises as :func:`load_plain`."""
    data = load_plain(path)
    with refusing(path):
        model = {name: value for name, value in data["model_state"].items() if not name.endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}


class _ArrayUnpickler(_Unpickler):
    """Loads containers of numbers, strings and numpy's arrays, which is all that the zoos' pickles have."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):
            return _no_bytes
        if module in ("numpy", "_codecs") or module.startswith(("numpy.core.", "numpy._core.")):
            stand_in = _STAND_INS.get(name)
            if stand_in:
                return stand_in
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


class _DType:
    """numpy's own believes a pickle that tells it that eight bytes of a file are the address of an object."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcSU]\d{1,4}", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self._order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self) -> np.dtype:
        return np.dtype(self._order + self._code)


class _Array(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.numpy(), bool(is_fortran), data))


def _no_bytes() -> bytes:
    """How b"" is written in the protocols that have no bytes."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # which is how bytes are written in the protocols that have none
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode("latin1")


def _array_of_bytes(data: bytes, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
    return np.ndarray(shape, dtype.numpy(), bytearray(data), order=order)


def _scalar(dtype: _DType, data: bytes | str) -> np.generic:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.numpy())[0]


_STAND_INS = {
    "encode": _encode,
    "dtype": _DType,
    "ndarray": str,  # only named, for _reconstruct
    "_reconstruct": lambda *_: _Array(0, "b"),
    "scalar": _scalar,
    "_frombuffer": _array_of_bytes,
}
