"""Detectron2's hooks, made for runs that stop and go on."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_context
from detectron2.utils import comm

from ..data.loader import SKIPPED, too_many_bad_images
from ..files import atomic_write
from .checkpoint import SafeCheckpointer, remove_old_checkpoints
from .preemption import FinishedEarly, Preempted
from .worker_state import gather_worker_states, preserve_rng, unwrap_ddp

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Save each worker's own state, too, and end a preempted run; on all workers.

    Of the numbered checkpoints ``keep`` stay; 0: all. Detectron2's ``max_to_keep`` forgets those of before a resume.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, keep: int = 0):
        super().__init__(checkpointer, period)
        self._keep = keep

    def before_train(self) -> None:
        super().before_train()
        resumed_from, final = self.checkpointer.resumed_from, f"{self.file_prefix}_final.pth"
        target = os.path.join(self.checkpointer.save_dir, final)
        is_over = 0 < self.max_iter <= self.trainer.start_iter
        if comm.is_main_process() and is_over and resumed_from and not os.path.isfile(target):
            # Killed between the last step's two files, of which this is the second.
            with open(resumed_from, "rb") as source, atomic_write(target, "wb") as file:
                shutil.copyfileobj(source, file)
            self.checkpointer.tag_last_checkpoint(final)

    def after_step(self) -> None:
        trainer, guard = self.trainer, self.trainer.guard
        if guard.finishing:
            self.max_iter = trainer.iter + 1  # the step then saves it as the last
        is_last = trainer.iter + 1 >= self.max_iter
        stop = guard.stopping and not is_last  # the last step ends the run anyway
        if not stop and not is_last and (trainer.iter + 1) % self.period:
            return
        workers = gather_worker_states(trainer.model)
        if comm.is_main_process():
            self.step(trainer.iter, workers=workers, finished_early=guard.finishing)
            if stop:
                self.save_preempted(workers)
            if self._keep:
                remove_old_checkpoints(self.checkpointer.save_dir, self._keep, trainer.iter)
        if stop:
            raise Preempted
        if guard.finishing:
            raise FinishedEarly

    def save_preempted(self, workers: list[dict[str, Any]]) -> None:
        """Save the present step out of turn, if it is not saved yet; on the main worker."""
        iteration = self.trainer.iter
        name = f"{self.file_prefix}_{iteration:07d}"
        if self.checkpointer.get_checkpoint_file() != os.path.join(self.checkpointer.save_dir, f"{name}.pth"):
            self.checkpointer.save(name, iteration=iteration, workers=workers)
        logger.info(f"Interrupted after step {iteration + 1}, all saved: type the same command with --resume to go on")


class BestCheckpointer(hooks.BestCheckpointer):
    """Keep the best model in ``model_best.pth``, from which no run resumes, and remember how good it was.

    For the main worker, after :class:`EvalHook`. After ``patience`` (0: any number of) evaluations in a row without a
    new best training ends.
    """

    def __init__(self, eval_period: int, checkpointer: SafeCheckpointer, val_metric: str, patience: int = 0):
        super().__init__(eval_period, checkpointer, val_metric)
        self._patience = patience

    def before_train(self) -> None:
        # The file is the memory: a run may have been killed right after writing it, and before the next checkpoint.
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter and os.path.isfile(path):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                best = saved["best"]
                if (saved.get("run", ""), best.get("name")) == (self._checkpointer.run, self._val_metric):
                    self.best_metric, self.best_iter = float(best["metric"]), int(best["iteration"])
            except Exception as error:
                logger.warning(f"{path} cannot be read ({error!r}), and will be replaced by the next evaluation's")
        if self.trainer.start_iter and self._val_metric in self.trainer.storage.latest():
            self._best_checking()  # of an evaluation that EvalHook has made up for

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # as EvalHook
            super().after_train()

    def _best_checking(self):
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning(f"TEST.BEST_METRIC {self._val_metric} is no metric of the evaluation: no best model is kept")
            return
        metric, iteration = float(latest[0]), latest[1]
        if math.isfinite(metric) and (self.best_metric is None or metric > self.best_metric):
            best = {"name": self._val_metric, "metric": metric, "iteration": iteration}
            threshold = self.trainer.storage.latest().get("score_threshold")  # of the evaluation of these weights
            more = {"score_threshold": float(threshold[0])} if threshold and threshold[1] == iteration else {}
            self._checkpointer.save(self._file_prefix, tag=False, iteration=iteration, best=best, **more)
            logger.info(f"{self._file_prefix}.pth: {self._val_metric} {metric:.5f} at step {iteration}, the best yet")
            self.best_metric, self.best_iter = metric, iteration
        # Not counted but computed, so that an evaluation that is made up for does not count twice.
        best_iter = -1 if self.best_iter is None else self.best_iter
        if self._patience and (iteration - best_iter) // self._period >= self._patience:
            logger.info(f"{self._val_metric} has not improved in {self._patience} evaluations: training ends")
            self.trainer.guard.finish()


class EvalHook(hooks.EvalHook):
    """Evaluate; a run that is stopped in an evaluation is saved by ``checkpoints``, and makes up for it on resuming."""

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
        # Detectron2's evaluates after a last step that has failed, too: alone, while the other workers wait in it. Only
        # when all steps were made is one further counted than the last.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def _do_eval(self):
        trainer = self.trainer
        done = min(trainer.storage.iter + 1, trainer.max_iter)  # after the last step it is counted one further
        # Now, while all workers are here: a preempted evaluation is none of their collectives any more.
        workers = gather_worker_states(trainer.model)
        try:
            super()._do_eval()
        except Preempted:
            is_saved = done in (trainer.start_iter, trainer.max_iter)
            if comm.is_main_process() and not is_saved:
                self._checkpoints.save_preempted(workers)
            raise
        self._evaluated = done


class BadImages(HookBase):
    """Name and count the images that could not be read, as they reach the model; a worker may have ``limit``."""

    def __init__(self, limit: int):
        self._limit, self._reasons, self._handle = limit, {}, None

    def before_train(self) -> None:
        # Before the forward pass: a step may run the model several times, or break on what took an image's place.
        # The guard has its batch by then. A function, since a deep copy of the model would copy a method's trainer.
        self._handle = self.trainer.model.register_forward_pre_hook(lambda model, args: self._look(model))

    def after_train(self) -> None:
        if self._handle:  # Detectron2 comes here, too, when another hook has failed before the training
            self._handle.remove()

    def _look(self, model) -> None:
        if not model.training:
            return
        for name, reason in (skipped for image in self.trainer.guard.batch for skipped in image.get(SKIPPED, ())):
            if name not in self._reasons:
                self._reasons[name] = reason
                count = f"{len(self._reasons)} of at most {self._limit} (DATALOADER.MAX_BAD_IMAGES)"
                logger.warning(f"{name} cannot be read ({reason}); another image took its place. {count}")
        if len(self._reasons) > self._limit:
            raise ValueError(too_many_bad_images(list(self._reasons.items()), self._limit))

    def after_step(self) -> None:
        if self._reasons:
            self.trainer.storage.put_scalar("bad_images", len(self._reasons), smoothing_hint=False)


class TrainingPicture(HookBase):
    """Draw an image every ``VIS_PERIOD`` steps, its objects above what the model finds; for the main worker.

    Detectron2's RetinaNet has the key and draws nothing. Training goes on bit for bit as without.
    """

    def __init__(self, period: int):
        self._period = period

    def after_step(self) -> None:
        model, images = unwrap_ddp(self.trainer.model), self.trainer.guard.batch[:1]
        if self.trainer.iter % self._period or not images:
            return
        with preserve_rng(), inference_context(model), torch.no_grad():  # the colors are drawn by lot
            try:
                found = model([{"image": image["image"]} for image in images])
            except AssertionError:
                return  # Detectron2's boxes are never infinite; that training has broken is not for a picture to say
            model.visualize_training(images, [result["instances"] for result in found])
