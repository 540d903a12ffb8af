import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNet, permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss, sigmoid_focal_loss_jit
from torch import nn

from benchmark import loss_accuracy, loss_benchmark, loss_contenders
from benchmark.loss_benchmark import Settings, measure_table, run_benchmark
from benchmark.loss_contenders import (
    CASES,
    STOCK,
    Case,
    dense_contenders,
    head_contenders,
    head_loss,
    make_batch,
    stock_loss,
)
from benchmark.loss_counters import Compiled, count_traffic
from focal_plugin.heads import FocalHead

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Case(2, (48, 64), (8, 16), num_anchors=3, num_classes=4)


@pytest.fixture
def no_compiler(monkeypatch):
    """As where torch.compile finds none; and the tests need not wait for it."""
    monkeypatch.setattr(
        loss_contenders, "compile_and_count", lambda *_: Compiled(None, error="InvalidCxxCompiler: no g++")
    )


@pytest.fixture
def tiny_case(monkeypatch, no_compiler):
    monkeypatch.setitem(CASES, "small", TINY)
    monkeypatch.setattr(loss_accuracy, "GAMMAS", (0.1, 2.0))
    monkeypatch.setattr(loss_accuracy, "DTYPES", (torch.float32,))


def test_large_case_is_what_the_design_measured():
    large = CASES["large"]
    assert large.level_sizes == [(100, 152), (50, 76), (25, 38), (13, 19), (7, 10)]
    assert large.num_logits == 2 * 182_403 * 80
    assert CASES["small"].level_sizes == [(16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_batch(memory_format):
    batch = make_batch(TINY, torch.bfloat16, memory_format, CPU)
    assert [tuple(x.shape) for x in batch.logits] == [(2, 12, 6, 8), (2, 12, 3, 4)]
    assert sum(x.numel() for x in batch.logits) == TINY.num_logits
    assert all(x.dtype == torch.bfloat16 and x.requires_grad and x.is_leaf for x in batch.logits)
    assert all(x.is_contiguous(memory_format=loss_contenders.FORMATS[memory_format]) for x in batch.logits)
    assert torch.cat([x.detach().flatten() for x in batch.logits]).float().mean() == pytest.approx(
        -math.log(99), abs=0.1
    )
    assert batch.labels.shape == (2, 180)
    positive = (batch.labels >= 0) & (batch.labels < 4)
    assert positive.sum(dim=1).tolist() == [20, 20]
    assert (batch.labels == -1).sum(dim=1).tolist() == [1, 1]
    assert batch.normalizer == 40
    assert batch.anchors.shape == (180, 4)
    for level, (labels, x) in enumerate(zip(batch.level_labels(), batch.logits)):
        assert labels.shape == (2, 3, *x.shape[2:])
        # Upstream's order of anchors: row, column, anchor.
        row, column, anchor = 2, 1, 2
        start = 144 if level else 0
        place = start + (row * x.shape[3] + column) * 3 + anchor
        assert labels[0, anchor, row, column] == batch.labels[0, place]
        centre = (batch.anchors[place, :2] + batch.anchors[place, 2:]) / 2
        torch.testing.assert_close(centre, torch.tensor([column, row]) * (8.0 * 2**level))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_stock_loss_is_upstreams(memory_format):
    batch = make_batch(TINY, torch.float32, memory_format, CPU)
    model = RetinaNet(
        backbone=nn.Identity(),
        head=nn.Identity(),
        head_in_features=["p3", "p4"],
        anchor_generator=nn.Identity(),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=None,
        num_classes=TINY.num_classes,
        pixel_mean=[0.0],
        pixel_std=[1.0],
    )
    anchors = [Boxes(a) for a in batch.anchors.split([144, 36])]
    deltas = [torch.zeros(2, len(a), 4) for a in anchors]
    boxes = [batch.anchors] * 2
    with EventStorage():
        pred_logits = [permute_to_N_HWA_K(x, TINY.num_classes) for x in batch.logits]
        upstream = model.losses(anchors, pred_logits, list(batch.labels), deltas, boxes)["loss_cls"]
    batch.normalizer = model.loss_normalizer
    for focal_loss in (sigmoid_focal_loss, sigmoid_focal_loss_jit):
        ours = stock_loss(batch, focal_loss)
        torch.testing.assert_close(ours, upstream)
        expected = torch.autograd.grad(upstream, batch.logits, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours, batch.logits), expected)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_contenders_compute_the_same(memory_format, no_compiler):
    batch = make_batch(TINY, torch.float32, memory_format, CPU)
    contenders = {c.name: c for c in head_contenders(batch)}
    stock = contenders[STOCK]
    expected = stock.step()
    stock.clear()
    assert all(x.grad is None for x in batch.logits)
    torch.testing.assert_close(contenders["focal_plugin"].loss(), stock.loss())
    torch.testing.assert_close(contenders["focal_plugin"].step(), expected)
    torch.testing.assert_close(stock.unfused(), stock.loss())
    assert contenders["focal_plugin, torch.compile"].skipped == "InvalidCxxCompiler: no g++"
    stock.clear()
    gradients = contenders["focal_plugin OHEM"].step()
    # 128 of 180 anchors an image at most, 4 classes each.
    assert 0 < sum(int((g != 0).sum()) for g in gradients) <= 2 * 128 * 4


def test_dense_functions_compute_the_same():
    batch = make_batch(TINY, torch.float32, "contiguous", CPU)
    first, *others = dense_contenders(batch)
    assert [c.name for c in (first, *others)] == ["fvcore", "fvcore jit", "torchvision", "focal_plugin, dense"]
    for other in others:
        torch.testing.assert_close(other.loss(), first.loss())
    # Without ignored anchors it is the heads' loss, but for the normaliser.
    batch.labels[batch.labels == -1] = TINY.num_classes
    first, *_ = dense_contenders(batch)
    torch.testing.assert_close(first.loss() / batch.normalizer, head_loss(FocalHead, batch)())


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_stock_moves_what_was_measured(memory_format):
    """397 bytes a logit were counted by others, with other rules for expanded and new tensors."""
    batch = make_batch(CASES["small"], torch.float32, memory_format, CPU)

    def step():
        stock_loss(batch, sigmoid_focal_loss).backward()
        return [x.grad for x in batch.logits]

    per_logit = count_traffic(step).total / CASES["small"].num_logits
    assert per_logit == pytest.approx(397, rel=0.05)


def test_compiled_contender():
    batch = make_batch(Case(1, (32, 32), (8,), num_anchors=3, num_classes=4), torch.float32, "contiguous", CPU)
    (compiled,) = [c for c in head_contenders(batch) if c.name == "focal_plugin, torch.compile"]
    if compiled.skipped:
        pytest.skip(compiled.skipped)
    torch.testing.assert_close(compiled.loss(), head_loss(FocalHead, batch)())
    assert compiled.start_up > 0


def test_table(tiny_case):
    settings = Settings(rounds=3)
    table = measure_table(settings, "small", "float32", "contiguous", with_functions=True)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "focal_plugin",
        "focal_plugin OHEM",
        "focal_plugin, torch.compile",
        STOCK,
        "fvcore",
        "fvcore jit",
        "torchvision",
        "focal_plugin, dense",
    ]
    assert rows.pop("focal_plugin, torch.compile").seconds == []
    for row in rows.values():
        assert len(row.seconds) == 3
        assert min(row.seconds) > 0
        assert row.ratios == [stock / own for stock, own in zip(rows[STOCK].seconds, row.seconds)]
        assert row.peak >= 1  # the gradient alone
        assert row.cache == 0  # all of this fits into the cache: no distinction
        assert row.bandwidth_share is None
    assert rows["fvcore"].total == pytest.approx(320, rel=0.05)
    assert table.copy_bandwidth is None


