"""The distribution against sorting all losses in float64, on every kind of input that it may meet."""

import numpy as np
import pytest
import torch

from focal_plugin.analysis.loss_distribution import GROUPS, NUM_BINS, LossDistribution
from focal_plugin.losses.formulas import Focal

K = 5


def make(*shape, num_classes=K, seed=0):
    """Logits (*shape, K) and labels with about as many positives, background and ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(*shape, num_classes, generator=generator) - 2
    labels = torch.randint(-num_classes, 2 * num_classes, shape, generator=generator)
    return logits, labels.clamp(-1, num_classes)


def counted(logits, labels, gammas=(0, 0.5, 1, 2)):
    distribution = LossDistribution(gammas)
    distribution.update(logits, labels)
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
            assert distribution.count(group) == len(losses) > 0
            assert distribution.total(group, gamma) == pytest.approx(losses.sum(), rel=1e-11)
            fraction, share = distribution.curve(group, gamma)
            above = np.rint(fraction * len(losses)).astype(int)
            expected = np.append(0.0, losses.cumsum())[above] / losses.sum()
            np.testing.assert_allclose(share, expected, atol=1e-11)
            assert (fraction[0], share[0]) == (0, 0) and (fraction[-1], share[-1]) == (1, 1)


def level(memory_format):
    """As a convolution writes it, (N, A * 8, H, W), seen as (N, H, W, A, 8); more than one block."""
    x = (4 * torch.randn(2, 3 * 8, 61, 83) - 2).contiguous(memory_format=memory_format)
    return x.view(2, 3, 8, 61, 83).permute(0, 3, 4, 1, 2), make(2, 61, 83, 3, num_classes=8)[1]


# The third and fourth: losses far below what float32 holds, and, as the second's, in the bins whose end is open.
CHANGES = [torch.Tensor.double, lambda x: 50 * x, lambda x: -x.abs() - 195, lambda x: x.abs() + 195]
CHANGES += [torch.Tensor.bfloat16]
CASES = [(change(make(40, 30)[0]), make(40, 30)[1]) for change in CHANGES]
CASES += [make(40, 30, num_classes=1), [x[::2, 1::3] for x in make(40, 30)]]
CASES += map(level, (torch.contiguous_format, torch.channels_last))


@pytest.mark.parametrize("logits, labels", CASES)
def test_equals_a_sort_of_all_losses(logits, labels):
    before = logits.clone()
    distribution = counted(logits, labels)
    check(distribution, logits, labels)
    assert torch.equal(logits, before) and distribution.total("negative", 2) > 0
    # Ignored anchors do not count, whatever their logits.
    logits[labels == -1] = torch.nan
    check(counted(logits, labels), before, labels)


@pytest.mark.parametrize("gamma", [0, 0.5, 2, 5])
def test_hardest_share_between_the_edges(gamma):
    """Within a bin losses differ by exp((1 + gamma) / 64) at most, 5 %, and no bin here holds 1 % of the windows."""
    logits, labels = make(200, 30)
    distribution, fractions = counted(logits, labels, [gamma]), np.array([0, 0.001, 0.01, 0.1, 0.2, 0.5, 1])
    for group, losses in naive(logits, labels, gamma).items():
        shares = np.append(0, losses.cumsum() / losses.sum())
        exact = np.interp(fractions * len(losses), np.arange(len(losses) + 1), shares)
        exact = pytest.approx(exact, rel=1e-3, abs=1e-4)
        assert np.interp(fractions, *distribution.curve(group, gamma)) == exact
        # Out of more windows than were counted: the others have no loss, they are the easiest.
        shares = np.interp([*(fractions / 4), 0.6], *distribution.curve(group, gamma, out_of=4 * len(losses)))
        assert shares[:-1] == exact and shares[-1] == 1


def test_the_images_add_up_from_nothing_in_a_state_that_does_not_grow():
    distribution = LossDistribution([0, 0.5, 2, 5])
    for num, label in ((0, K), (30, -1)):  # an empty one, and all of it ignored
        distribution.update(torch.randn(num, K), torch.full((num,), label))
        assert not any(distribution.count(group) or distribution.total(group, 2) for group in GROUPS)
        assert np.isnan(distribution.curve("positive", 2)[1]).all()
    parts = [make(40, 30, seed=seed) for seed in range(5)]
    for part in parts:
        distribution.update(*part)
    check(distribution, *(torch.cat(tensors) for tensors in zip(*parts)))
    state = [x for x in vars(distribution).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in state) == 2 * NUM_BINS * (1 + 4) * 8 < 620_000


def test_errors():
    full, update = torch.full, LossDistribution().update
    for call, message in (
        (lambda: LossDistribution([]), "gammas must be one or more"),
        (lambda: LossDistribution([1, 1.0]), "different numbers"),
        (lambda: LossDistribution([-1]), "gamma must be a finite number >= 0"),
        (lambda: LossDistribution().count("foreground"), "group must be one of positive, negative"),
        (lambda: LossDistribution().total("positive", 7), "gamma 7 was not counted"),
        (lambda: update(torch.zeros(3, K), torch.zeros(4, dtype=torch.long)), "targets must be"),
        (lambda: update(torch.zeros(3, K), full((3,), K + 1)), "labels must be in"),
        (lambda: update(full((3, K), torch.nan), full((3,), K)), "NaN or infinite"),
        (lambda: update(full((3, K), torch.inf), full((3,), 0)), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
