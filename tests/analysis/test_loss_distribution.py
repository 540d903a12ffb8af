"""The distribution against sorting all losses in float64, on every kind of input that it may meet."""

import numpy as np
import pytest
import torch

from focal_plugin.analysis.loss_distribution import GROUPS, NUM_BINS, LossDistribution
from focal_plugin.losses.formulas import Focal

K = 5


def make(shape=(40, 30), num_classes=K, seed=0, scale=4.0):
    """Logits (*shape, K) and labels with about as many positives, background and ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, num_classes, generator=generator) - 2
    labels = torch.randint(-num_classes, 2 * num_classes, shape, generator=generator)
    return logits, labels.clamp(-1, num_classes)


def naive(logits, labels, gamma):
    """{group: all losses in float64, sorted}."""
    num_classes = logits.shape[-1]
    counts = labels >= 0
    x, y = logits.double()[counts], labels[counts]
    present = y[:, None] == torch.arange(num_classes)
    return {
        "positive": Focal(gamma).value(-x[present]).sort().values.numpy(),
        "negative": Focal(gamma).value(x[~present]).sort().values.numpy(),
    }


def check(distribution, logits, labels):
    """Counts and totals, and the distribution at the edges of its bins, are exact."""
    for gamma in distribution.gammas:
        for group, losses in naive(logits, labels, gamma).items():
            assert distribution.count(group) == len(losses)
            total = losses.sum()
            assert distribution.total(group, gamma) == pytest.approx(total, rel=1e-11)
            if len(losses):
                fraction, share = distribution.cdf(group, gamma)
                below = np.rint(fraction * len(losses)).astype(int)
                expected = np.append(0.0, losses.cumsum())[below] / total
                np.testing.assert_allclose(share, expected, atol=1e-11)
                assert (fraction[0], share[0]) == (0, 0) and (fraction[-1], share[-1]) == (1, 1)


@pytest.mark.parametrize("num_classes", [1, K])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_a_sort_of_all_losses(num_classes, dtype):
    logits, labels = make(num_classes=num_classes)
    logits = logits.to(dtype)
    before = logits.clone()
    distribution = LossDistribution([0, 0.5, 1, 2, 5])
    distribution.update(logits, labels)
    check(distribution, logits, labels)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
@pytest.mark.parametrize("fraction", [0, 0.001, 0.01, 0.1, 0.2, 0.5, 1])
def test_hardest_share_between_the_edges(gamma, fraction):
    """Within a bin losses differ by exp((1 + gamma) / 64) at most, 5 %, and no bin here holds 1 % of the windows."""
    logits, labels = make((200, 30))
    distribution = LossDistribution([gamma])
    distribution.update(logits, labels)
    for group, losses in naive(logits, labels, gamma).items():
        hardest = losses[::-1].cumsum() / losses.sum()
        exact = np.interp(fraction * len(losses), np.arange(len(losses) + 1), np.append(0, hardest))
        assert distribution.hardest_share(group, gamma, fraction) == pytest.approx(exact, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_a_convolution_writes_them(memory_format):
    """(N, A * K, H, W) seen as (N, A, K, H, W), in more blocks than one."""
    num, anchors, height, width = 2, 3, 61, 83
    logits, labels = make((num, anchors, height, width), num_classes=8)
    written = logits.movedim(-1, 2).reshape(num, -1, height, width).contiguous(memory_format=memory_format)
    distribution = LossDistribution([0.5, 2])
    distribution.update(written.view(num, anchors, 8, height, width), labels, class_dim=2)
    check(distribution, logits, labels)


def test_a_view_that_is_not_dense():
    logits, labels = make()
    distribution = LossDistribution()
    distribution.update(logits[::2, 1::3], labels[::2, 1::3])
    check(distribution, logits[::2, 1::3], labels[::2, 1::3])


@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_logits_have_a_loss(sign):
    """Also where the loss is far below what float32 holds, and the ends of the histogram are open."""
    logits, labels = make()
    logits = sign * (logits.abs() + 195)
    distribution = LossDistribution([0, 0.5, 2])
    distribution.update(logits, labels)
    check(distribution, logits, labels)
    assert distribution.total("negative", 2) > 0 and np.isfinite(distribution.hardest_share("positive", 0.5, 0.1))


def test_huge_logits_of_both_signs():
    logits, labels = make(scale=200.0)
    distribution = LossDistribution([0, 0.5, 2])
    distribution.update(logits, labels)
    check(distribution, logits, labels)


def test_a_known_case():
    """Four negatives of p = .5 with log 2 each, one hard one of loss 200 and one positive."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [200.0, 0.0]])
    labels = torch.tensor([2, 2, 1])
    distribution = LossDistribution([0])
    distribution.update(logits, labels)
    assert distribution.count("positive") == 1 and distribution.count("negative") == 5
    assert distribution.total("positive", 0) == pytest.approx(np.log(2))
    assert distribution.hardest_share("negative", 0, 0.2) == pytest.approx(200 / (200 + 4 * np.log(2)))


