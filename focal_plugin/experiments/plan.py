"""From a table of the paper and a profile to the runs that there are to train."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
# What no training loads.
_NOT_TRAINED = ("analysis/", "deploy/", "doctor.py", "eval/drawing.py", "eval/page.py", "experiments/", "mmdet.py")


@dataclass(frozen=True)
class Profile:
    """What the rows are trained on: the paper's own setting, or a config that each row changes the loss of."""

    name: str  # "coco", "digits" or that of a YAML file
    config_file: Path  # that all rows are based on
    register: tuple[str, ...] = ()  # arguments of train_net's --register
    overrides: tuple[str, ...] = ()  # config keys and values for all rows, in turn; they win over a row's own
    is_coco: bool = False  # the paper's own setting, with a config for each row

    def config(self) -> CfgNode:
        """Return the configuration that all rows are based on."""
        return load_config(self.config_file, list(self.overrides))


def load_profile(name: str, register: Sequence[str] = (), overrides: Sequence[str] = ()) -> Profile:
    """Return the profile of a name, and register its data sets.

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
    built_in = {"coco": "paper/Base-paper.yaml", "digits": "digits/Base-digits.yaml"}
    path = config_dir() / built_in[name] if name in built_in else find_config(name)
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
    """Return the rows of a table, all or those asked for, in the table's order.

    Raises:
        ValueError: there is no such row, or the profile cannot vary what the table varies.
    """
    if table == "1e" and not profile.is_coco:
        raise ValueError(
            f"--table 1e varies backbone and image size, which --profile {profile.name} fixes; use --profile coco"
        )
    known = [row.key for row in TABLES[table]]
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"--rows {' '.join(unknown)}: not in table {table}, which has {', '.join(known)}")
    return [row for row in TABLES[table] if not keys or row.key in keys]


def make_runs(
    rows: Sequence[PaperRow], profile: Profile, seeds: Sequence[int], output: Path, num_gpus: int = 1
) -> list[Run]:
    """Return one run a row and seed, in the order of the seeds: each seed's table is complete before the next begins.

    A run lies in ``output/METHOD/seedN``, so tables that share a row share its run.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: the same seed twice")
    if not TRAIN_NET.is_file():
        raise ValueError(f"there is no {TRAIN_NET}: run it from a checkout, not with an installed wheel")
    base = profile.config()
    inputs = _digest_of_inputs(base)
    return [_make_run(row, profile, base, seed, output, num_gpus, inputs) for seed in seeds for row in rows]


def _make_run(row: PaperRow, profile: Profile, base: CfgNode, seed, output, num_gpus: int, inputs: str) -> Run:
    config_file, overrides = profile.config_file, ["SEED", str(seed)]
    if profile.is_coco:
        config_file = config_dir() / "paper" / f"{row.recipe}.yaml"
    else:
        for key, value in row.overrides(base).items():
            overrides += [key, value if isinstance(value, str) else repr(value)]
    overrides += profile.overrides
    cfg = load_config(config_file, overrides)
    solver = scale_to_workers(cfg, num_gpus).SOLVER
    title = f"{row.network} {title_of(cfg)}" if row.table == "1e" else title_of(cfg)
    method = row.recipe if profile.is_coco else row.method  # on COCO, rows of one method differ in network
    folder = Path(output) / method / f"seed{seed}"
    flags = ["--config-file", typed(config_file), "--resume", *(["--num-gpus", str(num_gpus)] if num_gpus > 1 else [])]
    flags += [word for text in profile.register for word in ("--register", text)]
    cfg.OUTPUT_DIR = ""
    facts = [cfg.dump(), num_gpus, inputs, torch.__version__, detectron2.__version__]
    return Run(
        method=method,
        title=f"{title} anchors {row.anchors[0]}x{row.anchors[1]}" if row.anchors else title,
        seed=cfg.SEED,
        folder=folder,
        command=("python", typed(TRAIN_NET), *flags, *overrides, "OUTPUT_DIR", typed(folder)),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        max_iter=solver.MAX_ITER,
        images_per_step=solver.IMS_PER_BATCH,
        on_gpu=torch.cuda.is_available() and torch.device(cfg.MODEL.DEVICE).type == "cuda",
        row=row,
    )


def training_sources() -> list[Path]:
    """Return the files whose code decides the outcome: a typo mended in a report costs no training."""
    sources = sorted(_PACKAGE.rglob("*.py"))
    return [path for path in sources if not path.relative_to(_PACKAGE).as_posix().startswith(_NOT_TRAINED)]


def _digest_of_inputs(cfg: CfgNode) -> str:
    """Return a hash of code, annotations and local weights, so that corrected boxes are trained on anew."""
    metas = [MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    # What draws itself is decided by the code; what is missing is reported by the run.
    paths = [meta.get("json_file") for meta in metas if not meta.get("lazily_generated")]
    digest = hashlib.sha256()
    for path in (TRAIN_NET, *training_sources(), *paths, cfg.MODEL.WEIGHTS):
        if path and Path(path).is_file():
            digest.update(f"\0{Path(path).name}\0".encode())
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)
    return digest.hexdigest()


def describe_plan(runs: Sequence[Run], parallel: int) -> str:
    """Return a table of the runs with the paper's numbers, and what is left to train; the time if one is measured."""
    lines, left, times, refused = [], {}, [], ""
    for run in runs:
        result, record, done = run.result(), None, 0
        try:
            if check_folder(run):
                record = result.last_step()
                names = [path.stem.removeprefix("model_") for path in run.folder.glob("model_[0-9]*.pth")]
                done = max((int(name) + 1 for name in names), default=0)
            state = result.status if result.ended else f"goes on at {done:,}" if done else "to train"
        except FileExistsError as error:
            state, refused = "refused", refused or f"\n{error}"
        times += [record["time"]] if record and "time" in record else []
        if not result.ended:
            left[run] = run.max_iter - done
        paper = run.row.published
        numbers = (paper.AP, paper.AP50, paper.AP75) if paper else "---"
        lines.append([run.row.key, run.seed, run.title, *numbers, f"{run.max_iter:,}", run.images_per_step, state])
    headers = ["row", "seed", "trained here", "paper's AP", "AP50", "AP75", "steps", "images / step", "state"]
    steps, images = sum(left.values()), sum(steps * run.images_per_step for run, steps in left.items())
    text = f"{len(left)} of {len(runs)} runs to train: {steps:,} steps, {images:,} images, {parallel} at a time."
    if left and times:
        second = statistics.median(times)
        time = format_duration(steps * second / min(parallel, len(left)))
        text += f" About {time}, at {second:.3g} s a step (the median of {len(times)} runs in this output folder)."
    elif left:
        text += " How long that takes is known once a run in this output folder has done some steps."
    return f"{tabulate(lines, headers, tablefmt='simple', floatfmt='.1f')}\n\n{text}{refused}"


def prepare_data(profile: Profile) -> Data:
    """Return where the data set lies; one that is made on first use is drawn now, and not by every run at once.

    Raises:
        ValueError: it cannot be trained on and reported.
    """
    cfg = profile.config()
    check_datasets(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        meta = MetadataCatalog.get(name)
        if not meta.get("json_file"):
            raise ValueError(f"data set {name!r} is not in COCO format: add --register {name}=FILE.json:IMAGES")
        if meta.get("lazily_generated"):
            print(f"{name}: {len(DatasetCatalog.get(name)):,} images", file=sys.stderr, flush=True)
    train, val = (MetadataCatalog.get(splits[0]) for splits in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    return Data(Path(train.json_file), Path(val.json_file), Path(val.image_root))
