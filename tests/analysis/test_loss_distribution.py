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


def counted(*args, gammas=(0, 0.5, 1, 2), **kwargs):
    distribution = LossDistribution(gammas)
    distribution.update(*args, **kwargs)
    return distribution


def naive(logits, labels, gamma):
    """{group: all losses in float64, the highest first}."""
    x, y = logits.double()[labels >= 0], labels[labels >= 0]
    present = y[:, None] == torch.arange(logits.shape[-1])
    losses = {"positive": Focal(gamma).value(-x[present]), "negative": Focal(gamma).value(x[~present])}
    return {group: loss.sort(descending=True).values.numpy() for group, loss in losses.items()}


def check(distribution, logits, labels):
    """Counts and totals, and the distribution at the edges of its bins, are exact."""
    for gamma in distribution.gammas:
        for group, losses in naive(logits, labels, gamma).items():
            assert distribution.count(group) == len(losses)
            assert distribution.total(group, gamma) == pytest.approx(losses.sum(), rel=1e-11)
            if len(losses):
                fraction, share = distribution.curve(group, gamma)
                above = np.rint(fraction * len(losses)).astype(int)
                expected = np.append(0.0, losses.cumsum())[above] / losses.sum()
                np.testing.assert_allclose(share, expected, atol=1e-11)
                assert (fraction[0], share[0]) == (0, 0) and (fraction[-1], share[-1]) == (1, 1)


@pytest.mark.parametrize("num_classes", [1, K])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_a_sort_of_all_losses(num_classes, dtype):
    logits, labels = make(num_classes=num_classes)
    logits = logits.to(dtype)
    before = logits.clone()
    check(counted(logits, labels, gammas=[0, 0.5, 1, 2, 5]), logits, labels)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_hardest_share_between_the_edges(gamma):
    """Within a bin losses differ by exp((1 + gamma) / 64) at most, 5 %, and no bin here holds 1 % of the windows."""
    logits, labels = make((200, 30))
    distribution, fractions = counted(logits, labels, gammas=[gamma]), np.array([0, 0.001, 0.01, 0.1, 0.2, 0.5, 1])
    for group, losses in naive(logits, labels, gamma).items():
        shares = np.append(0, losses.cumsum() / losses.sum())
        exact = np.interp(fractions * len(losses), np.arange(len(losses) + 1), shares)
        assert np.interp(fractions, *distribution.curve(group, gamma)) == pytest.approx(exact, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_a_convolution_writes_them(memory_format):
    """(N, A * K, H, W) seen as (N, A, K, H, W), in more blocks than one."""
    num, anchors, height, width = 2, 3, 61, 83
    logits, labels = make((num, anchors, height, width), num_classes=8)
    written = logits.movedim(-1, 2).reshape(num, -1, height, width).contiguous(memory_format=memory_format)
    check(counted(written.view(num, anchors, 8, height, width), labels, class_dim=2), logits, labels)


@pytest.mark.parametrize("change", [lambda x: x.abs() + 195, lambda x: -x.abs() - 195, lambda x: 50 * x])
def test_huge_logits_have_a_loss(change):
    """Also where the loss is far below what float32 holds, and the ends of the histogram are open."""
    logits, labels = make()
    distribution = counted(change(logits), labels)
    check(distribution, change(logits), labels)
    assert distribution.total("negative", 2) > 0


def test_a_view_that_is_not_dense():
    logits, labels = (x[::2, 1::3] for x in make())
    check(counted(logits, labels), logits, labels)


def test_a_known_case():
    """Four negatives of p = .5 with log 2 each, one hard one of loss 200 and one positive."""
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, 0.0], [200.0, 0.0]]), torch.tensor([2, 2, 1])
    distribution = counted(logits, labels, gammas=[0])
    assert distribution.count("positive") == 1 and distribution.count("negative") == 5
    assert distribution.total("positive", 0) == pytest.approx(np.log(2))
    assert np.interp(0.2, *distribution.curve("negative", 0)) == pytest.approx(200 / (200 + 4 * np.log(2)))


def test_ignored_anchors_do_not_count_whatever_their_logits():
    logits, labels = make()
    expected = counted(logits, labels)
    logits[labels == -1] = float("nan")
    check(counted(logits, labels), logits, labels)
    for group in GROUPS:
        np.testing.assert_array_equal(counted(logits, labels).curve(group, 0.5), expected.curve(group, 0.5))


@pytest.mark.parametrize("num", [0, 30])
@pytest.mark.parametrize("label", [-1, K])
def test_no_windows_have_no_distribution(num, label):
    distribution = counted(torch.randn(num, K), torch.full((num,), label))
    assert distribution.count("negative") == (K * num if label == K else 0)
    assert distribution.count("positive") == distribution.total("positive", 2) == 0
    assert np.isnan(distribution.curve("positive", 2)[1]).all()


def test_the_images_add_up_in_a_state_that_does_not_grow():
    parts = [make(seed=seed) for seed in range(5)]
    distribution = LossDistribution()
    for part in parts:
        distribution.update(*part)
    check(distribution, *(torch.cat(tensors) for tensors in zip(*parts)))
    state = [x for x in vars(distribution).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in state) == 2 * NUM_BINS * (1 + 4) * 8 < 620_000


def test_out_of_more_windows_than_were_counted():
    """The others have no loss: they are the easiest."""
    distribution = counted(*make())
    count = distribution.count("negative")
    (fraction, share), (more, same) = (distribution.curve("negative", 0, out_of=n) for n in (count, 4 * count))
    np.testing.assert_allclose(more, np.append(fraction / 4, 1), rtol=1e-12)
    np.testing.assert_array_equal(same, np.append(share, 1))
    with pytest.raises(ValueError, match="windows were counted"):
        distribution.curve("negative", 0, out_of=count - 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: LossDistribution([]), "gammas must be one or more"),
        (lambda d: LossDistribution([1, 1.0]), "different numbers"),
        (lambda d: LossDistribution([-1]), "gamma must be a finite number >= 0"),
        (lambda d: d.count("foreground"), "group must be one of positive, negative"),
        (lambda d: d.total("positive", 7), "gamma 7 was not counted"),
        (lambda d: d.update(torch.zeros(3, K), torch.zeros(4, dtype=torch.long)), "targets must be"),
        (lambda d: d.update(torch.zeros(3, K), torch.full((3,), K + 1)), "labels must be in"),
        *[
            (lambda d, x=x, y=y: d.update(torch.full((3, K), float(x)), torch.full((3,), y)), "NaN or infinite")
            for x in ("nan", "-inf", "inf")
            for y in (0, K)
        ],
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(LossDistribution())
