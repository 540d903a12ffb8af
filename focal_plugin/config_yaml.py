"""Merge YAML files and overrides into a config: no code, no network, no aliases, no key twice, no unknown key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config

from .files import printable

MAX_SIZE = 1 << 18  # bytes of a file; PyYAML takes seconds for more, and no config comes near
MAX_FILES = 20  # that one config is made of; where each names two bases, they double with each level

_HINTS = {  # (type of the default, type of what was given)
    ("float", "int"): " (write a float with a point: 2.0)",
    ("int", "float"): " (write a whole number: 90000)",
    ("tuple", "str"): ' (write a tuple: ("name",))',
}
_WITHOUT_ALIASES = (
    'python -c "import sys, yaml; yaml.SafeDumper.ignore_aliases = lambda *_: True; '
    "yaml.safe_dump(yaml.safe_load(open(sys.argv[1])), open(sys.argv[2], 'w'))\" OLD.yaml NEW.yaml"
)


def merge_file(cfg: CfgNode, file: str, opened: list[str] | None = None) -> None:
    """Merge a YAML file and, before it, those of its ``_BASE_`` into ``cfg``, as ``CfgNode.merge_from_file`` does.

    ``opened`` has been read for this config so far, this file is a ``_BASE_`` of it. Errors are those of
    :func:`focal_plugin.get_config`.
    """
    opened = opened or []
    name = f"{opened[0]}: its _BASE_ {printable(file, 300)}" if opened else file
    opened.append(file)
    with _naming(name, cfg):
        if len(opened) > MAX_FILES:
            raise ValueError(f"leads back to itself, or to more than {MAX_FILES} files")
        content, bases = _read(file)
    for base in bases:
        merge_file(cfg, os.path.join(os.path.dirname(file), os.path.expanduser(base)), opened)
    with _naming(name, cfg):
        # Version 1 has the names of early Detectron2, which guesses it by these two.
        is_old = any(lookup(content, key) is not None for key in ("MODEL.WEIGHT", "TEST.AUG_ON"))
        version = content.get("VERSION", 1 if is_old else cfg.VERSION)
        if repr(version) not in ("1", "2"):
            raise ValueError("VERSION must be 2, or 1 for a config with the names of early Detectron2")
        merged = downgrade_config(cfg, to_version=version)
        merged.merge_from_other_cfg(CfgNode(content))
        cfg.update(upgrade_config(merged))


def merge_overrides(cfg: CfgNode, opts: list[str]) -> None:
    """Merge ``["KEY", "VALUE", ...]`` of a command line into ``cfg``; raise a ValueError that names what cannot be."""
    flags = [o for o in opts if isinstance(o, str) and o.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]:.100} comes after the first KEY VALUE pair; put all flags before them")
    if len(opts) % 2:
        words = " ".join(map(str, opts))
        raise ValueError(f"overrides must be KEY VALUE pairs, got an odd number of words: {printable(words, 200)}")
    for key, value in zip(opts[::2], opts[1::2]):
        with _naming(f"override {printable(f'{key} {value}', 200)}", cfg):
            # Not left to yacs, which would look for "cu" in the text "cuda" to see whether there is a MODEL.DEVICE.cu.
            if key not in all_keys(cfg):
                raise KeyError(f"Non-existent key: {key}")
            if isinstance(lookup(cfg, key), float) and isinstance(value, str):
                with suppress(ValueError):  # FOCAL_LOSS_GAMMA 2 is no type error
                    value = float(value)
            cfg.merge_from_list([key, value])


def check_output_dir(cfg: CfgNode, file: str) -> None:
    """Refuse a folder outside of the working directory: a file from somebody else may choose one only inside."""
    folder = cfg.OUTPUT_DIR
    with _naming(f"{file}: OUTPUT_DIR {printable(folder)}", cfg):
        # Of what is there already symbolic links are followed, as they will be when it is written to.
        here, there = os.path.realpath("."), os.path.realpath(folder)
        if not os.path.isabs(folder) and os.path.commonpath([here, there]) != here:
            way_out = "give it on the command line, or an absolute path"
            raise ValueError(f"leads out of the working directory, to {printable(there, 300)}: {way_out}")


def all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Return the full names of the keys of a config, groups left out."""
    return [
        key
        for name, value in node.items()
        for key in (all_keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name])
    ]


