"""Focal loss and online hard example mining side by side on Detectron2's RetinaNet.

Importing the package registers ``FocalRetinaNet``, the heads and the digits data set; nothing else is touched.
"""

__version__ = "0.1.0"

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "detectron2":  # it is there, but something that it needs is not
        raise
    raise ImportError(
        "focal_plugin needs Detectron2, which is not on the package index under its own name. After torch and "
        "torchvision, install it with:\n"
        "  pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e2'"
    ) from None

from . import backbone as _backbone  # noqa: F401, registers a builder
from .config import add_focal_config, extend_config, get_config, load_config
from .data.digits import register_digits
from .heads import RETINANET_HEAD_REGISTRY, FocalHead, OHEMHead, build_retinanet_head
from .retinanet import FocalRetinaNet
from .ssd import SSDHead

register_digits()

__all__ = [
    "RETINANET_HEAD_REGISTRY",
    "FocalHead",
    "FocalRetinaNet",
    "OHEMHead",
    "SSDHead",
    "add_focal_config",
    "build_retinanet_head",
    "extend_config",
    "get_config",
    "load_config",
]
