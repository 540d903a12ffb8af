"""Upstream's hooks, made for runs that stop and go on."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..data.loader import SKIPPED, too_many_bad_images
from ..scalars import flush_scalars
from .checkpoint import SafeCheckpointer, remove_old_checkpoints
from .interrupt import FinishedEarly, Interrupted
from .resume import gather_worker_states

logger = logging.getLogger(__name__)


class FlushScalars(HookBase):
    """Hands on what the model has logged in this step: before the writers write it."""

    def after_step(self) -> None:
        flush_scalars()


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Upstream's, with each worker's own state, for all workers: and the place where an interrupted run ends.

    Args:
        checkpointer, period: as upstream's.
        keep: how many numbered checkpoints; 0: all. Upstream's ``max_to_keep`` forgets those of before a resume.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, keep: int = 0):
        super().__init__(checkpointer, period)
        self._keep = keep

    def before_train(self) -> None:
        super().before_train()
        if comm.is_main_process() and 0 < self.max_iter <= self.trainer.start_iter:
            # Killed between the last step's two files, of which this is the second.
            self.checkpointer.save_again(f"{self.file_prefix}_final")

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.finishing:
            self.max_iter = trainer.iter + 1  # upstream's step then saves it as the last
        is_last = trainer.iter + 1 >= self.max_iter
        stop = trainer.stopping and not is_last  # the last step ends the run anyway
        if not stop and not is_last and (trainer.iter + 1) % self.period:
            return
        workers = gather_worker_states(trainer.model)
        if comm.is_main_process():
            self.step(trainer.iter, workers=workers, finished_early=trainer.finishing)
            if stop:
                self.save_interrupted(workers)
            if self._keep:
                remove_old_checkpoints(self.checkpointer.save_dir, self._keep, trainer.iter)
        if stop:
            raise Interrupted
        if trainer.finishing:
            raise FinishedEarly

    def save_interrupted(self, workers: list[dict[str, Any]]) -> None:
        """Saves the present step out of turn, if it is not saved yet; on the main worker."""
        iteration = self.trainer.iter
        name = f"{self.file_prefix}_{iteration:07d}"
        if self.checkpointer.get_checkpoint_file() != os.path.join(self.checkpointer.save_dir, f"{name}.pth"):
            self.checkpointer.save(name, iteration=iteration, workers=workers)
        logger.info(f"Interrupted after step {iteration + 1}, all saved: type the same command with --resume to go on")


class BestCheckpointer(hooks.BestCheckpointer):
    """Upstream's, but resuming does not start from the best model, and does not forget how good it was.

    For the main worker, after :class:`EvalHook`.

    Args:
        eval_period, checkpointer, val_metric: as upstream's.
        patience: evaluations in a row without a new best after which training ends; 0: it never does.
    """

    def __init__(self, eval_period: int, checkpointer: SafeCheckpointer, val_metric: str, patience: int = 0):
        super().__init__(eval_period, checkpointer, val_metric)
        self._patience = patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]

    def before_train(self) -> None:
        if self.trainer.start_iter:
            self._remember_file()
            if self._val_metric in self.trainer.storage.latest():
                self._best_checking()  # of an evaluation that EvalHook has made up for

    def after_train(self) -> None:
        # Upstream's does so after a last step that has failed, too.
        if _has_ended_well(self.trainer):
            super().after_train()

    def _best_checking(self):
        if self._val_metric not in self.trainer.storage.latest():
            super()._best_checking()  # which warns
            return
        whole = self._checkpointer
        self._checkpointer = _Untagged(whole, self)
        try:
            super()._best_checking()
        finally:
            self._checkpointer = whole
        # Not counted but computed, so that an evaluation that is made up for does not count twice.
        _, iteration = self.trainer.storage.latest()[self._val_metric]
        best_iter = -1 if self.best_iter is None else self.best_iter
        in_vain = (iteration - best_iter) // self._period if self._patience else 0
        if 0 < self._patience <= in_vain:
            self._logger.info(f"{self._val_metric} has not improved in {in_vain} evaluations: training ends")
            self.trainer.finish()

    def _remember_file(self) -> None:
        """A run that is killed after an evaluation has a better model in its folder than in its last checkpoint."""
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if not os.path.isfile(path):
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["best"]
            metric, iteration = float(saved["metric"]), int(saved["iteration"])
        except Exception as error:
            self._logger.warning(f"{path} cannot be read ({error!r}), and will be replaced by the next evaluation's")
            self.best_metric = self.best_iter = None
            return
        is_ours = saved.get("run") == self._checkpointer.run and saved.get("name") == self._val_metric
        if is_ours and (self.best_metric is None or self._compare(metric, self.best_metric)):
            self.best_metric, self.best_iter = metric, iteration


class _Untagged:
    """Saves as the best model: not the one to resume from, and with the metric that it is best in."""

    def __init__(self, checkpointer, hook: BestCheckpointer):
        self._checkpointer, self._hook = checkpointer, hook

    def save(self, name: str, **state: Any) -> None:
        metric, iteration = self._hook.trainer.storage.latest()[self._hook._val_metric]
        if math.isfinite(metric):
            best = {"name": self._hook._val_metric, "metric": float(metric), "iteration": iteration}
            best["run"] = self._checkpointer.run
            self._checkpointer.save(name, tag=False, best=best, **state)


class EvalHook(hooks.EvalHook):
    """Upstream's, but a run that is stopped in an evaluation makes up for it when it resumes.

    Args:
        eval_period, eval_function: as upstream's.
        checkpoints: saves what is interrupted while evaluating.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict], checkpoints: PeriodicCheckpointer):
        super().__init__(eval_period, eval_function)
        self._checkpoints = checkpoints
        self._evaluated = 0  # steps done at the last evaluation

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": self._evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._evaluated = state_dict["evaluated"]

    def before_train(self) -> None:
        done = self.trainer.start_iter
        # Checkpoints are written before the evaluation of the same step.
        is_owed = self._period > 0 and done and done % self._period == 0 and self._evaluated != done
        if is_owed and done < self.trainer.max_iter:
            self.trainer.storage.iter = done - 1
            self._do_eval()
            self.trainer.storage.iter = done

    def after_train(self) -> None:
        # Upstream's evaluates after a last step that has failed, too: alone, while the other workers wait in that step.
        if _has_ended_well(self.trainer):
            super().after_train()

    def _do_eval(self):
        trainer = self.trainer
        done = min(trainer.storage.iter + 1, trainer.max_iter)  # after the last step upstream counts one further
        # Now, while all workers are here: an interrupted evaluation is none of their collectives any more.
        workers = gather_worker_states(trainer.model)
        try:
            super()._do_eval()
        except Interrupted:
            is_saved = done in (trainer.start_iter, trainer.max_iter)
            if comm.is_main_process() and not is_saved:
                self._checkpoints.save_interrupted(workers)
            raise
        self._evaluated = done


def _has_ended_well(trainer) -> bool:
    """Whether all steps were made: only then upstream counts one further than the last."""
    return trainer.iter >= trainer.max_iter


class BadImages(HookBase):
    """Names, counts and limits the images that could not be read.

    Args:
        limit: how many files of this worker may be replaced by others.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._handle = None

    def before_train(self) -> None:
        self._handle = self.trainer.model.register_forward_pre_hook(self._look_at)

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def after_step(self) -> None:
        if self._reasons:
            self.trainer.storage.put_scalar("bad_images", len(self._reasons), smoothing_hint=False)

    def _look_at(self, model, args):
        batch = args[0] if model.training and args else ()
        for image in batch:
            for name, reason in image.get(SKIPPED, ()):
                self._take(name, reason)

    def _take(self, name: str, reason: str) -> None:
        if name in self._reasons:
            return
        self._reasons[name] = reason
        logger.warning(
            f"{name} cannot be read ({reason}); another image took its place. "
            f"{len(self._reasons)} of at most {self._limit} (DATALOADER.MAX_BAD_IMAGES)"
        )
        if len(self._reasons) > self._limit:
            raise ValueError(too_many_bad_images(list(self._reasons.items()), self._limit))
