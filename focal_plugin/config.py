"""The plugin's config keys, and safe loading of configs that use them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .config_yaml import all_keys, check_output_dir, did_you_mean, lookup, merge_file, merge_overrides, unshare
from .files import printable

_EXTENSIONS: list[Callable[[CN], None]] = []

NO_KEYS = "the config has no MODEL.FOCAL: call focal_plugin.add_focal_config(cfg) after get_cfg()"


def add_focal_config(cfg: CN) -> None:
    """Add the keys of focal_plugin to ``cfg``; no key or default of Detectron2 is changed.

    alpha, gamma and the prior stay ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``, ``FOCAL_LOSS_GAMMA`` and ``PRIOR_PROB``. What
    the focal-loss paper leaves open about its OHEM baseline is a key of ``MODEL.OHEM`` each.
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

    # SGD, or ADAMW, which reads the same keys except MOMENTUM and NESTEROV; for FocalTrainer
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
    """Let :func:`load_config`, and so the tools, know keys that ``add_keys(defaults)`` adds: a decorator."""
    if add_keys not in _EXTENSIONS:
        _EXTENSIONS.append(add_keys)
    return add_keys


def get_config(config_file: str | os.PathLike, opts: Sequence[str] = ()) -> CN:
    """Load a config that came with focal_plugin (``"retina_focal.yaml"``), or any other YAML file, over the defaults.

    Unlike Detectron2, it runs no ``!!python`` tag and fetches no ``_BASE_``, and it refuses what Detectron2 takes in
    silence: a key given twice, and an ``OUTPUT_DIR`` in a file that leads out of the working directory.

    Args:
        config_file: as :func:`find_config` takes it; empty for the defaults alone.
        opts: ``["KEY", "VALUE", ...]`` overrides.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or has no valid YAML, an unknown key or a value of the
            wrong type; the message names the file and the key.
    """
    cfg = get_cfg()
    for add_keys in (add_focal_config, *_EXTENSIONS):
        add_keys(cfg)
    path = os.fspath(config_file) and str(find_config(config_file))
    if path.endswith(".py"):
        way_out = "which tools/lazyconfig_train_net.py takes; here give the YAML file of the same recipe"
        raise ValueError(f"{path} is a Python config, {way_out}")
    default = cfg.OUTPUT_DIR
    if path:
        merge_file(cfg, path)
    if default != cfg.OUTPUT_DIR and "OUTPUT_DIR" not in opts[::2]:
        check_output_dir(cfg, path)
    merge_overrides(cfg, list(opts))
    return unshare(cfg)


load_config = get_config  # for what does not come with focal_plugin, it reads better


def find_config(config_file: str | os.PathLike) -> Path:
    """Return a config file's path, as given or in the installed ``configs``; its FileNotFoundError lists those."""
    folder = config_dir()
    for path in (Path(config_file), folder / config_file):
        if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
            return path
    shipped = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.yaml"))
    hints = [f"did you mean {name}? " for name in difflib.get_close_matches(str(config_file)[-200:], shipped, n=1)]
    names = "".join(f"{name}, " for name in shipped if not name.startswith("paper/"))
    there_are = f"{''.join(hints)}focal_plugin has {names}and those of paper/"
    raise FileNotFoundError(f"no config file {printable(str(config_file), 300)}; {there_are}")


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def unknown_keys(cfg: CN) -> list[str]:
    """Return a line for each key that was set in Python, where it is no error, and that nothing here reads.

    Groups of keys that neither Detectron2 nor focal_plugin has are another project's, and not looked at.
    """
    known, unread = load_config(""), "no such key in Detectron2 or focal_plugin, nothing of theirs reads it"
    names, lines = all_keys(known), []
    for key in set(all_keys(cfg)).difference(names):
        group, _, name = key.rpartition(".")
        # COMPUTED_ is Detectron2's own prefix for values that code puts into a config.
        if not name.startswith("COMPUTED_") and (not group or isinstance(lookup(known, group), CN)):
            lines.append(f"{key}: {unread}{did_you_mean(key, names)}")
    return sorted(lines)
