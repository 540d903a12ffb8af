# Copyright (c) focal_plugin authors. Licensed under the Apache License, Version 2.0.
"""The wheel holds all it needs, a missing Detectron2 is said once, and setup_env deletes only its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, cwd, path=ROOT):
    """Run code in a new interpreter that sees `path` before any installed focal_plugin."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


# ------------------------------ the package


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """Built from an sdist, so that the sdist is complete, too."""
    pytest.importorskip("setuptools")
    tmp = tmp_path_factory.mktemp("build")
    source = tmp / "source"  # a copy: building leaves files behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("focal_plugin", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp, sdist], cwd=tmp, check=True)
    (wheel,) = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp / "wheel")
    return tmp / "wheel"


def test_wheel_has_every_config(unpacked_wheel):
    expected = {path.relative_to(ROOT) for kind in ("*.yaml", "*.py") for path in (ROOT / "configs").rglob(kind)}
    inside = unpacked_wheel / "focal_plugin"
    assert {path.suffix for path in expected} == {".yaml", ".py"}
    configs = [*inside.rglob("*.yaml"), *(inside / "configs").rglob("*.py")]
    assert {path.relative_to(inside) for path in configs} == expected


def test_wheel_has_nothing_but_the_package(unpacked_wheel):
    names = {path.name for path in unpacked_wheel.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"focal_plugin"}


def test_wheel_works_without_the_checkout(unpacked_wheel, tmp_path):
    code = (
        "import focal_plugin; print(focal_plugin.__file__); "
        "print(focal_plugin.get_config('retina_focal.yaml').MODEL.META_ARCHITECTURE)"
    )
    done = python(code, cwd=tmp_path, path=unpacked_wheel)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(unpacked_wheel / "focal_plugin" / "__init__.py"), "FocalRetinaNet"]


def test_missing_detectron2_gives_the_line_to_type(tmp_path):
    done = python("import sys; sys.modules['detectron2'] = None; import focal_plugin", cwd=tmp_path)
    assert done.stderr.count("Traceback") == 1
    error = done.stderr[done.stderr.rindex("\nImportError: ") :]
    line = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@"
    assert line in error


# ------------------------------ tools/setup_env.py


@pytest.fixture(scope="module")
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_state_of_an_environment(setup_env, tmp_path):
    venv = tmp_path / "venv"
    assert setup_env.state(venv, "pins") == "absent"
    setup_env.claim(venv)
    assert setup_env.state(venv, "pins") == "unfinished"
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / setup_env.COMPLETE).write_text("pins\n")
    assert setup_env.state(venv, "pins") == "complete"
    assert setup_env.state(venv, "other pins") == "outdated"
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(tmp_path / "uninstalled")
    assert setup_env.state(venv, "pins") == "outdated"


def test_pins_are_part_of_the_fingerprint(setup_env, tmp_path, monkeypatch):
    before = setup_env.fingerprint()
    assert setup_env.fingerprint() == before
    pins = tmp_path / "constraints.txt"
    pins.write_bytes(setup_env.CONSTRAINTS.read_bytes() + b"torch==9\n")
    monkeypatch.setattr(setup_env, "CONSTRAINTS", pins)
    assert setup_env.fingerprint() != before


def test_own_environment_is_emptied(setup_env, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    venv = tmp_path / "venv"
    setup_env.claim(venv)
    (venv / "lib").mkdir()
    (venv / "lib" / "half.py").touch()
    (venv / "lib64").symlink_to(outside)
    (venv / setup_env.COMPLETE).touch()
    setup_env.empty(venv)
    assert [path.name for path in venv.iterdir()] == [setup_env.OWNED]
    assert outside.is_dir()


def test_environment_of_another_checkout_is_foreign(setup_env, tmp_path, monkeypatch):
    setup_env.claim(tmp_path / "venv")
    (tmp_path / "venv" / setup_env.COMPLETE).write_text("pins")
    (tmp_path / "venv" / "keep").touch()
    monkeypatch.setattr(setup_env, "ROOT", tmp_path / "another checkout")
    assert setup_env.state(tmp_path / "venv", "pins") == "foreign"
    with pytest.raises(setup_env.SetupError, match="not touched"):
        setup_env.empty(tmp_path / "venv")
    assert (tmp_path / "venv" / "keep").exists()


def test_foreign_environment_is_never_emptied(setup_env, tmp_path):
    keep = tmp_path / "keep.txt"
    keep.touch()
    assert setup_env.state(tmp_path, "pins") == "foreign"
    with pytest.raises(setup_env.SetupError, match="not touched"):
        setup_env.empty(tmp_path)
    with pytest.raises(setup_env.SetupError, match="neither a Python environment"):
        setup_env.setup(tmp_path)
    assert list(tmp_path.iterdir()) == [keep]


def test_foreign_environment_without_detectron2_is_refused(setup_env, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(setup_env, "PROBE", "import no_detectron2_here")
    with pytest.raises(setup_env.SetupError, match=r"No module named 'no_detectron2_here'(.|\n)*pip install"):
        setup_env.check_foreign(tmp_path)


def test_failed_step_is_named_and_the_environment_not_trusted(setup_env, tmp_path, monkeypatch):
    def fail(builder):
        raise OSError("disk full")

    monkeypatch.setattr(setup_env, "check_version", lambda version: None)
    monkeypatch.setattr(setup_env.Builder, "steps", [("torch", fail, "free some space")])
    with pytest.raises(setup_env.SetupError, match=r"step 1 \(torch\) failed: disk full\n.*free some space"):
        setup_env.setup(tmp_path / "venv")
    assert setup_env.state(tmp_path / "venv", setup_env.fingerprint()) == "unfinished"


def test_wheel_with_another_sha256_is_refused(setup_env, tmp_path):
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"not what was published")
    with pytest.raises(setup_env.SetupError, match="not installed"):
        setup_env.check_sha256(wheel, setup_env.DETECTRON2_SHA256)


def test_detectron2_wheel_brings_no_tools_package(setup_env, tmp_path):
    record = "sal_detectron2-0.7.2.dist-info/RECORD"
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("detectron2/__init__.py", "")
        archive.writestr("tools/__init__.py", "")
        archive.writestr(record, "detectron2/__init__.py,,\ntools/__init__.py,,\n")
    setup_env.unpack(tmp_path / "x.whl", tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["detectron2", record.split("/")[0]]
    assert (tmp_path / "site" / record).read_text() == "detectron2/__init__.py,,\n"


@pytest.mark.parametrize(
    "version, answer", [((3, 8), "python3.12"), ((3, 10, 2), "python3.12"), ((3, 14), "python3.12")]
)
def test_wrong_python_is_told_what_to_type(setup_env, version, answer):
    setup_env.check_version((3, 11, 4))
    with pytest.raises(setup_env.SetupError, match=f"PYTHON={answer}"):
        setup_env.check_version(version, runs=lambda name: name == "python3.12")


def test_packages_go_nowhere_else(setup_env, monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    environment = setup_env.environment()
    assert "PIP_TARGET" not in environment
    assert environment["PIP_USER"] == "0"
    assert environment["PIP_INDEX_URL"] == "https://index.example/simple"
