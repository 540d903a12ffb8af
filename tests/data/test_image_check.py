import os

import numpy as np
import pytest
from coco_files import SIZE, content, found
from detectron2.data import detection_utils as utils
from PIL import Image


def test_missing_and_strange_images(check, folder):
    data = content(5)
    names = ["nowhere.png", "a\0b.png", "\ud800.png", "folder", "pipe"]
    (folder / "images" / "folder").mkdir()
    os.mkfifo(folder / "images" / "pipe")  # is not waited for
    for image, name in zip(data["images"], names):
        image["file_name"] = name
    for images in ("all", "sample"):
        report = check(data, images=images)
        assert [(f.code, f.count) for f in report.fatal] == [("missing_images", 5)]
        report.to_text().encode()
    assert not check(data, images="none").fatal


def test_broken_and_mis_sized_images(check, folder):
    path = folder / "images" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    (folder / "images" / "1.png").write_text("no image")
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "2.png")
    report, codes = check(content()), ("truncated_images", "unreadable_images", "mis_sized_images")
    assert {f.code: f.count for f in report.findings} == dict.fromkeys(codes, 1)
    # Training replaces what cannot be read, up to a limit; a wrong size means that the boxes are wrong.
    assert report.errors == report.findings and [finding.code for finding in report.fatal] == ["mis_sized_images"]
    assert "'2.png': 48 x 64, in the json 64 x 48" in report.to_text()
    assert not any(str(folder / "images") in example for finding in report.findings for example in finding.examples)
    assert found(check(content(), images="sample")).keys() == set(codes[1:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_after_exif_rotation_are_detectron2s(check, folder, orientation):
    exif, data = Image.Exif(), content()
    exif[274], data["images"][0]["file_name"] = orientation, "0.jpg"
    Image.new("RGB", SIZE).save(folder / "images" / "0.jpg", exif=exif)
    turned = utils.read_image(folder / "images" / "0.jpg", "BGR").shape[:2] != SIZE[::-1]
    assert turned == (orientation >= 5)
    report = check(data)
    assert [f.code for f in report.findings] == ["mis_sized_images"] * turned
    assert not turned or "48 x 64, turned by its EXIF orientation" in report.findings[0].examples[0]


def test_names_that_leave_the_folder_are_errors_and_links_and_absolute_ones_notes(check, folder):
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "images" / "link").symlink_to(folder / "elsewhere" / "deep")
    (folder / "images" / "sub").mkdir()
    for path in ("secret.png", "elsewhere/secret.png"):
        Image.new("RGB", SIZE).save(folder / path)
    data = content(9)
    names = ["../secret.png", "link/../secret.png", "sub/../../secret.png", "..", "link/../../x.png", "../images/0.png"]
    names += ["../images/../x.png", "a\0/../0.png"]
    for image, name in zip(data["images"], names):
        image["file_name"] = name
    for images in ("all", "sample", "none"):
        finding = found(check(data, images=images))["escaping_file_names"]
        assert finding.fatal and finding.count == 8
    data = content()
    for image, name in zip(data["images"], ("sub/../0.png", "1..png")):
        image["file_name"] = name
    (folder / "images" / "1.png").rename(folder / "images" / "1..png")
    assert check(data).findings == []
    data["images"][0]["file_name"] = "0.png"
    (folder / "images" / "0.png").rename(folder / "moved.png")
    (folder / "images" / "0.png").symlink_to(folder / "moved.png")
    data["images"][1]["file_name"] = str(folder / "images" / "1..png")
    severities = {finding.code: finding.severity for finding in check(data).findings}
    assert severities == {"symlinked_images": "note", "absolute_file_names": "note"}


def test_the_fast_form_looks_at_a_sample(check, folder):
    data = content(200)
    for i in range(4, 200):
        os.link(folder / "images" / "0.png", folder / "images" / f"{i}.png")
    report = check(data, images="sample")
    assert report.findings == [] and report.summary["images_looked_at"] == 64
    (folder / "images" / "199.png").unlink()
    assert found(check(data, images="sample")).keys() == {"missing_images"}
    with pytest.raises(ValueError, match="images='some' is none of all, sample, none"):
        check(data, images="some")
