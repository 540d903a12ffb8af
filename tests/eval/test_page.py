"""Pictures, and the page that tools/eval_report.py makes of random predictions."""

from html.parser import HTMLParser

import numpy as np
import pytest
from cases import BOX, annotation, random_case, result, write
from headless import CHROMIUM, show
from PIL import Image, ImageColor

from focal_plugin.eval import drawing
from focal_plugin.eval.coco import read_truth
from focal_plugin.eval.drawing import SIDE, Method, choose_images, crop, draw_mosaic, open_image
from focal_plugin.eval.page import markdown_text, write_eval_report

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "c\x1b[31m $x$ \u202egpj.exe \ud800")
TRUTH, CORRECT, WRONG = map(ImageColor.getrgb, (drawing.TRUTH, drawing.CORRECT, drawing.WRONG))
IMAGE = (32, 64, 96)


@pytest.fixture
def page(tmp_path):
    """The page of a random case with pictures: its HTML, and what the function returned."""
    for i in range(5):  # the sixth is not there
        noise = np.random.default_rng(i).integers(0, 255, (150, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"no image")

    def make(names=("a", "b", "c"), examples=9, **kwargs):
        paths = write(tmp_path, *random_case(len(names)), names, 6)
        line = write_eval_report(*paths, tmp_path / "page.html", images=tmp_path, examples=examples, **kwargs)
        return (tmp_path / "page.html").read_text(encoding="utf-8"), line

    return make


def test_the_page_needs_nothing_else_and_hostile_names_stay_text(page, tmp_path):
    html, line = page(HOSTILE, command="tools/eval_report.py a b")
    assert line.startswith("AP ") and "objects are missed" in line
    parser, tags = HTMLParser(), []
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(html)
    links = [attrs[key] for _, attrs in tags for key in ("src", "href") if key in attrs]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert all(attrs["alt"].strip() for tag, attrs in tags if tag == "img") and html.count('src="data:image/jpeg') >= 9
    assert "no picture: the image is not there, or cannot be read" in html
    assert "tools/eval_report.py a b" in html and "<figcaption>Classification: “" in html
    assert not [tag for tag in tags if tag[0] == "script" or "onerror" in tag[1]]
    assert not set(html) & {"\x1b", "\u202e", "\ud800"}
    assert markdown_text("a\x1b[0m|<b>\n`c`\u202e") == "a\\x1b\\[0m\\|&lt;b> / 'c'\\u202e"
    found, truth = tmp_path / "found.json", tmp_path / "truth.json"
    assert len(draw_mosaic(truth, tmp_path, [Method(HOSTILE[2], found)], tmp_path / "mosaic.jpg", num_images=3)) == 3
    for examples in (0, 2):
        html, _ = page(examples=examples)
        assert html.count('<div class="none">') + html.count('src="data:image/jpeg') == 2 * examples


def test_the_mosaic_shows_every_method_beside_the_truth(tmp_path):
    box = [10, 10, 20, 20]
    counts = (3, 0, 1, 5, 2, 0, 4)
    annotations = [annotation(10 * i + k, i, 7, box) for i, n in enumerate(counts) for k in range(n)]
    found, truth = write(tmp_path, annotations, [result(0, 7, box, 0.9), result(0, 8, box, 0.2)], num_images=7)
    assert choose_images(read_truth(truth), 4) == [2, 0, 3, 1]  # 1, 3, 5 and 0 objects
    assert choose_images(read_truth(truth), 20) == [2, 4, 0, 6, 3, 1]
    Image.new("RGB", (200, 150), IMAGE).save(tmp_path / "0.png")  # the others are not there
    methods = [Method("a", found), Method("b", found)]
    assert draw_mosaic(truth, tmp_path, methods, tmp_path / "m.png", num_images=4) == [2, 0, 3, 1]
    shown = np.asarray(Image.open(tmp_path / "m.png").convert("RGB"))[:, : 3 * 250]
    colors = TRUTH, CORRECT, WRONG, IMAGE
    columns = [(shown[130:] == color).all(axis=2).any(axis=0).nonzero()[0] // 266 for color in colors]
    assert [sorted(set(column)) for column in columns] == [[0], [1, 2], [], [0, 1, 2]]


def test_images_outside_of_their_folder_are_not_opened(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    for name in ("out.png", "in/a.png"):
        Image.new("RGB", (100, 60)).save(tmp_path / name, exif=exif)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    assert open_image(folder, "a.png").size == open_image(folder, "link.png").size == (60, 100)
    outside = "../out.png", str(tmp_path / "out.png"), "a/../../out.png"
    for name in (*outside, "b.png", ".", None, 3, "a\0.png", "\ud800.png", "x" * 5000):
        assert open_image(folder, name) is None, name


@pytest.mark.parametrize("box", [[40, 20, 20, 20], [-50, -50, 500, 400], [5, 5, 0, 0], [1e9, 0, 1e9, 1e9]], ids=str)
def test_crops_of_any_box(box):
    image = Image.new("RGB", (100, 60), IMAGE)
    image.paste("#fff", (40, 20, 60, 40))
    shown = np.asarray(crop(image, [(box, "#E69F00", ""), ([0, 0, 5, 5], "#56B4E9", "a")]))
    assert shown.shape == (SIDE, SIDE, 3)
    if box[0] == 40:  # in the middle, in its colour and its proportions, with the image around it
        ys, xs = np.nonzero((shown > 250).all(axis=2))
        assert abs(np.ptp(xs) - np.ptp(ys)) <= 1 and abs(xs.mean() - SIDE / 2) < 2 and abs(ys.mean() - SIDE / 2) < 2
        assert all((shown == color).all(axis=2).any() for color in (WRONG, IMAGE))


@pytest.mark.parametrize("case", ["no detection", "no object", "one class"])
def test_the_ends_of_the_scale(tmp_path, case):
    annotations, results = random_case(1)
    annotations, results = ([] if case == "no object" else annotations), ([] if case == "no detection" else results)
    line = write_eval_report(*write(tmp_path, annotations, results, ["cat"], 6), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert ("There is not a single detection" in html) == (case == "no detection")
    assert ("annotations have no objects" in html) == (case == "no object")
    assert line.startswith({"no object": "AP –", "no detection": "AP 0.0", "one class": "AP "}[case])
    assert "no pictures" in html and html.count("<img") == (case != "no object")


def test_the_tool_says_what_is_wrong(tmp_path, call_tool):
    found, truth = write(tmp_path, [annotation(1, 0, 7, BOX)], [result(0, 7, BOX, 0.5)])
    before, output = found.read_text(), tmp_path / "new" / "page.html"
    for words, message in (
        ([found, truth, "--score-threshold", "nan"], "--score-threshold must be a number"),
        ([found, truth, "--examples", "-1"], "--examples must be >= 0, got -1"),
        ([found, truth, "--iou", "2"], "--iou must be in (0, 1]"),
        ([found, truth, "--output", found], "give the page another name"),
        ([truth, found], "Predictions go first"),
        ([tmp_path / "a.json", truth], "a.json"),
        ([found, tmp_path / "b.json"], "b.json"),
        ([found, truth, "--images", tmp_path / "c"], "there is no folder"),
    ):
        code, _, error = call_tool("eval_report", "--output", output, *words)
        assert code == 2 and message in error and not output.exists()
    assert found.read_text() == before
    code, printed, _ = call_tool("eval_report", found, truth, "--output", output)
    assert code == 0 and "page.html" in printed and output.exists()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_scrolling_sideways(page, tmp_path):
    html, _ = page(names=("a", "a name that is much longer than there is room for on a phone" * 2, "c"))
    for width in (360, 1280):
        shown = show(html, width, tmp_path)
        assert shown.width == width and shown.page_width <= width
        assert shown.images == shown.decoded == html.count("<img") > 12
        assert shown.errors == 0 and "CONSOLE" not in shown.log
