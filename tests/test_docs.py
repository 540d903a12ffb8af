"""What the pages for readers name is there: paths, links, config keys, make targets and the flags of tools."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import focal_plugin
from focal_plugin.config import all_keys, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("configs", "docs", "focal_plugin", "requirements", "tests", "tools", ".ci")
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(text):
    return FENCE.sub("", text)


def code(text):
    """Everything in backticks, in lines and in blocks."""
    return re.findall(r"`([^`]+)`", prose(text)) + [block for _, block in FENCE.findall(text)]


def repository_paths(text):
    """What looks like a path in here; not globs, and not with a placeholder in capitals in its last name's stem."""
    words = {word.strip("\"'(),;") for piece in code(text) for word in piece.split()}
    words = {re.sub(r":[\w.,-]*$", "", word) for word in words}  # PROFILE:STEPS
    paths = {word for word in words if word.split("/")[0] in FOLDERS and "/" in word}
    return {path for path in paths if not re.search(r"[*<{$]|\.\.\.|NAME", path)}


def commands(text):
    """The words of each call of a tool in the blocks, continued lines joined and comments left out."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\s*(python3? )?tools/\w+\.py\b", line):
                yield [word for word in shlex.split(line, comments=True) if not word.startswith("python")]


def slug(heading):
    """GitHub's anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return kept.replace(" ", "-")


@each_page
def test_paths_exist(page):
    missing = {path for path in repository_paths(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()}
    assert not missing


@each_page
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(there.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.fixture(scope="module")
def known_keys():
    """The keys of the config, and the groups they are in."""
    parts = [key.split(".") for key in all_keys(load_config(""))]
    return {".".join(names[:n]) for names in parts for n in range(1, len(names) + 1)}


KEY = re.compile(r"(?<![\w./-])[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+(?![\w/])")


@each_page
def test_config_keys_exist(page, known_keys):
    text = page.read_text(encoding="utf-8")
    endings = {key[i + 1 :] for key in known_keys for i, letter in enumerate(key) if letter == "."}
    # In a sentence the end of a name will do, in a command it will not.
    assert not set(KEY.findall(prose(text))) - known_keys - endings
    assert not {word for words in commands(text) for word in words if KEY.fullmatch(word)} - known_keys


@each_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"^make ([a-z]+)", text, re.MULTILINE) + re.findall(r"`make ([a-z]+)", text)
    assert set(named) <= set(targets)


def help_of(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


def test_flags_of_tools_exist(monkeypatch, capsys):
    lines = {}
    for page in PAGES:
        for words in commands(page.read_text(encoding="utf-8")):
            lines.setdefault(words[0], []).append(words[1:])
    assert len(lines) > 4
    unknown = []
    for tool, calls in lines.items():
        known = set(re.findall(r"--[a-z][\w-]*", help_of(tool, monkeypatch, capsys)))
        for words in calls:
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            unknown += [(tool, flag) for flag in flags - known]
    assert not unknown


def test_what_these_tests_would_find():
    text = "`tools/none.py` and `configs/*.yaml`\n```\ntools/x.py --a 1 \\\n  --b  # --c\nmake demo\n```\n[x](#none)"
    assert repository_paths(text) == {"tools/none.py", "tools/x.py"}
    assert list(commands(text)) == [["tools/x.py", "--a", "1", "--b"]]
    assert slug("What `make` says, γ = 1") == "what-make-says-γ--1"


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == focal_plugin.__version__
    assert f'"{citation["license"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(reference["authors"] and reference["title"] for reference in citation["references"])
    assert focal_plugin.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
