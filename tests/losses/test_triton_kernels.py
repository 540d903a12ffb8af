"""The Triton kernels against the eager path: on a GPU, or in Triton's interpreter in a process of its own.

Triton decides when it is imported whether it interprets, so the interpreter cannot be switched on in here.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from focal_plugin.losses import sigmoid_focal_loss, sigmoid_focal_loss_star, triton_kernels
from focal_plugin.losses.args import Weights, alpha_weights
from focal_plugin.losses.blockwise import BlockwiseLoss
from focal_plugin.losses.focal import LabelLoss
from focal_plugin.losses.formulas import Focal, FocalStar

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="no GPU, and not in the interpreter")

FORMULAS = [Focal(0.0), Focal(0.5), Focal(1.0), Focal(2.0), Focal(5.0), FocalStar(2.0, 1.0)]
# Anchors side by side as a convolution writes them, classes side by side as channels_last does; one tile and several.
SHAPES = [(2, 2, 5), (3, 1, 37), (2, 3, 300), (2, 80, 150)]
SHAPES += [(5, 3, 1), (7, 1, 1), (300, 2, 1), (140, 80, 1), (4, 130, 1)]
# The interpreter is slow: there each formula is tried in both layouts, and each shape with one formula.
FEW = [(2, 2, 5), (5, 3, 1)]
CASES = [(f, s) for f in FORMULAS for s in SHAPES if DEVICE == "cuda" or f == Focal(0.5) or s in FEW]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests below run here")
def test_in_the_interpreter():
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{len(CASES) + 3} passed" in done.stdout, done.stdout[-500:]


@runs_kernels
@pytest.mark.parametrize(("formula", "shape"), CASES, ids=str)
def test_kernels_equal_the_eager_path(formula, shape):
    torch.manual_seed(0)
    labels = torch.randint(-1, shape[1] + 1, (shape[0], 1, shape[2])).to(DEVICE)
    per_class = alpha_weights(torch.rand(shape[1]).to(DEVICE), shape[1], torch.zeros(1, device=DEVICE))
    grad = torch.tensor(3.0, device=DEVICE).expand(shape[0], 1, shape[2])
    small = labels.to(torch.int8 if shape[1] < 128 else torch.int16)
    for dtype, y, weights in (
        (torch.float32, small, Weights(0.25, 0.75)),
        (torch.float32, labels.int(), per_class),
        (torch.float16, small, Weights(1.0, 1.0)),
        (torch.bfloat16, small, per_class),
    ):
        x = (8 * torch.randn(shape)).to(DEVICE, dtype)
        assert triton_kernels.is_usable(x, formula)
        loss = LabelLoss(formula, weights)
        want = BlockwiseLoss.loss(loss, x, y, True)
        assert_close(loss.loss(x, y, True), want, rtol=1e-5, atol=1e-12)
        gradient = loss.gradient(x, y, grad)
        assert gradient.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        want = BlockwiseLoss.gradient(loss, x, y, grad)
        # Below float16's smallest normal number one unit is what rounding may differ by.
        assert_close(gradient, want, rtol=tolerance, atol=1e-7 if dtype == torch.float16 else 1e-12)


@runs_kernels
def test_accurate_and_finite_over_logits_of_200():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-20, 20, 4001)])[:, None, None].to(DEVICE)
    one = torch.tensor(1.0, device=DEVICE).expand(len(x), 1, 1)
    for gamma, label in itertools.product((0.0, 0.1, 0.5, 1.0, 2.0, 5.0), (0, 1)):
        y = torch.full((len(x), 1, 1), label, dtype=torch.int8, device=DEVICE)
        loss = LabelLoss(Focal(gamma), Weights(0.25, 0.75))
        got = loss.loss(x, y, True), loss.gradient(x, y, one)
        assert all(torch.isfinite(values).all() for values in got)
        want = loss.loss(x.double(), y, True), loss.gradient(x.double(), y, one.double())
        # Squared probabilities underflow earlier than their product with the rest.
        assert_close([values.double() for values in got], list(want), rtol=2e-5, atol=1e-36)


@runs_kernels
def test_ignored_anchors_give_nothing_not_even_nan():
    for shape in ((4, 3, 1), (1, 3, 4)):
        y = torch.tensor([0, -1, 3, -1], dtype=torch.int8, device=DEVICE).view(shape[0], 1, shape[2])
        x = torch.randn(shape, device=DEVICE).masked_fill(y == -1, float("nan"))
        loss = LabelLoss(Focal(2.0), Weights(0.25, 0.75))
        gradient = loss.gradient(x, y, torch.tensor(1.0, device=DEVICE).expand(y.shape))
        for result in (loss.loss(x, y, True).expand(shape), gradient):
            assert torch.isfinite(result).all() and (result.masked_select(y == -1) == 0).all()
        assert (gradient.masked_select(y != -1) != 0).all()


@runs_kernels
def test_through_the_public_function():
    """Forward and backward, with a loss scaler's factor, of float16 logits in a convolution's layout."""
    x = (torch.randn(2, 3 * 5, 4, 6, device=DEVICE) - 6.5).half()
    y = torch.randint(-1, 6, (2, 3, 4, 6), device=DEVICE)
    for function in (sigmoid_focal_loss, sigmoid_focal_loss_star):
        results = []
        for dtype in (torch.float16, torch.float64):
            leaf = x.to(dtype).requires_grad_()
            loss = function(leaf.view(2, 3, 5, 4, 6), y, 0.25, 2.0, "mean", class_dim=2)
            gradient, again = (torch.autograd.grad(2.0**16 * loss, leaf, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(gradient, again)
            results.append((loss.detach().double(), gradient.double()))
        assert_close(*results, rtol=2e-3, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("is_gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("anchors_adjoin", [True, False], ids=["contiguous", "channels_last"])
def test_compiles_for_a_gpu_with_wide_loads(is_gradient, anchors_adjoin):
    """Down to PTX, which takes no GPU: 16 bytes a load, where a pattern that Triton cannot follow gives 4 or 2."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    anchors, classes = triton_kernels._tile(80, 15200 if anchors_adjoin else 1)
    constants = {"GAMMA": 2.0, "BETA": 0.0, "IS_STAR": False, "PER_CLASS": False, "ANCHORS_ADJOIN": anchors_adjoin}
    constants |= {"IS_GRADIENT": is_gradient, "BLOCK_ANCHORS": anchors, "BLOCK_CLASSES": classes, "EVEN": True}
    if not anchors_adjoin:
        constants["inner"] = 1
    types = {"labels": "*i8", "factor": "*fp32", "pos": "fp32", "neg": "fp32", "logits": "*bf16"}
    types |= {"out": "*bf16" if is_gradient else "*fp32"}
    names = triton_kernels._kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [(i,) for i, n in enumerate(names) if signature[n] in ("i32", "*bf16", "*i8")]
    divisible = {key: [["tt.divisibility", 16]] for key in aligned}
    values = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(triton_kernels._kernel, signature, values, divisible)
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx
    if is_gradient:
        assert "st.global.v4.b32" in ptx and "st.global.b16" not in ptx


