"""Say what is installed and what of focal_plugin works on each device here: a text to paste into an issue.

Nothing but the standard library is imported with this module, which tools/doctor.py loads by its path: it has to speak
where torch, Detectron2 or focal_plugin itself cannot be imported. Whatever a check raises is a finding of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

DETECTRON2_LINE = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e2'"
TORCH_LINE = "pip install torch torchvision, both in one call and from one index"
REPORT_LINE = "report it with all of this text; on a GPU try FOCAL_PLUGIN_TRITON=0"
PLAIN = "numpy scipy pandas matplotlib jinja2 tabulate filelock tqdm pycocotools fvcore"
NEEDED = {  # module: the way out
    **dict.fromkeys(("torch", "torchvision"), TORCH_LINE),
    **{name: f"pip install {name}" for name in PLAIN.split()},
    **{"PIL": "pip install pillow", "yaml": "pip install pyyaml", "sklearn": "pip install scikit-learn"},
    "detectron2": DETECTRON2_LINE,
    "focal_plugin": "the message says what is missing; lines marked with ! say how to get it",
}
OPTIONAL = {  # module: what it is for
    "detectron2._C": "not needed here: deformable convolutions, rotated boxes and the fast COCO evaluation would",
    "cv2": "drawing of detections needs it: pip install opencv-python-headless",
    "pkg_resources": "detectron2.model_zoo needs it, nothing here does: pip install 'setuptools<81'",
    "triton": "without it the losses on a GPU are not fused; it is for Linux only",
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "DETECTRON2_DATASETS", "FOCAL_PLUGIN_TRITON", "OMP_NUM_THREADS", "PYTHONPATH")
MAX_ERROR = 1e-4  # relative to float64, of the loss and its gradient in float32; where all works it is under 1e-5


class Report:
    """Lines of text, the last of which is the verdict, and the problems among them."""

    def __init__(self):
        self.lines: list[str] = []
        self.problems: list[str] = []

    def look(self, name: str, check: Callable, *args: object, way_out: str = "", purpose: str = "") -> bool:
        """Add what a check returns or raises, the latter as a problem if there is a way out; whether it returns."""
        try:
            self.lines.append(f"{name:<32} {check(*args)}")
            return True
        except (Exception, SystemExit) as error:  # which a module may raise while it is imported
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                text = "not installed"
        self.lines.append(f"{name:<32} {text} {'!' if way_out else f'({purpose})'}")
        self.problems += [f"{name}: {text} -> {way_out}"] if way_out else []
        return False


def diagnose() -> Report:
    """Look at everything; takes some seconds, most of them to import torch and Detectron2."""
    report, devices = Report(), []
    # Not into the report: what is imported warns and prints.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        given = [f"{name}={os.environ[name]!r}" for name in VARIABLES if name in os.environ]
        report.lines.append(_environment())
        report.look("environment", ", ".join, [sys.executable, *given])
        report.look("this tool", str, f"{__file__} (PYTHONPATH=. takes focal_plugin from its checkout)")
        report.look("focal_plugin's origin", _origin, "focal_plugin", "focal_plugin")
        report.look("Detectron2's origin", _origin, "detectron2", "detectron2", "sal-detectron2")
        there = {name for name, way_out in NEEDED.items() if report.look(name, _version, name, way_out=way_out)}
        for name, purpose in OPTIONAL.items():
            report.look(name, _version, name, purpose=purpose)
        report.look("OUTPUT_DIR", _output, way_out="work in another folder, or give OUTPUT_DIR on the command line")
        if {"torch", "torchvision"} <= there:
            from torch import ones
            from torchvision.ops import nms

            way_out = f"not made for this torch: {TORCH_LINE}"
            report.look("torchvision's nms of one box", nms, ones(1, 4), ones(1), 0.5, way_out=way_out)
            report.look("GPU", _gpu, way_out="see pytorch.org for the torch that fits your driver")
        if "focal_plugin" in there:
            devices = _try_everywhere(report)
    problems = "; ".join(report.problems)
    verdict = f"does not work here: {problems}" if problems else f"all works here ({', '.join(devices)})"
    report.lines.append(f"verdict: {verdict}")
    return report


def _try_everywhere(report: Report) -> list[str]:
    """Train each method a step, and compute the loss, on each device; return the devices."""
    from torch.cuda import device_count

    devices = ["cpu", *(f"cuda:{i}" for i in range(device_count()))]
    for device in devices:
        for title, config in (("FL", "digits/focal.yaml"), ("OHEM", "digits/ohem.yaml")):
            report.look(f"{title}, one step on {device}", one_step, config, device, way_out=REPORT_LINE)
        for gamma in (0.0, 0.5, 2.0):
            report.look(f"loss, gamma {gamma:g}, on {device}", loss_error, gamma, device, way_out=REPORT_LINE)
    return devices


def _environment() -> str:
    for module, function in (("detectron2.utils", "collect_env_info"), ("torch.utils", "get_pretty_env_info")):
        with contextlib.suppress(Exception):
            return getattr(importlib.import_module(f"{module}.collect_env"), function)().rstrip()
    return f"Python {platform.python_version()}, {platform.platform()}; Detectron2 and torch cannot say more"


def _origin(module: str, *distributions: str) -> str:
    """Return folder, version and, where pip or git knows it, commit: Detectron2 is "0.6" in years of commits."""
    spec = importlib.util.find_spec(module)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    text = str(folder or "not found")
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name)
            commit = re.search(r'"commit_id": *"(\w+)"', found.read_text("direct_url.json") or "")
            text += f", {name} {found.version}" + (f", commit {commit[1]}" if commit else "")
    if folder and (folder.parent / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            text += f", commit {subprocess.check_output(command, text=True, timeout=20).strip()}"
    return text


def _version(module: str) -> str:
    return getattr(importlib.import_module(module), "__version__", "there")


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return f"torch can use {torch.cuda.device_count()}; NCCL there: {torch.distributed.is_nccl_available()}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        if listed.startswith("GPU ") and "CUDA_VISIBLE_DEVICES" not in os.environ:
            name, cuda = listed.partition(" (UUID")[0], torch.version.cuda  # without its serial number
            reason = f"the driver is too old for CUDA {cuda}, or broken" if cuda else "it is built for the CPU only"
            raise RuntimeError(f"{name}: torch cannot use it, {reason}")
    return "none that torch may use"


def _output() -> str:
    output = Path("output").absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return f"{output} can be written, {shutil.disk_usage(existing).free / 2**30:.0f} GiB free"
    raise OSError(f"{output} cannot be written")


def one_step(config: str, device: str) -> str:
    """Return losses and gradient norm of a random model on a random image; raise if they are not finite."""
    import torch
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from focal_plugin import get_config

    boxes = Boxes(torch.tensor([[10.0, 12.0, 34.0, 36.0], [60.0, 50.0, 90.0, 84.0]]))
    objects = Instances((128, 128), gt_classes=torch.tensor([1, 7]), gt_boxes=boxes)
    with torch.random.fork_rng(devices=[]):  # the same numbers in every report, and in no other place
        torch.manual_seed(0)
        model = build_model(get_config(config, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])).train()
        image = torch.randint(0, 256, (3, 128, 128)).float()
    with EventStorage():
        losses = model([{"image": image, "instances": objects}])
    sum(losses.values()).backward()
    numbers = {**losses, "gradient": torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)}
    text = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
    if not all(map(math.isfinite, numbers.values())):
        raise FloatingPointError(f"not finite: {text}")
    return text


def loss_error(gamma: float, device: str) -> str:
    """Return the largest relative errors in float32 (on a GPU: of the Triton kernels), logits to 60; raise if high."""
    import torch
    from torch.nn.functional import logsigmoid

    from focal_plugin.losses import sigmoid_focal_loss

    logits = torch.linspace(-60, 60, 1200).view(400, 3)
    labels = torch.arange(400) % 4  # 3 is background
    x, y = logits.double().requires_grad_(), logits.to(device).requires_grad_()
    present = labels[:, None] == torch.arange(3)
    x_t = torch.where(present, x, -x)
    want = (torch.where(present, 0.25, 0.75) * -(torch.sigmoid(-x_t) ** gamma) * logsigmoid(x_t)).sum()
    got = sigmoid_focal_loss(y, labels.to(device), 0.25, gamma, "sum")
    want.backward()
    got.backward()
    counted = x.grad.abs() > 1e-37  # smaller ones are denormal in float32, or 0
    want = torch.cat([want.detach()[None], x.grad[counted]])
    errors = (torch.cat([got.detach()[None].cpu(), y.grad.cpu()[counted]]) - want).abs() / want.abs()
    text = f"relative error {errors[0]:.1e}, of the gradient {errors[1:].max():.1e}"
    if not errors.max() <= MAX_ERROR:  # NaN is not
        raise ArithmeticError(text)
    return text
