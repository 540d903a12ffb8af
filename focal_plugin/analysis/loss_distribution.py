"""Count which windows carry the loss: the distribution behind Figure 4 of the focal loss paper, in bounded memory.

The paper does not say what a "window" is: :data:`WINDOW` says what it is here. Every window has a logit of being wrong,
``s`` (see :mod:`focal_plugin.losses.formulas`), with which the focal loss grows whatever gamma is. One histogram over
``s`` therefore sorts the windows by their loss for all gammas at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..losses.args import check_choice, check_gamma, check_labels
from ..losses.formulas import Focal

GROUPS = ("positive", "negative")
GAMMAS = (0.0, 0.5, 1.0, 2.0)  # of Figure 4
WINDOW = (
    "A window is one entry of the sigmoid output: one anchor and one class. Positives are the entries of foreground "
    "anchors at their matched class, negatives all other entries of anchors that are not ignored; ignored anchors are "
    "left out. (The paper does not say what its windows are.) Labels are the model's own matcher's; images are resized "
    "as for a test. Loss is without alpha, which cancels in every share."
)

# Bins of 1/64 between logits of -60 and 60, and one on either side for what is beyond. Within a bin the focal loss
# changes by a factor of at most exp((1 + gamma) / 64), 5 % for gamma = 2.
_LIMIT, _PER_UNIT = 60, 64
NUM_BINS = 2 * _LIMIT * _PER_UNIT + 2
# Windows at a time: what is computed of them, in float64, stays in a CPU's cache; on a GPU it bounds the memory.
_BLOCK, _BLOCK_ON_DEVICE = 2**16, 2**23


class LossDistribution:
    """How the loss is spread over the windows, positives and negatives each, for several gammas of the same logits.

    The distributions are exact at the edges of the bins and linear in between; counts and totals are exact (float64).
    The state does not grow: 2 groups of :data:`NUM_BINS` bins, 600 KB for four gammas.

    Args:
        gammas: one or more different numbers >= 0, or a ValueError; 0 is cross entropy.
    """

    def __init__(self, gammas: Iterable[float] = GAMMAS):
        self.gammas = tuple(float(g) for g in gammas)
        if not self.gammas or len(set(self.gammas)) < len(self.gammas):
            raise ValueError(f"gammas must be one or more different numbers, got {list(self.gammas)}")
        for gamma in self.gammas:
            check_gamma(gamma)
        # Of each group and bin the count, then the sum for each gamma.
        self._bins = torch.zeros(len(GROUPS), 1 + len(self.gammas), NUM_BINS, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count the windows of some anchors, on the device of their logits.

        Args:
            logits: (..., K), in any memory layout; floating point.
            labels: (...) integers: a class in [0, K), K for background, -1 ignored.

        Raises:
            ValueError: shapes that do not agree, a label out of range (on a GPU: a device-side assertion), or a logit
                that counts and is not finite.
        """
        num_classes = logits.shape[-1]
        check_labels(labels, logits.shape, logits.dim() - 1, num_classes)
        if logits.numel() == 0:
            return
        self._bins = self._bins.to(logits.device)
        x, y = logits.flatten(0, -2), labels.flatten()
        is_foreground = (y >= 0) & (y < num_classes)
        foreground = x[is_foreground]
        present = y[is_foreground, None] == torch.arange(num_classes, device=y.device)
        size = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_DEVICE
        self._add(0, -foreground[present])
        self._add(1, foreground[~present])
        for block in x[y == num_classes].flatten().split(size):
            self._add(1, block)

    def _add(self, group: int, s: Tensor) -> None:
        """Add windows of a group by their (M,) logits of being wrong."""
        s = s.double()
        if not s.isfinite().all():
            raise ValueError("a logit is NaN or infinite: the model has diverged, or its input is not finite")
        bins = torch.add(_LIMIT * _PER_UNIT + 1, s, alpha=_PER_UNIT).floor_().clamp_(0, NUM_BINS - 1).long()
        self._bins[group, 0] += torch.bincount(bins, minlength=NUM_BINS)
        for sums, gamma in zip(self._bins[group, 1:], self.gammas):
            sums += torch.bincount(bins, weights=Focal(gamma).value(s), minlength=NUM_BINS)

    def count(self, group: str) -> int:
        """Return the number of windows of ``"positive"`` or ``"negative"``."""
        return int(self._of(group, self.gammas[0])[0].sum())

    def total(self, group: str, gamma: float) -> float:
        """Return the sum of the loss over all windows of a group, without alpha."""
        return float(self._of(group, gamma)[1].sum())

    def curve(self, group: str, gamma: float, out_of: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return which share of the loss of a group a fraction of its windows carries, the hardest ones first.

        ``out_of`` is the number of windows to relate to, if more than were counted: the others have no loss.

        Returns:
            Fractions and shares at the edges of all bins that are not empty, from (0, 0) to (1, 1); between them they
            are linear. NaN shares if there is no loss at all.
        """
        counts, sums = self._of(group, gamma)
        filled = np.flatnonzero(counts)[::-1]
        total = max(counts.sum() if out_of is None else out_of, 1)
        fraction = np.concatenate([[0], counts[filled].cumsum() / total, [1]])
        loss = np.concatenate([[0], sums[filled], [0]]).cumsum()
        return fraction, loss / loss[-1] if loss[-1] > 0 else np.full(len(loss), np.nan)

    def _of(self, group: str, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts and sums per bin."""
        check_choice("group", group, GROUPS)
        if gamma not in self.gammas:
            raise ValueError(f"gamma {gamma} was not counted, only {list(self.gammas)}")
        bins = self._bins[GROUPS.index(group)].cpu().numpy()
        return bins[0], bins[1 + self.gammas.index(gamma)]
