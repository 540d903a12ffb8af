"""Losses evaluated block by block: what they need beside logits and gradient fits into the cache.

The logits of a detector are the largest tensor of its loss by far, and an elementwise formula of ten operations on
them moves them, or a copy, twenty times through memory. Here they are gone through in blocks that stay in cache
until the block is done: the logits are read once for the loss, read once more for the gradient, which is written once.
Nothing but the logits is kept between the two passes.

Shapes: logits are seen as (outer, K, inner), in the order in which they lie in memory: K classes, whatever varies
slower than the class in ``outer`` and faster in ``inner``. That is a view both of what a convolution writes
(N, A * K, H, W: outer = N * A, inner = H * W) and of its channels_last form (outer = N * H * W * A, inner = 1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .alpha import float_dtype

# Entries of a block: on a CPU three float32 buffers of this size fit into a second-level cache of 1 MiB, on a GPU the
# size only bounds the memory.
_BLOCK, _BLOCK_ON_DEVICE = 2**16, 2**24
# More threads than this would wait for each other in Python; fewer blocks for each than this do not pay for a thread.
_MOST_THREADS, _BLOCKS_PER_THREAD = 8, 4

IGNORE = -1
"""Label of an example that takes no part in the loss."""


class Layout(NamedTuple):
    """How logits lie in memory, and the way to (outer, K, inner) and back."""

    sizes: tuple[int, ...]
    class_dim: int
    order: tuple[int, ...]
    """The dimensions in the order in which they lie in memory."""

    @classmethod
    def of(cls, x: Tensor, class_dim: int) -> "Layout":
        """That of ``x``, or, if ``x`` is not one dense piece of memory, of its contiguous copy."""
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(outer, K, inner)."""
        sizes, place = [self.sizes[d] for d in self.order], self.order.index(self.class_dim)
        return math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])

    def flat(self, x: Tensor) -> Tensor:
        """(outer, K, inner) of the logits, or of something of their shape: a view if it lies as they do."""
        return x.permute(self.order).reshape(self.shape)

    def flat_rows(self, rows: Tensor) -> Tensor:
        """(outer, 1, inner) of labels, or of anything that has the logits' shape without the class."""
        outer, _, inner = self.shape
        return rows.unsqueeze(self.class_dim).permute(self.order).reshape(outer, 1, inner)

    def unflat(self, flat: Tensor) -> Tensor:
        """The logits' shape of (outer, K, inner)."""
        return flat.view([self.sizes[d] for d in self.order]).permute(self._back())

    def unflat_rows(self, rows: Tensor) -> Tensor:
        """The labels' shape of (outer, 1, inner)."""
        sizes = [1 if d == self.class_dim else self.sizes[d] for d in self.order]
        return rows.view(sizes).permute(self._back()).squeeze(self.class_dim)

    def _back(self) -> list[int]:
        return [self.order.index(d) for d in range(len(self.order))]


