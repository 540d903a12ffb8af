"""What is installed, and what of focal_plugin works on each device here: a text to paste into an issue.

Nothing but the standard library is imported with this module, which tools/doctor.py loads by its path: it has to speak
where torch, Detectron2 or focal_plugin itself cannot be imported. Everything else happens in a check, and whatever a
check raises is a finding of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
DETECTRON2_LINE = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e2'"
TORCH_LINE = "pip install torch torchvision, both in one call and from one index"


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: of what was looked at.
        value: what was found.
        way_out: what to do about it; not empty: it does not work, and the verdict says so.
    """

    name: str
    value: str
    way_out: str = ""


@dataclass
class Report:
    """The findings by section, in order."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    """Those that a model was trained on."""

    @property
    def problems(self) -> list[Finding]:
        return [finding for findings in self.sections.values() for finding in findings if finding.way_out]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        if self.ok:
            return f"verdict: all works here ({', '.join(self.devices)})"
        broken = "; ".join(f"{p.name}: {p.value} -> {p.way_out}" for p in self.problems)
        return f"verdict: does not work here: {broken}"

    def to_text(self) -> str:
        lines = []
        for title, findings in self.sections.items():
            width = max((len(f.name) for f in findings), default=0)
            rows = [f"  {f.name:<{width}}  {f.value}{' !' if f.way_out else ''}" for f in findings]
            lines += [title, *(row.replace("\n", "\n    ") for row in rows)]
        return hide_home("\n".join([*lines, self.verdict]))

    def to_json(self) -> str:
        """An object with ok, verdict, devices, problems and sections; a finding has name, value and way_out."""
        sections = {title: [vars(finding) for finding in found] for title, found in self.sections.items()}
        problems = [vars(problem) for problem in self.problems]
        content = {"ok": self.ok, "verdict": self.verdict, "devices": self.devices, "problems": problems}
        return json.dumps(_each_text({**content, "sections": sections}, hide_home), indent=2)


def diagnose(upstream: bool = False) -> Report:
    """Looks at everything; takes some seconds, most of them to import torch and Detectron2.

    Args:
        upstream: also ``detectron2.utils.collect_env.collect_env_info()``, which is long and runs compilers.
    """
    report = Report()
    # Not into the report: what is imported warns and prints.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for title, check in _SECTIONS.items():
            report.sections[title] = examine(title, check)
        for device in _devices():
            report.sections[f"model on {device}"] = examine(device, lambda device=device: _check_device(device))
            report.devices.append(device)
        if upstream:
            report.sections["detectron2.utils.collect_env"] = examine("collect_env_info", _check_upstream)
    return report


def examine(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds, up to the exception that ends it, which is a finding too."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything while it is imported, SystemExit included
        found.append(Finding(name, describe(error), "see the lines above it for what is missing"))
    return found


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def hide_home(text: str) -> str:
    """``text`` with ~ for the home folder, whose name is that of a person."""
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}
    for home in sorted(homes, key=len, reverse=True):
        if len(home) > 1 and home != "~":
            text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_text(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def load(name: str) -> tuple[Any, str]:
    """The module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
        return None, "not installed" if is_missing else f"cannot be imported: {describe(error)}"


# ------------------------------ what is installed


def _check_plugin() -> Iterator[Finding]:
    spec = importlib.util.find_spec("focal_plugin")
    folder = Path(spec.origin).parent if spec and spec.origin else HERE
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    yield Finding("version", version.group(1) if version else "unknown")
    other = "" if folder == HERE else f" (not the checkout of this tool, {HERE}: PYTHONPATH=. would take that)"
    yield Finding("folder", f"{folder}{other}")
    yield Finding("git commit", _git_commit(folder))
    plugin, why = load("focal_plugin")
    way_out = "" if plugin else "the message says what is missing; lines marked with ! say how to get it"
    yield Finding("import focal_plugin", "works" if plugin else why, way_out)


