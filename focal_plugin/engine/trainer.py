"""Detectron2's ``DefaultTrainer`` with COCO evaluation, safe checkpoints and exact resumption."""

from __future__ import annotations

import functools
import json
import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver import build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from ..config import NO_KEYS, unknown_keys
from ..data.loader import NamingMapper, build_train_loader, ignore_sigterm, stream_of
from ..eval import coco
from ..files import atomic_write
from ..scalars import flush_scalars
from .checkpoint import SafeCheckpointer
from .guard import NonFiniteGuard
from .hooks import BadImages, BestCheckpointer, EvalHook, PeriodicCheckpointer, TrainingPicture
from .preemption import FinishedEarly, Preempted, stop_requested
from .preflight import check_values, scale_to_workers
from .worker_state import preserve_rng, restore_worker_state, unwrap_ddp

logger = logging.getLogger(__name__)

DIVERGED = "diverged.json"
"""File in OUTPUT_DIR that says at which "iteration" the loss of the last training broke; there only if it did."""


class FocalTrainer(DefaultTrainer):
    """``DefaultTrainer`` that may be stopped at any moment and resumed, in bfloat16 and on several CPU workers, too.

    Attributes:
        unscaled_cfg: the config before ``SOLVER.REFERENCE_WORLD_SIZE`` was applied; ``cfg`` is the one trained with.
        guard: looks at each step, and knows whether training ends after it.
    """

    def __init__(self, cfg: CfgNode):
        if "FOCAL" not in cfg.MODEL:
            raise ValueError(NO_KEYS)
        check_values(cfg, ("SOLVER.OPTIMIZER", "SOLVER.AMP.PRECISION"))
        self.unscaled_cfg = cfg
        cfg = scale_to_workers(cfg, comm.get_world_size())
        create_ddp_model = defaults.create_ddp_model
        if cfg.MODEL.DEVICE == "cpu":  # DefaultTrainer would give DistributedDataParallel a GPU's index
            defaults.create_ddp_model = functools.partial(create_ddp_model, device_ids=None)
        try:
            super().__init__(cfg)
        finally:
            defaults.create_ddp_model = create_ddp_model
        if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16":
            self._trainer.precision = torch.bfloat16
            # bfloat16 has float32's range: no gradient underflows, and a scale would only cost its steps.
            self._trainer.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)
        for line in unknown_keys(self.unscaled_cfg) if comm.is_main_process() else ():
            logger.warning(line)
        self.guard = NonFiniteGuard(cfg, self.model)
        # Of the inner trainer, which alone calls after_backward, when the weights are still those of before the step.
        self._trainer.register_hooks([self.guard])
        self._worker_states = None

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the newest whole checkpoint (a ValueError, if it is past ``MAX_ITER``), or load the weights."""
        if not isinstance(self.checkpointer, SafeCheckpointer):
            super().resume_or_load(resume=resume)  # a subclass has put its own there
            return
        rest = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.checkpointer.begin_run(rest.get("run", "") if self.checkpointer.resumed_from else None)
        if not self.checkpointer.resumed_from:
            return
        self.start_iter = self.iter + 1
        if rest.get("finished_early") and self.cfg.TEST.EARLY_STOP_PATIENCE:
            self.max_iter = self.start_iter
        if self.start_iter > self.max_iter:
            done = f"{self.checkpointer.resumed_from} has done {self.start_iter} steps of {self.max_iter}"
            raise ValueError(f"{done}: raise SOLVER.MAX_ITER, or start afresh in another OUTPUT_DIR")
        self._worker_states = rest.get("workers", [])

    def train(self) -> dict | None:
        if self._worker_states is not None:
            # As late as possible: what was built since must not have drawn from the generators.
            restore_worker_state(self.model, self._worker_states)
            self._worker_states = None
        diverged = Path(self.cfg.OUTPUT_DIR, DIVERGED)
        if comm.is_main_process():
            diverged.unlink(missing_ok=True)  # of an earlier attempt
        try:
            return super().train()
        except FinishedEarly:
            return None
        except FloatingPointError as error:  # of the guard, or of Detectron2 in a subclass that steps in its own way
            if comm.is_main_process():
                with suppress(OSError), atomic_write(diverged) as file:
                    json.dump({"iteration": self.iter, "message": str(error).partition("\n")[0]}, file)
            raise

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
        return ignore_sigterm(defaults.build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str = "") -> COCOEvaluator:
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return _Evaluator(dataset_name, tasks=("bbox",), output_dir=folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None) -> dict:
        # Training goes on with the random numbers that it would have drawn without.
        with preserve_rng():
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        solver, clip, unclipped = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS, cfg.clone()
        unclipped.defrost()
        unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = build_optimizer(unclipped, model)
        if solver.OPTIMIZER == "ADAMW":
            groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, foreach=True)
        if not clip.ENABLED or clip.CLIP_TYPE != "norm":
            return maybe_add_gradient_clipping(cfg, optimizer)
        optimizer.register_step_pre_hook(functools.partial(_clip_by_norm, clip.CLIP_VALUE, clip.NORM_TYPE))
        return optimizer

    def build_hooks(self) -> list[HookBase | None]:
        cfg, is_main = self.cfg, comm.is_main_process()
        can_draw = isinstance(unwrap_ddp(self.model), DenseDetector)  # others draw by themselves, or not at all
        # Here and not in the constructor: DefaultTrainer makes its checkpointer right before the hooks that keep it.
        self.checkpointer = SafeCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_TO_KEEP
        checkpoints = PeriodicCheckpointer(self.checkpointer, period, keep)
        classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") if cfg.DATASETS.TRAIN else None
        if classes:  # so that a prediction can name them where the data set is not
            self.checkpointer.facts = {"thing_classes": list(map(str, classes))}
        best = None
        if is_main and cfg.TEST.EVAL_PERIOD > 0 and cfg.TEST.BEST_METRIC:
            metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
            if len(names) > 1 and not metric.startswith(tuple(f"{name}/" for name in names)):
                metric = f"{names[0]}/{metric}"  # as the storage calls it
            best = BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric, cfg.TEST.EARLY_STOP_PATIENCE)
        theirs = {type(hook): hook for hook in super().build_hooks()}
        return [
            BadImages(cfg.DATALOADER.MAX_BAD_IMAGES),
            TrainingPicture(cfg.VIS_PERIOD) if is_main and cfg.VIS_PERIOD > 0 and can_draw else None,
            theirs[hooks.IterationTimer],
            theirs[hooks.LRScheduler],
            theirs.get(hooks.PreciseBN),  # before a checkpoint, which shall hold its statistics
            checkpoints,  # before an evaluation, which may fail; on all workers, Detectron2's on the main one only
            EvalHook(cfg.TEST.EVAL_PERIOD, theirs[hooks.EvalHook]._func, checkpoints),
            best,
            theirs.get(hooks.PeriodicWriter),  # on the main one
        ]

    def after_step(self) -> None:
        if self.guard.looked_at != self.iter:
            self.guard.exchange()  # a subclass makes its steps in another way, without after_backward
        flush_scalars()  # before the writers write
        super().after_step()

    def state_dict(self) -> dict:
        # DefaultTrainer keeps the state of the first hook of a class only.
        state = {**super().state_dict(), "hooks": {k: h.state_dict() for k, h in self._named_hooks() if h.state_dict()}}
        stream = stream_of(self.data_loader)
        if stream is not None:
            batches = stream.batch + self.iter + 1 - self.start_iter
            state["data"] = {"seed": stream.seed, "images": batches * self.cfg.SOLVER.IMS_PER_BATCH}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        trainer = state_dict["_trainer"]
        if isinstance(self._trainer, AMPTrainer) and not trainer.get("grad_scaler"):
            # Saved in float32 or bfloat16, which have no loss scale: float16 starts from its own.
            trainer = {**trainer, "grad_scaler": self._trainer.grad_scaler.state_dict()}
        super().load_state_dict({**state_dict, "_trainer": trainer, "hooks": {}})
        named = dict(self._named_hooks())
        for name, state in state_dict.get("hooks", {}).items():
            if hasattr(named.get(name), "load_state_dict"):
                named[name].load_state_dict(state)
            else:
                logger.warning(f"the checkpoint has a state for {name}, a hook that is not here or keeps none")
        stream, data = stream_of(self.data_loader), state_dict.get("data")
        if stream is None or data is None:
            logger.warning("the training images start again from the first: the checkpoint or the loader has no order")
        else:
            stream.start_from(data["images"] // self.cfg.SOLVER.IMS_PER_BATCH, data["seed"])

    def _named_hooks(self):
        """Yield each hook with a name of its own, its class for the first of a class."""
        seen = Counter()
        for hook in self._hooks:
            name = type(hook).__qualname__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name} {seen[name]}"), hook


class _Evaluator(COCOEvaluator):
    """A ``COCOEvaluator`` that a request to stop ends between two images, on all workers alike."""

    def process(self, inputs, outputs):
        if stop_requested():
            # The other workers come here at their next image, or to evaluate().
            comm.all_gather(True)
            raise Preempted
        super().process(inputs, outputs)

    def evaluate(self, img_ids=None):
        if any(comm.all_gather(stop_requested())):
            raise Preempted
        return super().evaluate(img_ids)

    def _eval_predictions(self, predictions, img_ids=None):
        """Store the best score threshold, or explain an AP of 0 or NaN; ``predictions`` are those of all workers."""
        super()._eval_predictions(predictions, img_ids)
        if not self._do_evaluation:
            return
        found = [detection for image in predictions for detection in image["instances"]]
        if self._results["bbox"]["AP"] > 0:
            if has_event_storage():  # in training
                threshold = coco.best_threshold(self._coco_api, found)
                get_event_storage().put_scalar("score_threshold", threshold, smoothing_hint=False)
            return
        scores, objects = [detection["score"] for detection in found], self._coco_api.anns.values()
        detected, annotated = (sorted({x["category_id"] for x in xs}) for xs in (found, objects))
        best = f", scores {min(scores):.3f} to {max(scores):.3f}" if scores else ""
        logger.warning(
            f"AP is 0: {len(found)} detections{best} for {len(objects)} objects. Category ids detected: "
            f"{detected or 'none'}, annotated: {annotated}. Is it too early in training, were weights skipped (see the "
            "log's start), is MODEL.RETINANET.SCORE_THRESH_TEST too high, or was training's order of classes another?"
        )


@torch.no_grad()
def _clip_by_norm(max_norm: float, norm_type: float, optimizer: torch.optim.Optimizer, *_) -> None:
    # As Detectron2, which calls clip_grad_norm_ once a parameter: a tenth of the step of a small model.
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return
    norms = torch.stack([torch.linalg.vector_norm(grad, norm_type).to(grads[0].device) for grad in grads])
    for grad, factor in zip(grads, (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()):
        grad.mul_(factor.to(grad.device))