class BlockedLoss(ABC):
    """A loss of (outer, K, inner) logits and their targets, in terms of one block of them.

    Targets are (outer, K, inner) or, one for each row of K logits, (outer, 1, inner); so is the loss. A subclass gives
    the differentiable form, and the loss and the gradient of a block in its own way where speed counts.
    """

    per_entry = True
    """Whether the loss has an entry for each logit or one for each row."""

    @abstractmethod
    def formula(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of float32 or float64 logits, from differentiable operations only."""

    def prepare(self, x: Tensor, target: Tensor, for_gradient: bool) -> tuple[Tensor, ...]:
        """What each block is to be given its part of: the target, or what can be made of it for all blocks at once."""
        return (target,)

    def block_loss(self, x: Tensor, targets: tuple[Tensor, ...], buffers: list[Tensor]) -> Tensor:
        """The loss of a block, which is free to overwrite ``x`` and the two ``buffers`` of its shape."""
        return self.formula(x, *targets)

    def block_rows(self, x: Tensor, targets: tuple[Tensor, ...], buffers: list[Tensor], out: Tensor) -> None:
        """Writes the loss of a block, summed over the classes, to ``out``; else as :meth:`block_loss`."""
        torch.sum(self.block_loss(x, targets, buffers), dim=1, keepdim=True, out=out)

    def block_gradient(
        self, x: Tensor, targets: tuple[Tensor, ...], grad_loss: Optional[Tensor], buffers: list[Tensor]
    ) -> Tensor:
        """The gradient of a block for the ``grad_loss`` of its loss's shape; else as :meth:`block_loss`."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.formula(leaf, *targets), leaf, grad_loss)[0]

    def __call__(self, x: Tensor, target: Tensor, reduce: bool) -> Tensor:
        """The loss, or its sum if ``reduce``, in float32 (float64 for float64)."""
        if reduce:
            return self.sum_and_rows(x, target)[0]
        # One fused kernel is what a compiler makes of the formula; a loop over blocks it would only unroll.
        return self.formula(upcast(x), target) if torch.compiler.is_compiling() else _Blocked.apply(x, target, self)

    def sum_and_rows(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the loss and, without a gradient, the :meth:`rows` that it is the sum of."""
        if torch.compiler.is_compiling():
            loss = self.formula(upcast(x), target)
            return loss.sum(), loss.detach().sum(dim=1, keepdim=True)
        return _BlockedSum.apply(x, target, self)

    @torch.no_grad()
    def losses(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of each entry or row."""
        out = x.new_zeros(_loss_shape(self, x), dtype=float_dtype(x))
        targets = self.prepare(x, target, for_gradient=False) if x.numel() else ()

        def work(block, values, buffers):
            out[block] = self.block_loss(values, [t[block] for t in targets], buffers)

        _for_each_block(x, work)
        return out

    @torch.no_grad()
    def rows(self, x: Tensor, target: Tensor) -> Tensor:
        """(outer, 1, inner) sums of the loss over the classes, all that a sum or a ranking needs of it."""
        if not self.per_entry:
            return self.losses(x, target)
        out = x.new_zeros((x.shape[0], 1, x.shape[2]), dtype=float_dtype(x))
        targets = self.prepare(x, target, for_gradient=False) if x.numel() else ()

        def work(block, values, buffers):
            self.block_rows(values, [t[block] for t in targets], buffers, out[block])

        _for_each_block(x, work)
        return out

    def gradient(self, x: Tensor, target: Tensor, grad_loss: Optional[Tensor]) -> Tensor:
        """The gradient for a ``grad_loss`` that broadcasts to the loss; rounded to x's dtype when it is complete.

        A subclass may call this with None, for a factor of 1 that its :meth:`block_gradient` knows of.
        """
        out = torch.empty_like(x)
        grad_loss = None if grad_loss is None else grad_loss.expand(_loss_shape(self, x))
        targets = self.prepare(x, target, for_gradient=True) if x.numel() else ()

        def work(block, values, buffers):
            grad = None if grad_loss is None else grad_loss[block]
            out[block] = self.block_gradient(values, [t[block] for t in targets], grad, buffers)

        _for_each_block(x, work)
        return out


class _Blocked(torch.autograd.Function):
    """Nothing but logits and targets is saved; the gradient is recomputed, so a second backward gives the same."""

    @staticmethod
    def forward(x, target, loss):
        return loss.losses(x, target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.loss = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx, grad_output):
        x, target = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return ctx.loss.gradient(x, target, grad_output), None, None
        # create_graph=True: the gradient is to be differentiated in its turn.
        value = ctx.loss.formula(upcast(x), target)
        value = value.sum() if grad_output.dim() == 0 else value
        return torch.autograd.grad(value, x, grad_output, create_graph=True)[0], None, None


class _BlockedSum(_Blocked):
    """The sum, and what it is the sum of."""

    @staticmethod
    def forward(x, target, loss):
        # Two stages, so that the sum does not depend on which thread or GPU block comes first.
        rows = loss.rows(x, target)
        return rows.sum(), rows

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Blocked.setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        # Or zeros of the shape of the rows would be made for what has no gradient.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_sum, _):
        return (None, None, None) if grad_sum is None else _Blocked.backward(ctx, grad_sum)


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 are computed in float32; float32 and float64 in themselves."""
    return x.to(float_dtype(x))


def _loss_shape(loss: BlockedLoss, x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1] if loss.per_entry else 1, x.shape[2]


Block = tuple[slice, slice, slice]


def _for_each_block(x: Tensor, work: Callable[[Block, Tensor, list[Tensor]], None]) -> None:
    """Calls ``work`` with each block's place, its logits in float and two buffers of its shape, to overwrite all three.

    On a CPU from several threads; which of them does a block changes no number, since blocks have nothing in common.
    """
    outer, num_classes, inner = x.shape
    if x.numel() == 0:
        return
    size = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_DEVICE
    width = min(inner, max(size // num_classes, 1))
    height = min(outer, max(size // (num_classes * width), 1))
    starts = [(o, i) for o in range(0, outer, height) for i in range(0, inner, width)]
    remaining, inference = iter(starts), torch.is_inference_mode_enabled()

    def run():
        # Threads start with gradients on and inference mode off.
        with torch.inference_mode(inference), torch.no_grad():
            scratch, buffers = x.new_empty((3, height * num_classes * width), dtype=float_dtype(x)), None
            for o, i in remaining:
                block = (slice(o, o + height), slice(None), slice(i, i + width))
                logits = x[block]
                if buffers is None or buffers[0].shape != logits.shape:
                    buffers = [b[: logits.numel()].view(logits.shape) for b in scratch]
                # The only time that the logits themselves are read.
                work(block, buffers[0].copy_(logits), buffers[1:])

    num_threads = min(torch.get_num_threads(), _MOST_THREADS, len(starts) // _BLOCKS_PER_THREAD)
    if x.device.type != "cpu" or num_threads < 2 or _is_watched():
        run()
    else:
        _run_in_threads(run, num_threads)


def _run_in_threads(run: Callable[[], None], num_threads: int) -> None:
    """Calls ``run`` in each of so many threads, in which torch does not split operations among threads of its own.

    It would make them meet after each of thousands of small operations, and wait milliseconds there as soon as anything
    else is busy on one of the cores: 30 seconds for what takes 0.2.
    """
    before, ready = torch.get_num_threads(), Barrier(num_threads + 1)

    def start():
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


def _is_watched() -> bool:
    """Whether a profiler or dispatch mode listens, which would not hear what other threads do."""
    return torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0
