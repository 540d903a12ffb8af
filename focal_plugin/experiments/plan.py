"""From a table of the paper and a profile to the runs that there are to train."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..config import config_dir, find_config, load_config
from ..data import register_from_args
from ..engine.preflight import check_datasets, scale_to_workers
from .paper import TABLES, PaperRow, title_of
from .results import Data, Run, typed
from .runner import check_folder, format_duration

_PACKAGE = Path(__file__).resolve().parents[1]
TRAIN_NET = _PACKAGE.parent / "tools" / "train_net.py"
_NOT_TRAINED = ("analysis/", "deploy/", "doctor.py", "eval/drawing.py", "eval/page.py", "experiments/", "mmdet.py")


@dataclass(frozen=True)
class Profile:
    """What the rows are trained on: the paper's own setting, or a config that each row changes the loss of."""

    name: str  # "coco", "digits" or that of a YAML file
    is_coco: bool  # the paper's own setting, with a config for each row
    config_file: Path
    base: CfgNode  # what it says with the overrides; all rows are based on it
    register: tuple[str, ...]  # arguments of train_net's --register
    overrides: tuple[str, ...]  # config keys and values for all rows, in turn; they win over a row's own


def load_profile(name: str, register: Sequence[str] = (), overrides: Sequence[str] = ()) -> Profile:
    """Return the profile "coco", "digits", or of the path of a Detectron2 config, and register its data sets.

    Raises:
        FileNotFoundError, ValueError: the file, a data set or an override cannot be; the message says which.
    """
    for key, instead in (("SEED", "--seeds"), ("OUTPUT_DIR", "--output")):
        if key in overrides[::2]:
            raise ValueError(f"{key} is set for each run by {instead}, not among the overrides")
    register_from_args(register)
    built_in = {"coco": "paper/Base-paper.yaml", "digits": "digits/Base-digits.yaml"}
    path = config_dir() / built_in[name] if name in built_in else find_config(name)
    title = name if name in built_in else path.name if path.stem in built_in else path.stem
    cfg = load_config(path, list(overrides))  # a wrong key is found here, once, and not by every row
    if len(cfg.DATASETS.TEST) != 1 or not cfg.DATASETS.TRAIN:
        have = f"DATASETS.TEST {cfg.DATASETS.TEST} and DATASETS.TRAIN {cfg.DATASETS.TRAIN}"
        raise ValueError(f"--profile {name}: one data set to evaluate on and one or more to train on, not {have}")
    return Profile(title, name == "coco", path, cfg, tuple(register), tuple(overrides))


def choose_rows(table: str, profile: Profile, keys: Sequence[str] = ()) -> list[PaperRow]:
    """Return the rows of a table, all or those asked for, in the table's order.

    Raises:
        ValueError: there is no such row, or the profile cannot vary what the table varies.
    """
    if table == "1e" and not profile.is_coco:
        raise ValueError(f"--table 1e varies backbone and image size, which {profile.name} fixes; use --profile coco")
    known = [row.key for row in TABLES[table]]
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"--rows {' '.join(unknown)}: not in table {table}, which has {', '.join(known)}")
    return [row for row in TABLES[table] if not keys or row.key in keys]


