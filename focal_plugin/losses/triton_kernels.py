"""The sigmoid losses of integer labels as Triton kernels: the logits are read once forward, once backward.

Bytes for each logit of e bytes: e forward; 2 e backward, where the gradient is recomputed and written in the logits'
dtype after it was scaled; (1 or 2 label bytes + 4 of the anchor's loss) / K beside them. The losses of the anchors are
the first of two stages of a deterministic sum, and what OHEM ranks by. Shapes as in the module ``blockwise``, which is
the reference of these kernels and takes over where Triton is not installed or the tensors are not on a GPU.
"""

import os
from typing import Optional

import torch
from torch import Tensor

from .args import Weights
from .formulas import Focal, FocalStar, Formula

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only
    triton = None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_usable(x: Tensor, formula: Formula) -> bool:
    """Return whether the kernels can take these; FOCAL_PLUGIN_TRITON=0 in the environment switches them off."""
    if triton is None or not isinstance(formula, (Focal, FocalStar)) or os.environ.get("FOCAL_PLUGIN_TRITON") == "0":
        return False
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or x.dtype not in _DTYPES or x.numel() == 0:
        return False
    # Within a program anchors and steps from class to class are counted in 32 bits.
    return max(x.shape[0], 16 * x.shape[2]) < 2**30


def run(x: Tensor, labels: Tensor, formula: Formula, weights: Weights, factor: Optional[Tensor] = None) -> Tensor:
    """Return the (outer, 1, inner) float32 sums over the classes of the loss of (outer, K, inner) logits.

    Args:
        x: contiguous float32, float16 or bfloat16.
        labels: (outer, 1, inner) int8, int16 or int32.
        weights: numbers, or (K, 1) float32 tensors.
        factor: a 0-dim tensor: return the gradient of the sum of these losses times it, in the dtype of ``x``.
    """
    outer, num_classes, inner = x.shape
    if factor is None:
        out = x.new_empty((outer, 1, inner), dtype=torch.float32)
    else:
        out, factor = torch.empty_like(x), factor.to(x.device, torch.float32)
    tensors = x, labels.contiguous(), out, out if factor is None else factor
    # Anchors that lie next to each other are split among programs as one list, planes of `inner` one by one.
    num_planes, num_anchors = (1, outer) if inner == 1 else (outer, inner)
    block_anchors, block_classes = _tile(num_classes, inner)
    is_star = isinstance(formula, FocalStar)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        _kernel[(num_planes * triton.cdiv(num_anchors, block_anchors),)](
            *tensors,
            *weights,
            num_classes,
            inner,
            num_anchors,
            IS_GRADIENT=factor is not None,
            GAMMA=formula.gamma,
            BETA=formula.beta if is_star else 0.0,
            IS_STAR=is_star,
            PER_CLASS=isinstance(weights.pos, Tensor),
            ANCHORS_ADJOIN=inner > 1,
            BLOCK_ANCHORS=block_anchors,
            BLOCK_CLASSES=block_classes,
            EVEN=num_classes % block_classes == 0,
            num_warps=4,
        )
    return out


def _tile(num_classes: int, inner: int) -> tuple[int, int]:
    """Return the anchors and classes of a tile, 2,048 logits or fewer, both powers of 2."""
    # A power of 2 that divides K needs no masks and wastes no lanes: 16 for 80.
    divisor = num_classes & -num_classes
    block_classes = min(divisor if divisor >= 8 else triton.next_power_of_2(num_classes), 16)
    most = 2048 // block_classes
    # Neighbors in memory are anchors here, and classes where inner is 1.
    return (min(most, 128) if inner > 1 else most), block_classes


if triton is not None:

    @triton.jit
    def _log1p(e):
        """Return log(1 + e) for 0 <= e <= 1 to 2.3e-7 of its value; log(1.0 + e) loses the digits of a small e."""
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
        """Return sigmoid(s)**gamma: in log space, but for the small whole numbers."""
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
        """Compute ``formulas.Focal.value`` and ``FocalStar.value``."""
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
        """Compute ``formulas.Focal.derivative`` and ``FocalStar.derivative``."""
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
    def _kernel(
        logits,
        labels,
        out,
        factor,
        pos,
        neg,
        num_classes,
        inner,
        num_anchors,
        IS_GRADIENT: tl.constexpr,
        GAMMA: tl.constexpr,
        BETA: tl.constexpr,
        IS_STAR: tl.constexpr,
        PER_CLASS: tl.constexpr,
        ANCHORS_ADJOIN: tl.constexpr,
        BLOCK_ANCHORS: tl.constexpr,
        BLOCK_CLASSES: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        """Write the gradient of each logit times ``factor``, or the loss of each anchor."""
        # Of each of this program's anchors: its index, whether it exists, and where its first logit lies.
        blocks = tl.cdiv(num_anchors, BLOCK_ANCHORS)
        # 64 bits: a batch can have more than 2**31 logits.
        plane = (tl.program_id(0) // blocks).to(tl.int64)
        anchor = (tl.program_id(0) % blocks) * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
        exists = anchor < num_anchors
        if ANCHORS_ADJOIN:
            first = plane * num_classes * inner + anchor
        else:
            first = anchor.to(tl.int64) * num_classes
        anchor = plane * num_anchors + anchor
        label = tl.load(labels + anchor, mask=exists, other=-1).to(tl.int32)
        offset = first[:, None] + tl.arange(0, BLOCK_CLASSES)[None, :] * inner
        place = logits + offset
        if IS_GRADIENT:
            out_place = out + offset
            # Read here and not on the host, which would have to wait for it.
            scale = tl.load(factor)
        else:
            total = tl.zeros((BLOCK_ANCHORS,), tl.float32)
        for start in range(0, num_classes, BLOCK_CLASSES):
            classes = start + tl.arange(0, BLOCK_CLASSES)
            in_range = classes < num_classes
            mask = exists[:, None] if EVEN else exists[:, None] & in_range[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            present = label[:, None] == classes[None, :]
            s = tl.where(present, -x, x)
            if PER_CLASS:
                pos_here = tl.load(pos + classes, mask=in_range, other=0.0)[None, :]
                neg_here = tl.load(neg + classes, mask=in_range, other=0.0)[None, :]
            else:
                pos_here, neg_here = pos, neg
            if IS_GRADIENT:
                slope = _derivative(s, GAMMA, BETA, IS_STAR)
                grad = slope * tl.where(present, -pos_here * scale, neg_here * scale)
                grad = tl.where(label[:, None] >= 0, grad, 0.0)
                tl.store(out_place, grad.to(out.dtype.element_ty), mask=mask)
                out_place += BLOCK_CLASSES * inner
            else:
                value = _value(s, GAMMA, BETA, IS_STAR) * tl.where(present, pos_here, neg_here)
                total += tl.sum(value if EVEN else tl.where(mask, value, 0.0), axis=1)
            place += BLOCK_CLASSES * inner
        if not IS_GRADIENT:
            # Not a product: whatever lies in an ignored anchor, a NaN included, its loss is 0.
            tl.store(out + anchor, tl.where(label >= 0, total, 0.0), mask=exists)
