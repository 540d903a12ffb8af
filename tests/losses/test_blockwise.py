"""The engine: no copies, blocks that leave no trace in the result, and one read for each pass."""

import threading
from functools import partial

import pytest
import torch
from gradients import value_and_gradient
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from focal_plugin.losses import blockwise, sigmoid_focal_loss, softmax_focal_loss
from focal_plugin.losses.args import Weights
from focal_plugin.losses.focal import LabelLoss
from focal_plugin.losses.formulas import Focal

N, A, K, H, W = 2, 3, 4, 5, 6
both_formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def conv_output(memory_format):
    torch.manual_seed(0)
    return (3 * torch.randn(N, A * K, H, W)).contiguous(memory_format=memory_format)


STRIDES = [torch.randn(6, 5)[:, ::2], torch.randn(4, 1).expand(4, 3), torch.randn(3, 4, 2).transpose(0, 2)[:, 1:]]
STRIDES += [torch.randn(3, 4).T, torch.randn(1, 3, 1), torch.randn(0, 3), torch.randn(2, 0)]


@pytest.mark.parametrize("x", STRIDES, ids=lambda x: f"{tuple(x.shape)} {x.stride()}")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_strides_give_what_a_contiguous_copy_gives(x, reduction):
    labels = torch.randint(-1, x.shape[-1] + 1, x.shape[:-1])
    copies = x.clone(memory_format=torch.contiguous_format), x
    results = (value_and_gradient(sigmoid_focal_loss, y, labels, reduction=reduction) for y in copies)
    assert_close(*results, rtol=1e-6, atol=1e-9)


@both_formats
@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
@pytest.mark.parametrize("kind", ["labels", "dense", "softmax"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_block_size_changes_no_number(monkeypatch, memory_format, block, kind, reduction):
    """In particular no anchor's loss depends on how the work is split; the total's order of addition is fixed, too."""
    torch.manual_seed(1)
    labels = torch.randint(-1, K, (N, A, H, W))
    targets = torch.rand(N, A, K, H, W) if kind == "dense" else labels
    loss_function = softmax_focal_loss if kind == "softmax" else sigmoid_focal_loss
    x, results = conv_output(memory_format), []

    def scaled(x, **options):
        return 0.3 * loss_function(x.view(N, A, K, H, W), targets, **options)

    for size in (10**6, block):
        monkeypatch.setattr(blockwise, "_BLOCK", size)
        for alpha in (0.25, [0.1, 0.3, 0.5, 0.9]):
            options = {"alpha": alpha, "gamma": 0.5, "reduction": reduction, "class_dim": 2}
            results.append(value_and_gradient(scaled, x, **options))
            assert results[-1][1].stride() == x.stride()
    # Vectorized and scalar code of the same function may differ in the last place.
    assert_close(results[:2], results[2:], rtol=1e-5, atol=1e-9)


class Reads(TorchDispatchMode):
    """How often the memory of a tensor is an operand of an operation that is no view."""

    def __init__(self, tensor):
        super().__init__()
        self.storage, self.entries = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(n in func.name() for n in ("detach", "new_", "_like")):
            for t in [*args, *(kwargs or {}).values()]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() == self.storage:
                    # A gather reads one logit for each index.
                    self.entries += out.numel() if "gather" in func.name() else t.numel()
        return out


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_read_once_forward_and_once_backward_and_only_they_and_labels_are_kept(memory_format, dtype):
    x = torch.randn(N, 2 * 80, H, W).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    labels = torch.randint(-1, 81, (N, 2, H, W))
    saved = []
    with Reads(x) as reads:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = sigmoid_focal_loss(x.view(N, 2, 80, H, W), labels, reduction="sum", class_dim=2)
        forward = reads.entries
        loss.backward()
        backward = reads.entries - forward
    # The class of each anchor once more: 1/80.
    assert forward == backward == x.numel() + labels.numel()
    assert x.grad.dtype == dtype and x.grad.stride() == x.stride()
    assert sum(t.nbytes for t in saved) == x.nbytes + labels.numel() and saved[0].data_ptr() == x.data_ptr()


def test_an_anchors_loss_is_the_sum_over_its_classes_and_so_is_its_weighted_gradient():
    """One factor for all anchors takes a way of its own, and must give what any other does."""
    loss = LabelLoss(Focal(2.0), Weights(0.25, 0.75))
    x, labels = conv_output(torch.channels_last).view(N, A, K, H, W), torch.randint(-1, K + 1, (N, A, H, W))
    assert_close(loss(x, labels, class_dim=2), sigmoid_focal_loss(x, labels, class_dim=2).sum(dim=2))
    for weight in (torch.tensor(3.0).expand(N, A, H, W), torch.rand(N, A, H, W)):
        _, got = value_and_gradient(loss, x, labels, class_dim=2, weight=weight)
        per_logit = weight.unsqueeze(2).expand_as(x).clone()
        assert_close(got, value_and_gradient(sigmoid_focal_loss, x, labels, class_dim=2, weight=per_logit)[1])


def test_threads_are_ours_and_torchs_setting_is_left_alone(monkeypatch, request):
    """Blocks on two threads, in which torch itself uses one; elsewhere it goes on with what it had."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.setattr(blockwise, "_BLOCK", 64)
    seen = []
    block_loss = blockwise.BlockwiseLoss.block_loss

    def spy(*args):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return block_loss(*args)

    monkeypatch.setattr(blockwise.BlockwiseLoss, "block_loss", spy)
    x, labels = torch.randn(200, 8), torch.randint(-1, 8, (200,))
    torch.set_num_threads(2)
    threaded = softmax_focal_loss(x, labels)
    used, settings = zip(*seen)
    assert threading.get_ident() not in used and set(settings) == {1} and len(seen) == 25
    assert torch.get_num_threads() == 2
    for mode in (torch.inference_mode, torch.no_grad):  # which our threads take over
        with mode():
            loss = sum(sigmoid_focal_loss(x.requires_grad_(), y).sum() for y in (labels, torch.rand(200, 8)))
        assert not loss.requires_grad and torch.isfinite(loss)
    torch.set_num_threads(1)
    assert torch.equal(softmax_focal_loss(x, labels), threaded)
    assert threading.get_ident() == seen[-1][0]
    torch.set_num_threads(2)
    monkeypatch.setattr(blockwise.BlockwiseLoss, "block_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        softmax_focal_loss(x, labels)
    assert torch.get_num_threads() == 2