@pytest.mark.skipif(DEVICE != "cuda" or INTERPRETED, reason="no GPU")
def test_no_step_of_it_waits_for_the_gpu_and_the_eager_path_is_there_too(monkeypatch):
    x = torch.randn(2, 9 * 80, 50, 76, device="cuda", requires_grad=True)
    y = torch.randint(-1, 81, (2, 9, 50, 76), device="cuda")
    try:
        for mode in ("default", "error"):  # the first time the kernels are compiled
            torch.cuda.set_sync_debug_mode(mode)
            loss = sigmoid_focal_loss(x.view(2, 9, 80, 50, 76), y, reduction="mean", class_dim=2)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setenv("FOCAL_PLUGIN_TRITON", "0")
    assert not triton_kernels.is_usable(x, Focal(2.0))
    assert_close(sigmoid_focal_loss(x.view(2, 9, 80, 50, 76), y, reduction="mean", class_dim=2), loss)


@pytest.mark.skipif(INTERPRETED, reason="the CPU is usable there")
def test_what_the_kernels_do_not_know_is_left_to_the_blocks(monkeypatch):
    for device, dtype in (("cpu", torch.float32), (DEVICE, torch.float64)):
        assert not triton_kernels.is_usable(torch.zeros(2, 3, 4, device=device, dtype=dtype), Focal(2.0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read here only, not by Triton, which has been imported
    monkeypatch.delenv("FOCAL_PLUGIN_TRITON", raising=False)
    usable = [triton_kernels.is_usable(torch.zeros(2, 3, 4), f) for f in (Focal(2.0), FocalStar(2.0, 1.0), (2.0,))]
    assert usable == [True, True, False]
