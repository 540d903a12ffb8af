"""Paths, config keys, make targets and flags that the pages name are there; `make docs` checks the links of docs/."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import focal_plugin
from focal_plugin.losses.focal import _sigmoid_loss
from focal_plugin.losses.formulas import softplus

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {path.name: path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
FOLDERS = "benchmark|configs|docs|examples|focal_plugin|requirements|tests|tools"


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_is_there(page):
    paths = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w(?!\w*[*<{{$])", TEXTS[page])
    paths += re.findall(r"\]\((?!http)([^)#]+)", TEXTS[page]) if (ROOT / page).exists() else []
    assert not [path for path in paths if not (ROOT / path).exists()]
    keys = set(re.findall(r"(?<![\w./-])[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+(?![\w/])", TEXTS[page]))
    known = " ".join(focal_plugin.config_yaml.all_keys(focal_plugin.load_config("")))  # of which a part will do
    assert not [key for key in keys if not re.search(rf"\b{key}\b", known)]
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", TEXTS[page], re.M)
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8") for target in targets)


def test_flags_of_tools_exist(monkeypatch, capsys):
    shown = re.findall(r"^ *(tools/\w+\.py.*)", "\n".join(TEXTS.values()).replace("\\\n", " "), re.M)
    calls = [shlex.split(command, comments=True) for command in shown]
    for tool in {words[0] for words in calls}:
        monkeypatch.setattr(sys, "argv", [tool, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        known = re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)
        assert not {word for words in calls if words[0] == tool for word in words if word[:2] == "--"} - {*known}, tool


def test_the_recipe_for_a_loss_works():
    """The code of CONTRIBUTING, run through the function and the gradient that it names."""
    scope = {"NamedTuple": NamedTuple, "torch": torch, "softplus": softplus}
    exec("if True:\n" + re.search(r"^ +```python\n(.*?)^ +```", TEXTS["CONTRIBUTING.md"], re.M | re.S)[1], scope)
    x, labels = (8 * torch.randn(20, 3, dtype=torch.float64)).requires_grad_(), torch.arange(20) % 5 - 1
    present = labels[:, None] == torch.arange(3)
    entries = torch.where(present, 0.25, 0.75) * torch.nn.functional.softplus(torch.where(present, -x, x) + 0.5)
    both = _sigmoid_loss(scope["Margin"](0.5), x, labels, 0.25, "sum", -1), entries[labels >= 0].sum()
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(each, x)[0] for each in both))


def test_versions_agree():
    version = focal_plugin.__version__
    assert f"version: {version}\nlicense: Apache-2.0" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert version in TEXTS["CHANGELOG.md"] and 'license="Apache-2.0"' in (ROOT / "setup.py").read_text("utf-8")
