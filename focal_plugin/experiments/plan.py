"""From a table of the paper and a profile to the runs that there are to train."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import config_dir, find_config, load_config
from ..data import register_from_args
from ..engine.auto_scale import scale_to_workers
from .naming import title_of
from .paper import TABLES, PaperRow
from .worker import Run

_PACKAGE = Path(__file__).resolve().parents[1]
_DIGITS = "digits/Base-digits.yaml"


@dataclass(frozen=True)
class Profile:
    """What the rows are trained on: the paper's own setting, or a config that each row changes the loss of.

    Attributes:
        name: "coco", "digits" or that of a YAML file.
        is_coco: the paper's own setting, with a config for each row.
        config_file: the config that all rows are based on.
        register: arguments of train_net's --register.
        overrides: config keys and values for all rows, in turn; they win over a row's own.
    """

    name: str
    config_file: Path
    register: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    is_coco: bool = False

    def config(self, row: PaperRow | None = None) -> CfgNode:
        """The configuration of a row, or of the profile itself."""
        if row is None:
            return load_config(self.config_file, list(self.overrides))
        path, overrides = self.recipe(row)
        return load_config(path, list(overrides))

    def recipe(self, row: PaperRow) -> tuple[Path, tuple[str, ...]]:
        """The config file of a row and the overrides on top of it."""
        if self.is_coco:
            return config_dir() / "paper" / f"{row.recipe}.yaml", self.overrides
        settings = row.method.overrides(load_config(self.config_file, list(self.overrides)))
        words = [word for key, value in settings for word in (key, _word(value))]
        return self.config_file, (*words, *self.overrides)


def load_profile(name: str, register: Sequence[str] = (), overrides: Sequence[str] = ()) -> Profile:
    """
    Args:
        name: "coco", "digits", or the path of a Detectron2 config.
        register: arguments of --register.
        overrides: config keys and values for all rows.

    Raises:
        FileNotFoundError, ValueError: the file, a data set or an override cannot be; the message says which.
    """
    for key, instead in (("SEED", "--seeds"), ("OUTPUT_DIR", "--output")):
        if key in overrides[::2]:
            raise ValueError(f"{key} is set for each run by {instead}, not among the overrides")
    register_from_args(register)
    built_in = {"coco": config_dir() / "paper" / "Base-paper.yaml", "digits": config_dir() / _DIGITS}
    path = built_in.get(name) or find_config(name)
    title = name if name in built_in else path.name if path.stem in built_in else path.stem
    profile = Profile(title, path, tuple(register), tuple(overrides), is_coco=name == "coco")
    cfg = profile.config()  # a wrong key is found here, once, and not by every row
    if len(cfg.DATASETS.TEST) != 1 or not cfg.DATASETS.TRAIN:
        raise ValueError(
            f"--profile {name}: one data set to evaluate on and at least one to train on are needed, not "
            f"DATASETS.TEST {cfg.DATASETS.TEST} and DATASETS.TRAIN {cfg.DATASETS.TRAIN}"
        )
    return profile


def choose_rows(table: str, profile: Profile, keys: Sequence[str] = ()) -> list[PaperRow]:
    """The rows of a table, all or those asked for, in the table's order.

    Raises:
        ValueError: there is no such table or row, or the profile cannot vary what the table varies.
    """
    if table not in TABLES:
        raise ValueError(f"--table {table}: choose one of {', '.join(TABLES)}")
    if table == "1e" and not profile.is_coco:
        raise ValueError(
            f"--table 1e varies backbone and image size, which --profile {profile.name} fixes; use --profile coco"
        )
    rows = TABLES[table]
    unknown = [key for key in keys if key not in {row.key for row in rows}]
    if unknown:
        raise ValueError(
            f"--rows {' '.join(unknown)}: not in table {table}, which has {', '.join(row.key for row in rows)}"
        )
    return [row for row in rows if not keys or row.key in keys]


def make_runs(
    rows: Sequence[PaperRow],
    profile: Profile,
    seeds: Sequence[int],
    output_dir: Path,
    train_net: Path,
    num_gpus: int = 1,
) -> list[Run]:
    """One run per row and seed, in the order of the seeds: each seed's table is complete before the next begins.

    A run lies in `output_dir/<recipe>/seed<seed>`, so tables that share a row share its run.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: the same seed twice")
    digests = _files_digest(profile.config()), _code_digest(train_net)
    return [_make_run(row, profile, seed, output_dir, train_net, num_gpus, *digests) for seed in seeds for row in rows]


def method_key(row: PaperRow, profile: Profile) -> str:
    """What a row's runs are called: on COCO rows with one method can differ in backbone and image size."""
    return row.recipe if profile.is_coco else row.method.key


def _make_run(row, profile, seed, output_dir, train_net, num_gpus, data, code) -> Run:
    config_file, overrides = profile.recipe(row)
    overrides = ("SEED", str(seed), *overrides)
    cfg = load_config(config_file, list(overrides))
    solver = scale_to_workers(cfg, num_gpus).SOLVER
    register = [word for text in profile.register for word in ("--register", text)]
    return Run(
        method=method_key(row, profile),
        title=_title(row, cfg),
        seed=cfg.SEED,
        folder=Path(output_dir) / method_key(row, profile) / f"seed{seed}",
        train_net=train_net,
        config_file=config_file,
        flags=("--num-gpus", str(num_gpus), *register) if num_gpus > 1 else tuple(register),
        overrides=overrides,
        fingerprint=fingerprint(cfg, num_gpus, data, code),
        max_iter=solver.MAX_ITER,
        images_per_step=solver.IMS_PER_BATCH,
        on_gpu=torch.cuda.is_available() and torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


def _title(row: PaperRow, cfg: CfgNode) -> str:
    """The method, with what else the table varies."""
    if row.table == "1e":
        return f"{row.network.key} {title_of(cfg)}"
    if row.method.anchors:
        return "{} anchors {}x{}".format(title_of(cfg), *row.method.anchors)
    return title_of(cfg)


def fingerprint(cfg: CfgNode, num_gpus: int = 1, data: str = "", code: str = "") -> str:
    """Return a hash of all that decides the outcome of a run: configuration, data, weights, workers, what trains."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = ""
    facts = [cfg.dump(), num_gpus, data, code, torch.__version__, detectron2.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def training_sources() -> list[Path]:
    """Return the files of the package that a training loads: from ``engine`` on, import by import.

    A typo mended in a report or in the doctor is none of theirs, and costs no training.
    """
    found, waiting = set(), [_PACKAGE / "__init__.py", _PACKAGE / "engine" / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = path.parents[node.level - 1].joinpath(*filter(None, (node.module or "").split(".")))
                for name in (module, *(module / alias.name for alias in node.names)):
                    waiting += [name.with_suffix(".py"), name / "__init__.py"]
    return sorted(found)


def _code_digest(train_net: Path) -> str:
    digest = hashlib.sha256()
    for path in (train_net, *training_sources()):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _files_digest(cfg: CfgNode) -> str:
    """Of annotations and local weights, so that corrected boxes are trained on and not reported from an older run."""
    metas = [MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    # What draws itself is decided by the code; what is missing is reported by the run.
    paths = [meta.get("json_file") for meta in metas if not meta.get("lazily_generated")]
    digest = hashlib.sha256()
    for path in (*paths, cfg.MODEL.WEIGHTS):
        if path and Path(path).is_file():
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)
    return digest.hexdigest()


def _word(value: Any) -> str:
    """A value as it stands on a command line."""
    return value if isinstance(value, str) else repr(value)