def test_scratch_in_cache_has_its_own_column(tiny_case, monkeypatch):
    monkeypatch.setattr(loss_benchmark, "cache_size", lambda _: 4 * TINY.num_logits - 1)
    table = measure_table(Settings(rounds=1), "small", "float32", "contiguous", with_functions=False)
    row = table.rows[0]
    assert row.cache > 0
    assert row.total == row.memory + row.cache
    assert "in cache" in loss_benchmark.format_table(table, TINY)


def test_rounds_go_on_while_there_is_time(tiny_case):
    quick = measure_table(Settings(seconds=0, few=2), "small", "float32", "contiguous", with_functions=False)
    assert len(quick.rows[0].seconds) == 2
    patient = measure_table(Settings(seconds=60, many=4), "small", "float32", "contiguous", with_functions=False)
    assert len(patient.rows[0].seconds) == 4


def test_kernel_bytes_are_added_only_where_operations_do_not_show():
    focal, ohem = [loss_benchmark.Contender(n, None, kernel=k) for n, k in (("focal", 12.0), ("ohem", 4.0))]

    def rows(seen):
        return {n: loss_benchmark.Row(n, [], [], memory=m, cache=0.0) for n, m in (("focal", seen), ("ohem", 20.0))}

    hidden, visible = rows(0.5), rows(200.0)
    loss_benchmark._add_kernels([focal, ohem], hidden)
    loss_benchmark._add_kernels([focal, ohem], visible)
    assert (hidden["focal"].memory, hidden["ohem"].memory) == (12.5, 24.0)
    assert "computed" in hidden["focal"].note
    assert (visible["focal"].memory, visible["ohem"].memory) == (200.0, 20.0)