def test_ignored_anchors_do_not_count_whatever_their_logits():
    logits, labels = make()
    distribution, expected = LossDistribution(), LossDistribution()
    expected.update(logits, labels)
    logits[labels == -1] = float("nan")
    distribution.update(logits, labels)
    assert all(distribution.histogram(group) == expected.histogram(group) for group in GROUPS)


def test_no_positives():
    logits, _ = make()
    distribution = LossDistribution()
    distribution.update(logits, torch.full(logits.shape[:-1], K))
    assert distribution.count("positive") == 0 and distribution.total("positive", 2) == 0
    assert distribution.count("negative") == logits.numel()
    assert np.isnan(distribution.hardest_share("positive", 2, 0.1))
    assert np.isnan(distribution.cdf("positive", 2)[1]).all()


@pytest.mark.parametrize("num", [0, 30])
def test_nothing_at_all_and_all_ignored(num):
    distribution = LossDistribution()
    distribution.update(torch.randn(num, K), torch.full((num,), -1))
    for group in GROUPS:
        assert distribution.count(group) == 0 and np.isnan(distribution.hardest_share(group, 0, 0.5))
        assert distribution.histogram(group)["windows"] == []


def test_merged_equals_joint():
    parts = [make(seed=seed) for seed in range(3)]
    merged, joint = LossDistribution(), LossDistribution()
    for logits, labels in parts:
        part = LossDistribution()
        part.update(logits, labels)
        assert merged.merge(part) is merged
    joint.update(*(torch.cat(tensors) for tensors in zip(*parts)))
    for group in GROUPS:
        assert merged.count(group) == joint.count(group)
        for gamma in merged.gammas:
            for ours, theirs in zip(merged.cdf(group, gamma), joint.cdf(group, gamma)):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_out_of_more_windows_than_were_counted():
    """The others have no loss: they are the easiest."""
    logits, labels = make()
    distribution = LossDistribution([0])
    distribution.update(logits, labels)
    count = distribution.count("negative")
    fraction, share = distribution.cdf("negative", 0, out_of=4 * count)
    assert fraction[0] == 0 and fraction[1] == 0.75 and share[0] == share[1] == 0 and share[-1] == 1
    inner = distribution.hardest_share("negative", 0, 0.4)
    assert distribution.hardest_share("negative", 0, 0.1, out_of=4 * count) == pytest.approx(inner)
    assert distribution.hardest_share("negative", 0, 0.5, out_of=4 * count) == 1
    with pytest.raises(ValueError, match="windows were counted"):
        distribution.cdf("negative", 0, out_of=count - 1)


def test_the_state_does_not_grow_with_the_images():
    distribution = LossDistribution()

    def size():
        return sum(t.numel() * t.element_size() for t in vars(distribution).values() if isinstance(t, torch.Tensor))

    before = size()
    for seed in range(20):
        distribution.update(*make(seed=seed))
    assert size() == before == 2 * (NUM_BINS + 1) * (1 + 4) * 8 < 620_000


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: LossDistribution([]), "gammas must be one or more"),
        (lambda d: LossDistribution([1, 1.0]), "different numbers"),
        (lambda d: LossDistribution([-1]), "gamma must be a finite number >= 0"),
        (lambda d: d.merge(LossDistribution([3])), "cannot merge gammas"),
        (lambda d: d.count("foreground"), "group must be one of positive, negative"),
        (lambda d: d.total("positive", 7), "gamma 7 was not counted"),
        (lambda d: d.hardest_share("positive", 0, 1.5), r"fraction must be in \[0, 1\]"),
        (lambda d: d.update(torch.zeros(3, K), torch.zeros(4, dtype=torch.long)), "targets must be"),
        (lambda d: d.update(torch.zeros(3, K), torch.full((3,), K + 1)), "labels must be in"),
        (lambda d: d.update(torch.full((3, K), float("nan")), torch.full((3,), K)), "NaN or infinite"),
        (lambda d: d.update(torch.full((3, K), -float("inf")), torch.full((3,), K)), "NaN or infinite"),
        (lambda d: d.update(torch.full((3, K), float("inf")), torch.full((3,), K)), "NaN or infinite"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(LossDistribution())
