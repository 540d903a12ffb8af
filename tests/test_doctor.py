"""tools/doctor.py: its verdict here, in environments that are broken on purpose, and on a loss that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from focal_plugin import FocalHead, doctor, losses

TOOL = str(Path(__file__).resolve().parent.parent / "tools" / "doctor.py")


def test_all_works_here():
    report = doctor.diagnose()
    assert not report.problems and report.lines[-1].startswith("verdict: all works here (cpu")
    said = ("PyTorch", "detectron2", "FL, one step on cpu", "OHEM, one step on cpu", "loss, gamma 0.5, on cpu")
    assert all(text in "\n".join(report.lines) for text in said)


@pytest.mark.parametrize("module", ["torch", "detectron2", "numpy"])
def test_broken_environment_is_described(module, tmp_path):
    """A module is missing, and others raise anything; from another folder."""
    (tmp_path / "pycocotools.py").write_text("raise SystemExit('a broken build')")
    (tmp_path / "cv2.py").write_text("raise OSError('libGL.so.1: cannot open\\n shared object file')")
    code = (
        f"import sys, runpy; sys.modules[{module!r}] = None; sys.path.insert(0, {str(tmp_path)!r}); "
        f"sys.argv = ['doctor.py']; runpy.run_path({TOOL!r}, run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    verdict = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert verdict.startswith("verdict: does not work here: ")
    assert f"{module}: not installed -> {doctor.NEEDED[module]}" in verdict
    assert "pycocotools: SystemExit: a broken build -> pip install pycocotools" in verdict
    assert "OSError: libGL.so.1: cannot open shared object file" in done.stdout


def test_loss_that_is_wrong_is_reported(monkeypatch):
    right_head, right_loss, nan = FocalHead.losses, losses.sigmoid_focal_loss, torch.tensor(torch.nan)
    monkeypatch.setattr(FocalHead, "losses", lambda *args: right_head(*args)._replace(loss_cls=nan))
    monkeypatch.setattr(losses, "sigmoid_focal_loss", lambda *args: 1.001 * right_loss(*args))
    report = doctor.Report()
    devices = doctor._try_everywhere(report)
    step, *errors = report.problems
    assert step.startswith("FL, one step on cpu: FloatingPointError: not finite: loss_cls nan")
    assert len(errors) == 3 * len(devices) and all("relative error 1.0e-03" in error for error in errors)
    monkeypatch.setattr(losses, "sigmoid_focal_loss", lambda *args: float("nan") * right_loss(*args))
    with pytest.raises(ArithmeticError, match="nan"):
        doctor.loss_error(2.0, "cpu")


def test_gpu_that_torch_cannot_use_and_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: GPU-123)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="GPU 0: Some GPU: torch cannot use it, "):
        doctor._gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._gpu() == "none that torch may use"
    monkeypatch.chdir(tmp_path)
    assert "can be written" in doctor._output()
    (tmp_path / "output").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cannot be written"):
        doctor._output()
