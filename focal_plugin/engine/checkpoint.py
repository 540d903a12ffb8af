"""Checkpoints that survive: written whole or not at all, read without running code, the newest good one found."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..files import TEMPORARY, atomic_write

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d+)\.pth")
_MAX_WEIGHTS = 20_000  # upstream compares each name of a file with each of the model
_MAX_OBJECTS = 10_000_000  # in a file, one that is used n times counting n times


class SafeCheckpointer(DetectionCheckpointer):
    """Upstream's checkpointer for files that one need not trust, on machines that may stop at any moment.

    ``.pth`` files are loaded with ``weights_only=True``, model-zoo ``.pkl`` files only if they hold arrays. A file is
    written under another name, synced to the disk and renamed, and only then ``last_checkpoint`` names it. To resume, a
    newest file that cannot be read is reported, and the newest one that can is taken.

    Attributes:
        resumed_from: the file that ``resume_or_load`` resumed from; empty if it did not.
        skipped: after loading, a line for each kind of parameter that the file did not fill.
    """

    def __init__(self, model, save_dir="", *, save_to_disk=None, **checkpointables):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = _AtomicWrites(self.path_manager)
        self.resumed_from = ""
        self.skipped: list[str] = []
        self._read: tuple[str, Any] = ("", None)
        self._moves_tag = True

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Upstream's ``save``.

        Args:
            name: of the file, without ".pth".
            tag: whether ``last_checkpoint`` shall name it, so that the run resumes from it.
            kwargs: more to save: tensors, numbers, strings and containers of them.

        Raises:
            OSError: it cannot be written, as on a full disk. All earlier files are whole.
        """
        self._moves_tag = tag
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the disk's error
            if (
                isinstance(error, RuntimeError)
                and "write" not in str(error)
                and not isinstance(error.__context__, OSError)
            ):
                raise
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise OSError(
                getattr(cause, "errno", None),
                f"could not write {os.path.join(self.save_dir, name)}.pth ({cause}). The earlier checkpoints are whole"
                f"{self._newest()}. Make room, or choose another OUTPUT_DIR, and type the same command with --resume",
            ) from error
        finally:
            self._moves_tag = True

    def save_again(self, name: str) -> None:
        """Saves what was resumed from under another name, if it has not got it, as it is."""
        target = os.path.join(self.save_dir, f"{name}.pth")
        if self.resumed_from and not os.path.isfile(target):
            with open(self.resumed_from, "rb") as source, atomic_write(target, "wb") as file:
                shutil.copyfileobj(source, file)
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._moves_tag:
            super().tag_last_checkpoint(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Upstream's, but that the newest checkpoint that can be read is resumed from: a collective call.

        Raises:
            ValueError: there are checkpoints to resume from, and none can be read; or ``path`` is refused.
            FileNotFoundError: a worker does not see the checkpoint that the first one resumes from.
        """
        self.resumed_from = self._find_resumable() if resume else ""
        if self.resumed_from:
            return self.load(self.resumed_from)
        if resume:
            logger.warning(f"--resume: {self.save_dir} has no checkpoint to resume from; starting afresh")
        return self.load(path, checkpointables=[])

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """Upstream's.

        Raises:
            ValueError: the file is damaged, would run code, or does not fit; the message names it.
            OSError: it is not there, or cannot be read.
        """
        self.skipped = []
        path = os.fspath(path) if path else ""
        if path and "://" not in path:
            _check_regular(path.partition("?")[0])  # behind the "?" there may be upstream's matching_heuristics
        try:
            with _refusing(path, "what it holds does not fit here"):
                return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # upstream's, left behind by an error

    def _find_resumable(self) -> str:
        """The file that all workers resume from; empty if there is none."""
        found, error = "", None
        if comm.is_main_process():
            try:
                found = self._newest_readable()
            except ValueError as e:
                error = e
        answers = comm.all_gather((found, str(error or "")))
        if answers[0][1]:
            raise error or ValueError(answers[0][1])
        found = answers[0][0]
        seen = comm.all_gather(not found or os.path.isfile(found))
        if not all(seen):
            raise FileNotFoundError(
                f"worker {seen.index(False)} does not see {found}: OUTPUT_DIR must be on a disk that all machines share"
            )
        return found

    def _newest_readable(self) -> str:
        folder = Path(self.save_dir)
        for leftover in folder.glob(f"*.pth{TEMPORARY}"):
            with suppress(OSError):
                leftover.unlink()  # was being written when the run was killed
        tag, named = folder / "last_checkpoint", _last(folder)
        candidates = _resumable(folder)
        first = folder / (named or "?")
        if named and os.path.basename(named) == named and os.path.isfile(first):
            candidates = [first, *(path for path in candidates if path != first)]
        elif candidates or os.path.isfile(tag):
            logger.warning(f"{tag} names no checkpoint of that folder ({named!r}); looking for the newest one")
        problems = []
        for path in candidates:
            problem = self._why_not_resumable(path)
            if not problem:
                return str(path)
            logger.warning(f"cannot resume from {path}: {problem}")
            problems.append(f"\n  {path}: {problem}")
        if problems:
            raise ValueError(
                f"none of the checkpoints in {folder} can be resumed from:{''.join(problems)}\n"
                "To start afresh leave out --resume, with another OUTPUT_DIR to keep them"
            )
        return ""

    def _why_not_resumable(self, path: Path) -> str:
        try:
            checkpoint = self._torch_load(str(path))
            _check_weights(checkpoint, str(path))
            if not {"iteration", *self.checkpointables} <= checkpoint.keys():
                raise ValueError(f"it holds weights only, no {' and no '.join(self.checkpointables)}")
        except (OSError, ValueError) as error:
            return str(error)
        self._read = str(path), checkpoint  # not to be read a second time
        return ""

    def _newest(self) -> str:
        last = _last(self.save_dir)
        return f", the last one is {last}" if last else ""

    def _torch_load(self, f):
        (path, checkpoint), self._read = self._read, ("", None)
        if path == f:
            return checkpoint
        return load_plain(f)

    def _load_file(self, filename):
        with _refusing(filename):
            # Upstream would unpickle .pkl and .pyth files without looking.
            if filename.endswith(".pkl"):
                checkpoint = _zoo_checkpoint(_load_arrays(filename))
            elif filename.endswith(".pyth"):
                checkpoint = _pycls_checkpoint(load_plain(filename))
            else:
                checkpoint = super()._load_file(filename)
        _check_weights(checkpoint, filename)
        return checkpoint

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        kinds = {
            "other shape in the model": [
                f"{name} {there} -> {here}" for name, there, here in incompatible.incorrect_shapes
            ],
            "not in the file": incompatible.missing_keys,
            "not in the model": incompatible.unexpected_keys,
        }
        self.skipped = [_listed(what, names) for what, names in kinds.items() if names]


def load_plain(path: str) -> Any:
    """What ``torch.save`` has written, if it is tensors, numbers, strings and containers of them; on the CPU.

    Raises:
        ValueError: it is damaged, or would run code.
        OSError: it cannot be read.
    """
    _check_regular(path)
    with _refusing(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":  # how torch tells its two formats apart
                _check_archive(file)
            else:
                _check_stream(file)
        return torch.load(path, map_location="cpu", weights_only=True)


def remove_old_checkpoints(folder: str, keep: int, iteration: int) -> None:
    """Removes all but the ``keep`` newest numbered checkpoints up to ``iteration``.

    ``model_final.pth``, ``model_best.pth`` and what a later step has left stay, and so does what ``last_checkpoint``
    names.
    """
    last = _last(folder)
    past = [path for path in _numbered(Path(folder)) if _iteration(path) <= iteration]
    for path in past[: -keep or None]:
        if path.name != last:
            path.unlink(missing_ok=True)


def _last(folder: str | os.PathLike) -> str:
    """What ``last_checkpoint`` says; it may be of any length and content."""
    tag = os.path.join(folder, "last_checkpoint")
    if not os.path.isfile(tag):
        return ""
    with open(tag, encoding="utf-8", errors="replace") as file:
        return file.read(1024).strip()


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)]
    return sorted(paths, key=_iteration)


def _resumable(folder: Path) -> list[Path]:
    """The checkpoints of a folder that a run would go on from, newest first."""
    paths, final = _numbered(folder)[::-1], folder / "model_final.pth"
    if final.is_file():
        # Where MAX_ITER was raised after it, later ones have been written since.
        is_newest = not paths or final.stat().st_mtime >= paths[0].stat().st_mtime
        paths.insert(0 if is_newest else len(paths), final)
    return paths


def _iteration(path: Path) -> int:
    return int(_NUMBERED.fullmatch(path.name)[1])


def _listed(what: str, names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


def _check_weights(checkpoint: Any, filename: str) -> None:
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


def _check_regular(path: str) -> None:
    """A pipe would be waited for, and a device never ends."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no checkpoint {path!r}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is refused: it is no regular file")


@contextmanager
def _refusing(filename: str, why: str = "") -> Iterator[None]:
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
        raise OSError(e.errno, f"{filename} cannot be read ({e})") from e
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


def _load_arrays(path: str) -> Any:
    _check_regular(path)
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


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


def _zoo_checkpoint(data: dict[str, Any]) -> dict[str, Any]:
    """The two formats that upstream knows: Detectron2's own, and that of Detectron and Caffe2."""
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    model = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def _pycls_checkpoint(data: dict[str, Any]) -> dict[str, Any]:
    model = {name: value for name, value in data["model_state"].items() if not name.endswith("num_batches_tracked")}
    return {"model": model, "__author__": "pycls", "matching_heuristics": True}


class _AtomicWrites:
    """A path manager that lets files appear whole; those that are not on this machine as before."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def open(self, path: str, mode: str = "r", **kwargs):
        if mode in ("w", "wb") and "://" not in path:
            return atomic_write(path, mode)
        return self._path_manager.open(path, mode, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)
