"""The plugin's config keys, and safe loading of configs that use them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import downgrade_config, get_cfg, upgrade_config

from .config_yaml import check_text, read_config
from .files import printable

# What yacs raises for a key or value that cannot be, or one whose literal Python cannot parse.
_YACS_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError, MemoryError)
_EXTENSIONS: list[Callable[[CN], None]] = []


def add_focal_config(cfg: CN) -> None:
    """Add the keys of focal_plugin to ``cfg``; no key or default of Detectron2 is changed.

    A second call changes nothing. alpha, gamma and the prior stay ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``,
    ``FOCAL_LOSS_GAMMA`` and ``PRIOR_PROB``. The focal-loss paper does not say how its OHEM baseline was ranked,
    scoped, normalized and de-duplicated: each of those choices is a key of ``MODEL.OHEM``.
    """
    focal = cfg.MODEL.setdefault("FOCAL", CN())
    # Head, which owns the classification loss: FocalHead, OHEMHead, SSDHead or yours in RETINANET_HEAD_REGISTRY
    focal.setdefault("HEAD", "FocalHead")
    # Classification loss: focal, or focal_star (FL* of the paper's appendix)
    focal.setdefault("LOSS", "focal")
    # Beta of FL*
    focal.setdefault("STAR_BETA", 1.0)
    # One alpha a class, in [0, 1]; empty: FOCAL_LOSS_ALPHA for all
    focal.setdefault("CLASS_ALPHA", [])
    # Positive anchors to divide the losses by: ema (Detectron2's running mean) or batch (this step's, as the paper)
    focal.setdefault("NORMALIZER", "ema")
    # Count the positives of all workers, so that N workers divide as one worker with the joint batch would
    focal.setdefault("NORMALIZER_SYNC", False)
    # The best anchor of a box counts as its match only from this IoU on; 0.4 = Detectron v1, 0.0 = Detectron2
    focal.setdefault("MIN_LOW_QUALITY_IOU", 0.0)

    ohem = cfg.MODEL.setdefault("OHEM", CN())
    # Examples (anchors) kept, per image or per batch (SCOPE)
    ohem.setdefault("BATCH_SIZE", 128)
    # IoU over which an example is dropped in favor of a harder one; <= 0: no suppression
    ohem.setdefault("NMS_THRESH", 0.5)
    # Negatives kept for each positive; 0.0: positives and negatives compete, 3.0: the paper's 1:3 variant
    ohem.setdefault("NEG_POS_RATIO", 0.0)
    # BATCH_SIZE counts per image, or over the batch of one worker
    ohem.setdefault("SCOPE", "image")
    # Score of an example: cls (its classification loss) or cls+box (the original OHEM)
    ohem.setdefault("RANK_BY", "cls")
    # Boxes that the suppression compares: anchors (the original's undecoded RoIs) or predicted
    ohem.setdefault("NMS_BOXES", "anchors")
    # Suppress only examples of the same label, background being one (the original OHEM)
    ohem.setdefault("NMS_PER_LABEL", True)
    # What divides the classification loss: selected (examples kept) or positives (all, by MODEL.FOCAL.NORMALIZER)
    ohem.setdefault("NORMALIZER", "selected")
    # Positives whose boxes are trained, and what divides the box loss: selected (those kept) or positives (all)
    ohem.setdefault("BOX_LOSS_ON", "selected")

    ssd = cfg.MODEL.setdefault("SSD", CN())
    # SSDHead: negatives kept for each positive, the hardest of each image
    ssd.setdefault("NEG_POS_RATIO", 3.0)

    # SGD, or ADAMW with the same keys but MOMENTUM and NESTEROV, for FocalTrainer
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    # What AMP.ENABLED computes in: float16 (with a loss scaler) or bfloat16 (without), for FocalTrainer
    cfg.SOLVER.AMP.setdefault("PRECISION", "float16")
    # How many of the periodic checkpoints to keep, the newest; 0: all. model_final and model_best stay
    cfg.SOLVER.setdefault("CHECKPOINTS_TO_KEEP", 0)
    # Images of a worker that cannot be read and are replaced by others, before training stops; 0: stop at the first
    cfg.DATALOADER.setdefault("MAX_BAD_IMAGES", 10)
    # With EVAL_PERIOD > 0: the metric by which model_best.pth is kept, as in metrics.json; "": none
    cfg.TEST.setdefault("BEST_METRIC", "bbox/AP")
    # Evaluations in a row without a new best after which training ends; 0: it goes on to SOLVER.MAX_ITER
    cfg.TEST.setdefault("EARLY_STOP_PATIENCE", 0)


def extend_config(add_keys: Callable[[CN], None]) -> Callable[[CN], None]:
    """Let :func:`load_config`, and so the tools, know keys of your own, such as those of a head: a decorator.

    Args:
        add_keys: is given the config with all defaults; adds keys to it.
    """
    if add_keys not in _EXTENSIONS:
        _EXTENSIONS.append(add_keys)
    return add_keys


def get_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """Load a config that came with focal_plugin (``"retina_focal.yaml"``), or any other YAML file, over the defaults.

    Args:
        config_file: a path, or a name under the installed ``configs`` folder; a path that exists goes first.
        opts: ``["KEY", "VALUE", ...]`` overrides.

    Raises:
        FileNotFoundError: no such file; the message lists the configs that there are.
        ValueError: see :func:`load_config`.
    """
    return load_config(find_config(config_file), opts)


def find_config(config_file: str) -> Path:
    """Return the path of a config file, looked up as :func:`get_config` does."""
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
    """Return the folder of the YAML files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def load_config(config_file: str | os.PathLike, opts: Sequence[str] = ()) -> CN:
    """Load a YAML file over the defaults of Detectron2 and of the plugin.

    YAML is loaded safely: Detectron2 runs ``!!python`` tags in a config and fetches a ``_BASE_`` over the network; this
    refuses both. It also refuses what Detectron2 takes in silence: a key given twice, and an ``OUTPUT_DIR`` from a file
    that leads out of the working directory (on the command line it may).

    Args:
        config_file: a path; empty for the defaults alone.
        opts: ``["KEY", "VALUE", ...]`` overrides.

    Returns:
        the config, not frozen.

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
        content, default = read_config(path), cfg.OUTPUT_DIR
        try:
            _merge_content(cfg, content)
        except _YACS_ERRORS as e:
            raise ValueError(f"{path}: {_explain(cfg, e)}") from e
        if default != cfg.OUTPUT_DIR and "OUTPUT_DIR" not in opts[::2]:
            _check_output_dir(cfg.OUTPUT_DIR, path)
    _merge_opts(cfg, list(opts))
    return cfg


def _merge_content(cfg: CN, content: dict[str, Any]) -> None:
    """Merge as ``CfgNode.merge_from_file`` does, which knows the names of early Detectron2 (version 1)."""
    has_old_names = any(lookup(content, key) is not None for key in ("MODEL.WEIGHT", "TEST.AUG_ON"))
    version = content.get("VERSION", 1 if has_old_names else cfg.VERSION)
    if version not in (1, 2):
        raise ValueError("VERSION must be 2, or 1 for a config with the names of early Detectron2")
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(CN(content))
    else:
        old = downgrade_config(cfg, to_version=version)
        old.merge_from_other_cfg(CN(content))
        cfg.clear()
        cfg.update(upgrade_config(old))


def _check_output_dir(folder: object, path: str) -> None:
    """Refuse a folder outside of the working directory: a file from somebody else may choose one only inside."""
    if not isinstance(folder, str):
        raise ValueError(f"{path}: OUTPUT_DIR must be a path, got {printable(folder)}")
    here = os.path.realpath(os.getcwd())
    # Of what is there already symbolic links are followed, as they will be when it is written to.
    there = os.path.realpath(os.path.join(here, folder))
    if not os.path.isabs(folder) and os.path.commonpath([here, there]) != here:
        raise ValueError(
            f"{path}: OUTPUT_DIR {printable(folder)} leads out of the working directory, to {printable(there, 300)}: "
            "give OUTPUT_DIR on the command line, or an absolute path"
        )


def _merge_opts(cfg: CN, opts: list[str]) -> None:
    flags = [o for o in opts if isinstance(o, str) and o.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]:.100} comes after the first KEY VALUE pair; put all flags before them")
    if len(opts) % 2:
        words = " ".join(map(str, opts))
        raise ValueError(f"overrides must be KEY VALUE pairs, got an odd number of words: {printable(words, 200)}")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            _merge_override(cfg, key, value)
        except _YACS_ERRORS as e:
            words = printable(f"{key} {value}", 200)
            raise ValueError(f"override {words}: {_explain(cfg, e)}") from e


def _merge_override(cfg: CN, key: str, value: object) -> None:
    # Not left to yacs, which would look for "cu" in the text "cuda" to see whether there is a MODEL.DEVICE.cu.
    if key not in all_keys(cfg) and not isinstance(lookup(cfg, str(key)), CN):
        raise KeyError(f"Non-existent key: {key}")
    if isinstance(value, str):
        check_text(value)
        if isinstance(lookup(cfg, key), float):
            with suppress(ValueError):  # FOCAL_LOSS_GAMMA 2 is no type error
                value = float(value)
    cfg.merge_from_list([key, value])


def _explain(cfg: CN, error: Exception) -> str:
    """Return yacs' error with the nearest existing key for an unknown one, and the spelling for a wrong type."""
    if isinstance(error, (RecursionError, MemoryError)):
        return "a value is nested too deeply"
    message = str(error.args[0] if error.args else error)
    unknown = re.search(r"^Non-existent.* key: (.*)", message, re.DOTALL)
    if unknown:
        near = difflib.get_close_matches(unknown[1][:200], all_keys(cfg), n=1, cutoff=0.6)
        if near == [unknown[1]]:
            return f"unknown config key {near[0]!r}: in a file it is written nested, one name a line"
        return f"unknown config key {printable(unknown[1], 200)}" + (f"; did you mean {near[0]}?" if near else "")
    # Not with the values, which may be of any length and content.
    message = re.sub(r"^(Type mismatch \(.*?\)) with values .* for", r"\1 for", message, flags=re.DOTALL)
    if ".CfgNode'> vs." in message:
        key = message.rpartition(" ")[2]
        return f"{key} is a group of keys, such as {key}.{next(iter(lookup(cfg, key) or ()), '...')}"
    if "'float'> vs. <class 'int'" in message:
        message += " (write a float with a point: 2.0)"
    if "'tuple'> vs. <class 'str'" in message:
        message += ' (write a tuple: ("name",))'
    return message


def all_keys(node: CN, prefix: str = "") -> list[str]:
    """Return the full names of the keys of a config, groups left out."""
    keys = []
    for name, value in node.items():
        keys += all_keys(value, f"{prefix}{name}.") if isinstance(value, CN) else [prefix + name]
    return keys


def lookup(config: Mapping, key: str) -> Any:
    """Return what a dotted key, such as "MODEL.FOCAL.HEAD", names in a config or nested dicts; None where it is not."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


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
