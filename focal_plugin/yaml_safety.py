"""What a YAML config may hold, looked at before Detectron2 reads it: no code, no bombs, no network, no double keys."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import yaml

BASE_KEY = "_BASE_"
MAX_SIZE = 1 << 18  # bytes of a file: PyYAML takes seconds for more, and no config comes near
MAX_NODES = 20_000  # keys and values of a file, an alias counting as what it stands for
MAX_DEPTH = 50  # lists and mappings inside each other, aliases followed
MAX_FILES = 20  # that one config is made of; where each names two bases, they double with each level
MAX_TEXT = 10_000  # characters of a value: yacs parses each as a Python literal, which nests as deep as it is long
_MAX_DIGITS = 100  # of a number; base 60 and base 16 know no limit of Python's

_TAG = "tag:yaml.org,2002:"
_ALLOWED = {
    yaml.ScalarNode: {_TAG + name for name in ("null", "bool", "int", "float", "str", "merge")},
    yaml.SequenceNode: {_TAG + "seq"},
    yaml.MappingNode: {_TAG + "map"},
}


class ConfigFile(NamedTuple):
    """One of the files that a config is made of: its path and its content without ``_BASE_``."""

    path: str
    content: dict[str, Any]


def read_config_files(path: str) -> list[ConfigFile]:
    """A YAML config and all that it is based on, the bases first, as Detectron2 will find them.

    Raises:
        FileNotFoundError: a file is not there, or is a folder, a pipe or a device.
        ValueError: a file is no mapping of plain values; the message names ``path``, the file and mostly the line.
    """
    files: list[ConfigFile] = []
    _follow(path, path, [], files)
    return files


def check_text(text: str) -> None:
    """Raises a ValueError for a string that no value of a config can be."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a value of {len(text):,} characters; {MAX_TEXT:,} are the most")
    if "\0" in text:
        raise ValueError("a NUL character in a value")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair in a value, which cannot be written to a file")


def _follow(path: str, first: str, above: list[str], files: list[ConfigFile]) -> None:
    place = first if path == first else f"{first}: its _BASE_ {path}"
    if not os.path.isfile(path):
        why = "is no regular file" if os.path.lexists(path) else "is not there"
        # As a value: a path may hold anything.
        raise FileNotFoundError(
            f"{first}: its _BASE_ {path!r} {why}" if above else f"no config file {path!r}: it {why}"
        )
    real = os.path.realpath(path)
    if real in above:
        raise ValueError(f"{first}: its _BASE_ leads back to itself, by {path}")
    if len(above) + len(files) >= MAX_FILES:
        raise ValueError(f"{first}: its _BASE_ makes it read more than {MAX_FILES} files")
    try:
        content = _load(path)
        bases = _bases(content, path)
    except (OSError, ValueError) as e:
        raise ValueError(f"{place}: {e}") from e
    for base in bases:
        _follow(base, first, [*above, real], files)
    files.append(ConfigFile(path, content))


def _bases(content: dict[str, Any], path: str) -> list[str]:
    """The paths under ``_BASE_``, which is taken out, as fvcore resolves them."""
    if BASE_KEY not in content:
        return []
    value = content.pop(BASE_KEY)
    paths = []
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"_BASE_ must be a path or a list of paths, not {_shown(value)}")
        if "://" in name:
            raise ValueError(
                f"_BASE_ {_shown(name)} would be fetched over the network: save that file and name its path"
            )
        name = os.path.expanduser(name) if name.startswith("~") else name
        paths.append(os.path.join(os.path.dirname(path), name))
    return paths


def _load(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE:,} bytes: this is no config")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not valid YAML: not UTF-8 text (byte {e.start:,})") from e
    if "\0" in text:
        raise ValueError(f"not valid YAML: a NUL in line {text.count(chr(10), 0, text.index(chr(0))) + 1}")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as e:
        raise ValueError(f"not valid YAML: {e}") from e
    except RecursionError as e:
        raise ValueError("not valid YAML: nested too deeply") from e
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("holds no KEY: VALUE pairs at its top level" + ("" if root else ": it is empty"))
    _Vetting().extent(root)
    return _construct(loader, root)


def _construct(loader: _Loader, root: yaml.Node) -> dict[str, Any]:
    try:
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as e:
        raise ValueError(f"not valid YAML: {e.problem} ({_where(e.problem_mark)})") from e


class _Loader(yaml.SafeLoader):
    """Stops at too many nodes or too deep ones while it reads, before they cost anything."""

    def __init__(self, text: str):
        super().__init__(text)
        self._count = self._level = 0

    def compose_node(self, parent, index):
        self._count += 1
        self._level += 1
        _check_extent(self._count, self._level)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Vetting:
    """Looks at each node of a document once, however often aliases name it.

    An alias comes after what it stands for, so the recursion is as deep as the text is nested, not as deep as what
    the aliases make of it.
    """

    def __init__(self):
        self._known: dict[int, tuple[int, int] | None] = {}

    def extent(self, node: yaml.Node) -> tuple[int, int]:
        """(nodes, levels) that a node stands for."""
        if id(node) in self._known:
            extent = self._known[id(node)]
            if extent is None:
                raise ValueError(f"an alias inside of what it stands for ({_where(node.start_mark)})")
            return extent
        self._known[id(node)] = None
        _check_tag(node)
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        inner = [self.extent(child) for child in _children(node)]
        extent = 1 + sum(nodes for nodes, _ in inner), 1 + max((levels for _, levels in inner), default=0)
        _check_extent(*extent)
        self._known[id(node)] = extent
        return extent


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_extent(nodes: int, levels: int) -> None:
    if nodes > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} keys and values, aliases counted as what they stand for")
    if levels > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _check_tag(node: yaml.Node) -> None:
    if node.tag in _ALLOWED[type(node)]:
        return
    tag = node.tag.replace(_TAG, "!!")
    if tag.startswith("!!python"):
        raise ValueError(
            f"{_shown(tag)} ({_where(node.start_mark)}). Python tags can run any code and are refused: write the "
            "values as literals, e.g. anchor sizes as numbers (see configs/Base-FocalRetinaNet.yaml)"
        )
    raise ValueError(
        f"{_shown(tag)} ({_where(node.start_mark)}): a value is a number, a text, true, false, null, a list or a "
        "mapping, and nothing else, such as a date; a text that looks like one goes in quotes"
    )


def _check_scalar(node: yaml.ScalarNode) -> None:
    place = _where(node.start_mark)
    try:
        check_text(node.value)
    except ValueError as e:
        raise ValueError(f"{e} ({place})") from e
    if node.tag in (_TAG + "int", _TAG + "float"):
        if len(node.value) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} digits ({place})")
    elif node.tag not in (_TAG + "bool", _TAG + "null"):
        return
    try:
        yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError) as e:  # "!!bool maybe" is a KeyError
        raise ValueError(f"{_shown(node.value)} is no {node.tag[len(_TAG) :]} ({place})") from e


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        place = _where(key.start_mark)
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TAG + "str", _TAG + "merge"):
            what = _shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise ValueError(f"{what} as a key ({place}): keys are names")
        if key.value in seen:
            # YAML takes the last without a word.
            raise ValueError(f"the key {_shown(key.value)} for the second time in its mapping ({place})")
        seen.add(key.value)


def _shown(value: Any) -> str:
    text = repr(value[:80] if isinstance(value, (str, list)) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def _where(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}" if mark else "unknown line"
