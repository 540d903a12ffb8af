"""The sigmoid losses of integer labels as Triton kernels: the logits are read once forward, once backward.

Bytes for each logit of e bytes: e forward; 2 e backward, where the gradient is recomputed and written in the logits'
dtype after it was scaled; (1 or 2 label bytes + 4 of the row sum) / K beside them. The row sums are the first of two
stages of a deterministic sum, and what OHEM ranks by. Shapes as in :mod:`focal_plugin.losses.blocked`, whose eager path
is the reference of these kernels and takes over where Triton is not installed or the tensors are not on a GPU.
"""

import os
from typing import Union

import torch
from torch import Tensor

from .alpha import Weights
from .formulas import Focal, FocalStar

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only
    triton = None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_usable(x: Tensor, entry: object) -> bool:
    """Whether the kernels can take these logits and this formula.

    FOCAL_PLUGIN_TRITON=0 in the environment switches them off.
    """
    if triton is None or x.dtype not in _DTYPES or x.numel() == 0 or os.environ.get("FOCAL_PLUGIN_TRITON") == "0":
        return False
    if not isinstance(entry, (Focal, FocalStar)):
        return False
    # Within a program rows and steps from class to class are counted in 32 bits.
    return max(x.shape[0], 16 * x.shape[2]) < 2**30 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def rows(x: Tensor, labels: Tensor, entry: Union[Focal, FocalStar], weights: Weights) -> Tensor:
    """(outer, 1, inner) float32 sums over the classes of the loss of (outer, K, inner) logits.

    Args:
        x: contiguous float32, float16 or bfloat16.
        labels: (outer, 1, inner) int8, int16 or int32.
        entry: the formula.
        weights: numbers, or (K,) float32 tensors.
    """
    out = x.new_empty((x.shape[0], 1, x.shape[2]), dtype=torch.float32)
    _launch(_rows_kernel, x, labels, entry, weights, out)
    return out


def gradient(x: Tensor, labels: Tensor, entry: Union[Focal, FocalStar], weights: Weights, grad_loss: Tensor) -> Tensor:
    """The gradient of the sum of :func:`rows` times the 0-dim ``grad_loss``, in the dtype of ``x``."""
    out = torch.empty_like(x)
    _launch(_gradient_kernel, x, labels, entry, weights, out, grad_loss.to(x.device, torch.float32))
    return out


def _launch(kernel, x: Tensor, labels: Tensor, entry, weights: Weights, *tensors: Tensor) -> None:
    outer, num_classes, inner = x.shape
    per_class = isinstance(weights.pos, Tensor) and weights.pos.dim() > 0
    # Rows that lie next to each other are split among programs as one list, planes of `inner` one by one.
    num_planes, num_rows = (1, outer) if inner == 1 else (outer, inner)
    block_rows, block_classes = _tile(num_classes, inner)
    is_star = isinstance(entry, FocalStar)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        kernel[(num_planes * triton.cdiv(num_rows, block_rows),)](
            x,
            labels.contiguous(),
            *tensors,
            weights.pos,
            weights.neg,
            num_classes,
            inner,
            num_rows,
            GAMMA=entry.gamma,
            BETA=entry.beta if is_star else 0.0,
            IS_STAR=is_star,
            PER_CLASS=per_class,
            ROWS_ADJOIN=inner > 1,
            BLOCK_ROWS=block_rows,
            BLOCK_CLASSES=block_classes,
            EVEN=num_classes % block_classes == 0,
            num_warps=4,
        )


def _tile(num_classes: int, inner: int) -> tuple[int, int]:
    """Rows and classes of a tile, 2,048 logits or fewer, both powers of 2."""
    # A power of 2 that divides K needs no masks and wastes no lanes: 16 for 80.
    divisor = num_classes & -num_classes
    block_classes = min(divisor if divisor >= 8 else triton.next_power_of_2(num_classes), 16)
    most = 2048 // block_classes
    # Neighbours in memory are rows here, and classes where inner is 1.
    return (min(most, 128) if inner > 1 else most), block_classes


