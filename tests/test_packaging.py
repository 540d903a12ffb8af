# Copyright (c) focal_plugin authors. Licensed under the Apache License, Version 2.0.
"""The wheel holds all it needs, a missing Detectron2 is said once, and setup_env deletes only its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, cwd, path=ROOT):
    """Run code in a new interpreter that sees `path` before any installed focal_plugin."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_wheel_has_all_it_needs_and_works_without_the_checkout(tmp_path):
    """Built from an sdist, so that the sdist is complete, too."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # a copy: building leaves files behind
    for name in ("focal_plugin", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, sdist], cwd=tmp_path, check=True)
    with zipfile.ZipFile(*tmp_path.glob("*.whl")) as archive:
        archive.extractall(tmp_path / "wheel")
    assert {p.name for p in (tmp_path / "wheel").iterdir() if p.suffix != ".dist-info"} == {"focal_plugin"}
    inside = tmp_path / "wheel" / "focal_plugin"
    folders = {ROOT / "focal_plugin": inside, ROOT / "configs": inside / "configs"}
    expected = {folders[folder] / p.relative_to(folder) for folder in folders for p in folder.rglob("*")}
    for suffix in (".py", ".yaml", ".html", ".css", ".md"):
        assert {p for p in expected if p.suffix == suffix} == set(inside.rglob(f"*{suffix}"))
    code = (  # the import registers, and touches nothing else
        "import sys; import focal_plugin as f\n"
        "from detectron2.modeling import META_ARCH_REGISTRY as m\n"
        "from detectron2.data import DatasetCatalog as d\n"
        "assert m.get('FocalRetinaNet') is f.FocalRetinaNet and 'digits_train' in d\n"
        "assert 'sklearn' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "print(f.__file__, f.get_config('retina_focal.yaml').MODEL.META_ARCHITECTURE)"
    )
    (tmp_path / "empty").mkdir()
    done = python(code, cwd=tmp_path / "empty", path=tmp_path / "wheel")
    assert done.stdout.split() == [str(inside / "__init__.py"), "FocalRetinaNet"], done.stderr
    assert not list((tmp_path / "empty").iterdir())


def test_missing_detectron2_gives_the_line_to_type(tmp_path):
    done = python("import sys; sys.modules['detectron2'] = None; import focal_plugin", cwd=tmp_path)
    assert done.stderr.count("Traceback") == 1
    error = done.stderr[done.stderr.rindex("\nImportError: ") :]
    assert "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@" in error


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The module, whose commands are put into ``ran`` instead of run: after one, there is a Python."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []

    def call(command, cwd, env, pass_fds):
        module.ran.append(" ".join(command))
        module.env = env
        (cwd / "bin").mkdir(exist_ok=True)
        if not (cwd / "bin" / "python").is_symlink():
            (cwd / "bin" / "python").symlink_to(sys.executable)
        (module.site_packages(cwd) / "tools").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(module.subprocess, "call", call)
    monkeypatch.setattr(module, "OLDEST", (3, 9))
    monkeypatch.setattr(module, "CONSTRAINTS", tmp_path / "constraints.txt")
    (tmp_path / "constraints.txt").write_text("torch==1")
    return module


def test_environment_is_made_once_and_made_again_from_nothing(setup_env, tmp_path, monkeypatch, capsys):
    for name, value in {"TARGET": "/elsewhere", "USER": "1", "INDEX_URL": "https://index.example/simple"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "outside").mkdir()
    venv = tmp_path / "here" / "venv"
    with monkeypatch.context() as patch:  # two at once wait
        patch.setattr(setup_env.fcntl, "flock", flock := Mock(side_effect=[BlockingIOError, None]))
        setup_env.setup(venv)
    assert "waiting for another setup" in capsys.readouterr().out
    assert [call.args[1] & setup_env.fcntl.LOCK_NB for call in flock.call_args_list] == [setup_env.fcntl.LOCK_NB, 0]
    # Packages go nowhere else, wherever they come from.
    assert "PIP_TARGET" not in setup_env.env and setup_env.env["PIP_USER"] == "0"
    assert setup_env.env["PIP_INDEX_URL"] == "https://index.example/simple"
    assert "-m venv" in setup_env.ran[0] and "import focal_plugin" in setup_env.ran[-1] and len(setup_env.ran) == 7
    assert all(f"--constraint {tmp_path / 'constraints.txt'}" in command for command in setup_env.ran[1:4])
    assert "--require-hashes" in setup_env.ran[4] and "--hash=sha256:" in setup_env.DETECTRON2.read_text()
    assert not (setup_env.site_packages(venv) / "tools").exists()  # which Detectron2's wheel brings by mistake
    setup_env.setup(venv)
    assert len(setup_env.ran) == 7  # nothing to do
    reasons = (
        lambda: (tmp_path / "constraints.txt").write_text("torch==2"),
        lambda: (venv / setup_env.OWNED).write_text(f"{setup_env.ROOT}\n"),  # never finished
        lambda: (venv / "bin" / "python").unlink(),
    )
    for number, happens in enumerate(reasons, 2):
        (venv / "old.py").touch()
        (venv / "lib64").symlink_to(tmp_path / "outside")
        happens()
        setup_env.setup(venv)
        assert len(setup_env.ran) == 7 * number and not (venv / "old.py").exists() and not (venv / "lib64").exists()
    assert (tmp_path / "outside").is_dir()


@pytest.mark.parametrize("failure", [3, FileNotFoundError("no such file")])
def test_failed_step_is_named_and_the_environment_not_trusted(setup_env, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(setup_env.subprocess, "call", Mock(side_effect=[failure]))
    reason = r"step 1 \(environment\) failed: (exit status 3|no such file)\n.*venv"
    with pytest.raises(setup_env.SetupError, match=reason):
        setup_env.setup(tmp_path / "venv")
    assert (tmp_path / "venv" / setup_env.OWNED).read_text() == f"{setup_env.ROOT}\n"


@pytest.mark.parametrize("owner", ["", "another checkout"])
def test_foreign_environment_is_never_changed(setup_env, tmp_path, monkeypatch, owner):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / (setup_env.OWNED if owner else "keep")).write_text(f"{owner}\n")
    before = sorted(venv.iterdir())
    with pytest.raises(setup_env.SetupError, match="not touched"):
        setup_env.empty(venv)
    with pytest.raises(setup_env.SetupError, match="neither a Python environment"):
        setup_env.setup(venv)
    (venv / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(setup_env, "PROBE", "import no_detectron2_here")
    with pytest.raises(setup_env.SetupError, match=r"No module named 'no_detectron2_here'(.|\n)*pip install"):
        setup_env.setup(venv)
    monkeypatch.setattr(setup_env, "PROBE", "")
    setup_env.setup(venv)
    assert sorted(venv.iterdir()) == before and not setup_env.ran


@pytest.mark.parametrize("version", [(3, 8), (3, 10, 2), (3, 14)])
def test_wrong_python_is_told_what_to_type(setup_env, monkeypatch, version):
    monkeypatch.setattr(setup_env, "OLDEST", (3, 11))
    setup_env.check_version((3, 11, 4))
    with pytest.raises(setup_env.SetupError, match=r"PYTHON=python3\.12"):
        setup_env.check_version(version, runs=lambda name: name == "python3.12")
