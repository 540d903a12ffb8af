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
MAX_TEXT = 3_000  # characters of a value: yacs reads each as a Python literal, and has to print what it means


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
    content, default = read_config(path), cfg.OUTPUT_DIR
    try:
        _merge_content(cfg, content)
    except _YACS_ERRORS as e:
        raise ValueError(f"{path}: {_explain(cfg, e)}") from e
    if default != cfg.OUTPUT_DIR and not may_leave:
        _check_output_dir(cfg.OUTPUT_DIR, path)


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
            _merge_override(cfg, key, value)
        except _YACS_ERRORS as e:
            words = printable(f"{key} {value}", 200)
            raise ValueError(f"override {words}: {_explain(cfg, e)}") from e


def _merge_override(cfg: CfgNode, key: str, value: object) -> None:
    # Not left to yacs, which would look for "cu" in the text "cuda" to see whether there is a MODEL.DEVICE.cu.
    if key not in all_keys(cfg) and not isinstance(lookup(cfg, str(key)), CfgNode):
        raise KeyError(f"Non-existent key: {key}")
    if isinstance(value, str):
        check_text(value)
        if isinstance(lookup(cfg, key), float):
            with suppress(ValueError):  # FOCAL_LOSS_GAMMA 2 is no type error
                value = float(value)
    cfg.merge_from_list([key, value])


def _explain(cfg: CfgNode, error: Exception) -> str:
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


def unshare(value: Any) -> Any:
    """Copy the lists of a config, or ``dump()`` writes one that stands in two places as an alias, refused here."""
    if isinstance(value, CfgNode):
        for key, inner in value.items():
            value[key] = unshare(inner)
        return value
    return type(value)([unshare(inner) for inner in value]) if isinstance(value, (list, tuple)) else value


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML config merged over the files of its ``_BASE_``, which are found as Detectron2 finds them.

    Returns:
        nested dicts of None, booleans, numbers, texts and lists of them.

    Raises:
        FileNotFoundError: a file is not there, or is a folder, a pipe or a device.
        ValueError: a file is no mapping of plain values; the message names ``path``, the file and mostly the line.
    """
    num_files = 0

    def read(file: str, above: tuple[str, ...]) -> dict[str, Any]:
        nonlocal num_files
        num_files += 1
        where = f"{path}: its _BASE_ {printable(file, 300)}" if above else path
        if not os.path.isfile(file):
            why = "is no regular file" if os.path.lexists(file) else "is not there"
            raise FileNotFoundError(f"{where} {why}" if above else f"no config file {printable(file, 300)}: it {why}")
        real = os.path.realpath(file)
        if real in above or num_files > MAX_FILES:
            raise ValueError(f"{where} leads back to itself, or to more than {MAX_FILES} files")
        try:
            content = _load(file)
            bases = _pop_bases(content, file)
        except (OSError, ValueError) as e:
            raise ValueError(f"{where}: {e}") from e
        merged: dict[str, Any] = {}
        for base in bases:
            _merge(read(base, (*above, real)), merged)
        _merge(content, merged)
        return merged

    return read(path, ())


def check_text(text: str) -> None:
    """Raise a ValueError for a string that no value of a config can be."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a value of {len(text):,} characters; {MAX_TEXT:,} are the most")
    if "\0" in text:
        raise ValueError("a NUL character in a value")
    text.encode()  # half of a surrogate pair could not be written to a file


def _merge(content: dict[str, Any], into: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(value, into[key])
        else:
            into[key] = value


def _pop_bases(content: dict[str, Any], file: str) -> list[str]:
    """Take ``_BASE_`` out of a config and return the paths that it names, relative ones seen from the file."""
    value = content.pop("_BASE_", [])
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"_BASE_ must be a path or a list of paths, not {printable(value)}")
        if "://" in path:
            raise ValueError(
                f"_BASE_ {printable(path)} would be fetched over the network: save that file and name its path"
            )
    return [os.path.join(os.path.dirname(file), os.path.expanduser(path)) for path in paths]


def _load(file: str) -> dict[str, Any]:
    with open(file, "rb") as stream:
        data = stream.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE:,} bytes: this is no config")
    try:
        content = _PlainLoader(data).get_single_data()
    except yaml.MarkedYAMLError as e:
        raise ValueError(f"not valid YAML: {e.problem}{_line(e.problem_mark)}") from e
    except (yaml.YAMLError, OverflowError) as e:
        raise ValueError(f"not valid YAML: {e}") from e
    if not isinstance(content, dict):
        raise ValueError("holds no KEY: VALUE pairs at its top level" + (": it is empty" if content is None else ""))
    return content


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
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            if tag.startswith("!!python"):
                raise ValueError(
                    f"{printable(tag)}{line}. Python tags can run any code and are refused: write the values as "
                    "literals, e.g. anchor sizes as numbers (see configs/Base-FocalRetinaNet.yaml)"
                )
            raise ValueError(
                f"the tag {printable(tag)}{line}: write a number, a text, true, false, null or a list plainly"
            )
        if isinstance(event, yaml.ScalarEvent):
            try:
                check_text(event.value)
            except ValueError as e:
                raise ValueError(f"{e}{line}") from e
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep{line}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            line = _line(key.start_mark)
            if not key.tag.endswith(":str"):
                what = printable(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise ValueError(f"{what} as a key{line}: keys are names")
            if key.value in seen:  # YAML takes the last without a word
                raise ValueError(f"the key {printable(key.value)} for the second time in its mapping{line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1})" if mark else ""
