"""tools/doctor.py: its verdict here, in environments that are broken on purpose, and on a loss that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from focal_plugin import FocalHead, doctor, selftest

ROOT = Path(__file__).resolve().parent.parent
RUN = "import runpy; sys.argv = ['doctor.py']; runpy.run_path({tool!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def report():
    return doctor.diagnose()


def values(report):
    return {finding.name: finding.value for findings in report.sections.values() for finding in findings}


def run_broken(prelude, cwd):
    """doctor.py in a new interpreter, from another folder, after ``prelude``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = f"import sys; {prelude}; {RUN.format(tool=str(ROOT / 'tools' / 'doctor.py'))}"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_all_works_here(report):
    assert report.ok, report.to_text()
    assert report.devices[0] == "cpu"
    assert report.to_text().splitlines()[-1] == f"verdict: all works here ({', '.join(report.devices)})"
    found = values(report)
    assert found["torch"] == torch.__version__
    assert found["folder"] != "" and "works" in found["import focal_plugin"]
    assert {"FL, forward and backward", "OHEM, forward and backward"} <= found.keys()


def test_json_says_what_the_text_says(report):
    content = json.loads(report.to_json())
    assert content["ok"] and content["problems"] == [] and content["devices"] == report.devices
    for title, findings in content["sections"].items():
        assert title in report.to_text()
        assert all(set(finding) == {"name", "value", "way_out"} for finding in findings)


@pytest.mark.parametrize("module", ["torch", "detectron2", "numpy"])
def test_missing_module_is_named(module, tmp_path):
    done = run_broken(f"sys.modules[{module!r}] = None", tmp_path)
    verdict = done.stdout.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert verdict.startswith("verdict: does not work here: ")
    assert f"{module}: not installed -> pip install" in verdict
    assert "Traceback" not in done.stdout + done.stderr


def test_module_that_raises_anything_does_not_end_it(tmp_path):
    (tmp_path / "pycocotools.py").write_text("raise SystemExit('a broken build')")
    (tmp_path / "cv2.py").write_text("raise OSError('libGL.so.1: cannot open shared object file')")
    done = run_broken(f"sys.path.insert(0, {str(tmp_path)!r}); sys.modules['torch'] = None", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pycocotools: cannot be imported: SystemExit: a broken build -> pip install pycocotools" in done.stdout
    assert "cannot be imported: OSError: libGL.so.1" in done.stdout


@pytest.mark.parametrize("error", [RuntimeError, OSError, SystemExit])
def test_checks_go_on_after_one_that_raises(error):
    def check():
        yield doctor.Finding("first", "fine")
        raise error("no kernel image\nis available")

    first, second = doctor.examine("second", check)
    assert (first.name, first.way_out) == ("first", "")
    assert second.value == f"{error.__name__}: no kernel image is available" and second.way_out


def test_loss_that_is_no_number_is_reported(monkeypatch):
    right = FocalHead.losses

    def broken(self, pred_logits, targets):
        out = right(self, pred_logits, targets)
        return out._replace(loss_cls=out.loss_cls * float("nan"))

    monkeypatch.setattr(FocalHead, "losses", broken)
    _, way_out = selftest.one_step("digits/focal.yaml", "cpu")
    assert way_out.startswith("loss_cls, gradient not finite")
    report = doctor.diagnose()
    assert not report.ok and "FL, forward and backward: loss_cls nan" in report.verdict
    assert json.loads(report.to_json())["problems"]


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_loss_that_is_not_the_reference_is_reported(monkeypatch, wrong):
    right = selftest.sigmoid_focal_loss
    assert selftest.loss_error(2.0, "cpu")[1] == ""
    monkeypatch.setattr(selftest, "sigmoid_focal_loss", lambda *args: wrong * right(*args))
    text, way_out = selftest.loss_error(2.0, "cpu")
    assert "1.0e-03" in text or "nan" in text
    assert way_out


def test_home_is_replaced(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert doctor.hide_home("/home/ada/env '/home/ada' (/home/ada)") == "~/env '~' (~)"
    assert doctor.hide_home("/home/adam/env /mnt/home/ada/x") == "/home/adam/env /mnt/home/ada/x"
    report = doctor.Report({"packages": [doctor.Finding("torch", "/home/ada/env", "look into /home/ada/env")]})
    assert "ada" not in report.to_text() + report.to_json()
    monkeypatch.setenv("HOME", "/")
    assert doctor.hide_home("/usr/lib") == "/usr/lib"


@pytest.mark.parametrize(
    "capability, archs, fits",
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code runs on later minor versions
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "compute_90"], True),  # PTX is compiled on the spot
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((7, 0), ["compute_75"], False),
        ((9, 0), ["gfx90a"], False),
    ],
)
def test_kernel_image_for_a_gpu(capability, archs, fits):
    assert doctor.arch_fits(capability, archs) is fits


def test_gpu_that_torch_cannot_use_is_a_problem(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: GPU-123)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = doctor._unused_gpu("13.0")
    assert found.value == "GPU 0: Some GPU: torch cannot use it" and "driver" in found.way_out
    assert "CPU only" in doctor._unused_gpu(None).way_out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not doctor._unused_gpu("13.0").way_out


def test_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(finding.way_out for finding in doctor._check_places())
    (tmp_path / "output").write_text("a file where the folder should be")
    assert any("OUTPUT_DIR" in finding.way_out for finding in doctor._check_places())
