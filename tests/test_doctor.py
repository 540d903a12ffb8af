"""tools/doctor.py: its verdict here, in environments that are broken on purpose, and on a loss that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from focal_plugin import FocalHead, doctor, losses

ROOT = Path(__file__).resolve().parent.parent
RUN = "import runpy; sys.argv = ['doctor.py']; runpy.run_path({tool!r}, run_name='__main__')"


def run_broken(prelude, cwd):
    """doctor.py in a new interpreter, from another folder, after ``prelude``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = f"import sys; {prelude}; {RUN.format(tool=str(ROOT / 'tools' / 'doctor.py'))}"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_all_works_here():
    report = doctor.diagnose()
    assert not report.problems and report.devices[0] == "cpu"
    assert report.verdict() == f"verdict: all works here ({', '.join(report.devices)})"
    text = "\n".join(report.lines)
    for said in ("PyTorch", "detectron2", "FL, one step on cpu", "OHEM, one step on cpu", "loss, gamma 0.5, on cpu"):
        assert said in text


@pytest.mark.parametrize("module", ["torch", "detectron2", "numpy"])
def test_missing_module_is_named(module, tmp_path):
    done = run_broken(f"sys.modules[{module!r}] = None", tmp_path)
    verdict = done.stdout.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert verdict.startswith("verdict: does not work here: ")
    assert f"{module}: not installed -> {doctor.NEEDED[module]}" in verdict
    assert "Traceback" not in done.stdout + done.stderr


def test_module_that_raises_anything_does_not_end_it(tmp_path):
    (tmp_path / "pycocotools.py").write_text("raise SystemExit('a broken build')")
    (tmp_path / "cv2.py").write_text("raise OSError('libGL.so.1: cannot open\\n shared object file')")
    done = run_broken(f"sys.path.insert(0, {str(tmp_path)!r}); sys.modules['torch'] = None", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pycocotools: SystemExit: a broken build -> pip install pycocotools" in done.stdout
    assert "OSError: libGL.so.1: cannot open shared object file" in done.stdout


def test_loss_that_is_wrong_is_reported(monkeypatch):
    right_head, right_loss = FocalHead.losses, losses.sigmoid_focal_loss

    def broken(self, pred_logits, targets):
        out = right_head(self, pred_logits, targets)
        return out._replace(loss_cls=out.loss_cls * float("nan"))

    monkeypatch.setattr(FocalHead, "losses", broken)
    monkeypatch.setattr(losses, "sigmoid_focal_loss", lambda *args: 1.001 * right_loss(*args))
    report = doctor.Report()
    doctor._try_everywhere(report)
    step, *errors = report.problems
    assert step.startswith("FL, one step on cpu: FloatingPointError: not finite: loss_cls nan")
    assert len(errors) == 3 * len(report.devices) and all("relative error 1.0e-03" in error for error in errors)
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
