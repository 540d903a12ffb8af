"""docs/config.md is what config.py says, key for key."""

import re

import pytest
from detectron2.config import get_cfg

from focal_plugin import add_focal_config, config_docs
from focal_plugin.config import all_keys

SOURCE = """
def add_focal_config(cfg):
    if "X" not in cfg.SOLVER:
        # First half
        # and second
        cfg.SOLVER.X = 1


def _focal_defaults():
    node = CN()
    # What it is
    node.HEAD = "a"
    return node
"""


def rows(text):
    """{key: (default, meaning)} of the tables of the page."""
    found = re.findall(r"^\| `([A-Z][\w.]+)` \| `(.*?)` \| (.+) \|$", text, re.MULTILINE)
    return {key: (default, meaning) for key, default, meaning in found}


def test_page_is_current():
    assert config_docs.main(["--check"]) == 0, "type: python -m focal_plugin.config_docs"


def test_every_key_has_its_default_and_a_meaning():
    cfg = get_cfg()
    upstream = set(all_keys(cfg))
    add_focal_config(cfg)
    added = set(all_keys(cfg)) - upstream
    found = rows(config_docs.render())
    assert len(added) > 10 and added <= found.keys()
    assert found.keys() - added == config_docs.UPSTREAM_KEYS.keys() and found.keys() - added <= upstream
    for key, (default, meaning) in found.items():
        value = cfg
        for name in key.split("."):
            value = value[name]
        assert default == (f'"{value}"' if isinstance(value, str) else str(value)), key
        assert len(meaning) > 10, key


def test_comments_are_read_with_their_keys():
    assert config_docs.documented_keys(SOURCE) == {
        "SOLVER.X": "First half and second",
        "MODEL.FOCAL.HEAD": "What it is",
    }


@pytest.mark.parametrize("comment, key", [("    # What it is\n", "MODEL.FOCAL.HEAD"), ("        # and second\n", "")])
def test_key_without_a_comment_is_refused(comment, key):
    source = SOURCE.replace(comment, "")
    if key:
        with pytest.raises(ValueError, match=rf"{key} has no comment"):
            config_docs.documented_keys(source)
    else:  # the other half is still one
        assert config_docs.documented_keys(source)["SOLVER.X"] == "First half"


def test_source_and_config_must_agree(monkeypatch, capsys):
    config_docs.check_keys({"A.B": "x"}, ["A.B"])
    with pytest.raises(ValueError, match=r"A\.C is added, but no assignment"):
        config_docs.check_keys({"A.B": "x"}, ["A.B", "A.C"])
    with pytest.raises(ValueError, match=r"A\.B is assigned to, but"):
        config_docs.check_keys({"A.B": "x"}, [])
    monkeypatch.setattr(config_docs, "added_keys", lambda: [])
    assert config_docs.main(["--check"]) == 2
    assert "MODEL.FOCAL.HEAD is assigned to, but" in capsys.readouterr().err


def test_check_says_what_is_not_current(tmp_path, capsys):
    page = tmp_path / "config.md"
    assert config_docs.main(["--check", "--output", str(page)]) == 1
    assert config_docs.main(["--output", str(page)]) == 0
    assert config_docs.main(["--check", "--output", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("`128`", "`129`"), encoding="utf-8")
    capsys.readouterr()
    assert config_docs.main(["--check", "--output", str(page)]) == 1
    assert "`129`" in capsys.readouterr().err
    assert config_docs.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