def test_run_prints_and_returns_everything(tiny_case):
    texts = []
    settings = Settings(cases=["small"], dtypes=["bfloat16"], rounds=2)
    results = run_benchmark(settings, texts.append, command="benchmark it")
    assert len(texts) == 1 + 2 + 1
    environment, first, second, *_ = texts
    for word in ("benchmark it", torch.__version__, "threads used", "triton", "detectron2"):
        assert word in environment
    assert "bfloat16, contiguous" in first
    assert "fvcore jit" in first
    assert "skipped: InvalidCxxCompiler: no g++" in first
    assert "channels_last" in second
    assert "fvcore jit" not in second  # once per dtype
    assert "NaN or inf gradients" in texts[-1]

    results = json.loads(json.dumps(results, allow_nan=False))
    assert len(results["tables"]) == 2
    row = results["tables"][0]["rows"][0]
    assert row["name"] == "focal_plugin"
    assert row["bytes_per_logit"] == row["memory"] + row["cache"]
    low, median, high = row["quartiles"]["seconds"]
    assert low <= median <= high
    assert len(row["quartiles"]["stock_over_this"]) == 3
    assert {a["function"] for a in results["accuracy"]} >= {"focal_plugin", "fvcore", "torchvision"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_table_on_a_gpu(tiny_case):
    settings = Settings(device=torch.device("cuda"), rounds=2)
    table = measure_table(settings, "small", "float32", "contiguous", with_functions=True)
    assert table.copy_bandwidth > 0
    for row in table.rows:
        assert row.skipped or (row.peak >= 1 and row.total > 0 and row.bandwidth_share > 0)


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_loss", ROOT / "tools" / "benchmark_loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["benchmark_loss.py", *map(str, arguments)])
        return module.main()

    return run


def test_tool(tool, tiny_case, tmp_path, capsys):
    path = tmp_path / "losses.json"
    arguments = ["--cases", "small", "--dtypes", "float32", "--formats", "contiguous", "--device", "cpu", "--rounds", 1]
    assert tool(*arguments, "--json", path) == 0
    assert "stock RetinaNet" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert "--rounds 1" in results["environment"]["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "huge"], "invalid choice: 'huge'"),
        (["--dtypes", "float8"], "invalid choice: 'float8'"),
        (["--rounds", "0"], "--rounds: invalid positive_number value: '0'"),
        (["--threads", "two"], "--threads: invalid positive_number value: 'two'"),
        (["--json", "no/such/folder/x.json"], "--json: there is no folder"),
    ],
)
def test_bad_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tool("--device", "cuda")
    assert "finds no CUDA GPU" in capsys.readouterr().err