def make_runs(rows: list[PaperRow], profile: Profile, seeds: list[int], output: Path, num_gpus: int = 1) -> list[Run]:
    """Return one run a row and seed, seed by seed, in ``output/METHOD/seedN``: tables that share a row share a run."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: the same seed twice")
    if not TRAIN_NET.is_file():
        raise ValueError(f"there is no {TRAIN_NET}: run it from a checkout, not with an installed wheel")
    inputs = _digest_of_inputs(profile.base)
    return [_make_run(row, profile, seed, output, num_gpus, inputs) for seed in seeds for row in rows]


def _make_run(row: PaperRow, profile: Profile, seed: int, output: Path, num_gpus: int, inputs: str) -> Run:
    # On COCO, rows of one method differ in network.
    config_file, method, own = config_dir() / "paper" / f"{row.recipe}.yaml", row.recipe, {}
    if not profile.is_coco:
        config_file, method, own = profile.config_file, row.method, row.overrides(profile.base)
    own = [word for key, value in own.items() for word in (key, value if isinstance(value, str) else repr(value))]
    overrides = ["SEED", str(seed), *own, *profile.overrides]
    cfg = load_config(config_file, overrides)
    solver = scale_to_workers(cfg, num_gpus).SOLVER
    title = f"{row.network} {title_of(cfg)}" if row.table == "1e" else title_of(cfg)
    title += f" anchors {row.anchors[0]}x{row.anchors[1]}" if row.anchors else ""
    folder = Path(output) / method / f"seed{seed}"
    flags = ["--config-file", typed(config_file), "--resume", *(["--num-gpus", str(num_gpus)] if num_gpus > 1 else [])]
    flags += [word for text in profile.register for word in ("--register", text)]
    command = ("python", typed(TRAIN_NET), *flags, *overrides, "OUTPUT_DIR", typed(folder))
    cfg.OUTPUT_DIR = ""
    facts = [cfg.dump(), num_gpus, inputs, torch.__version__, detectron2.__version__]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    on_gpu = torch.cuda.is_available() and torch.device(cfg.MODEL.DEVICE).type == "cuda"
    return Run(method, title, seed, folder, command, fingerprint, solver.MAX_ITER, solver.IMS_PER_BATCH, on_gpu, row)


def training_sources() -> list[Path]:
    """Return the files that a training loads: a typo mended in a report costs no training."""
    names = sorted(path.relative_to(_PACKAGE).as_posix() for path in _PACKAGE.rglob("*.py"))
    return [_PACKAGE / name for name in names if not name.startswith(_NOT_TRAINED)]


def _digest_of_inputs(cfg: CfgNode) -> str:
    """Return a hash of code, annotations and local weights, so that corrected boxes are trained on anew."""
    metas = [MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    # What draws itself is decided by the code; what is missing is reported by the run.
    paths = [meta.get("json_file") for meta in metas if not meta.get("lazily_generated")]
    digest = hashlib.sha256()
    for path in (TRAIN_NET, *training_sources(), *paths, cfg.MODEL.WEIGHTS):
        if path and Path(path).is_file():
            digest.update(f"\0{Path(path).name}\0".encode())
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def describe_plan(runs: Sequence[Run], parallel: int) -> str:
    """Return a table of the runs with the paper's numbers, and what is left to train; the time if one is measured."""
    lines, left, times, refused = [], {}, [], ""
    for run in runs:
        result, done = run.result(), 0
        try:
            if check_folder(run):
                record = result.last_step()
                times += [record["time"]] if "time" in record else []
                done = max((int(path.stem[6:]) + 1 for path in run.folder.glob("model_[0-9]*.pth")), default=0)
            state = result.status if result.ended else f"goes on at {done:,}" if done else "to train"
        except FileExistsError as error:
            state, refused = "refused", refused or f"\n{error}"
        if not result.ended:
            left[run] = run.max_iter - done
        numbers = astuple(run.row.published)[:3] if run.row.published else "---"
        lines.append([run.row.key, run.seed, run.title, *numbers, f"{run.max_iter:,}", run.images_per_step, state])
    headers = ["row", "seed", "trained here", "paper's AP", "AP50", "AP75", "steps", "images / step", "state"]
    steps, images = sum(left.values()), sum(steps * run.images_per_step for run, steps in left.items())
    text = f"{len(left)} of {len(runs)} runs to train: {steps:,} steps, {images:,} images, {parallel} at a time."
    if left and times:
        second, of = statistics.median(times), f"the median of {len(times)} runs in this output folder"
        text += f" About {format_duration(steps * second / min(parallel, len(left)))}, at {second:.3g} s a step ({of})."
    elif left:
        text += " How long that takes is known once a run in this output folder has done some steps."
    return f"{tabulate(lines, headers, tablefmt='simple', floatfmt='.1f')}\n\n{text}{refused}"


def prepare_data(profile: Profile) -> Data:
    """Return where the data set lies, drawn if it is made on first use; raise a ValueError if it cannot be used."""
    cfg = profile.base
    check_datasets(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        meta = MetadataCatalog.get(name)
        if not meta.get("json_file"):
            raise ValueError(f"data set {name!r} is not in COCO format: add --register {name}=FILE.json:IMAGES")
        if meta.get("lazily_generated"):
            print(f"{name}: {len(DatasetCatalog.get(name)):,} images", file=sys.stderr, flush=True)
    train, val = (MetadataCatalog.get(splits[0]) for splits in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    return Data(Path(train.json_file), Path(val.json_file), Path(val.image_root))
