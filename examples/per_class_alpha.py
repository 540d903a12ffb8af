#!/usr/bin/env python3
"""sigmoid_focal_loss with one alpha per class, in a plain PyTorch classifier on long-tailed labels; no detector.

Scikit-learn's 8x8 digits, of which the digits 5 to 9 are made rare for training: 6 images each, all of 0 to 4. Alpha
weighs a class's positives, 1 - alpha its negatives: a larger one makes up for there being few positives.

python examples/per_class_alpha.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from focal_plugin.losses import sigmoid_focal_loss

NUM_CLASSES = 10
RARE = range(5, 10)


def long_tailed(kept: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, 64) images and (n,) labels to train on, with ``kept`` of each rare class, and the same to test on."""
    digits = load_digits()
    images, labels = digits.data.astype(np.float32) / 16, digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1200], order[1200:]
    by_class = [train[labels[train] == k][: kept if k in RARE else None] for k in range(NUM_CLASSES)]
    train = np.concatenate(by_class)
    return tuple(torch.from_numpy(x) for x in (images[train], labels[train], images[test], labels[test]))


def recalls(alpha: float | list[float], steps: int = 60) -> list[float]:
    """Trains a small network; of each class the share of its test images that are found."""
    images, labels, test_images, test_labels = long_tailed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))
    nn.init.constant_(model[-1].bias, -2.2)  # the prior of the focal loss paper: each class starts at 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        # Labels as they are, no one-hot; alpha as a list, one for each class.
        loss = sigmoid_focal_loss(model(images), labels, alpha=alpha, gamma=2.0, reduction="sum") / len(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model(test_images).argmax(dim=1) == test_labels
    return [found[test_labels == k].float().mean().item() for k in range(NUM_CLASSES)]


def main() -> dict[str, tuple[float, float]]:
    alphas = [0.95 if k in RARE else 0.25 for k in range(NUM_CLASSES)]
    results = {}
    for name, alpha in (("one alpha, 0.25", 0.25), ("0.95 for the rare", alphas)):
        recall = recalls(alpha)
        results[name] = sum(recall[:5]) / 5, sum(recall[5:]) / 5
        print(f"{name:<18} recall of the frequent {results[name][0]:.3f}, of the rare {results[name][1]:.3f}")
    return results


if __name__ == "__main__":
    main()
