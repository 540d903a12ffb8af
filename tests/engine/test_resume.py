"""Runs that are stopped, at any moment and in any way, and resumed: bit for bit what the run that never stopped is."""

import random
import signal

import pytest
import torch

from focal_plugin.engine.interrupt import RESUME_ME

FINAL = "model_final.pth"


@pytest.fixture
def never_stopped(zygote, command, tmp_path):
    """never_stopped(KEY, VALUE, ...): its last checkpoint."""

    def train(*opts):
        folder = tmp_path / "never_stopped"
        assert zygote.run(command(folder, *opts), tmp_path / "never.txt") == 0, (tmp_path / "never.txt").read_text()
        return load(folder / FINAL)

    return train


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(got, want, where="checkpoint"):
    """Bit for bit, whatever the types."""
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            assert_same(got[key], want[key], f"{where}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, where
        # As bytes, for two NaNs are not equal.
        assert got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes(), where
    else:
        assert got == want, where


def test_killed_at_twenty_random_moments(zygote, command, never_stopped, tmp_path):
    """Steps, checkpoints and evaluations are equally likely to be hit: all three happen all the time."""
    want = never_stopped()
    folder, console = tmp_path / "run", tmp_path / "run.txt"
    moments = random.Random(0)
    killed = 0
    while killed < 20:
        code = zygote.run(command(folder), console, fault=("kill after", moments.uniform(0, 0.6)))
        if code == 0:  # it was faster
            break
        assert code == -signal.SIGKILL, console.read_text()
        killed += 1
    print(killed)
    assert zygote.run(command(folder), console) == 0, console.read_text()
    assert_same(load(folder / FINAL), want)
