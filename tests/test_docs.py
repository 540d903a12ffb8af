"""What the pages for readers name is there: paths, links, config keys, make targets and the flags of tools."""

import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import focal_plugin
from focal_plugin import load_config
from focal_plugin.config_yaml import all_keys
from focal_plugin.losses.focal import _sigmoid_loss
from focal_plugin.losses.formulas import softplus

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"(?<![\w/.-])(?:benchmark|configs|docs|examples|focal_plugin|requirements|tests|tools|\.ci)/[\w./-]*\w(?![\w/]*[*<{$])"
)
KEY = re.compile(r"(?<![\w./-])[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+(?![\w/])")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def slug(heading):
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_paths_and_links_exist(page):
    text, prose = TEXTS[page.name], FENCE.sub("", TEXTS[page.name])
    assert not {path for path in PATH.findall(text) if "NAME" not in path and not (ROOT / path).exists()}
    for path, _, anchor in (target.partition("#") for target in re.findall(r"\]\(([^):\s]+)\)", prose)):
        there = page.parent / path if path else page
        assert there.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", there.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), anchor


@each_page
def test_keys_and_make_targets_exist(page):
    names = [key.split(".") for key in all_keys(load_config(""))]
    # A group or the end of a name will do.
    known = {".".join(n[i:j]) for n in names for i in range(len(n)) for j in range(i + 1, len(n) + 1)}
    assert not set(KEY.findall(TEXTS[page.name])) - known
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXTS[page.name], re.MULTILINE)) <= set(targets)


def test_flags_of_tools_exist(monkeypatch, capsys):
    blocks = "\n".join(block for text in TEXTS.values() for block in FENCE.findall(text)).replace("\\\n", " ")
    commands = re.findall(r"^ *(?:python3? )?(tools/\w+\.py.*)", blocks, re.MULTILINE)
    calls = [shlex.split(command, comments=True) for command in commands]
    monkeypatch.setenv("COLUMNS", "200")
    known = {}
    for tool in {words[0] for words in calls}:
        monkeypatch.setattr(sys, "argv", [tool, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        assert not end.value.code
        known[tool] = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert len(known) > 4
    flags = {(words[0], word.partition("=")[0]) for words in calls for word in words if word.startswith("--")}
    assert not {(tool, flag) for tool, flag in flags if flag not in known[tool]}


def test_the_recipe_for_a_loss_works():
    """The code of CONTRIBUTING, run through the function and the gradient that it names."""
    scope = {"NamedTuple": NamedTuple, "torch": torch, "softplus": softplus}
    exec(textwrap.dedent(re.search(r"^ *```python\n(.*?)^ *```", TEXTS["CONTRIBUTING.md"], re.M | re.S)[1]), scope)
    x, labels = (8 * torch.randn(20, 3, dtype=torch.float64)).requires_grad_(), torch.arange(20) % 5 - 1
    loss = _sigmoid_loss(scope["Margin"](0.5), x, labels, 0.25, "sum", -1)
    present = labels[:, None] == torch.arange(3)
    entries = torch.where(present, 0.25, 0.75) * torch.nn.functional.softplus(torch.where(present, -x, x) + 0.5)
    want = entries[labels >= 0].sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(each, x)[0] for each in (loss, want)))


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == focal_plugin.__version__
    assert f'"{citation["license"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert focal_plugin.__version__ in TEXTS["CHANGELOG.md"]
