import json

import pytest
from coco_files import content
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_plugin.data.register import register_coco_json, register_from_args

CONTENT = content(1)
pytestmark = pytest.mark.usefixtures("restore_catalogs")


@pytest.fixture
def cells(tmp_path):
    """Paths of a valid json and of its images."""
    (tmp_path / "images").mkdir()
    (tmp_path / "cells.json").write_text(json.dumps(CONTENT))
    return tmp_path / "cells.json", tmp_path / "images"


def test_known_classes_spare_a_second_reading(cells, monkeypatch):
    argument = [f"cells={cells[0]}:{cells[1]}"]
    known = register_from_args(argument)
    assert list(known) == ["cells"] and known["cells"]
    DatasetCatalog.pop("cells")
    MetadataCatalog.pop("cells")
    monkeypatch.setattr("focal_plugin.data.register._read_classes", lambda path: pytest.fail("read again"))
    assert register_from_args(argument, known) == known


@pytest.mark.parametrize("name", ["b.json", "a=b.json", "a:b.json"])
def test_the_flag_is_split_at_the_first_equals_sign_and_at_the_last_colon(cells, name):
    path = cells[0].rename(cells[0].with_name(name))
    assert register_from_args([f"cells={path}:{cells[1]}"]) == {"cells": ["three", "seven"]}
    assert MetadataCatalog.get("cells").json_file == str(path)


@pytest.mark.parametrize(
    "text", ["", "cells", "cells=", "cells=a.json", "=a.json:b", "cells=:b", "cells=a:", "a b=c:d"]
)
def test_bad_syntax_says_the_form(text):
    with pytest.raises(ValueError, match=f"^--register {text}: .*name=annotations.json:image_dir$"):
        register_from_args([text])


@pytest.mark.parametrize("name", ["cells", "cells-v1.2", "a.b", "Zellen_ä", "x-"])
def test_registered_data_set_loads_as_detectron2s_own_does(cells, name):
    register_from_args([f"{name}={cells[0]}:{cells[1]}"])
    meta = MetadataCatalog.get(name)
    assert meta.thing_classes == ["three", "seven"]
    assert meta.evaluator_type == "coco" and meta.json_file == str(cells[0])
    (record,) = DatasetCatalog.get(name)  # Detectron2 sets thing_classes again and refuses a difference
    assert record["file_name"] == str(cells[1] / "0.png")
    assert [row["category_id"] for row in record["annotations"]] == [0, 1]


def test_the_same_again_is_a_no_op_and_relative_paths_survive_a_change_of_directory(cells, monkeypatch):
    assert register_from_args(None) == register_from_args([]) == {}
    monkeypatch.chdir(cells[0].parent)
    register_from_args(["cells=cells.json:images"])
    register_coco_json("cells", *cells)
    monkeypatch.chdir("/")
    assert len(DatasetCatalog.get("cells")) == 1


@pytest.mark.parametrize("name", ["coco_2017_train", "cells", "half"])
def test_a_taken_name_is_refused_with_the_way_out(cells, tmp_path, name):
    register_coco_json("cells", *cells)
    MetadataCatalog.get("half").json_file = "elsewhere.json"
    before = MetadataCatalog.get(name).as_dict()
    with pytest.raises(ValueError, match=f"'{name}' is the name of another data set.*my_{name}"):
        register_coco_json(name, cells[0], tmp_path)
    assert MetadataCatalog.get(name).as_dict() == before


def test_missing_files(cells, tmp_path):
    for paths, message in (
        (f"{tmp_path}/nowhere.json:{cells[1]}", r"no file .*nowhere\.json; the form is"),
        (f"{cells[0]}:{tmp_path}/nowhere", "no directory .*nowhere; the form is"),
        (r"C:\cells.json:C:\images", "no file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            register_from_args([f"cells={paths}"])
    assert "cells" not in DatasetCatalog and "cells" not in MetadataCatalog


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not json"),
        (b"\x89PNG\xff", "is not json"),
        ("[]", "lacks a list of images and of annotations and of categories"),
        ({"annotations": {}}, "lacks a list of annotations"),
        ({"categories": []}, "has no categories"),
        ({"categories": [{"id": 1}]}, "without a name"),
        *(({"categories": [{"id": i, "name": "a"}]}, "without a whole number as id") for i in ("1", True, 1.0)),
        *(({"categories": [{"id": 1, "name": name}]}, "without a name") for name in (5, None)),
        ({"categories": ["a\nb"]}, "without a name"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "two categories with the"),
        (json.dumps(CONTENT)[:-1], r"is not json .*char \d+"),
        ("\ufeff" + json.dumps(CONTENT), r"is not json .*byte order mark"),
    ],
)
def test_a_file_that_is_no_coco_json(cells, text, message):
    text = json.dumps({**CONTENT, **text}) if isinstance(text, dict) else text
    cells[0].write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^--register cells=.*cells.json.*{message}") as caught:
        register_coco_json("cells", *cells)
    assert "\n" not in str(caught.value)
    assert "cells" not in DatasetCatalog and "cells" not in MetadataCatalog


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", "a\0b", "-rf", "/etc/passwd"])
def test_a_name_that_cannot_be_part_of_a_file_name_is_refused(cells, name):
    with pytest.raises(ValueError, match=r"becomes part of file names.*name=annotations\.json:image_dir$"):
        register_from_args([f"{name}={cells[0]}:{cells[1]}"])
    assert name not in DatasetCatalog and name not in MetadataCatalog
