from __future__ import annotations

import json

import pytest
from coco_files import SIZE
from PIL import Image

from focal_plugin.data.dataset_check import check_coco


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of `content()`."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", SIZE, (i, 9, 9)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


@pytest.fixture
def check(folder):
    """check(data, images=..., cfg=...): the report on a json with these data, or on a file of these bytes."""

    def run(data, **kwargs):
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        (folder / "a.json").write_bytes(text)
        return check_coco(folder / "a.json", folder / "images", **kwargs)

    return run
