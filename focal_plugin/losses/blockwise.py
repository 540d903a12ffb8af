"""Evaluate a loss block by block: what it needs beside logits and gradient fits into the cache.

The logits of a detector are by far the largest tensor of its loss, and an elementwise formula of ten operations moves
them, or a copy, twenty times through memory. Here a block of them stays in the cache until it is done: the logits are
read once for the loss and once more for the gradient, which is written once. Only the logits and the targets are kept
between the two passes.

Shapes: logits are seen as (outer, K, inner), in the order in which they lie in memory: K classes, whatever varies
slower than the class in ``outer`` and faster in ``inner``. That is a view both of what a convolution writes
(N, A * K, H, W: outer = N * A, inner = H * W) and of its channels_last form (outer = N * H * W * A, inner = 1). Labels
and everything else that each anchor (each set of K logits) has one of are (outer, 1, inner).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .args import IGNORE, float_dtype

# Logits in a block: on a CPU three float32 buffers of this size fit into a second-level cache of 1 MiB, on a GPU the
# size only bounds the memory.
_BLOCK, _BLOCK_ON_DEVICE = 2**16, 2**24

Block = tuple[slice, slice, slice]


class BlockwiseLoss(ABC):
    """A loss of logits and their targets, which are integer labels or dense.

    A subclass gives the loss as one differentiable :meth:`expression`. Where speed counts it also gives the loss and
    the gradient of a block in closed form. Labels that are -1 are handled here: loss and gradient are 0.
    """

    has_labels = True
    """Whether targets are labels, of which some may be ignored, or dense."""

    def __call__(self, inputs: Tensor, targets: Tensor, class_dim: int = -1, sum_classes: bool = True) -> Tensor:
        """Return the loss of each anchor or of each logit, in float32 (float64 for float64).

        Args:
            inputs: logits of any shape with K classes along ``class_dim``, in any memory layout.
            targets: labels of that shape without ``class_dim``, known to be in range, or dense targets of that shape.
            class_dim: the dimension of ``inputs`` that runs over classes.
            sum_classes: sum over the classes, to the shape of the labels; else the shape of ``inputs`` is kept.
        """
        layout = Layout.of(inputs, class_dim)
        x = layout.flat(inputs)
        if self.has_labels:
            target = small_labels(layout.flat(targets.unsqueeze(class_dim)), x.shape[1])
        else:
            target = layout.flat(targets.detach())
        if torch.compiler.is_compiling():
            # A compiler fuses the expression by itself, and would only unroll a loop over blocks.
            loss = self.expression(upcast(x), target)
            loss = loss.sum(dim=1, keepdim=True) if sum_classes else loss
        else:
            loss = _Blockwise.apply(x, target, self, sum_classes)
        loss = layout.unflat(loss)
        return loss.squeeze(class_dim) if sum_classes else loss

    # ------------------------------ what a subclass gives

    @abstractmethod
    def expression(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of (outer, K, inner) float32 or float64 logits, from differentiable operations only.

        It is (outer, K, inner), or (outer, 1, inner) for a loss that cannot be told apart by class.
        """

    def prepare(self, x: Tensor, target: Tensor, for_gradient: bool) -> tuple[Tensor, ...]:
        """Return tensors of which each block is given its part: the target, or what is made of it once for all."""
        return (target,)

    def block_loss(self, x: Tensor, parts: list[Tensor], buffers: list[Tensor]) -> Tensor:
        """Return the loss of a block; free to overwrite ``x`` and the two ``buffers`` of its shape."""
        return self.expression(x, *parts)

    def block_gradient(self, x: Tensor, parts: list[Tensor], grad: Optional[Tensor], buffers: list[Tensor]) -> Tensor:
        """Return the gradient of a block, times ``grad``, which broadcasts to its shape; as :meth:`block_loss`."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = self.expression(leaf, *parts)
            return torch.autograd.grad(loss, leaf, grad.expand_as(loss))[0]

    # ------------------------------ the two passes

    @torch.no_grad()
    def loss(self, x: Tensor, target: Tensor, sum_classes: bool) -> Tensor:
        """Return the loss of (outer, K, inner) logits, (outer, 1, inner) if the classes are summed over."""
        out = x.new_zeros((x.shape[0], 1 if sum_classes else x.shape[1], x.shape[2]), dtype=float_dtype(x))
        parts = self.prepare(x, target, for_gradient=False) if x.numel() else ()

        def work(block: Block, logits: Tensor, buffers: list[Tensor]) -> None:
            loss = self.block_loss(logits, [part[block] for part in parts], buffers)
            if sum_classes:
                torch.sum(loss, dim=1, keepdim=True, out=out[block])
            else:
                out[block] = loss
            self._clear_ignored(out[block], target[block])

        _for_each_block(x, work)
        return out

    def gradient(self, x: Tensor, target: Tensor, grad: Optional[Tensor]) -> Tensor:
        """Return the gradient times ``grad``, rounded to the dtype of ``x`` when it is complete.

        ``grad`` is (outer, K or 1, inner). None means 1, for a :meth:`block_gradient` that knows it.
        """
        out = torch.empty_like(x)
        parts = self.prepare(x, target, for_gradient=True) if x.numel() else ()

        def work(block: Block, logits: Tensor, buffers: list[Tensor]) -> None:
            part_of_grad = None if grad is None else grad[block]
            gradient = self.block_gradient(logits, [part[block] for part in parts], part_of_grad, buffers)
            self._clear_ignored(gradient, target[block])
            out[block] = gradient

        _for_each_block(x, work)
        return out

    def _clear_ignored(self, out: Tensor, target: Tensor) -> None:
        """Set what is ignored to 0; not by a product, which would leave a NaN a NaN."""
        if self.has_labels:
            ignored = target == IGNORE
            # Most blocks have nothing to clear. A CPU may look; a GPU would have to be waited for.
            if ignored.device.type != "cpu" or ignored.any():
                out.masked_fill_(ignored, 0.0)


class _Blockwise(torch.autograd.Function):
    """Keeps logits and targets only; the gradient is computed from them, so a second backward gives the same."""

    @staticmethod
    def forward(x, target, loss, sum_classes):
        return loss.loss(x, target, sum_classes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.loss, ctx.sum_classes = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx, grad):
        x, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in its turn
            loss = ctx.loss.expression(upcast(x), target)
            loss = loss.sum(dim=1, keepdim=True) if ctx.sum_classes else loss
            gradient = torch.autograd.grad(loss, x, grad, create_graph=True)[0]
        else:
            gradient = ctx.loss.gradient(x, target, grad)
        return gradient, None, None, None


def repeated_number(grad: Tensor) -> Optional[Tensor]:
    """Return the one number that an expanded tensor repeats, as the gradient of a sum does, or None. Reads no value."""
    is_repeated = grad.numel() > 0 and all(n == 1 or stride == 0 for n, stride in zip(grad.shape, grad.stride()))
    return grad[(0,) * grad.dim()] if is_repeated else None


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in what a loss of it is computed in."""
    return x.to(float_dtype(x))


