"""The plugin's config keys, and safe loading of configs that use them."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .yaml_safety import BASE_KEY, check_text, read_config_files

_TOO_NESTED = "a value is nested too deeply"
_EXTENSIONS: list[Callable[[CN], None]] = []


def add_focal_config(cfg: CN) -> None:
    """Adds the keys of focal_plugin to ``cfg``; no upstream key or default is changed.

    A second call changes nothing. alpha, gamma and the prior stay upstream's ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``,
    ``FOCAL_LOSS_GAMMA`` and ``PRIOR_PROB``. The focal-loss paper does not say how its OHEM baseline was ranked,
    scoped, normalised and de-duplicated: each of those choices is a key of ``MODEL.OHEM``.
    """
    for name, defaults in (("FOCAL", _focal_defaults()), ("OHEM", _ohem_defaults()), ("SSD", _ssd_defaults())):
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
    if "EARLY_STOP_PATIENCE" not in cfg.TEST:
        # Evaluations in a row without a new best after which training ends; 0: it goes on to SOLVER.MAX_ITER
        cfg.TEST.EARLY_STOP_PATIENCE = 0


def _focal_defaults() -> CN:
    node = CN()
    # Head, which owns the classification loss: FocalHead, OHEMHead, SSDHead or yours in RETINANET_HEAD_REGISTRY
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


def _ssd_defaults() -> CN:
    node = CN()
    # SSDHead: negatives kept for each positive, the hardest of each image
    node.NEG_POS_RATIO = 3.0
    return node


def extend_config(add_keys: Callable[[CN], None]) -> Callable[[CN], None]:
    """Lets :func:`load_config`, and so the tools, know keys of your own, such as those of a head: a decorator.

    Args:
        add_keys: is given the config with all defaults; adds keys to it.
    """
    if add_keys not in _EXTENSIONS:
        _EXTENSIONS.append(add_keys)
    return add_keys


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
        if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
            return path
    shipped = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml"))
    near = difflib.get_close_matches(str(config_file)[-100:], shipped, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    tables = [name for name in shipped if name.startswith("paper/")]
    names = ", ".join(name for name in shipped if name not in tables)
    raise FileNotFoundError(
        f"no config file {str(config_file)!r}{hint or ';'} focal_plugin has: {names}, and the {len(tables)} of paper/"
    )


def config_dir() -> Path:
    """The folder of the YAML files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def load_config(config_file: Union[str, os.PathLike], opts: Sequence[str] = ()) -> CN:
    """Upstream's defaults, the plugin's, a YAML file (empty: none), then overrides; the result is not frozen.

    YAML is loaded safely: unlike Detectron2, which runs ``!!python`` tags in a config and fetches a ``_BASE_`` over the
    network, this refuses them. It also refuses what Detectron2 would take in silence: a key given twice, and an
    ``OUTPUT_DIR`` from a file that leads out of the working directory (on the command line it may).

    Raises:
        FileNotFoundError: the file or a ``_BASE_`` of it is not there.
        ValueError: no valid YAML, a ``!!python`` tag, an unknown key or a value of the wrong type; the message
            names the file and the key.
    """
    cfg = get_cfg()
    add_focal_config(cfg)
    for add_keys in _EXTENSIONS:
        add_keys(cfg)
    path = os.fspath(config_file)
    if path.endswith(".py"):
        raise ValueError(
            f"{path} is a Python config, which tools/lazyconfig_train_net.py takes; here give the YAML file of the "
            "same recipe"
        )
    if path:
        default = cfg.OUTPUT_DIR
        _merge_file(cfg, path)
        if default != cfg.OUTPUT_DIR and "OUTPUT_DIR" not in opts[::2]:
            _check_output_dir(cfg.OUTPUT_DIR, path)
    _merge_opts(cfg, list(opts))
    return cfg


def _merge_file(cfg: CN, path: str) -> None:
    for file in read_config_files(path):
        place = path if file.path == path else f"{path}: its _BASE_ {file.path}"
        try:
            _check_groups(cfg, file.content)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from e
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        _check_numbers(cfg)
    except (RecursionError, MemoryError) as e:
        raise ValueError(f"{path}: {_TOO_NESTED}") from e
    except OSError as e:
        raise ValueError(f"{path}: it cannot be read any more ({e})") from e
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"{path}: {_explain(cfg, e)}") from e


def _check_groups(cfg: CN, content: dict, prefix: str = "") -> None:
    """Where a config has a group of keys a file has one, too: Detectron2 looks for old names before it checks types."""
    for key, value in content.items():
        if isinstance(cfg.get(key), CN):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{prefix}{key} is a group of keys, such as {prefix}{key}.{next(iter(cfg[key]), '...')}"
                )
            _check_groups(cfg[key], value, f"{prefix}{key}.")
    if not prefix and content.get("VERSION", 2) not in (1, 2):
        raise ValueError("VERSION must be 2, or 1 for a config with the names of early Detectron2")


