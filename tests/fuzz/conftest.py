import os

import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test has a working directory of its own, where the commands in hostile files would leave a canary."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("canary")), "code has run"


@pytest.fixture
def no_files():
    """Return names of what is there and no regular file, and of what cannot be there."""
    os.mkdir("folder")
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "device")
    return ["folder", "pipe", "loop", "device"], ["missing", "a\0b", "x" * 5000]