if triton is not None:

    @triton.jit
    def _log1p(e):
        """log(1 + e) for 0 <= e <= 1 to 2.3e-7 of its value, however small e is; log(1.0 + e) would lose its digits."""
        # Minimax polynomial of log1p(e) / e, fitted in float64. It costs less than a logarithm on a GPU.
        p = e * 0.005232624243944883 - 0.029504956677556038
        p = p * e + 0.07822549343109131
        p = p * e - 0.1366320699453354
        p = p * e + 0.1910598874092102
        p = p * e - 0.2484297752380371
        p = p * e + 0.3331909477710724
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        return p * e

    @triton.jit
    def _power(wrong, log_wrong, GAMMA: tl.constexpr):
        """sigmoid(s)**gamma: in log space, but for the small whole numbers."""
        if GAMMA == 0.0:
            weight = tl.full(wrong.shape, 1.0, tl.float32)
        elif GAMMA == 1.0:
            weight = wrong
        elif GAMMA == 2.0:
            weight = wrong * wrong
        else:
            weight = tl.exp(GAMMA * log_wrong)
        return weight

    @triton.jit
    def _value(s, GAMMA: tl.constexpr, BETA: tl.constexpr, IS_STAR: tl.constexpr):
        """``formulas.Focal.value`` and ``FocalStar.value``."""
        if IS_STAR:
            s = GAMMA * s - BETA
        e = tl.exp(-tl.abs(s))
        tail = _log1p(e)
        cross_entropy = tl.maximum(s, 0.0) + tail
        if IS_STAR:
            value = cross_entropy / GAMMA
        else:
            wrong = tl.where(s > 0, 1.0, e) / (1.0 + e)
            value = _power(wrong, tl.minimum(s, 0.0) - tail, GAMMA) * cross_entropy
        return value

    @triton.jit
    def _derivative(s, GAMMA: tl.constexpr, BETA: tl.constexpr, IS_STAR: tl.constexpr):
        """``formulas.Focal.derivative`` and ``FocalStar.derivative``."""
        if IS_STAR:
            s = GAMMA * s - BETA
        e = tl.exp(-tl.abs(s))
        near = 1.0 / (1.0 + e)
        far = e * near
        slope = tl.where(s > 0, near, far)  # sigmoid(s)
        if not IS_STAR:
            tail = _log1p(e)
            weight = _power(slope, tl.minimum(s, 0.0) - tail, GAMMA)
            right = tl.where(s > 0, far, near)
            slope = (GAMMA * right * (tl.maximum(s, 0.0) + tail) + slope) * weight
        return slope

    @triton.jit
    def _place(num_classes, inner, num_rows, ROWS_ADJOIN: tl.constexpr, BLOCK_ROWS: tl.constexpr):
        """Of this program's rows: whether each exists, its index, and the index of its first logit."""
        blocks = tl.cdiv(num_rows, BLOCK_ROWS)
        # 64 bits: a batch can have more than 2**31 logits.
        plane = (tl.program_id(0) // blocks).to(tl.int64)
        row = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        if ROWS_ADJOIN:
            first = plane * num_classes * inner + row
        else:
            first = row.to(tl.int64) * num_classes
        return row < num_rows, plane * num_rows + row, first

    @triton.jit
    def _weights(pos, neg, classes, in_range, PER_CLASS: tl.constexpr):
        if PER_CLASS:
            pos = tl.load(pos + classes, mask=in_range, other=0.0)[None, :]
            neg = tl.load(neg + classes, mask=in_range, other=0.0)[None, :]
        return pos, neg

    @triton.jit
    def _rows_kernel(
        logits,
        labels,
        out,
        pos,
        neg,
        num_classes,
        inner,
        num_rows,
        GAMMA: tl.constexpr,
        BETA: tl.constexpr,
        IS_STAR: tl.constexpr,
        PER_CLASS: tl.constexpr,
        ROWS_ADJOIN: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_CLASSES: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        exists, row, first = _place(num_classes, inner, num_rows, ROWS_ADJOIN, BLOCK_ROWS)
        label = tl.load(labels + row, mask=exists, other=-1).to(tl.int32)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        place = logits + first[:, None] + tl.arange(0, BLOCK_CLASSES)[None, :] * inner
        for start in range(0, num_classes, BLOCK_CLASSES):
            classes = start + tl.arange(0, BLOCK_CLASSES)
            in_range = classes < num_classes
            mask = exists[:, None] if EVEN else exists[:, None] & in_range[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            present = label[:, None] == classes[None, :]
            value = _value(tl.where(present, -x, x), GAMMA, BETA, IS_STAR)
            pos_here, neg_here = _weights(pos, neg, classes, in_range, PER_CLASS)
            value = value * tl.where(present, pos_here, neg_here)
            total += tl.sum(value if EVEN else tl.where(mask, value, 0.0), axis=1)
            place += BLOCK_CLASSES * inner
        # Not a product: whatever lies in an ignored row, a NaN included, its loss is 0.
        tl.store(out + row, tl.where(label >= 0, total, 0.0), mask=exists)

    @triton.jit
    def _gradient_kernel(
        logits,
        labels,
        out,
        grad_loss,
        pos,
        neg,
        num_classes,
        inner,
        num_rows,
        GAMMA: tl.constexpr,
        BETA: tl.constexpr,
        IS_STAR: tl.constexpr,
        PER_CLASS: tl.constexpr,
        ROWS_ADJOIN: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_CLASSES: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        exists, row, first = _place(num_classes, inner, num_rows, ROWS_ADJOIN, BLOCK_ROWS)
        label = tl.load(labels + row, mask=exists, other=-1).to(tl.int32)
        # Read here and not on the host, which would have to wait for it.
        scale = tl.load(grad_loss)
        offset = first[:, None] + tl.arange(0, BLOCK_CLASSES)[None, :] * inner
        place, out_place = logits + offset, out + offset
        for start in range(0, num_classes, BLOCK_CLASSES):
            classes = start + tl.arange(0, BLOCK_CLASSES)
            in_range = classes < num_classes
            mask = exists[:, None] if EVEN else exists[:, None] & in_range[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            present = label[:, None] == classes[None, :]
            slope = _derivative(tl.where(present, -x, x), GAMMA, BETA, IS_STAR)
            pos_here, neg_here = _weights(pos, neg, classes, in_range, PER_CLASS)
            grad = slope * tl.where(present, -pos_here * scale, neg_here * scale)
            grad = tl.where(label[:, None] >= 0, grad, 0.0)
            tl.store(out_place, grad.to(out.dtype.element_ty), mask=mask)
            place += BLOCK_CLASSES * inner
            out_place += BLOCK_CLASSES * inner
