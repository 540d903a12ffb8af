"""Checkpoints that survive: written whole or not at all, read without running code, the newest good one found."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..files import TEMPORARY, atomic_write

logger = logging.getLogger(__name__)

# All that the pickles of the Detectron and Detectron2 model zoos are made of, beside Python's own containers.
_ARRAY_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}
_NUMBERED = re.compile(r"model_(\d+)\.pth")


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
        """
        self.skipped = []
        try:
            return super().load(path, *args, **kwargs)
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{path} is refused: what it holds does not fit here ({error!r})") from error
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
            leftover.unlink()  # was being written when the run was killed
        tag = folder / "last_checkpoint"
        named = tag.read_text(encoding="utf-8", errors="replace").strip() if tag.is_file() else ""
        candidates = _resumable(folder)
        first = folder / (named or "?")
        if named and os.path.basename(named) == named and first.is_file():
            candidates = [first, *(path for path in candidates if path != first)]
        elif candidates or tag.is_file():
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
        tag = Path(self.save_dir) / "last_checkpoint"
        return f", the last one is {tag.read_text(encoding='utf-8')}" if tag.is_file() else ""

    def _torch_load(self, f):
        (path, checkpoint), self._read = self._read, ("", None)
        if path == f:
            return checkpoint
        return load_plain(f)

    def _load_file(self, filename):
        with _refusing(filename):
            # What upstream is about to unpickle, it shall find harmless.
            if filename.endswith(".pkl"):
                with PathManager.open(filename, "rb") as f:
                    _ArrayUnpickler(f, encoding="latin1").load()
            elif filename.endswith(".pyth"):
                torch.load(filename, map_location="cpu", weights_only=True)
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
    with _refusing(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def remove_old_checkpoints(folder: str, keep: int, iteration: int) -> None:
    """Removes all but the ``keep`` newest numbered checkpoints up to ``iteration``.

    ``model_final.pth``, ``model_best.pth`` and what a later step has left stay, and so does what ``last_checkpoint``
    names.
    """
    tag = Path(folder) / "last_checkpoint"
    last = tag.read_text(encoding="utf-8").strip() if tag.is_file() else ""
    past = [path for path in _numbered(Path(folder)) if _iteration(path) <= iteration]
    for path in past[: -keep or None]:
        if path.name != last:
            path.unlink(missing_ok=True)


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
    if not isinstance(model, dict):
        raise ValueError(f"{filename} is refused: it holds no state_dict of a model")
    for name, value in model.items():
        is_numbers = isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")
        if not isinstance(name, str) or not is_numbers:
            raise ValueError(
                f"{filename} is refused: {name!r} in its state_dict is no tensor but {type(value).__name__}"
            )


@contextmanager
def _refusing(filename: str) -> Iterator[None]:
    """Turns whatever a damaged or hostile file raises (anything, from KeyError to EOFError) into one error."""
    try:
        yield
    except OSError:
        raise
    except ValueError as e:
        if " is refused: " in str(e):
            raise
        raise _refused(filename, e) from e
    except Exception as e:
        raise _refused(filename, e) from e


def _refused(filename: str, error: Exception) -> ValueError:
    return ValueError(
        f"{filename} is refused: it is damaged, or no plain checkpoint of tensors and arrays but one that would "
        f"run code when loaded. If you trust it, load it yourself and save its state_dict again. ({error!r})"
    )


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


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
