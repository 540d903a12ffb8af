#!/usr/bin/env python3
# Copyright (c) focal_plugin authors. Licensed under the Apache License, Version 2.0.
"""Make the environment that `make` runs everything in, or check the one it is pointed at.

    tools/setup_env.py .venv

An environment made here holds a file, OWNED, written before anything else: it says which checkout may empty it and,
once all is installed, from what. Without it the environment is somebody else's and is only looked at. With it, but not
from what is wanted now, it is made again from nothing: never repaired.

Standard library only, since it runs before anything is installed; and in syntax that an old Python can read, so that
it gets as far as saying so.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS, REQUIREMENTS, DETECTRON2 = (
    ROOT / "requirements" / name for name in ("constraints.txt", "dev.txt", "detectron2.txt")
)
OWNED = "made-by-focal_plugin"
OLDEST, NEWEST = (3, 11), (3, 13)  # what the pinned versions have wheels for
DETECTRON2_TAG = "3.10"
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e2"

# Where packages come from (indexes, proxies, certificates) is the user's to say; which ones, and where they go, is not.
# Each of these is a PIP_ variable.
OVERRIDDEN = {
    *("TARGET", "PREFIX", "ROOT", "SRC", "DRY_RUN", "IGNORE_INSTALLED", "UPGRADE", "PRE", "NO_DEPS"),
    *("CONSTRAINT", "REQUIREMENT", "REQUIRE_HASHES", "ONLY_BINARY", "NO_BINARY", "NO_BUILD_ISOLATION"),
    *("PYTHON", "PYTHON_VERSION", "PLATFORM", "IMPLEMENTATION", "ABI"),
}

# Versions, and the one compiled operator that RetinaNet needs.
PROBE = """
import platform, detectron2, torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print("Python", platform.python_version(), end="")
for module in (torch, torchvision, detectron2):
    print(",", module.__name__, module.__version__, end="")
print(flush=True)
"""


class SetupError(Exception):
    """What went wrong and what to do, in words for the user."""


def say(text):
    print("setup: " + text, flush=True)  # before what pip prints next


def mark():
    """What OWNED says of a finished environment: whose it is, and a sum of all that it depends on."""
    files = (CONSTRAINTS, REQUIREMENTS, DETECTRON2, Path(__file__))
    return f"{ROOT}\n{hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()}\n"


def is_ours(venv):
    """Made by this very checkout: what another one made may be in use there."""
    return (venv / OWNED).is_file() and (venv / OWNED).read_text().splitlines()[:1] == [str(ROOT)]


def empty(venv):
    """Make a folder of ours, with nothing but OWNED in it. Stopped anywhere, the rest is ours, and is not trusted."""
    if venv.exists() and any(venv.iterdir()) and not is_ours(venv):
        raise SetupError(f"{venv} was not made by this checkout, so it is not touched")
    venv.mkdir(parents=True, exist_ok=True)
    (venv / OWNED).write_text(f"{ROOT}\n")
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OWNED:
            path.unlink()


def environment():
    dropped = {"PYTHONHOME", "PYTHONPATH", *("PIP_" + name for name in OVERRIDDEN)}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def steps(venv):
    """Return what each is called, its command, and what to do when that fails; in this order."""
    python, pins = venv / "bin" / "python", ("--constraint", CONSTRAINTS)
    pip = (python, "-m", "pip", "install")
    built_here = (*pip, "--no-build-isolation")  # with the pinned setuptools: fvcore and iopath come as sources
    tag = ("--only-binary=:all:", "--python-version", DETECTRON2_TAG, "--target", site_packages(venv))
    return (
        (
            "environment",
            (sys.executable, "-m", "venv", venv),
            "does this Python have venv? (Debian, Ubuntu: apt install python3-venv)",
        ),
        (
            "build tools",
            (*pip, *pins, "setuptools", "wheel"),
            "is the package index within reach (network, proxy, pip config)?",
        ),
        (
            "torch, torchvision",
            (*pip, *pins, "torch", "torchvision"),
            "is there room? On Linux it takes 6 GB, and pip's cache as much",
        ),
        (
            "requirements",
            (*built_here, *pins, "--requirement", REQUIREMENTS),
            "see pip's message; versions are in requirements/constraints.txt",
        ),
        (
            "Detectron2",
            (*pip, "--no-deps", *tag, "--require-hashes", "--requirement", DETECTRON2),
            "or name an environment of yours that has it: make VENV=/path/to/env",
        ),
        ("focal_plugin", (*built_here, "--no-deps", "--editable", ROOT), "see pip's message"),
        (
            "check",
            (python, "-c", PROBE + "import focal_plugin"),
            '"torchvision::nms does not exist": is pip set to an index of CPU-only torch?',
        ),
    )


def site_packages(venv):
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))


def runs(python):
    return shutil.which(python) and subprocess.run([python, "-V"], capture_output=True).returncode == 0


def check_version(version, runs=runs):
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return
    names = [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    raise SetupError(
        "the pinned versions need Python {}.{} to {}.{}, and this is {}.{}.\n".format(*OLDEST, *NEWEST, *version)
        + f"  What to do: make setup PYTHON={next(filter(runs, names), '/path/to/python3.11')}"
    )


def check_foreign(venv):
    """An environment of the user's is used as it is: looked at, never changed."""
    python = venv / "bin" / "python"
    if not python.exists():
        raise SetupError(
            f"{venv} exists, and is neither a Python environment nor made by this script: not touched.\n"
            "  What to do: name another with VENV=..."
        )
    probe = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        raise SetupError(
            f"{venv} is your own environment, and what the plugin needs does not import there: {reason}\n"
            "  What to do: install torch and torchvision into it, then Detectron2:\n"
            f"    {python} -m pip install --no-build-isolation '{DETECTRON2_SOURCE}'\n"
            "  or let setup make one of its own: VENV=.focal-venv"
        )
    say(f"your environment {venv} is used as it is ({probe.stdout.strip()})")


def setup(venv):
    with open(__file__, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup, or for the pip of one that was stopped")
            fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not venv.exists() or (venv.is_dir() and not any(venv.iterdir()))
        if not (is_new or is_ours(venv)):
            check_foreign(venv)
            return
        # A link to a Python that has been removed since does not exist().
        if not is_new and (venv / OWNED).read_text() == mark() and (venv / "bin" / "python").exists():
            return
        check_version(sys.version_info)
        again = "never finished, or made from other versions; making it again from nothing"
        say(f"{venv}: {'making it' if is_new else again}")
        empty(venv)
        began, todo = time.monotonic(), steps(venv)
        for number, (title, command, hint) in enumerate(todo, 1):
            say(f"[{number}/{len(todo)}] {title}, after {time.monotonic() - began:.0f} s")
            # What outlives a killed setup keeps the lock: nothing empties the environment under a running pip.
            keep = {"cwd": venv, "env": environment(), "pass_fds": [lock.fileno()]}
            try:
                failure = subprocess.call([str(word) for word in command], **keep)
            except OSError as error:
                failure = error
            if failure:
                reason = f"exit status {failure}" if isinstance(failure, int) else failure
                raise SetupError(f"step {number} ({title}) failed: {reason}\n  What to do: {hint}")
        shutil.rmtree(site_packages(venv) / "tools", ignore_errors=True)  # which Detectron2's wheel brings by mistake
        (venv / OWNED).write_text(mark())
        say(f"{venv} is ready, after {time.monotonic() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("venv", nargs="?", type=Path, default=ROOT / ".venv")
    try:
        setup(parser.parse_args().venv.resolve())
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; the next `make setup` starts from nothing")


if __name__ == "__main__":
    main()
