"""The plugin's config keys, and safe loading of configs that use them."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg


def add_focal_config(cfg: CN) -> None:
    """Adds the keys of focal_plugin to ``cfg``; no upstream key or default is changed.

    A second call changes nothing. alpha, gamma and the prior stay upstream's ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``,
    ``FOCAL_LOSS_GAMMA`` and ``PRIOR_PROB``. The focal-loss paper does not say how its OHEM baseline was ranked,
    scoped, normalised and de-duplicated: each of those choices is a key of ``MODEL.OHEM``.
    """
    for name, defaults in (("FOCAL", _focal_defaults()), ("OHEM", _ohem_defaults())):
        node = cfg.MODEL.setdefault(name, CN())
        for key, value in defaults.items():
            node.setdefault(key, value)
    if "OPTIMIZER" not in cfg.SOLVER:
        # SGD (upstream's) or ADAMW (with the same keys, but MOMENTUM and NESTEROV), for FocalTrainer
        cfg.SOLVER.OPTIMIZER = "SGD"
    if "PRECISION" not in cfg.SOLVER.AMP:
        # What AMP.ENABLED computes in: float16 (upstream's, with a loss scaler) or bfloat16 (without), for FocalTrainer
        cfg.SOLVER.AMP.PRECISION = "float16"
    if "CHECKPOINTS_TO_KEEP" not in cfg.SOLVER:
        # Of the periodic checkpoints, how many to keep: the newest; 0: all. model_final and model_best stay
        cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    if "MAX_BAD_IMAGES" not in cfg.DATALOADER:
        # Images of a worker that cannot be read and are replaced by others, before training stops; 0: stop at the first
        cfg.DATALOADER.MAX_BAD_IMAGES = 10
    if "BEST_METRIC" not in cfg.TEST:
        # With EVAL_PERIOD > 0: the metric by which model_best.pth is kept, as in metrics.json; "": none
        cfg.TEST.BEST_METRIC = "bbox/AP"


def _focal_defaults() -> CN:
    node = CN()
    # Name in RETINANET_HEAD_REGISTRY of the head, which owns the classification loss: FocalHead, OHEMHead or yours
    node.HEAD = "FocalHead"
    # Classification loss: focal, or focal_star (FL* of the paper's appendix)
    node.LOSS = "focal"
    # Beta of FL*
    node.STAR_BETA = 1.0
    # One alpha a class, in [0, 1]; empty: FOCAL_LOSS_ALPHA for all
    node.CLASS_ALPHA = []
    # Positive anchors to divide the losses by: ema (upstream's running mean) or batch (this step's, as the paper)
    node.NORMALIZER = "ema"
    # Count the positives of all workers, so that N workers divide as one worker with the joint batch would
    node.NORMALIZER_SYNC = False
    # The best anchor of a box counts as its match only from this IoU on; 0.4 = Detectron v1, 0.0 = upstream
    node.MIN_LOW_QUALITY_IOU = 0.0
    return node


def _ohem_defaults() -> CN:
    node = CN()
    # Examples (anchors) kept, per image or per batch (SCOPE)
    node.BATCH_SIZE = 128
    # IoU over which an example is dropped in favour of a harder one; <= 0: no suppression
    node.NMS_THRESH = 0.5
    # Negatives kept for each positive; 0.0: positives and negatives compete, 3.0: the paper's 1:3 variant
    node.NEG_POS_RATIO = 0.0
    # BATCH_SIZE counts per image, or over the batch of one worker
    node.SCOPE = "image"
    # Score of an example: cls (its classification loss) or cls+box (the original OHEM)
    node.RANK_BY = "cls"
    # Boxes that the suppression compares: anchors (the original's undecoded RoIs) or predicted
    node.NMS_BOXES = "anchors"
    # Suppress only examples of the same label, background being one (the original OHEM)
    node.NMS_PER_LABEL = True
    # What divides the classification loss: selected (examples kept) or positives (all, by MODEL.FOCAL.NORMALIZER)
    node.NORMALIZER = "selected"
    # Positives whose boxes are trained, and what divides the box loss: selected (those kept) or positives (all)
    node.BOX_LOSS_ON = "selected"
    return node


def get_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """A config that came with focal_plugin (``"retina_focal.yaml"``), or any other YAML file, over the defaults.

    Args:
        config_file: a path, or a name under the installed ``configs`` folder; a path that exists goes first.
        opts: ``["KEY", "VALUE", ...]`` overrides.

    Raises:
        FileNotFoundError: no such file; the message lists the configs that there are.
        ValueError: see :func:`load_config`.
    """
    return load_config(find_config(config_file), opts)


def find_config(config_file: str) -> Path:
    """The path of a config file, as :func:`get_config` looks it up."""
    folder = config_dir()
    for path in (Path(config_file), folder / config_file):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml")))
    raise FileNotFoundError(f"no config file {str(config_file)!r}; focal_plugin has: {shipped}")


def config_dir() -> Path:
    """The folder of the YAML files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def load_config(config_file: Union[str, os.PathLike], opts: Sequence[str] = ()) -> CN:
    """Upstream's defaults, the plugin's, a YAML file (empty: none), then overrides; the result is not frozen.

    YAML is loaded safely: unlike Detectron2, which runs ``!!python`` tags in a config, this refuses them.

    Raises:
        FileNotFoundError: the file or a ``_BASE_`` of it is not there.
        ValueError: no valid YAML, a ``!!python`` tag, an unknown key or a value of the wrong type; the message
            names the file and the key.
    """
    cfg = get_cfg()
    add_focal_config(cfg)
    path = os.fspath(config_file)
    if path:
        _merge_file(cfg, path)
    _merge_opts(cfg, list(opts))
    return cfg


