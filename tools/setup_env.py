#!/usr/bin/env python3
# Copyright (c) focal_plugin authors. Licensed under the Apache License, Version 2.0.
"""Make the environment that `make` runs everything in, or check the one it is pointed at.

    tools/setup_env.py .venv

An environment made here holds two files: OWNED, written before anything else, says that this script may
empty it; COMPLETE, written after everything else, says what it was made from. Without OWNED it is somebody
else's and is only looked at. With OWNED but without a COMPLETE that matches, it is made again from nothing:
never repaired.

Standard library only, since it runs before anything is installed; and in syntax that an old Python can read,
so that it gets as far as saying so.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
REQUIREMENTS = ROOT / "requirements" / "dev.txt"

OWNED = "made-by-focal_plugin"
COMPLETE = "focal_plugin-complete"

OLDEST, NEWEST = (3, 11), (3, 13)  # what the pinned versions have wheels for

# Upstream Detectron2 of 2024-04-17 with a fix for Python 3.11, as a wheel that needs no compiler. It is
# tagged Python 3.10 because of one compiled module, which RetinaNet does not use; the rest is pure Python.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_TAG = "3.10"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e2"

# Where packages come from (indexes, proxies, certificates) is the user's to say; which ones, and where they
# go, is not. Each of these is a PIP_ variable.
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
    print(text, flush=True)  # before what pip prints next


# ------------------------------ state on disk


def fingerprint():
    """Of all that a finished environment depends on: the pins, this script, and where the checkout lies."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (CONSTRAINTS, REQUIREMENTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def state(venv, want):
    """absent, foreign, unfinished, outdated or complete."""
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        return "absent"
    if not is_ours(venv):
        return "foreign"
    if not (venv / COMPLETE).is_file():
        return "unfinished"
    # A link to a Python that has been removed since does not exist().
    current = (venv / COMPLETE).read_text().strip() == want and (venv / "bin" / "python").exists()
    return "complete" if current else "outdated"


def claim(venv):
    venv.mkdir(parents=True, exist_ok=True)
    text = "The checkout whose tools/setup_env.py made this environment, and empties it when it has to.\n"
    (venv / OWNED).write_text(f"{ROOT}\n{text}")


def is_ours(venv):
    """Made by this very checkout: what another one made may be in use there."""
    return (venv / OWNED).is_file() and (venv / OWNED).read_text().splitlines()[:1] == [str(ROOT)]


def empty(venv):
    """Everything but OWNED goes, COMPLETE first: stopped anywhere, the rest is ours, and is not trusted."""
    if not is_ours(venv):
        raise SetupError(f"{venv} was not made by this checkout, so it is not touched")
    if (venv / COMPLETE).exists():
        (venv / COMPLETE).unlink()
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OWNED:
            path.unlink()


# ------------------------------ the steps


def environment():
    dropped = {"PYTHONHOME", "PYTHONPATH", *("PIP_" + name for name in OVERRIDDEN)}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class Builder:
    def __init__(self, venv, lock):
        self.venv, self.lock = venv, lock
        self.python = venv / "bin" / "python"

    def run(self, *command):
        # What outlives a killed setup keeps the lock: nothing empties the environment under a running pip.
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=self.venv, env=environment(), pass_fds=[self.lock.fileno()])
        if done.returncode:
            raise SetupError(f"exit status {done.returncode}")

    def pip(self, verb, *arguments):
        self.run(self.python, "-m", "pip", verb, *arguments)

    def create(self):
        self.run(sys.executable, "-m", "venv", self.venv)

    def build_tools(self):
        self.pip("install", "--constraint", CONSTRAINTS, "setuptools", "wheel")

    def torch(self):
        self.pip("install", "--constraint", CONSTRAINTS, "torch", "torchvision")

    def requirements(self):
        # No isolation: fvcore and iopath come as sources, and are built with the pinned setuptools.
        pins = ("--constraint", CONSTRAINTS, "--requirement", REQUIREMENTS)
        self.pip("install", "--no-build-isolation", *pins)

    def detectron2(self):
        with tempfile.TemporaryDirectory() as folder:
            where = ("--only-binary=:all:", "--python-version", DETECTRON2_TAG, "--dest", folder)
            self.pip("download", "--no-deps", *where, DETECTRON2)
            (wheel,) = Path(folder).glob("*.whl")
            check_sha256(wheel, DETECTRON2_SHA256)
            code = "import sysconfig; print(sysconfig.get_path('purelib'))"
            unpack(wheel, subprocess.check_output([str(self.python), "-c", code], text=True).strip())

    def plugin(self):
        self.pip("install", "--no-deps", "--no-build-isolation", "--editable", ROOT)

    def check(self):
        self.run(self.python, "-c", PROBE + "import focal_plugin")

    # In this order: what it is called, what does it, what to do when that fails.
    steps = (
        ("environment", create, "does this Python have venv? (Debian, Ubuntu: apt install python3-venv)"),
        ("build tools", build_tools, "is the package index within reach (network, proxy, pip config)?"),
        ("torch, torchvision", torch, "is there room? On Linux it takes 6 GB, and pip's cache as much"),
        ("requirements", requirements, "see pip's message; versions are in requirements/constraints.txt"),
        ("Detectron2", detectron2, "or name an environment of yours that has it: make VENV=/path/to/env"),
        ("focal_plugin", plugin, "see pip's message"),
        ("check", check, '"torchvision::nms does not exist": is pip set to an index of CPU-only torch?'),
    )


def check_sha256(path, expected):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SetupError(f"{path.name} has sha256 {found}, not {expected}: not installed")


def unpack(wheel, purelib):
    """What pip does with a wheel of plain files, whatever its tag; but without the top-level package `tools`,
    which this one brings along by mistake."""
    with zipfile.ZipFile(str(wheel)) as archive:
        archive.extractall(purelib, [name for name in archive.namelist() if not name.startswith("tools/")])
    for record in Path(purelib).glob("sal_detectron2-*.dist-info/RECORD"):
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if not line.startswith("tools/")))


# ------------------------------ putting it together


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


def build(venv, want, lock):
    check_version(sys.version_info)
    if (venv / OWNED).exists():
        empty(venv)
    claim(venv)
    builder, began = Builder(venv, lock), time.monotonic()
    for number, (title, action, hint) in enumerate(Builder.steps, 1):
        start = time.monotonic()
        say(f"setup: [{number}/{len(Builder.steps)}] {title}")
        try:
            action(builder)
        except (SetupError, OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
            raise SetupError(f"step {number} ({title}) failed: {error}\n  What to do: {hint}") from error
        say(f"setup: [{number}/{len(Builder.steps)}] {title}: {time.monotonic() - start:.0f} s")
    (venv / COMPLETE).write_text(want + "\n")
    say(f"setup: {venv} is ready, after {time.monotonic() - began:.0f} s")


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
            f"    {python} -m pip install --no-build-isolation '{UPSTREAM}'\n"
            "  or let setup make one of its own: VENV=.focal-venv"
        )
    say(f"setup: your environment {venv} is used as it is ({probe.stdout.strip()})")


def setup(venv):
    want = fingerprint()
    with open(__file__, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("setup: waiting for another setup, or for the pip of one that was stopped")
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = state(venv, want)
        if found == "foreign":
            check_foreign(venv)
        elif found != "complete":
            reason = {
                "absent": "making it",
                "unfinished": "never finished; making it again from nothing",
                "outdated": "made from other versions; making it again from nothing",
            }
            say(f"setup: {venv}: {reason[found]}")
            build(venv, want, lock)


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
