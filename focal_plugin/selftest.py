"""Whether the plugin works on a device: one training step of each head, and the loss against float64."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Callable

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.functional import logsigmoid

from .config import get_config
from .losses import sigmoid_focal_loss

MAX_ERROR = 1e-4
"""Relative to float64, of the loss and its gradient in float32; a device that works stays under 1e-5."""


def check_device(device: str) -> Iterator[tuple[str, str, str]]:
    """Trains FL and OHEM for one step on a device, and compares the loss function there with float64.

    Yields:
        What was tried, what came out, and what to do about it: "" if it works.
    """
    for title, config in (("FL", "digits/focal.yaml"), ("OHEM", "digits/ohem.yaml")):
        yield _timed(f"{title}, forward and backward", lambda config=config: one_step(config, device))
    for gamma in (0.0, 0.5, 2.0):
        yield _timed(f"loss against float64, gamma {gamma:g}", lambda gamma=gamma: loss_error(gamma, device))


def _timed(name: str, check: Callable[[], tuple[str, str]]) -> tuple[str, str, str]:
    start = time.perf_counter()
    try:
        text, way_out = check()
    except Exception as error:  # the other checks of the device are still worth their time
        text, way_out = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "report it with all of this text",
        )
    return name, f"{text} ({time.perf_counter() - start:.2f} s)", way_out


def one_step(config: str, device: str) -> tuple[str, str]:
    """Losses and gradient norm of a random model on a random image, and what to do if they are not finite."""
    with torch.random.fork_rng(devices=[]):  # the same numbers in every report, and in no other place
        torch.manual_seed(0)
        model = build_model(get_config(config, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])).train()
    objects = Instances((128, 128))
    objects.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 34.0, 36.0], [60.0, 50.0, 90.0, 84.0]]))
    objects.gt_classes = torch.tensor([1, 7])
    image = torch.randint(0, 256, (3, 128, 128), generator=torch.Generator().manual_seed(0)).float()
    with EventStorage():
        losses = model([{"image": image, "instances": objects}])
    sum(losses.values()).backward()
    numbers = {name: float(loss) for name, loss in losses.items()}
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    numbers["gradient"] = float(torch.stack(norms).norm())
    bad = [name for name, number in numbers.items() if not math.isfinite(number)]
    text = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
    return text, f"{', '.join(bad)} not finite: report it with all of this text" if bad else ""


def loss_error(gamma: float, device: str) -> tuple[str, str]:
    """Largest relative error of the loss and its gradient in float32, logits from -60 to 60, against float64."""
    logits = torch.linspace(-60, 60, 1200).view(400, 3)
    labels = torch.arange(400) % 4  # 3 is background
    x = logits.double().requires_grad_()
    present = labels[:, None] == torch.arange(3)
    x_t = torch.where(present, x, -x)
    want = (torch.where(present, 0.25, 0.75) * -(torch.sigmoid(-x_t) ** gamma) * logsigmoid(x_t)).sum()
    want.backward()
    y = logits.to(device).requires_grad_()
    got = sigmoid_focal_loss(y, labels.to(device), 0.25, gamma, "sum")
    got.backward()
    of_loss = float(abs(got.detach().cpu().double() - want.detach()) / want.detach())
    # Smaller ones are denormal in float32, or 0.
    counted = x.grad.abs() > 1e-37
    of_gradient = float(((y.grad.cpu().double() - x.grad).abs() / x.grad.abs())[counted].max())
    # Not "> MAX_ERROR", which is false for NaN.
    is_right = of_loss <= MAX_ERROR and of_gradient <= MAX_ERROR
    way_out = "" if is_right else "report it with all of this text; on a GPU try FOCAL_PLUGIN_TRITON=0"
    return f"relative error {of_loss:.1e}, of the gradient {of_gradient:.1e}", way_out
