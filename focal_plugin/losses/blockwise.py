"""Evaluate a loss block by block: what it needs beside logits and gradient fits into the cache.

The logits are by far the largest tensor of a detector's loss, and a formula of ten operations moves them twenty times
through memory. Here a block of them stays in the cache until it is done: the logits are read once for the loss and once
for the gradient, which is written once. Only the logits and the targets are kept between the two passes.

Shapes: logits are seen as (outer, K, inner), in the order in which they lie in memory: K classes, whatever varies
slower than the class in ``outer`` and faster in ``inner``. That is a view both of what a convolution writes
(N, A * K, H, W: outer = N * A, inner = H * W) and of its channels_last form (outer = N * H * W * A, inner = 1). What
each anchor (each set of K logits) has one of, as its label, is (outer, 1, inner).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Union

import torch
from torch import Tensor

from .args import IGNORE, Weights, float_dtype
from .formulas import Formula

# Logits in a block: on a CPU three float32 buffers of this size fit into a second-level cache of 1 MiB, on a GPU the
# size only bounds the memory.
_BLOCK, _BLOCK_ON_DEVICE = 2**16, 2**24


class BlockwiseLoss(ABC):
    """A loss of logits and their targets: the ``formula`` of each logit times the ``weights``.

    A subclass gives the loss as one differentiable :meth:`expression`. Where speed counts it also gives the loss and
    the gradient of a block in closed form. Labels that are -1 are handled here: loss and gradient are 0.
    """

    has_labels = True  # whether targets are labels, of which some may be ignored, or dense

    def __init__(self, formula: Formula, weights: Union[Weights, float, Tensor]):
        self.formula, self.weights = formula, weights

    def __call__(self, inputs: Tensor, targets: Tensor, class_dim: int = -1, sum_classes: bool = True) -> Tensor:
        """Return the loss of each anchor or of each logit, in float32 (float64 for float64).

        Args:
            inputs: logits of any shape with K classes along ``class_dim``, in any memory layout.
            targets: labels of that shape without ``class_dim``, known to be in range, or dense targets of that shape.
            class_dim: the dimension of ``inputs`` that runs over classes.
            sum_classes: sum over the classes, to the shape of the labels; else the shape of ``inputs`` is kept.
        """
        layout = Layout(inputs, class_dim)
        x = layout.flat(inputs)
        if self.has_labels:
            # The smallest type that holds -1 to K: they are read again in each pass.
            dtype = torch.int8 if x.shape[1] < 2**7 else torch.int16 if x.shape[1] < 2**15 else torch.int32
            target = layout.flat(targets.unsqueeze(class_dim)).to(dtype)
        else:
            target = layout.flat(targets.detach())
        if torch.compiler.is_compiling():
            # A compiler fuses the expression by itself, and would only unroll a loop over blocks.
            loss = self.differentiable_loss(x, target, sum_classes)
        else:
            loss = _Blockwise.apply(x, target, self, sum_classes)
        loss = layout.unflat(loss)
        return loss.squeeze(class_dim) if sum_classes else loss

    @abstractmethod
    def expression(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of (outer, K, inner) float32 or float64 logits, from differentiable operations only.

        It is (outer, K, inner), or (outer, 1, inner) for a loss that cannot be told apart by class.
        """

    def prepare(self, x: Tensor, target: Tensor, for_gradient: bool) -> tuple[Tensor, ...]:
        """Return tensors of which each block is given its part: the target, or what is made of it once for all."""
        return (target,)

    def block_loss(self, x: Tensor, buffers: list[Tensor], target: Tensor) -> Tensor:
        """Return the loss of a block; free to overwrite ``x`` and the two ``buffers`` of its shape."""
        return self.expression(x, target)

    def block_gradient(self, x: Tensor, buffers: list[Tensor], target: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of a block, times ``grad``, which broadcasts to its shape; as :meth:`block_loss`."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = self.expression(leaf, target)
            return torch.autograd.grad(loss, leaf, grad.expand_as(loss))[0]

    def loss(self, x: Tensor, target: Tensor, sum_classes: bool) -> Tensor:
        """Return the loss of (outer, K, inner) logits, (outer, 1, inner) if the classes are summed over."""
        out = x.new_zeros((x.shape[0], 1 if sum_classes else x.shape[1], x.shape[2]), dtype=float_dtype(x))
        return self._fill(out, x, target, False)

    def gradient(self, x: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient times the (outer, K or 1, inner) ``grad``, rounded to the dtype of ``x`` at the end."""
        return self._fill(torch.empty_like(x), x, target, True, grad)

    def differentiable_loss(self, x: Tensor, target: Tensor, sum_classes: bool) -> Tensor:
        """Return what :meth:`loss` does, with a graph and not block by block."""
        loss = self.expression(x.to(float_dtype(x)), target)
        return loss.sum(dim=1, keepdim=True) if sum_classes else loss

    def _fill(self, out: Tensor, x: Tensor, target: Tensor, for_gradient: bool, *grad: Tensor) -> Tensor:
        """Write the gradient or the loss of each block into ``out``, summed over the classes if it has but one."""
        if x.numel() == 0:
            return out
        evaluate = self.block_gradient if for_gradient else self.block_loss
        parts = (*self.prepare(x, target, for_gradient), *grad)

        def work(block: tuple[slice, ...], logits: Tensor, buffers: list[Tensor]) -> None:
            result = evaluate(logits, buffers, *(part[block] for part in parts))
            if out.shape[1] < result.shape[1]:
                result = result.sum(dim=1, keepdim=True)
            if self.has_labels:
                ignored = target[block] == IGNORE
                # Most blocks have nothing to clear. A CPU may look; a GPU would have to be waited for.
                if ignored.device.type != "cpu" or ignored.any():
                    result.masked_fill_(ignored, 0.0)  # not by a product, which would leave a NaN a NaN
            out[block] = result

        _for_each_block(x, work)
        return out


class _Blockwise(torch.autograd.Function):
    """Keeps logits and targets only; the gradient is computed from them, so a second backward gives the same."""

    @staticmethod
    def forward(x, target, criterion, sum_classes):
        return criterion.loss(x, target, sum_classes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.criterion, ctx.sum_classes = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx, grad):
        x, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in its turn
            loss = ctx.criterion.differentiable_loss(x, target, ctx.sum_classes)
            gradient = torch.autograd.grad(loss, x, grad, create_graph=True)[0]
        else:
            gradient = ctx.criterion.gradient(x, target, grad)
        return gradient, None, None, None


class Layout:
    """How logits lie in memory, and the way to (outer, K, inner) and back, for labels with a class dimension of 1.

    If they are not one dense piece of memory, the layout is that of their contiguous copy.
    """

    def __init__(self, x: Tensor, class_dim: int):
        order = []  # the dimensions as they lie in memory
        for dim in range(x.dim()):
            # A sort by comparisons: torch.compile cannot follow sorted() where the sizes are symbols.
            place = len(order)
            while place and x.stride(order[place - 1]) < x.stride(dim):
                place -= 1
            order.insert(place, dim)
        self.order = order if x.permute(order).is_contiguous() else list(range(x.dim()))
        self.sizes, self.class_dim = x.shape, class_dim % x.dim()

    def flat(self, x: Tensor) -> Tensor:
        """Return a tensor of the logits' shape as (outer, K, inner): a view if it lies as they do."""
        x, place = x.permute(self.order), self.order.index(self.class_dim)
        return x.reshape(math.prod(x.shape[:place]), x.shape[place], math.prod(x.shape[place + 1 :]))

    def unflat(self, flat: Tensor) -> Tensor:
        """Return (outer, K, inner) in the logits' shape."""
        sizes = [flat.shape[1] if dim == self.class_dim else self.sizes[dim] for dim in self.order]
        return flat.view(sizes).permute([self.order.index(dim) for dim in range(len(sizes))])


# More threads than this would wait for each other in Python; fewer blocks for each than this do not pay for a thread.
_MOST_THREADS, _BLOCKS_PER_THREAD = 8, 4


def _for_each_block(x: Tensor, work: Callable[[tuple[slice, ...], Tensor, list[Tensor]], None]) -> None:
    """Call ``work`` with each block's place, its logits in float and two buffers of its shape, to overwrite all three.

    On a CPU from several threads; which of them does a block changes no number, since blocks have nothing in common.
    A profiler or dispatch mode hears its own thread only: ``torch.set_num_threads(1)`` lets it hear everything.
    """
    outer, num_classes, inner = x.shape
    size = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_DEVICE
    width = min(inner, max(size // num_classes, 1))
    height = min(outer, max(size // (num_classes * width), 1))
    starts = [(o, i) for o in range(0, outer, height) for i in range(0, inner, width)]
    blocks = [(slice(o, o + height), slice(None), slice(i, i + width)) for o, i in starts]
    remaining, inference = iter(blocks), torch.is_inference_mode_enabled()

    def run() -> None:
        # Threads start with gradients on and inference mode off.
        with torch.inference_mode(inference), torch.no_grad():
            scratch, buffers = x.new_empty((3, height * num_classes * width), dtype=float_dtype(x)), None
            for block in remaining:
                logits = x[block]
                if buffers is None or buffers[0].shape != logits.shape:
                    buffers = [b[: logits.numel()].view(logits.shape) for b in scratch]
                # The only time that the logits themselves are read.
                work(block, buffers[0].copy_(logits), buffers[1:])

    num_threads = min(torch.get_num_threads(), _MOST_THREADS, len(blocks) // _BLOCKS_PER_THREAD)
    if x.device.type != "cpu" or num_threads < 2:
        run()
    else:
        _run_in_threads(run, num_threads)


def _run_in_threads(run: Callable[[], None], num_threads: int) -> None:
    """Call ``run`` in each of so many threads, in which torch does not split operations among threads of its own.

    It would make them meet after each of thousands of small operations, and wait milliseconds there as soon as anything
    else is busy on one of the cores: 30 seconds for what takes 0.2.
    """
    before, ready = torch.get_num_threads(), Barrier(num_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # or a thread's first operation takes the default of that moment
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(num_threads, initializer=start) as pool:
        try:
            results = [pool.submit(run) for _ in range(num_threads)]
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        finally:
            # The setting is each thread's own, but also the default of threads to come: that for this moment only.
            torch.set_num_threads(before)
        for result in results:
            result.result()