def _check_numbers(cfg: CN) -> None:
    """Integers beyond 64 bits fit nowhere, and those of thousands of digits cannot even be printed."""
    waiting = _flat(cfg)
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{key}: a number that does not fit into 64 bits")


def _check_output_dir(folder: object, path: str) -> None:
    """A file from somebody else may choose a folder for its output, but not somewhere else than where one works."""
    if not isinstance(folder, str):
        raise ValueError(f"{path}: OUTPUT_DIR must be a path, got {folder!r}")
    here = os.path.realpath(os.getcwd())
    # Of what is there already symbolic links are followed, as they will be when it is written to.
    there = os.path.realpath(os.path.join(here, folder))
    if not os.path.isabs(folder) and os.path.commonpath([here, there]) != here:
        raise ValueError(
            f"{path}: OUTPUT_DIR {folder!r} leads out of the working directory, to {there}: give OUTPUT_DIR on the "
            "command line, or an absolute path"
        )


def _merge_opts(cfg: CN, opts: list[str]) -> None:
    flags = [o for o in opts if isinstance(o, str) and o.startswith("--")]
    if flags:
        raise ValueError(f"{_cut(flags[0])} comes after the first KEY VALUE pair; put all flags before them")
    if len(opts) % 2:
        raise ValueError(
            f"overrides must be KEY VALUE pairs, got an odd number of words: {_cut(' '.join(map(str, opts)))}"
        )
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            _check_override(cfg, key, value)
            cfg.merge_from_list([key, _as_float(cfg, key, value)])
            _check_numbers(cfg)
        except (RecursionError, MemoryError) as e:
            raise ValueError(f"override {_cut(key)} {_cut(value)}: {_TOO_NESTED}") from e
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"override {_cut(key)} {_cut(value)}: {_explain(cfg, e, key)}") from e


def _check_override(cfg: CN, key: object, value: object) -> None:
    """yacs would look for "cu" in the text "cuda" to see whether there is a MODEL.DEVICE.cu."""
    if not isinstance(key, str):
        raise ValueError(f"{key!r} is no key")
    for text in (key, value):
        if isinstance(text, str):
            check_text(text)
    node = cfg
    for name in key.split("."):
        if key != BASE_KEY and (not isinstance(node, CN) or name not in node):
            raise KeyError(f"Non-existent key: {key}")
        node = node.get(name)
    if isinstance(node, CN):
        raise ValueError(f"it is a group of keys, such as {key}.{next(iter(node), '...')}")


def _as_float(cfg: CN, key: str, value: str) -> Union[str, float]:
    """``value`` as a float where the key holds one, so that ``FOCAL_LOSS_GAMMA 2`` is no type error."""
    try:
        return float(value) if isinstance(lookup(cfg, key), float) else value
    except (TypeError, ValueError):
        return value


def _explain(cfg: CN, error: Exception, key: str = "") -> str:
    """yacs' error, with the nearest existing key for an unknown one and the spelling for a wrong number type."""
    message = str(error.args[0] if error.args else error)
    if isinstance(error, (KeyError, AssertionError)) and "Non-existent" in message:
        key = key or message.rsplit(" ", 1)[-1]
        near = difflib.get_close_matches(key[:200], all_keys(cfg), n=1, cutoff=0.6)
        if near == [key]:
            return f"unknown config key {key!r}: in a file it is written nested, one name a line"
        return f"unknown config key {_cut(key)}" + (f"; did you mean {near[0]}?" if near else "")
    if "ype mismatch" in message and "'float'" in message and "'int'" in message:
        message += " (write a float with a point: 2.0)"
    if "ype mismatch" in message and "'tuple'" in message and "'str'" in message:
        message += ' (write a tuple: ("name",))'
    return message


def all_keys(node: CN) -> list[str]:
    """The full names of the keys of a config, groups left out."""
    return [key for key, _ in _flat(node)]


def lookup(config: Mapping, key: str) -> Any:
    """Return what a dotted key, such as "MODEL.FOCAL.HEAD", names in a config or nested dicts; None where it is not."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _flat(node: CN, prefix: str = "") -> list[tuple[str, object]]:
    pairs = []
    for name, value in node.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, CN) else [(prefix + name, value)]
    return pairs


def unknown_keys(cfg: CN) -> list[str]:
    """Return a line for each key that was set in Python and that neither Detectron2 nor focal_plugin reads.

    ``cfg.BASE_LR = 0.1`` is no error: the attribute is new, and SOLVER.BASE_LR is what it was. Groups of keys that
    neither has are another project's, and not looked at.
    """
    known = load_config("")
    names, lines = all_keys(known), []
    for key in all_keys(cfg):
        group, _, name = key.rpartition(".")
        # COMPUTED_ is Detectron2's own prefix for values that code puts into a config.
        if key in names or name.startswith("COMPUTED_") or not isinstance(lookup(known, group) if group else known, CN):
            continue
        near = difflib.get_close_matches(key.upper(), names, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        lines.append(f"{key}: no such key in Detectron2 or focal_plugin, nothing of theirs reads it{hint}")
    return lines


def _cut(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
