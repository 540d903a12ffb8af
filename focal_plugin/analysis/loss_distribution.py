"""Which windows carry the loss: the distribution behind Figure 4 of the focal loss paper, in bounded memory.

The paper (Lin et al. 2017, section 5.1) does not say what a "window" is. Here a window is one entry of the sigmoid
output, that of one anchor and one class: the positives are the entries of foreground anchors at their matched class,
the negatives all other entries of the anchors that are not ignored. Ignored anchors are left out.

Every window has a logit of being wrong, ``s`` (see :mod:`focal_plugin.losses.formulas`), and the focal loss grows with
``s`` whatever gamma is. One histogram over ``s`` therefore sorts the windows by their loss for all gammas at once.
Alpha is a constant factor within each group, which the normalised distributions do not see: the loss is without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..losses.args import IGNORE, check_gamma, check_labels
from ..losses.blockwise import Layout
from ..losses.formulas import softplus

GROUPS = ("positive", "negative")
GAMMAS = (0.0, 0.5, 1.0, 2.0)
"""Those of Figure 4."""

# Bins of 1/64 between logits of -60 and 60, and one on either side for what is beyond. Within a bin the focal loss
# changes by a factor of at most exp((1 + gamma) / 64), 5 % for gamma = 2.
_LIMIT, _PER_UNIT = 60, 64
NUM_BINS = 2 * _LIMIT * _PER_UNIT + 2
# Entries at a time: what is computed of them, in float64, stays in a CPU's cache; on a GPU it bounds the memory.
_BLOCK, _BLOCK_ON_DEVICE = 2**16, 2**23


class LossDistribution:
    """How the loss is spread over the windows, positives and negatives each, for several gammas of the same logits.

    The distributions are exact at the edges of the bins and linear in between; counts and totals are exact (float64).
    The state has a fixed size: 2 groups of :data:`NUM_BINS` bins, each with a count and a sum of losses per gamma,
    600 KB for four gammas.

    Attributes:
        gammas: the gammas, in the order given.
    """

    def __init__(self, gammas: Iterable[float] = GAMMAS):
        """
        Args:
            gammas: focusing parameters, >= 0; 0 is cross entropy.

        Raises:
            ValueError: there is none, one is given twice, or one is out of range.
        """
        self.gammas = tuple(float(g) for g in gammas)
        if not self.gammas or len(set(self.gammas)) < len(self.gammas):
            raise ValueError(f"gammas must be one or more different numbers, got {list(self.gammas)}")
        for gamma in self.gammas:
            check_gamma(gamma)
        # One bin more, for entries that do not count.
        self._counts = torch.zeros(len(GROUPS), NUM_BINS + 1, dtype=torch.int64)
        self._sums = torch.zeros(len(GROUPS), len(self.gammas), NUM_BINS + 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, class_dim: int = -1) -> None:
        """Counts the windows of some anchors, on the device of their logits.

        Args:
            logits: any shape that has K classes along ``class_dim``, in any memory layout; floating point.
            labels: integers of the same shape without ``class_dim``: a class in [0, K), K for background, -1 ignored.
            class_dim: where the classes are.

        Raises:
            ValueError: the shapes do not agree, a label is out of range (on a GPU: a device-side assertion), or a
                logit that counts is not finite.
        """
        class_dim %= logits.dim()
        check_labels(labels, logits.shape, class_dim, logits.shape[class_dim])
        if logits.numel() == 0:
            return
        layout = Layout(logits, class_dim)
        x, labels = layout.flat(logits), layout.flat(labels.unsqueeze(class_dim))
        # An index that is valid for background and ignored rows as well.
        index = labels.clamp(0, x.shape[1] - 1).long()
        present = (labels >= 0) & (labels < x.shape[1])
        self._counts, self._sums = self._counts.to(x.device), self._sums.to(x.device)
        self._add(0, -x.gather(1, index)[present].double())
        for block in _blocks(x):
            s = x[block].to(torch.float64, copy=True)  # to overwrite
            bins = _bins(s)
            # Each row's entry of its class is a positive, which was counted above.
            at_class = bins.gather(1, index[block]).masked_fill_(present[block], NUM_BINS)
            bins.scatter_(1, index[block], at_class).masked_fill_(labels[block] == IGNORE, NUM_BINS)
            self._add(1, s.flatten(), bins.flatten())
        if not self._sums[..., :NUM_BINS].isfinite().all():
            raise ValueError("a logit is NaN or infinite: the model has diverged, or its input is not finite")

    def _add(self, group: int, s: Tensor, bins: Tensor | None = None) -> None:
        """Adds the (M,) float64 logits of being wrong to a group."""
        bins = _bins(s) if bins is None else bins
        self._counts[group] += torch.bincount(bins, minlength=NUM_BINS + 1)
        # formulas.Focal, whose two costly terms are the same for every gamma.
        cross_entropy = softplus(s, out=torch.empty_like(s))
        log_wrong = torch.sub(s, cross_entropy, out=s)
        loss = torch.empty_like(s)
        for i, gamma in enumerate(self.gammas):
            torch.mul(log_wrong, gamma, out=loss).exp_().mul_(cross_entropy)
            self._sums[group, i] += torch.bincount(bins, weights=loss, minlength=NUM_BINS + 1)

    def merge(self, other: LossDistribution) -> LossDistribution:
        """Adds what another one counted, e.g. on another part of the images; returns itself.

        Raises:
            ValueError: it has other gammas.
        """
        if other.gammas != self.gammas:
            raise ValueError(f"cannot merge gammas {list(self.gammas)} with gammas {list(other.gammas)}")
        self._counts += other._counts.to(self._counts.device)
        self._sums += other._sums.to(self._sums.device)
        return self

    def count(self, group: str) -> int:
        """The number of windows of ``"positive"`` or ``"negative"``."""
        return int(self._of(group)[0].sum())

    def total(self, group: str, gamma: float) -> float:
        """The sum of the loss over all windows of a group, without alpha."""
        return float(self._of(group, gamma)[1].sum())

    def cdf(self, group: str, gamma: float, out_of: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The cumulative distribution of the loss over the windows sorted from the lowest loss to the highest.

        Args:
            group: "positive" or "negative".
            gamma: one of :attr:`gammas`.
            out_of: the number of windows to relate to, if more than were counted: the others have no loss.

        Returns:
            The fraction of the windows and the share of the loss that they carry, at the edges of all bins that are
            not empty, from (0, 0) to (1, 1). NaN shares if there is no loss at all.

        Raises:
            ValueError: no such group or gamma, or ``out_of`` is less than was counted.
        """
        fraction, share = self._from_hardest(group, gamma, out_of)
        fraction, share = 1 - fraction[::-1], 1 - share[::-1]
        if fraction[0] > 0:
            fraction, share = np.append(0.0, fraction), np.append(share[0], share)
        return fraction, share

    def hardest_share(self, group: str, gamma: float, fraction: float, out_of: int | None = None) -> float:
        """The share of a group's loss that its hardest windows carry; NaN if there is no loss at all.

        Args:
            fraction: how many of the windows, in [0, 1].
            group, gamma, out_of: as in :meth:`cdf`.

        Raises:
            ValueError: as :meth:`cdf`; or a fraction out of range.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        return float(np.interp(fraction, *self._from_hardest(group, gamma, out_of)))

    def histogram(self, group: str) -> dict:
        """All bins that are not empty, as plain numbers, from the lowest loss to the highest.

        Returns:
            ``"from"``, ``"to"``: the edges of each bin, as logits of being wrong (None: open); ``"windows"``: the
            counts; ``"loss"``: the sums of the loss, by gamma.
        """
        counts, _ = self._of(group)
        filled = np.flatnonzero(counts)
        edges = [None, *(np.arange(NUM_BINS - 1) / _PER_UNIT - _LIMIT).tolist(), None]
        return {
            "from": [edges[i] for i in filled],
            "to": [edges[i + 1] for i in filled],
            "windows": counts[filled].tolist(),
            "loss": {f"{gamma:g}": self._of(group, gamma)[1][filled].tolist() for gamma in self.gammas},
        }

    def _from_hardest(self, group: str, gamma: float, out_of: int | None) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`cdf`, but counted from the hardest window; no further than to the easiest that was counted."""
        counts, sums = self._of(group, gamma)
        filled = np.flatnonzero(counts)[::-1]
        counted, loss = (np.append(0, np.cumsum(values[filled])) for values in (counts, sums))
        out_of = int(counted[-1]) if out_of is None else out_of
        if out_of < counted[-1]:
            raise ValueError(f"out_of is {out_of}, but {int(counted[-1])} windows were counted")
        share = loss / loss[-1] if loss[-1] > 0 else np.full(len(loss), np.nan)
        return counted / max(out_of, 1), share

    def _of(self, group: str, gamma: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The counts of a group, and its sums for a gamma (by default the first), per bin."""
        if group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}; got {group!r}")
        gamma = self.gammas[0] if gamma is None else gamma
        if gamma not in self.gammas:
            raise ValueError(f"gamma {gamma} was not counted, only {list(self.gammas)}")
        i, g = GROUPS.index(group), self.gammas.index(gamma)
        return self._counts[i, :NUM_BINS].cpu().numpy(), self._sums[i, g, :NUM_BINS].cpu().numpy()


def _bins(s: Tensor) -> Tensor:
    """The number of each logit's bin. One that is not finite has a bin, too: its loss shows that it is not."""
    place = torch.add(_LIMIT * _PER_UNIT + 1, s, alpha=_PER_UNIT).nan_to_num_(0.0)
    return place.floor_().clamp_(0, NUM_BINS - 1).long()


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """The places of blocks of (outer, K, inner) logits, each with all classes."""
    outer, num_classes, inner = x.shape
    size = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_DEVICE
    width = min(inner, max(size // num_classes, 1))
    height = min(outer, max(size // (num_classes * width), 1))
    for o in range(0, outer, height):
        for i in range(0, inner, width):
            yield slice(o, o + height), slice(None), slice(i, i + width)
