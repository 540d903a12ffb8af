"""Write checkpoints whole or not at all, read them without running code, and find the newest good one."""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm

from ..files import TEMPORARY, atomic_write
from ..retinanet import FocalRetinaNet
from .safe_load import check_regular, check_weights, load_plain, load_zoo, refusing

logger = logging.getLogger(__name__)

_RUN = "run_id"


class SafeCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer for files that one need not trust, on machines that may stop at any moment.

    ``.pth`` files are loaded with ``weights_only=True``, model-zoo ``.pkl`` files only if they hold arrays. A file is
    written under another name, synced to the disk and renamed, and only then ``last_checkpoint`` names it.

    Attributes:
        resumed_from: the file that ``resume_or_load`` resumed from; empty if it did not.
        run: an id of the run that saves here.
        facts: what each checkpoint of this run says beside the states, such as the classes' names ("thing_classes").
        unfilled: after loading, the names of the parameters and buffers that have kept their values.
        skipped: the same in words, with what the file has and the model has not: a line for each kind.
    """

    resumed_from = run = ""
    facts: Mapping[str, Any] = {}
    unfilled: Sequence[str] = ()
    skipped: Sequence[str] = ()

    def begin_run(self, run: str | None = None) -> None:
        """Make the folder that of one run; what another has left there stays, but is not resumed from any more.

        ``run`` is the one that goes on here, "" if its checkpoints do not say; None: a new one begins.
        """
        self.run = uuid.uuid4().hex if run is None else run
        if not self.save_to_disk or not self.save_dir or "://" in self.save_dir:
            return
        folder = Path(self.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if run is None:
            for earlier in _resumable(folder)[:1]:
                logger.warning(
                    f"{folder} has checkpoints of an earlier run, such as {earlier.name}, which this one overwrites as "
                    "it goes. --resume would have gone on; another OUTPUT_DIR keeps both"
                )
            # A new run that is stopped before its first checkpoint is not to be taken for the old one.
            (folder / "last_checkpoint").unlink(missing_ok=True)
        if self.run:
            with atomic_write(folder / _RUN) as file:
                file.write(self.run)

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Save the model, what else the constructor was given, and ``kwargs``, plain values and tensors, to NAME.pth.

        With ``tag``, ``last_checkpoint`` then names it. An OSError, as of a full disk, leaves all earlier files whole.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        content = {key: value.state_dict() for key, value in {"model": self.model, **self.checkpointables}.items()}
        content |= {**self.facts, **kwargs, **({"run": self.run} if self.run else {})}
        logger.info(f"Saving checkpoint to {path}")
        try:
            with self._open_to_write(path, "wb") as file:
                torch.save(content, file)
            if tag:
                self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the disk's error
            cause = error if isinstance(error, OSError) else error.__context__ or error
            if not isinstance(cause, OSError) and "write" not in str(error):
                raise
            number, last = getattr(cause, "errno", None), _read(self.save_dir) or "none"
            what = f"could not write {path} ({cause}). The earlier checkpoints are whole, the last one is {last}"
            way_out = "Make room, or choose another OUTPUT_DIR, and type the same command with --resume"
            raise OSError(number, f"{what}. {way_out}") from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with self._open_to_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def _open_to_write(self, path: str, mode: str):
        return self.path_manager.open(path, mode) if "://" in path else atomic_write(path, mode)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest checkpoint that can be read, or else load ``path``: a collective call.

        Raises:
            ValueError: there are checkpoints to resume from, and none can be read; or ``path`` is refused.
            FileNotFoundError: a worker does not see the checkpoint that the first one resumes from.
        """
        self.resumed_from = ""
        if resume and "://" in self.save_dir:
            self.resumed_from = self.get_checkpoint_file()
        elif resume:
            keys, is_main = {"iteration", *self.checkpointables}, comm.is_main_process()
            found, why_none = comm.all_gather(newest_resumable(Path(self.save_dir), keys) if is_main else None)[0]
            if why_none:
                raise ValueError(why_none)
            seen = comm.all_gather(not found or os.path.isfile(found))
            if not all(seen):
                unseen = f"worker {seen.index(False)} does not see {found}"
                raise FileNotFoundError(f"{unseen}: OUTPUT_DIR must be on a disk that all machines share")
            self.resumed_from = found
        if self.resumed_from:
            return self.load(self.resumed_from)
        if resume:
            logger.warning(f"--resume: {self.save_dir} has no checkpoint to resume from; starting afresh")
        return self.load(path, checkpointables=[])

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """Load as DetectionCheckpointer does.

        Raises:
            ValueError: the file is damaged, would run code, or does not fit; the message names it.
            OSError: it is not there, or cannot be read.
        """
        path = os.fspath(path or "")
        if path and "://" not in path:
            check_regular(path.partition("?")[0])  # behind the "?" there may be Detectron2's matching_heuristics
        self._parsed_url_during_load = None  # which Detectron2 leaves behind after an error, and then stumbles over
        with refusing(path, "what it holds does not fit here"):
            return super().load(path, *args, **kwargs)

    def _load_file(self, filename):
        # Detectron2 would unpickle .pkl and .pyth files without looking.
        is_zoo = filename.endswith((".pkl", ".pyth"))
        checkpoint = load_zoo(filename) if is_zoo else super()._load_file(filename)
        check_weights(checkpoint, filename)
        return checkpoint

    def _torch_load(self, f):
        return load_plain(f)

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        # fvcore names what has another shape among the missing ones, too.
        other_shape = {name: f"{name} {there} -> {here}" for name, there, here in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in other_shape]
        self.unfilled, self.skipped = [*other_shape, *missing], []
        kinds = "other shape in the model", "not in the file", "not in the model"
        for what, names in zip(kinds, (list(other_shape.values()), missing, incompatible.unexpected_keys)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.skipped += [f"{len(names)} {what} ({', '.join(names[:3])}{more})"] if names else []


def build_trained_model(cfg: CfgNode) -> FocalRetinaNet:
    """Build the model of a config, which may be stock RetinaNet's, with the weights of ``MODEL.WEIGHTS``, all of them.

    Raises:
        ValueError: it is another meta-architecture, or the weights are not those of such a model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    name = cfg.MODEL.META_ARCHITECTURE
    if name == "RetinaNet":
        cfg.MODEL.META_ARCHITECTURE = name = "FocalRetinaNet"
    if not issubclass(META_ARCH_REGISTRY.get(name), FocalRetinaNet):
        raise ValueError(f"MODEL.META_ARCHITECTURE {name} is neither FocalRetinaNet nor RetinaNet")
    model = build_model(cfg)
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    # Detectron2 only warns of weights that stay random, whose loss would be measured here.
    wrong = [key for key in checkpointer.unfilled if not key.endswith("num_batches_tracked")]
    if wrong:
        lacks = f"it lacks, or has in another shape, {len(wrong)} of its weights, such as {', '.join(wrong[:3])}"
        raise ValueError(f"MODEL.WEIGHTS is no trained model of this config: {lacks}")
    return model


def newest_resumable(folder: Path, keys: Set[str]) -> tuple[str, str]:
    """Return the checkpoint to go on from, what ``last_checkpoint`` names or else the newest good one; or why none is.

    What a killed save has left is removed, what cannot be resumed from is logged; ``keys`` a checkpoint has to have.
    """
    for leftover in folder.glob(f"*.pth{TEMPORARY}"):
        with suppress(OSError):
            leftover.unlink()
    named, run, candidates = _read(folder), _read(folder, _RUN), _resumable(folder)
    tag, first = folder / "last_checkpoint", folder / (named or "?")
    if named and os.path.basename(named) == named and os.path.isfile(first):
        candidates = [first, *(path for path in candidates if path != first)]
    elif candidates or os.path.isfile(tag):
        what = f"names no checkpoint of that folder ({named!r})" if os.path.isfile(tag) else "is not there"
        logger.warning(f"{tag} {what}; looking for the newest one")
    problems = []
    for path in candidates:
        try:
            checkpoint = load_plain(str(path))
            check_weights(checkpoint, str(path))
            if not keys <= checkpoint.keys():
                raise ValueError(f"it holds weights only, no {' and no '.join(sorted(keys - checkpoint.keys()))}")
            if path.name == named or run in ("", checkpoint.get("run")):
                return str(path), ""
            logger.warning(f"cannot resume from {path}: it is of an earlier run in that folder")
        except (OSError, ValueError) as error:
            logger.warning(f"cannot resume from {path}: {error}")
            problems.append(f"\n  {path}: {error}")
    why = f"none of the checkpoints in {folder} can be resumed from:{''.join(problems)}"
    way_out = "To start afresh leave out --resume, with another OUTPUT_DIR to keep them"
    return "", f"{why}\n{way_out}" if problems else ""


def remove_old_checkpoints(folder: str, keep: int, iteration: int) -> None:
    """Remove numbered checkpoints up to ``iteration``, but the ``keep`` newest and what ``last_checkpoint`` names."""
    last = _read(folder)
    past = [path for number, path in _numbered(Path(folder)) if number <= iteration]
    for path in past[: -keep or None]:
        if path.name != last:
            path.unlink(missing_ok=True)


def _read(folder: str | os.PathLike, name: str = "last_checkpoint") -> str:
    path = Path(folder, name)
    return path.read_text(encoding="utf-8", errors="replace")[:1024].strip() if path.is_file() else ""


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(r"model_(\d+)\.pth", path.name), path) for path in folder.glob("model_*.pth")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _resumable(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that a run would go on from, newest first."""
    paths, final = [path for _, path in _numbered(folder)[::-1]], folder / "model_final.pth"
    if final.is_file():
        # Where MAX_ITER was raised after it, later ones have been written since.
        is_newest = not paths or final.stat().st_mtime >= paths[0].stat().st_mtime
        paths.insert(0 if is_newest else len(paths), final)
    return paths