def _merge_file(cfg: CN, path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path!r}")
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: its _BASE_ {e.filename!r} is not there") from e
    except yaml.constructor.ConstructorError as e:
        raise ValueError(
            f"{path}: {e.problem} ({_where(e)}). Python tags can run any code and are refused: write the values as "
            "literals, e.g. anchor sizes as numbers (see configs/Base-FocalRetinaNet.yaml)"
        ) from e
    except yaml.YAMLError as e:
        raise ValueError(f"{path}: not valid YAML: {e}") from e
    except RecursionError as e:
        raise ValueError(f"{path}: its _BASE_ leads back to itself") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not valid YAML: not UTF-8 text") from e
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: {_explain(cfg, e)}") from e


def _merge_opts(cfg: CN, opts: list[str]) -> None:
    flags = [o for o in opts if isinstance(o, str) and o.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} comes after the first KEY VALUE pair; put all flags before them")
    if len(opts) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, got an odd number of words: {' '.join(map(str, opts))}")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            cfg.merge_from_list([key, _as_float(cfg, key, value)])
        except (AssertionError, AttributeError, KeyError, ValueError) as e:
            raise ValueError(f"override {key} {value}: {_explain(cfg, e, key)}") from e


def _as_float(cfg: CN, key: str, value: str) -> Union[str, float]:
    """``value`` as a float where the key holds one, so that ``FOCAL_LOSS_GAMMA 2`` is no type error."""
    node = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, CN) else None
    try:
        return float(value) if isinstance(node, float) else value
    except ValueError:
        return value


def _explain(cfg: CN, error: Exception, key: str = "") -> str:
    """yacs' error, with the nearest existing key for an unknown one and the spelling for a wrong number type."""
    message = str(error.args[0] if error.args else error)
    if isinstance(error, (KeyError, AssertionError)) and "Non-existent" in message:
        key = key or message.rsplit(" ", 1)[-1]
        near = difflib.get_close_matches(key, _all_keys(cfg), n=1, cutoff=0.6)
        return f"unknown config key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if "ype mismatch" in message and "'float'" in message and "'int'" in message:
        message += " (write a float with a point: 2.0)"
    if "ype mismatch" in message and "'tuple'" in message and "'str'" in message:
        message += ' (write a tuple: ("name",))'
    return message


def _all_keys(node: CN, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys += _all_keys(value, f"{prefix}{name}.") if isinstance(value, CN) else [prefix + name]
    return keys


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}" if mark else "unknown line"