def _git_commit(folder: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        # Installed into an environment that lies in some other project's checkout, it has no commit of its own.
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return "none: not in a checkout"
        changed = ", with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return "none: not in a checkout, or there is no git"


def _check_system() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores")
    names = ("CUDA_VISIBLE_DEVICES", "DETECTRON2_DATASETS", "FOCAL_PLUGIN_TRITON", "OMP_NUM_THREADS", "PYTHONPATH")
    for name in names:
        if name in os.environ:
            yield Finding(name, repr(os.environ[name]))


def _check_packages() -> Iterator[Finding]:
    for name, (is_needed, way_out) in _PACKAGES.items():
        module, why = load(name)
        if module:
            yield Finding(name, str(getattr(module, "__version__", None) or _distribution_version(name)))
        else:
            yield Finding(name, why if is_needed else f"{why} ({way_out})", way_out if is_needed else "")
        if module and name == "torchvision":
            yield _check_nms(module)


_PACKAGES = {  # module: needed, and the way out or what it would be for
    "torch": (True, TORCH_LINE),
    "torchvision": (True, TORCH_LINE),
    "numpy": (True, "pip install numpy"),
    "PIL": (True, "pip install pillow"),
    "pycocotools": (True, "pip install pycocotools"),
    "fvcore": (True, "pip install fvcore"),
    "cv2": (False, "drawing of detections needs it: pip install opencv-python-headless"),
    "pkg_resources": (False, "detectron2.model_zoo needs it, nothing here does: pip install 'setuptools<81'"),
    "triton": (False, "without it the losses on a GPU are not fused; it is for Linux only"),
}


def _distribution_version(module: str) -> str:
    for name in (module, {"pkg_resources": "setuptools", "PIL": "pillow", "cv2": "opencv-python"}.get(module, module)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "version unknown"


def _check_nms(torchvision: Any) -> Finding:
    try:
        import torch

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        return Finding("torchvision's operators", "work (nms)")
    except Exception as error:  # not torch's RuntimeError alone: a half-loaded library raises anything
        return Finding("torchvision's operators", describe(error), f"not made for this torch: {TORCH_LINE}")


def _check_detectron2() -> Iterator[Finding]:
    module, why = load("detectron2")
    if not module:
        yield Finding("detectron2", why, DETECTRON2_LINE)
        return
    yield Finding("package", _origin_of_detectron2())
    yield Finding("folder", str(Path(module.__file__).parent))
    compiled, why = load("detectron2._C")
    state = "there" if compiled else "not there" if why == "not installed" else why
    needs = "deformable convolutions, rotated boxes and the fast COCO evaluation would"
    yield Finding("compiled _C", f"{state}; RetinaNet and nothing here needs it: {needs}")


def _origin_of_detectron2() -> str:
    """Its distribution, version and, where pip knows it, commit: ``__version__`` is "0.6" in years of commits."""
    for name in ("detectron2", "sal-detectron2"):
        with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
            distribution = metadata.distribution(name)
            url = json.loads(distribution.read_text("direct_url.json") or "{}")
            commit = url.get("vcs_info", {}).get("commit_id", "")
            return f"{name} {distribution.version}" + (f", commit {commit}" if commit else "")
    return "not installed by pip (found on the path)"


# ------------------------------ accelerators and places


def _check_accelerators() -> Iterator[Finding]:
    torch, why = load("torch")
    if not torch:
        yield Finding("torch", f"{why}, so nothing is known of GPUs")
        return
    cuda = torch.version.cuda or getattr(torch.version, "hip", None)
    yield Finding("torch is built for", f"CUDA or ROCm {cuda}" if cuda else "the CPU only")
    if torch.cuda.is_available():
        yield from _check_gpus(torch)
    else:
        yield _unused_gpu(cuda)
    yield Finding("Triton for the loss", _triton_use(torch))
    if torch.backends.mps.is_available():
        yield Finding("MPS", "there, but untested with this plugin, which runs on the CPU here")
    dist = torch.distributed
    backends = {"gloo (CPU workers)": "is_gloo_available", "NCCL (GPU workers)": "is_nccl_available"}
    for name, question in backends.items():
        is_there = dist.is_available() and getattr(dist, question, lambda: False)()
        yield Finding(name, "available" if is_there else "not available")


def _check_gpus(torch: Any) -> Iterator[Finding]:
    from torch.utils import collect_env

    yield Finding("driver", str(collect_env.get_nvidia_driver_version(collect_env.run)))
    archs = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        text = f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB, capability {capability[0]}.{capability[1]}"
        fits = torch.version.hip or arch_fits(capability, archs)
        way_out = "" if fits else f"this torch has kernels for {' '.join(archs)}: install one that has yours"
        yield Finding(f"cuda:{i}", text, way_out)


def arch_fits(capability: tuple[int, int], archs: Iterable[str]) -> bool:
    """Whether a build of torch has a kernel image for a GPU: of its major version, or PTX of a lower one.

    Args:
        capability: (major, minor) of the GPU.
        archs: as ``torch.cuda.get_arch_list()`` has them, e.g. "sm_86" (machine code), "compute_90" (PTX).
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)
        if not match:
            continue
        have = int(match[2]), int(match[3])
        if have <= tuple(capability) and (match[1] == "compute" or have[0] == capability[0]):
            return True
    return False


def _unused_gpu(cuda: str | None) -> Finding:
    """Of a machine on which torch finds no GPU: whether there is one all the same."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    if not listed.startswith("GPU ") or os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return Finding("GPU", "none that torch may use")
    reason = f"the driver is too old for CUDA {cuda}, or broken" if cuda else "this torch is built for the CPU only"
    # Without its serial number.
    name = listed.splitlines()[0].partition(" (UUID")[0]
    return Finding("GPU", f"{name}: torch cannot use it", f"{reason}: see pytorch.org for the right command")


def _triton_use(torch: Any) -> str:
    if os.environ.get("FOCAL_PLUGIN_TRITON") == "0":
        return "switched off by FOCAL_PLUGIN_TRITON=0"
    triton, why = load("triton")
    if not triton:
        return f"no: {why}"
    return "yes, on CUDA" if torch.cuda.is_available() else "no: it is for CUDA tensors, and there is no GPU"


def _check_places() -> Iterator[Finding]:
    output = Path("output").absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free = f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free"
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    way_out = "" if writable else "work in another folder, or give OUTPUT_DIR on the command line"
    yield Finding("OUTPUT_DIR", f"{output}, {'can' if writable else 'cannot'} be written, {free}", way_out)
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser().absolute()
    inside = ", ".join(name for name in ("coco", "digits") if (datasets / name).is_dir())
    yield Finding("data sets", f"{datasets}, {f'has {inside}' if inside else 'has neither coco nor digits yet'}")


def _devices() -> list[str]:
    """Those to try a model on: none if what it is made of is not there."""
    if not load("focal_plugin")[0]:
        return []
    import torch

    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()) if torch.cuda.is_available())]


def _check_device(device: str) -> Iterator[Finding]:
    from focal_plugin.selftest import check_device

    for name, value, way_out in check_device(device):
        yield Finding(name, value, way_out)


def _check_upstream() -> Iterator[Finding]:
    from detectron2.utils.collect_env import collect_env_info

    yield Finding("collect_env_info", "\n" + collect_env_info())


_SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "focal_plugin": _check_plugin,
    "system": _check_system,
    "packages": _check_packages,
    "Detectron2": _check_detectron2,
    "accelerators": _check_accelerators,
    "places": _check_places,
}
