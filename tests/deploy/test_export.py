"""Exported models against the model: two sizes, nothing found, and a comparison that can fail."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from focal_plugin.deploy import export

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", sorted(export.FILES))
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.RETINANET.NUM_CLASSES", "1"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.FOCAL.HEAD", "OHEMHead", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20"),
        ("MODEL.FOCAL.HEAD", "SSDHead", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.6"),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.99"),
    ],
    ids=["focal", "one class", "stock", "few candidates", "softmax", "nothing to find"],
)
def test_exported_finds_what_the_model_finds(make_model, tmp_path, name, opts):
    path, finds_nothing = tmp_path / export.FILES[name], "0.99" in opts
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    cfg, model = make_model(*opts, **({"spread": 1.0} if finds_nothing else {}))
    model.train(bool(opts))
    sample = export.read_sample(cfg)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    export.export(model, sample, path)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "weights.pth"]
    differences = export.check_export(model, path, sample)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert len({name.partition(",")[0] for name in differences}) == 3  # two sizes, and nothing to find
    assert len(differences) == 5 and not any(d.problems or d.skipped for d in differences.values()), differences
    counts, said = [d.count for d in differences.values()], export.format_differences(differences)
    if finds_nothing:
        assert not any(counts) and "which says little" in said and "the same" not in said
        assert [tuple(x.shape) for x in export.load_exported(path)(torch.zeros(3, 40, 56))] == [(0, 4), (0,), (0,)]
    else:
        assert counts[-1] == 0 and min(counts[:4]) > 3 and f"the same {sum(counts)} detections" in said, counts


def make(scores=(0.9, 0.5, 0.3), row=0, box=0.0, label=None, score=0.0):
    """Detections far from each other, of which one is changed."""
    x = torch.arange(len(scores))[:, None] * 20.0
    boxes, classes, scores = torch.cat([x, x, x + 10, x + 10], dim=1), (x[:, 0] > 0).long(), torch.tensor(scores)
    boxes[row, 2] += box
    scores[row] += score
    classes[row] = classes[row] if label is None else label
    return boxes, classes, scores


@pytest.mark.parametrize(
    ("got", "problems"),
    [
        (make(box=0.02), 2),  # one is missing, and one is too many
        (make(score=-2e-4), 2),
        (make(label=1), 2),
        (make(row=2, box=float("nan")), 2),
        (make(row=2, score=float("nan")), 2),
        (make((0.9, 0.5)), 1),
        (tuple(torch.cat([x, x[1:2]]) for x in make()), 1),  # twice
        (tuple(x[:0] for x in make()), 3),
    ],
)
def test_compare_finds_each_difference_and_does_not_mind_the_order(got, problems):
    model = SimpleNamespace(test_score_thresh=0.05, max_detections_per_image=100)
    found = export.compare(make(), got, model)
    assert len(found.problems) == problems and found.skipped == 0
    for order in map(list, itertools.permutations(range(3))):
        found = export.compare(make(), tuple(x[order] for x in make(row=1, box=0.005, score=5e-5)), model)
        assert (found.count, found.skipped, found.problems) == (3, 0, [])
        assert found.box == pytest.approx(0.005, rel=1e-2) and found.score == pytest.approx(5e-5, rel=1e-2)


def test_equal_scores_and_a_full_list_hide_no_difference():
    model = SimpleNamespace(test_score_thresh=0.05, max_detections_per_image=100)
    want = make([0.29] * 50)
    got = (want[0] + 5000.0 * (torch.arange(50) > 0)[:, None], *want[1:])
    assert len(export.compare(want, got, model).problems) >= 2 * (export.COMPARED - 1)
    model.max_detections_per_image = 1
    assert export.compare(make([0.9]), tuple(x[:0] for x in make()), model).problems


@pytest.mark.parametrize(
    ("scores", "full_at", "cut"),
    [
        ([0.9, 0.05005], 100, True),  # the threshold
        ([0.9, 0.06], 100, False),
        ([0.9] * export.COMPARED + [0.29], 100, True),  # low, and not of the best
        ([0.9] * export.COMPARED + [0.31], 100, False),
        ([0.9] * (export.COMPARED - 1) + [0.29], 100, False),
        ([0.9, 0.8, 0.8], 3, True),  # the last of a full image
        ([0.9, 0.8, 0.7], 4, False),
    ],
)
def test_compare_leaves_out_what_lies_at_a_cut(scores, full_at, cut):
    model = SimpleNamespace(test_score_thresh=0.05, max_detections_per_image=full_at)
    pair = make(scores), make(scores, row=-1, box=5000.0)
    for want, got in (pair, pair[::-1]):
        found = export.compare(want, got, model)
        assert (found.skipped, len(found.problems)) == ((2, 0) if cut else (0, 2))


def test_tool_exports_and_describes(make_model, tmp_path, monkeypatch, call_tool):
    make_model(stored={"thing_classes": ["a", "b", "c"], "score_threshold": 0.1})
    flags = ["--config-file", "digits/focal.yaml", "--output", tmp_path / "out", "--format", "torchscript"]
    weights = ["MODEL.WEIGHTS", tmp_path / "weights.pth", "MODEL.RETINANET.NUM_CLASSES", "3"]
    weights += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96"]
    code, out, err = call_tool("export_model", *flags, *weights)
    assert code == 0 and "detections, to 0.01 px and 0.0001 in score" in out, err
    text = (tmp_path / "out" / "model.json").read_text()
    described = json.loads(text)
    assert described["classes"] == ["a", "b", "c"] and described["thresholds"]["score"] == 0.2
    assert described["files"] == {"torchscript": "model.ts"} and described["input"]["resize"]["shortest_edge"] == 96
    assert described["versions"]["torch"] == torch.__version__ and str(tmp_path) not in text
    # The outputs come in the order that is written there.
    outputs = torch.jit.load(tmp_path / "out" / "model.ts")(torch.rand(3, 40, 56) * 255)
    for output, stated in zip(outputs, described["outputs"], strict=True):
        assert str(output.dtype) == f"torch.{stated['dtype']}" and output.dim() == len(stated["shape"])
    assert outputs[3].tolist() == [40, 56]
    # A difference is exit code 1, and deletes nothing.
    monkeypatch.setattr("focal_plugin.deploy.export.load_exported", lambda path: lambda image: make())
    code, out, _ = call_tool("export_model", *flags, "--classes", "cat, dog,cow", *weights)
    assert code == 1 and all(text in out for text in ("is missing", "is too many", "NOT the same: ", " more\n"))
    assert "the same 0" not in out and (tmp_path / "out" / "model.ts").is_file()
    assert json.loads((tmp_path / "out" / "model.json").read_text())["classes"] == ["cat", "dog", "cow"]
