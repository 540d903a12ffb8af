"""Reads a big json file piece by piece: memory is bounded by one element of a list, not by the file."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK_SIZE = 1 << 18  # bytes a read
MAX_ELEMENT = 64 << 20  # characters
MAX_DEPTH = 100  # lists and objects inside each other, in one element

_SPACE = re.compile(r"[ \t\n\r]*")
_BARE_WORD = re.compile(r'[^\s,:\[\]{}"]*')  # a number, true, false, null, NaN, Infinity: ends where none of these is
_TAIL = 16  # characters; an error closer to the buffer's end than this may come from the cut: "-Infinit", "\\ud83"


class LIST:
    """What :func:`stream_json` gives as the value of a top-level list, before the elements."""


class NotAnObjectError(ValueError):
    """Valid so far, but the file's top level is a list, a string, a number, ..."""


def stream_json(
    path: str | os.PathLike, *, chunk_size: int = CHUNK_SIZE, max_element: int = MAX_ELEMENT
) -> Iterator[tuple[str, int | None, Any]]:
    """Goes through a json file whose top level is an object, as ``json.load`` would understand it.

    NaN, Infinity and -Infinity are numbers, as for ``json.load``. Four things are refused that it lets pass: a
    top-level key given twice, elements of more than ``max_element`` characters, nesting deeper than ``MAX_DEPTH``
    inside an element, and a top level that is no object.

    Args:
        path: the file, UTF-8 without a byte order mark.
        chunk_size: bytes to read at a time.
        max_element: the longest list element, or other top-level value, in characters.

    Yields:
        ``(key, None, LIST)`` where a top-level list begins, then ``(key, index, element)`` for each element of it;
        ``(key, None, value)`` for a top-level value that is no list.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: the file is no such json; the message gives the place. A :class:`NotAnObjectError` if the only
            fault is the top level.
    """
    with open(path, "rb") as file:
        yield from _Reader(file, chunk_size, max_element).items()


class _Reader:
    """A window of decoded text over the file; ``pos`` is where reading goes on in it."""

    def __init__(self, file: BinaryIO, chunk_size: int, max_element: int):
        self._file, self._chunk_size, self._max_element = file, chunk_size, max_element
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._pos = "", 0
        self._dropped = 0  # characters before the window
        self._bytes_read = 0
        self._at_end = False

    def items(self) -> Iterator[tuple[str, int | None, Any]]:
        first = self._next_char()
        if first == "\ufeff":
            raise ValueError("byte order mark at character 0: save the file as UTF-8 without one")
        if first != "{":
            self._value()  # not even json?
            self._expect_end()
            raise NotAnObjectError("the top level is no object")
        self._pos += 1
        keys = set()
        while self._another("}", is_first=not keys):
            key = self._key()
            if key in keys:
                raise ValueError(f"top-level key {key[:80]!r} for the second time, before {self._place()}")
            keys.add(key)
            if self._next_char() == "[":
                yield key, None, LIST
                yield from self._elements(key)
            else:
                yield key, None, self._value()
        self._expect_end()

    def _elements(self, key: str) -> Iterator[tuple[str, int, Any]]:
        self._pos += 1
        index = 0
        while self._another("]", is_first=index == 0):
            yield key, index, self._value()
            index += 1

    def _another(self, closing: str, is_first: bool) -> bool:
        """Steps over the "," before the next member, or over the closing bracket: then False."""
        char = self._next_char()
        if char == closing:
            self._pos += 1
            return False
        if not is_first:
            if char != ",":
                raise ValueError(f"',' or '{closing}' expected at {self._place()}")
            self._pos += 1
        return True

    def _key(self) -> str:
        if self._next_char() != '"':
            raise ValueError(f"a key in double quotes expected at {self._place()}")
        key = self._value()
        if self._next_char() != ":":
            raise ValueError(f"':' expected at {self._place()}")
        self._pos += 1
        return key

    def _value(self) -> Any:
        """Parses one value, read in steps that double so that a huge one is not parsed again for every chunk."""
        if self._next_char() not in '{["':
            self._complete_bare_word()
        while True:
            try:
                value, end = self._scan(self._text, self._pos)
                self._check_size(end)
                self._check_depth(value, end)
                self._pos = end
                return value
            except json.JSONDecodeError as error:
                if self._at_end or not self._is_cut(error):
                    raise ValueError(f"{error.msg.removesuffix(' at')} at {self._place(error.pos)}") from None
                problem = error.msg  # not the error itself: in a cycle with this frame, it would keep the text alive
            except RecursionError:
                raise ValueError(f"nested too deeply at {self._place()}") from None
            except ValueError as error:  # an integer of thousands of digits, or a float whose point is not read yet
                if self._at_end:
                    raise ValueError(f"{error} at {self._place()}") from None
                problem = str(error)
            self._check_size(len(self._text), problem)
            self._read(max(self._chunk_size, len(self._text) - self._pos))

    @staticmethod
    def _is_cut(error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - _TAIL

    def _complete_bare_word(self) -> None:
        """Reads on until "12" cannot be the beginning of "1234" any more."""
        while not self._at_end and _BARE_WORD.match(self._text, self._pos).end() == len(self._text):
            self._check_size(len(self._text))
            self._read(max(self._chunk_size, len(self._text) - self._pos))

    def _check_size(self, end: int, problem: str = "") -> None:
        if end - self._pos > self._max_element:
            why = f" ({problem})" if problem else ""
            raise ValueError(f"an element of more than {self._max_element:,} characters{why} at {self._place()}")

    def _check_depth(self, value: Any, end: int) -> None:
        """The same limit wherever this is called from, while Python's own counts the caller's frames as well."""
        text, pos = self._text, self._pos
        if text.count("[", pos, end) + text.count("{", pos, end) <= MAX_DEPTH:
            return
        depth, level = 0, _containers([value])
        while level:
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} deep at {self._place()}")
            level = [inner for outer in level for inner in _containers(outer)]

    def _next_char(self) -> str:
        """The character at the next place that is no white space; an empty string at the end of the file."""
        while True:
            self._pos = _SPACE.match(self._text, self._pos).end()
            if self._pos < len(self._text):
                return self._text[self._pos]
            if self._at_end:
                return ""
            self._read(self._chunk_size)

    def _expect_end(self) -> None:
        if self._next_char():
            raise ValueError(f"more text after the end of the json at {self._place()}")

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._bytes_read += len(data)
        self._at_end = not data
        try:
            more = self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            place = self._bytes_read - len(error.object) + error.start
            raise ValueError(f"not UTF-8 ({error.reason}) at byte {place:,}") from None
        self._dropped += self._pos
        self._text, self._pos = self._text[self._pos :] + more, 0

    def _place(self, pos: int | None = None) -> str:
        return f"character {self._dropped + (self._pos if pos is None else pos):,}"


def _containers(outer: list | dict) -> list:
    members = outer.values() if isinstance(outer, dict) else outer
    return [member for member in members if isinstance(member, (list, dict))]
