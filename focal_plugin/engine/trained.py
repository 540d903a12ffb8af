"""A model with trained weights, all of them."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ..retinanet import FocalRetinaNet
from .checkpoint import SafeCheckpointer
from .trainer import FocalTrainer


def load_model(cfg: CfgNode) -> FocalRetinaNet:
    """The model of a config with the weights of ``MODEL.WEIGHTS``, all of them.

    Stock RetinaNet's weights and configs are a FocalRetinaNet's.

    Raises:
        ValueError: it is another meta-architecture, or the weights are not those of such a model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    name = cfg.MODEL.META_ARCHITECTURE
    if not issubclass(META_ARCH_REGISTRY.get(name), FocalRetinaNet):
        raise ValueError(f"MODEL.META_ARCHITECTURE {name} is neither FocalRetinaNet nor RetinaNet")
    model = FocalTrainer.build_model(cfg)
    _CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


class _CompleteCheckpointer(SafeCheckpointer):
    """Upstream only warns of weights that stay random, whose loss would be measured here."""

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        wrong = [key for key, *_ in incompatible.incorrect_shapes]
        wrong += [key for key in incompatible.missing_keys if not key.endswith("num_batches_tracked")]
        wrong = list(dict.fromkeys(wrong))  # fvcore lists what has another shape among the missing ones, too
        if wrong:
            raise ValueError(
                f"MODEL.WEIGHTS is no trained model of this config: it lacks, or has in another shape, {len(wrong)} of "
                f"its weights, such as {', '.join(wrong[:3])}"
            )
        return incompatible
