"""Merge YAML files and overrides into a config: no code, no network, no aliases, no key twice, no unknown key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config

from .files import printable

MAX_SIZE = 1 << 18  # bytes of a file; PyYAML takes seconds for more, and no config comes near
MAX_FILES = 20  # that one config is made of; where each names two bases, they double with each level
MAX_DEPTH = 50  # lists and mappings inside each other

# What yacs raises for a key or value that cannot be, or one whose literal Python cannot parse.
_YACS_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError, MemoryError)


def merge_file(cfg: CfgNode, path: str, may_leave: bool = False) -> None:
    """Merge a YAML file into ``cfg`` as ``CfgNode.merge_from_file`` does, safely.

    Args:
        cfg: changed in place.
        path: of the file.
        may_leave: whether its ``OUTPUT_DIR`` may lead out of the working directory.

    Raises:
        FileNotFoundError, ValueError: see :func:`focal_plugin.load_config`.
    """
    default = cfg.OUTPUT_DIR
    try:
        _merge_content(cfg, _read(path, []))
        if default != cfg.OUTPUT_DIR and not may_leave:
            _check_output_dir(cfg.OUTPUT_DIR)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: {e}") from e
    except (OSError, *_YACS_ERRORS) as e:
        raise ValueError(f"{path}: {_explain(cfg, e)}") from e


def merge_overrides(cfg: CfgNode, opts: list[str]) -> None:
    """Merge ``["KEY", "VALUE", ...]`` of a command line into ``cfg``; raise a ValueError that names what cannot be."""
    flags = [o for o in opts if isinstance(o, str) and o.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]:.100} comes after the first KEY VALUE pair; put all flags before them")
    if len(opts) % 2:
        words = " ".join(map(str, opts))
        raise ValueError(f"overrides must be KEY VALUE pairs, got an odd number of words: {printable(words, 200)}")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            before = lookup(cfg, str(key))
            # Not left to yacs, which would look for "cu" in the text "cuda" to see whether there is a MODEL.DEVICE.cu.
            if not isinstance(before, CfgNode) and key not in all_keys(cfg):
                raise KeyError(f"Non-existent key: {key}")
            if isinstance(before, float) and isinstance(value, str):
                with suppress(ValueError):  # FOCAL_LOSS_GAMMA 2 is no type error
                    value = float(value)
            cfg.merge_from_list([key, value])
        except _YACS_ERRORS as e:
            raise ValueError(f"override {printable(f'{key} {value}', 200)}: {_explain(cfg, e)}") from e


def all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Return the full names of the keys of a config, groups left out."""
    keys = []
    for name, value in node.items():
        keys += all_keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]
    return keys


