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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (text, "not of the form")
        for text in ("", "cells", "cells=", "cells=a", "=a:b", "cells=:b", "cells=a:", "a b=c:d")
    ]
    + [(f"{name}=a:b", "part of file names") for name in ("../up", "a/b", "a\\b", "..", "a\0b", "-rf", "/etc/passwd")],
)
def test_a_bad_form_and_a_name_that_cannot_be_part_of_a_file_name_are_refused(text, problem):
    with pytest.raises(ValueError, match=rf"{problem}.*name=annotations\.json:image_dir$") as caught:
        register_from_args([text])
    assert f"--register {text}" in str(caught.value) or repr(f"--register {text}") in str(caught.value)
    assert not {text.partition("=")[0]} & {*DatasetCatalog, *MetadataCatalog}


@pytest.mark.parametrize(
    ("name", "file_name"),
    [("cells", "b.json"), ("cells-v1.2", "a=b.json"), ("a.b", "a:b.json"), ("Zellen_ä", "a"), ("x-", "a b.json")],
)
def test_registered_data_set_loads_as_detectron2s_own_does(cells, name, file_name):
    """The flag is split at the first equals sign and at the last colon."""
    path = cells[0].rename(cells[0].with_name(file_name))
    assert register_from_args([f"{name}={path}:{cells[1]}"]) == {name: ["three", "seven"]}
    meta = MetadataCatalog.get(name)
    assert (meta.thing_classes, meta.evaluator_type, meta.json_file) == (["three", "seven"], "coco", str(path))
    (record,) = DatasetCatalog.get(name)  # Detectron2 sets thing_classes again and refuses a difference
    assert record["file_name"] == str(cells[1] / "0.png")
    assert [row["category_id"] for row in record["annotations"]] == [0, 1]


def test_the_same_again_is_a_no_op_and_known_classes_spare_a_second_reading(cells, monkeypatch):
    assert register_from_args(None) == register_from_args([]) == {}
    monkeypatch.chdir(cells[0].parent)
    known = register_from_args(["cells=cells.json:images"])
    register_coco_json("cells", *cells)
    monkeypatch.chdir("/")  # which relative paths survive
    assert len(DatasetCatalog.get("cells")) == 1
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("cells")
    monkeypatch.setattr("focal_plugin.data.register._read_classes", lambda path: pytest.fail("read again"))
    assert register_from_args([f"cells={cells[0]}:{cells[1]}"], known) == known


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


def test_a_file_that_is_no_coco_json(cells):
    for text, message in (
        (b"\x89PNG\xff", "is not json"),
        ("[]", "lacks a list of images and of annotations and of categories"),
        ({"annotations": {}}, "lacks a list of annotations"),
        ({"categories": []}, "has no categories"),
        *(({"categories": [{"id": i, "name": "a"}]}, "without a whole number as id") for i in ("1", True, 1.0)),
        *(({"categories": [{"id": 1, "name": name}]}, "without a name") for name in (5, None)),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "two categories with the"),
        ("\ufeff" + json.dumps(CONTENT), r"is not json .*byte order mark"),
    ):
        text = json.dumps({**CONTENT, **text}) if isinstance(text, dict) else text
        cells[0].write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f"^--register cells=.*cells.json.*{message}") as caught:
            register_coco_json("cells", *cells)
        assert "\n" not in str(caught.value) and not {"cells"} & {*DatasetCatalog, *MetadataCatalog}
