"""Read YAML configs as plain data: no code, no network, no aliases and no key twice."""

from __future__ import annotations

import os
from typing import Any

import yaml

from .files import printable

MAX_SIZE = 1 << 18  # bytes of a file; PyYAML takes seconds for more, and no config comes near
MAX_FILES = 20  # that one config is made of; where each names two bases, they double with each level
MAX_DEPTH = 50  # lists and mappings inside each other
MAX_TEXT = 3_000  # characters of a value: yacs reads each as a Python literal, and has to print what it means


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
