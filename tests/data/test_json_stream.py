from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin.data.json_stream import LIST, MAX_DEPTH, NotAnObjectError, stream_json

NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)  # infinities, exponents and all
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
OBJECTS = st.dictionaries(st.text(), VALUES | st.lists(VALUES, max_size=5), max_size=4)


def rebuild(path, **kwargs):
    """What json.load would have given, put together from the stream."""
    content = {}
    for key, index, value in stream_json(path, **kwargs):
        if index is not None:
            assert index == len(content[key])
            content[key].append(value)
        else:
            content[key] = [] if value is LIST else value
    return content


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("stream") / "a.json"


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.integers(1, 9), st.booleans(), st.sampled_from([None, 0, 3]))
def test_equals_json_load(file, content, chunk_size, ascii_only, indent):
    try:
        file.write_text(json.dumps(content, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate fits into a file only as an escape
        file.write_text(json.dumps(content, indent=indent))
    assert rebuild(file, chunk_size=chunk_size) == content


@settings(max_examples=200, deadline=None)
@given(OBJECTS, st.data(), st.integers(1, 9))
def test_a_damaged_file_fails_where_json_load_fails(file, content, data, chunk_size):
    damaged = bytearray(json.dumps(content, ensure_ascii=True).encode())
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=2))
    file.write_bytes(damaged)
    try:
        expected = json.loads(damaged.decode())
    except ValueError:
        expected = None
    try:
        assert repr(rebuild(file, chunk_size=chunk_size)) == repr(expected)  # repr: NaN is not equal to itself
    except NotAnObjectError:
        assert expected is None or not isinstance(expected, dict)
    except ValueError as error:
        twice = "second time" in str(error)
        assert expected is None or twice or damaged.startswith(b"\xef\xbb\xbf")
        assert twice or "character" in str(error) or "byte" in str(error)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 1 << 18])
def test_numbers_words_and_strings_across_chunks(file, chunk_size):
    numbers = "1234, -5.5e+10, 1.5E-3, -Infinity, Infinity, true, null"
    text = f'{{"a": [{numbers}, "\\ud83d\\ude00 \\\\", "Größe 😀"], "b" : -0.25 }}\n '
    file.write_text(text, encoding="utf-8")
    assert rebuild(file, chunk_size=chunk_size) == json.loads(text)
    file.write_text('{"a": NaN}')
    (((_, index, value)),) = stream_json(file, chunk_size=chunk_size)
    assert index is None and value != value


@pytest.mark.parametrize("chunk_size", [1, 1 << 18])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value at character 0"),
        (b'{"a": [1, 2', "',' or ']' expected at character 11"),
        (b'{"a": [1, 2]', "',' or '}' expected at character 12"),
        (b'{"a": 1} x', "more text after the end of the json at character 9"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xe4"}', "not UTF-8 .* at byte 7"),
        (b'{"a": "\xe4', "not UTF-8 .* at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 .* at byte 0"),
        (b'{"a": 1, "a": 2}', "key 'a' for the second time"),
        (b'{"a": [1,]}', "Expecting value at character 9"),
        (b'{"a": 1,}', "a key in double quotes expected at character 8"),
        (b'{"a" 1}', "':' expected at character 5"),
        (b'{"a": [1.5e]}', "expected at character 10"),
        (b'{"a": [12 34]}', "',' or ']' expected at character 10"),
        (b'{"a": "\\x"}', "Invalid .*escape"),
        (b'{"a": "b', "Unterminated string starting at character 6"),
        (b'{"a": [' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b'{"b":' * 100_000, "nested too deeply"),
        (b'{"a": [' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"]}", "nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300.* at character 6"),
        (b"[1, 2", "at character 5"),
    ],
)
def test_faults_are_value_errors_that_give_the_place(file, text, message, chunk_size):
    file.write_bytes(text)
    chunk_size = chunk_size if len(text) < 100 else 1 << 12
    with pytest.raises(ValueError, match=message) as caught:
        rebuild(file, chunk_size=chunk_size)
    assert not isinstance(caught.value, (json.JSONDecodeError, UnicodeDecodeError, NotAnObjectError))


@pytest.mark.parametrize("text", ["[]", "[{}]", '"a"', "1", "null", " NaN "])
def test_a_top_level_that_is_no_object(file, text):
    file.write_text(text)
    with pytest.raises(NotAnObjectError, match="top level"):
        rebuild(file, chunk_size=1)


def test_depth_counts_nesting_not_brackets(file):
    content = {"a": [[[[1]] * 200, "[[" * 200]], "b": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)}
    file.write_text(json.dumps(content))
    assert rebuild(file) == content


def test_an_element_over_the_limit_is_named(file):
    file.write_text(json.dumps({"a": [1, "x" * 5000]}))
    assert rebuild(file, max_element=5002, chunk_size=64)["a"][1] == "x" * 5000
    for chunk_size in (64, 1 << 18):
        with pytest.raises(ValueError, match=r"more than 5,001 characters.* at character 10"):
            rebuild(file, max_element=5001, chunk_size=chunk_size)


def test_a_fault_is_found_without_reading_the_rest(file):
    file.write_text('{"a": [{"id": 1,, "b": 2}, ' + " " * 3_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="at character 16"):
            rebuild(file, chunk_size=1 << 12)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_time_is_linear_in_one_huge_element(file):
    def seconds(size):
        file.write_text(json.dumps({"a": [[1.5] * size]}))
        start = time.process_time()
        assert len(rebuild(file, chunk_size=1024)["a"][0]) == size
        return time.process_time() - start

    small = min(seconds(20_000) for _ in range(3))
    assert seconds(320_000) < 16 * 6 * small  # 16 times the work; parsing again for every chunk would be 256 times


def test_memory_is_that_of_an_element(file):
    with open(file, "w") as out:
        out.write('{"a": [0')
        out.writelines(f', {{"id": {i}, "points": {[i] * 30}}}' for i in range(20_000))
        out.write("]}")
    assert file.stat().st_size > 3_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_json(file, chunk_size=1 << 14)) == 20_002
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()