def lookup(config: Mapping, key: str) -> Any:
    """Return what a dotted key, such as "MODEL.FOCAL.HEAD", names in a config or nested dicts; None where it is not."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def did_you_mean(key: str, known: list[str]) -> str:
    """Return a hint with the key that was meant; empty if that is not clear, as a wrong hint is worse than none."""
    key = key.upper()[-200:]
    top, last = key.split(".")[0], key.split(".")[-1]
    known = known + sorted({name.rpartition(".")[0] for name in known} - {""})  # and the groups
    ends = [other for other in known if other.endswith(f".{key}")]
    alike = [other for other in known if other.endswith((f".{last}", f"_{last}"))]
    guesses = (
        # A slip of the keyboard. Further off, keys are alike by their group alone, as DATASETS.VAL and DATASETS.TRAIN.
        difflib.get_close_matches(key, known, n=1, cutoff=0.88),
        ends if "." in key else [],  # the first groups left out: FPN.NORM
        [other for other in alike if other.startswith(("MODEL.RETINANET.", "MODEL.FOCAL."))][:1],  # read here
        [other for other in alike if other.startswith(f"{top}.")],
        ends,  # BASE_LR
    )
    return next((f"; did you mean {guess[0]}?" for guess in guesses if len(guess) == 1), "")


def unshare(value: Any) -> Any:
    """Copy the lists of a config, or ``dump()`` writes one that stands in two places as an alias, refused here."""
    if isinstance(value, CfgNode):
        for key, inner in value.items():
            value[key] = unshare(inner)
        return value
    return type(value)([unshare(inner) for inner in value]) if isinstance(value, (list, tuple)) else value


@contextmanager
def _naming(what: str, cfg: CfgNode) -> Iterator[None]:
    """Turn whatever PyYAML and yacs raise for content that cannot be into one error that begins with ``what``."""
    try:
        yield
        repr(cfg)  # as dump() has to do later: Python does not write an integer of thousands of digits down
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{what}: {e}") from e
    except Exception as e:
        raise ValueError(f"{what}: {_explain(cfg, e)}") from e


def _explain(cfg: CfgNode, error: Exception) -> str:
    """Return what is wrong, with the key that was probably meant, or the spelling of a value."""
    if isinstance(error, (RecursionError, MemoryError)):
        return "a value is nested too deeply"
    if isinstance(error, yaml.reader.ReaderError):
        return f"not valid YAML in UTF-8: {error.reason} (character {error.position + 1})"
    if isinstance(error, (yaml.YAMLError, OverflowError)):
        return f"not valid YAML: {getattr(error, 'problem', error)}{_line(getattr(error, 'problem_mark', None))}"
    message = str(error.args[0] if isinstance(error, KeyError) else error)
    unknown = re.match(r"Non-existent(?: config)? key: (.*)", message, re.DOTALL)
    mismatch = re.match(r"(Type mismatch \(<class '(\S+)'> vs. <class '(\S+)'>\)).* key: (.*)", message, re.DOTALL)
    key = unknown[1] if unknown else mismatch[4] if mismatch else ""
    if isinstance(lookup(cfg, key), CfgNode):
        return f"{key} is a group of keys, such as {key}.{next(iter(lookup(cfg, key)), '...')}"
    if unknown:
        known = all_keys(cfg)
        hint = ": in a file it is written nested, one name a line" if key in known else did_you_mean(key, known)
        return f"unknown config key {printable(key, 200)}{hint}"
    if mismatch:  # without the values, which may be of any length and content
        return f"{mismatch[1]} for config key: {key}{_HINTS.get(mismatch.group(2, 3), '')}"
    return message


def _read(file: str) -> tuple[dict[str, Any], list[str]]:
    """Return what stands in one file, and the paths of its ``_BASE_``."""
    if not os.path.isfile(file):
        raise FileNotFoundError("not there, or no regular file")
    with open(file, "rb") as stream:
        data = stream.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE:,} bytes: this is no config")
    content = _PlainLoader(data).get_single_data()
    if not isinstance(content, dict):
        raise ValueError("holds no KEY: VALUE pairs at its top level" + (": it is empty" if content is None else ""))
    bases = content.pop("_BASE_", [])
    bases = bases if isinstance(bases, list) else [bases]
    for base in bases:
        if not isinstance(base, str) or not base or "://" in base:
            what = "_BASE_ must be a path or a list of paths, and is not fetched"
            raise ValueError(f"{what}: {printable(base)}; save it here, and name its path")
    return content, bases


class _PlainLoader(yaml.SafeLoader):
    """Load None, booleans, numbers, texts, lists and mappings, each of which is written out where it is."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        line = _line(event.start_mark)
        if event.anchor:
            way_out = f"write the value out at each place, or let PyYAML do it: {_WITHOUT_ALIASES}"
            raise ValueError(f"an alias or anchor, {printable(event.anchor)}{line}: {way_out}")
        if event.tag:
            tag = printable(event.tag.replace("tag:yaml.org,2002:", "!!"))
            way_out = "write the values as literals, anchor sizes as in configs/Base-FocalRetinaNet.yaml"
            raise ValueError(f"the tag {tag}{line}. Python tags can run any code and are refused: {way_out}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            line = _line(key.start_mark)
            if not key.tag.endswith(":str"):
                raise ValueError(f"a key that is no name{line}: ON, 3 and the like need quotes")
            if key.value in names:  # YAML takes the last without a word
                raise ValueError(f"the key {printable(key.value)} for the second time in its mapping{line}")
            names.add(key.value)
        return super().construct_mapping(node, deep)


# A date is the text that it looks like, such as a folder's name.
_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def _line(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1})" if mark else ""
