"""What the tools that run a trained model, without its data set, have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge

from ..config import find_config, load_config
from ..data import add_register_argument
from ..engine import load_checked_config


def add_model_arguments(parser: ArgumentParser) -> None:
    """``--config-file``, ``--register`` and ``--classes``: which model, and how its classes are called."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config of the model (required)")
    add_register_argument(parser, "for its class names")
    parser.add_argument("--classes", metavar="A,B,C", help="class names (default: those of DATASETS.TEST, or numbers)")


def load_inference_config(args: Namespace) -> tuple[CfgNode, str]:
    """The frozen, checked config of a command line, and the data set whose names the classes have ("": none).

    Unlike :func:`~focal_plugin.engine.load_checked_config` it asks for no data set: the machine that predicts seldom
    has one. ``cfg.DATASETS.TEST`` is empty.

    Args:
        args: with ``config_file``, ``register`` and ``opts`` (``KEY VALUE ...``).

    Raises:
        FileNotFoundError, ValueError: the config, a key, the weights; the message says which.
    """
    given = load_config(find_config(args.config_file), args.opts) if args.config_file else None
    if given is not None and not given.MODEL.WEIGHTS:
        raise ValueError("no trained weights: add MODEL.WEIGHTS path/to/model_final.pth")
    names = given.DATASETS.TEST if given is not None else ()
    opts = [*args.opts, "DATASETS.TEST", "()"]
    cfg = load_checked_config(Namespace(**{**vars(args), "opts": opts, "eval_only": True, "resume": False}))
    return cfg, names[0] if names else ""


def class_names(num_classes: int, dataset: str = "", given: str | None = None) -> list[str]:
    """How the classes 0..K-1 are called.

    Args:
        num_classes: K.
        dataset: a registered data set; one that is not, or says nothing of its classes, is no error.
        given: names with commas between them, which come before the data set's.

    Returns:
        K names; the numbers "0", "1", ... where nothing says more.

    Raises:
        ValueError: there are not K names in ``given`` or in the data set.
    """
    if given is not None:
        names, source = [name.strip() for name in given.split(",")], f"--classes {given}"
    else:
        metadata = MetadataCatalog.get(dataset) if dataset in MetadataCatalog.list() else None
        names, source = list(getattr(metadata, "thing_classes", None) or []), f"DATASETS.TEST {dataset}"
        if not names:
            return [str(number) for number in range(num_classes)]
    if len(names) != num_classes or not all(names):
        raise ValueError(
            f"{source} has {len(names)} class names and the model {num_classes} (MODEL.RETINANET.NUM_CLASSES): give "
            "as many with --classes A,B,C"
        )
    return names


def category_ids(num_classes: int, dataset: str = "") -> list[int]:
    """The ids that the data set's json gives the classes 0..K-1; 0..K-1 themselves where there is none."""
    metadata = MetadataCatalog.get(dataset) if dataset in MetadataCatalog.list() else None
    to_class: dict[int, int] = getattr(metadata, "thing_dataset_id_to_contiguous_id", None) or {}
    ids = {number: category for category, number in to_class.items()}
    return [ids.get(number, number) for number in range(num_classes)]


def resize_for_test(cfg: CfgNode) -> ResizeShortestEdge:
    """As ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST`` say."""
    return ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