def small_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return the labels in the smallest type that holds -1 to K: they are read again in each pass."""
    dtype = torch.int8 if num_classes < 2**7 else torch.int16 if num_classes < 2**15 else torch.int32
    return labels.to(dtype)


class Layout(NamedTuple):
    """How logits lie in memory, and the way to (outer, K, inner) and back.

    What each anchor has one of, as its label, goes the same way with a class dimension of size 1.
    """

    sizes: tuple[int, ...]
    class_dim: int
    order: tuple[int, ...]
    """The dimensions in the order in which they lie in memory."""

    @classmethod
    def of(cls, x: Tensor, class_dim: int) -> "Layout":
        """Return that of ``x``, or, if ``x`` is not one dense piece of memory, of its contiguous copy."""
        order = []
        for dim in range(x.dim()):
            # A sort by comparisons: torch.compile cannot follow sorted() where the sizes are symbols.
            place = len(order)
            while place and x.stride(order[place - 1]) < x.stride(dim):
                place -= 1
            order.insert(place, dim)
        if not x.permute(order).is_contiguous():
            order = range(x.dim())
        return cls(tuple(x.shape), class_dim % x.dim(), tuple(order))

    def flat(self, x: Tensor) -> Tensor:
        """Return a tensor of the logits' shape as (outer, K, inner): a view if it lies as they do."""
        x, place = x.permute(self.order), self.order.index(self.class_dim)
        return x.reshape(math.prod(x.shape[:place]), x.shape[place], math.prod(x.shape[place + 1 :]))

    def unflat(self, flat: Tensor) -> Tensor:
        """Return (outer, K, inner) in the logits' shape."""
        sizes = [flat.shape[1] if dim == self.class_dim else self.sizes[dim] for dim in self.order]
        return flat.view(sizes).permute([self.order.index(dim) for dim in range(len(sizes))])


# ------------------------------ blocks and threads


# More threads than this would wait for each other in Python; fewer blocks for each than this do not pay for a thread.
_MOST_THREADS, _BLOCKS_PER_THREAD = 8, 4


def _for_each_block(x: Tensor, work: Callable[[Block, Tensor, list[Tensor]], None]) -> None:
    """Call ``work`` with each block's place, its logits in float and two buffers of its shape, to overwrite all three.

    On a CPU from several threads; which of them does a block changes no number, since blocks have nothing in common.
    A profiler or dispatch mode hears its own thread only: ``torch.set_num_threads(1)`` lets it hear everything.
    """
    if x.numel() == 0:
        return
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
