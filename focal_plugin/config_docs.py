"""docs/config.md, written from the comments in config.py and checked against the config itself.

python -m focal_plugin.config_docs            (writes it)
python -m focal_plugin.config_docs --check    (exit code 1 if it is not current)
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

from . import config
from .config import add_focal_config, all_keys

DOCS = Path(__file__).resolve().parent.parent / "docs" / "config.md"

# Upstream has a word for each of them only in its source.
UPSTREAM_KEYS = {
    "MODEL.RETINANET.NUM_CLASSES": "K, the classes without background; must be that of the data sets",
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": "weight of positives, 1 - alpha that of negatives; < 0: no weighting; "
    "more than 1 is refused",
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": "focusing parameter, >= 0; 0: cross entropy",
    "MODEL.RETINANET.PRIOR_PROB": "what every class of every anchor is scored with at the start, by the bias of the "
    "last layer; between 0 and 1",
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "smooth_l1, iou, giou, diou or ciou",
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": "of smooth_l1, where it goes over from squared to linear; 0: plain L1",
    "MODEL.RETINANET.IOU_THRESHOLDS": "what parts the best IoU of an anchor into the IOU_LABELS",
    "MODEL.RETINANET.IOU_LABELS": "of each part: 0 background, -1 ignored, 1 the class of the box",
    "SOLVER.REFERENCE_WORLD_SIZE": "workers that the SOLVER's values are made for; batch, learning rate and schedule "
    "are scaled to those there are; 0: taken as they stand",
    "SOLVER.AMP.ENABLED": "mixed precision, on a GPU; the losses are computed in float32 all the same",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "clip gradients: the first thing to try when the loss becomes NaN",
    "TEST.EVAL_PERIOD": "evaluate every so many steps; 0: only at the end",
    "VIS_PERIOD": "every so many steps a picture for TensorBoard: an image's objects, and what is predicted; 0: none",
}

_HEAD = """\
# Config keys

Written by `python -m focal_plugin.config_docs` from the comments in `focal_plugin/config.py`: do not edit it here.
Defaults are those of `add_focal_config`; what a shipped config has instead, its YAML file says. Any key can be given
behind the flags of a command, as `KEY VALUE`.
"""
_OWN = """\
## Keys that focal_plugin adds

The paper does not say how its OHEM baseline was ranked, scoped, normalised and de-duplicated: each of these choices is
a key of `MODEL.OHEM`.
"""
_UPSTREAM = """\
## Keys of Detectron2 that matter most here

They mean what they mean upstream, and have its defaults. α, γ and the prior stay where Detectron2 users look for them.
"""


def documented_keys(source: str) -> dict[str, str]:
    """Each key that the source of a ``config.py`` sets, with the comment above its line.

    Args:
        source: assignments to ``cfg.GROUP.KEY``, and to ``node.KEY`` within ``def _NAME_defaults()`` for MODEL.NAME.

    Raises:
        ValueError: a key without a comment; the message names it.
    """
    lines, keys = source.splitlines(), {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
                root, _, name = target.partition(".")
                if root in ("cfg", "node") and name and name == name.upper():
                    group = f"MODEL.{function.name.strip('_').split('_')[0].upper()}." if root == "node" else ""
                    keys[group + name] = _comment_above(lines, node.lineno, group + name)
    return keys


def _comment_above(lines: list[str], number: int, key: str) -> str:
    """The comment that ends on the line before the one with this number, counted from 1."""
    first = number - 1
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    words = [line.strip().lstrip("#").strip() for line in lines[first : number - 1]]
    if not any(words):
        raise ValueError(f"{key} has no comment: write one on the line above it (line {number} of config.py)")
    return " ".join(words)


def check_keys(documented: dict[str, str], added: list[str]) -> None:
    """Raises a ValueError unless the keys found in the source are those that the config has."""
    problems = [f"{key} is added, but no assignment to it was found" for key in added if key not in documented]
    problems += [f"{key} is assigned to, but the config does not have it" for key in documented if key not in added]
    if problems:
        raise ValueError("\n".join(problems))


def added_keys() -> list[str]:
    """What ``add_focal_config`` adds to Detectron2's keys, in its order."""
    cfg = get_cfg()
    before = set(all_keys(cfg))
    add_focal_config(cfg)
    return [key for key in all_keys(cfg) if key not in before]


def render() -> str:
    """docs/config.md.

    Raises:
        ValueError: a key without a comment, or that the source and the config do not agree on.
    """
    meanings, added = documented_keys(Path(config.__file__).read_text(encoding="utf-8")), added_keys()
    check_keys(meanings, added)
    groups: dict[str, dict[str, str]] = {}
    for key in sorted(added, key=lambda key: (not key.startswith("MODEL."), key.rpartition(".")[0])):
        groups.setdefault(key.rpartition(".")[0], {})[key] = meanings[key]
    own = [f"### `{group}`\n\n{_table(keys)}" for group, keys in groups.items()]
    return "\n".join([_HEAD, _OWN, *own, _UPSTREAM, _table(UPSTREAM_KEYS)]).rstrip() + "\n"


def _table(meanings: dict[str, str]) -> str:
    cfg = get_cfg()
    add_focal_config(cfg)
    rows = [f"| `{key}` | `{_shown(_value(cfg, key))}` | {_escape(text)} |" for key, text in meanings.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows, ""])


def _value(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if ``--check`` finds it not current, 2 if it cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m focal_plugin.config_docs", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="FILE", help="(default: docs/config.md)")
    args = parser.parse_args(argv)
    try:
        want = render()
        if args.check:
            have = args.output.read_text(encoding="utf-8") if args.output.is_file() else ""
            return _report_difference(have, want, args.output)
        args.output.write_text(want, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report_difference(have: str, want: str, path: Path) -> int:
    diff = list(difflib.unified_diff(have.splitlines(), want.splitlines(), str(path), "config.py", lineterm="", n=0))
    if diff:
        print(*diff[:12], "Not current. Type: python -m focal_plugin.config_docs", sep="\n", file=sys.stderr)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