def lookup(config: Mapping, key: str) -> Any:
    """Return what a dotted key, such as "MODEL.FOCAL.HEAD", names in a config or nested dicts; None where it is not."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint with the nearest of the known names; empty if none is near."""
    near = difflib.get_close_matches(name[-200:], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unshare(value: Any) -> Any:
    """Copy the lists of a config, or ``dump()`` writes one that stands in two places as an alias, refused here."""
    if isinstance(value, CfgNode):
        for key, inner in value.items():
            value[key] = unshare(inner)
        return value
    return type(value)([unshare(inner) for inner in value]) if isinstance(value, (list, tuple)) else value


def _merge_content(cfg: CfgNode, content: dict[str, Any]) -> None:
    """Merge, also what has the names of early Detectron2 (version 1)."""
    has_old_names = any(lookup(content, key) is not None for key in ("MODEL.WEIGHT", "TEST.AUG_ON"))
    version = content.get("VERSION", 1 if has_old_names else cfg.VERSION)
    if version not in (1, 2):
        raise ValueError("VERSION must be 2, or 1 for a config with the names of early Detectron2")
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(CfgNode(content))
    else:
        old = downgrade_config(cfg, to_version=version)
        old.merge_from_other_cfg(CfgNode(content))
        cfg.clear()
        cfg.update(upgrade_config(old))


def _check_output_dir(folder: object) -> None:
    """Refuse a folder outside of the working directory: a file from somebody else may choose one only inside."""
    if not isinstance(folder, str):
        raise ValueError(f"OUTPUT_DIR must be a path, got {printable(folder)}")
    # Of what is there already symbolic links are followed, as they will be when it is written to.
    here, there = os.path.realpath("."), os.path.realpath(folder)
    if not os.path.isabs(folder) and os.path.commonpath([here, there]) != here:
        raise ValueError(
            f"OUTPUT_DIR {printable(folder)} leads out of the working directory, to {printable(there, 300)}: "
            "give OUTPUT_DIR on the command line, or an absolute path"
        )


def _explain(cfg: CfgNode, error: Exception) -> str:
    """Return yacs' error with the nearest existing key for an unknown one, and the spelling for a wrong type."""
    if isinstance(error, (RecursionError, MemoryError)):
        return "a value is nested too deeply"
    message = str(error.args[0] if isinstance(error, KeyError) else error)
    unknown = re.search(r"^Non-existent.* key: (.*)", message, re.DOTALL)
    if unknown:
        key, known = f"unknown config key {printable(unknown[1], 200)}", all_keys(cfg)
        if unknown[1] in known:
            return f"{key}: in a file it is written nested, one name a line"
        return key + did_you_mean(unknown[1], known)
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


def _read(file: str, seen: list[str]) -> dict[str, Any]:
    """Return a file merged over those of its ``_BASE_``; what has been read for one config is appended to ``seen``."""
    where = f"its _BASE_ {printable(file, 300)}" if seen else ""
    seen.append(file)
    if len(seen) > MAX_FILES:
        raise ValueError(f"{where} leads back to itself, or to more than {MAX_FILES} files")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{where or 'it'} is {'no regular file' if os.path.lexists(file) else 'not there'}")
    try:
        content, bases = _load(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"{where}: {e}" if where else str(e)) from e
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(_read(os.path.join(os.path.dirname(file), os.path.expanduser(base)), seen), merged)
    _merge(content, merged)
    return merged


def _merge(content: dict[str, Any], into: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(value, into[key])
        else:
            into[key] = value


def _load(file: str) -> tuple[dict[str, Any], list[str]]:
    """Return what stands in one file, and the paths of its ``_BASE_``."""
    with open(file, "rb") as stream:
        data = stream.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE:,} bytes: this is no config")
    try:
        content = _PlainLoader(data).get_single_data()
    except (yaml.YAMLError, OverflowError) as e:
        line = _line(getattr(e, "problem_mark", None))
        raise ValueError(f"not valid YAML: {getattr(e, 'problem', e)}{line}") from e
    if not isinstance(content, dict):
        raise ValueError("holds no KEY: VALUE pairs at its top level" + (": it is empty" if content is None else ""))
    bases = content.pop("_BASE_", [])
    bases = bases if isinstance(bases, list) else [bases]
    for base in bases:
        if not isinstance(base, str) or not base:
            raise ValueError(f"_BASE_ must be a path or a list of paths, not {printable(base)}")
        if "://" in base:
            raise ValueError(f"_BASE_ {printable(base)} would be fetched over the network: save it and name its path")
    return content, bases


class _PlainLoader(yaml.SafeLoader):
    """A loader of None, booleans, numbers, texts, lists and mappings, each of which is written out where it is."""

    # Nothing is a date (tag "timestamp") or a merge key: they are the texts that they look like.
    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] in ("null", "bool", "int", "float")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        line = _line(event.start_mark)
        if event.anchor:
            raise ValueError(f"an alias or anchor, {printable(event.anchor)}{line}: write the value out at each place")
        if event.tag:
            raise ValueError(
                f"the tag {printable(event.tag.replace('tag:yaml.org,2002:', '!!'))}{line}. Python tags can run any "
                "code and are refused: write the values as literals, e.g. anchor sizes as numbers "
                "(see configs/Base-FocalRetinaNet.yaml)"
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep{line}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not key.tag.endswith(":str"):
                what = printable(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise ValueError(f"{what} as a key{_line(key.start_mark)}: keys are names")
            if key.value in seen:  # YAML takes the last without a word
                line = _line(key.start_mark)
                raise ValueError(f"the key {printable(key.value)} for the second time in its mapping{line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1})" if mark else ""
