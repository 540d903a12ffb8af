"""Python configs (Detectron2's LazyConfig): found, loaded, and overridden without misspelt keys.

Such a config is code and is run; :func:`focal_plugin.load_config` reads YAML, which is not.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from detectron2.config import LazyConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import config_dir

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_OPTIONS = [
    "output_dir",
    "init_checkpoint",
    "max_iter",
    "amp.enabled",
    "ddp",
    "checkpointer.period",
    "eval_period",
    "log_period",
    "device",
]
_NOT_THERE = object()


def find_lazy_config(config_file: str) -> str:
    """The path of a Python config: one that exists, or a name under the installed ``configs`` folder."""
    folder = config_dir()
    shipped = ", ".join(sorted(path.relative_to(folder).as_posix() for path in folder.glob("lazy/*.py")))
    if not config_file:
        raise ValueError(f"no config: give --config-file; focal_plugin has: {shipped}")
    if not config_file.endswith(".py"):
        raise ValueError(f"{config_file} is no Python config (.py): tools/train_net.py takes YAML")
    for path in (config_file, str(folder / config_file)):
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"no config file {config_file!r}; focal_plugin has: {shipped}")


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Runs a Python config, and applies ``key=value`` overrides in Hydra's grammar; ``+key=value`` adds a new key.

    Unlike upstream's ``LazyConfig.apply_overrides`` alone, which adds a misspelt key in silence.

    Raises:
        ValueError: the config fails or lacks a part, an unknown key, or a value of another kind.
    """
    try:
        cfg = LazyConfig.load(config_file)
    except Exception as e:  # it is a program: anything
        raise ValueError(f"{config_file}: {type(e).__name__}: {e.__cause__ or e}") from e
    missing = [name for name in PARTS if name not in cfg] or [
        key for key in map("train.{}".format, _OPTIONS) if OmegaConf.select(cfg, key, default=_NOT_THERE) is _NOT_THERE
    ]
    if missing:
        raise ValueError(f"{config_file}: it lacks {' and '.join(missing)}; a config gives {', '.join(PARTS)}")
    flags = [text for text in overrides if text.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} comes after the first key=value override; put all flags before them")
    for text in overrides:
        try:
            _check_override(cfg, text)
            LazyConfig.apply_overrides(cfg, [text])
        except (HydraException, KeyError, OmegaConfBaseException, ValueError) as e:
            raise ValueError(f"override {text}: {e.args[0] if e.args else e}") from e
    for key in ("train.max_iter", "train.log_period", "train.checkpointer.period"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{config_file}: {key} must be a whole number of at least 1, got {value!r}")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as e:
        raise ValueError(f"{config_file}: {e}") from e
    return cfg


def _check_override(cfg: DictConfig, text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])
    key = override.key_or_group
    if override.is_delete() or override.is_sweep_override():
        raise ValueError("overrides are key=value, or +key=value for a new key; a list is written [1,2]")
    before, value = OmegaConf.select(cfg, key, default=_NOT_THERE), override.value()
    if override.is_add():
        return
    if before is _NOT_THERE:
        near = difflib.get_close_matches(key, _all_keys(cfg), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown key {key!r}; {hint}(to add one that the config leaves out: +{text})")
    if isinstance(before, DictConfig) and not isinstance(value, dict):
        raise ValueError(f"it is a group of keys, such as {key}.{next(iter(before), '...')}")
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(before))
    if kinds and type(value) not in kinds:
        raise ValueError(f"it is {before!r} in the config: {value!r} must be of that type, {type(before).__name__}")


def _all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items_ex(resolve=False):
        keys += _all_keys(value, f"{prefix}{name}.") if isinstance(value, DictConfig) else [f"{prefix}{name}"]
    return keys
