"""What a piece of PyTorch code moves and holds: bytes through memory, bytes at the peak.

Counted, not estimated: traffic by watching every ATen operation, the peak from the allocator's own record. What the
operations do not show is computed (:func:`kernel_bytes`) or asked of the compiler (:func:`compile_and_count`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations by how they depart from "reads its inputs, writes its outputs, reads and writes what it changes".
_TOUCH_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
_TOUCH_NOTHING |= {"resize_", "set_", "is_same_size"}
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
_GATHER = {"gather", "index", "index_select", "take", "embedding", "masked_select"}
_SCATTER = {"scatter_", "scatter_add_", "scatter_reduce_", "index_put_", "_index_put_impl_"}
_SCATTER |= {"index_copy_", "index_add_", "index_fill_"}


class Traffic(NamedTuple):
    """Bytes moved.

    Attributes:
        memory: to and from tensors that were there before, that stay, or that are too large for the cache.
        cache: to and from small tensors made and dropped on the way: scratch that need not leave the cache.
    """

    memory: int
    cache: int

    @property
    def total(self) -> int:
        return self.memory + self.cache


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes that each ATen operation run under it reads and writes, those of a backward pass too.

    An operation reads its tensor inputs, each once, and writes its outputs; what it changes in place it reads and
    writes, what it is given as ``out=`` it writes. Views cost nothing, nor does memory that is only allocated; an
    expanded dimension counts once. Indexing counts the entries it touches. That is exact for operations that stream
    through their tensors, which an elementwise loss is made of; caches between two operations, and what an operation
    allocates for itself, are not seen, and neither is a kernel that is no ATen operation.

    Attributes:
        by_op: bytes of each operation, of ``memory`` and ``cache`` together.
    """

    def __init__(self, cache_size: int = 0):
        """
        Args:
            cache_size: bytes. Storages up to this size that are made under the counter count as ``cache``; 0: none.
        """
        super().__init__()
        self.by_op: Counter[str] = Counter()
        self._cache_size = cache_size
        self._memory = self._cache = 0
        # Bytes moved to and from each small storage made here, which `keep` can still turn into memory.
        self._small: dict[int, int] = {}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Counts these as memory whatever their size: they are results, which outlive the code that is measured."""
        for tensor in tensors:
            self._memory += self._small.pop(_storage(tensor), 0)

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._memory, self._cache + sum(self._small.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(func._schema, args, kwargs, out)
        return out

    def _count(self, schema, args, kwargs, out) -> None:
        name = schema.name.partition("::")[2]
        reads, writes = _operands(schema, args, kwargs, name)
        known = {_storage(t) for t in [*reads, *writes]}
        outputs = _tensors(out)
        made = [t for t in outputs if _storage(t) not in known]
        for tensor in made:
            self._register(tensor)
        is_view = bool(outputs) and not made and not writes
        if is_view or name in _TOUCH_NOTHING:
            return
        if name in _SCATTER:
            self._count_scatter(name, args)
            return
        if name.startswith("new_") or name.endswith("_like"):
            reads = []  # they lend shape and dtype
        elif name in _GATHER:
            source, *reads = reads
            self._move(name, source, sum(t.numel() for t in [*made, *writes]) * source.element_size())
        for tensor in {_extent(t): t for t in reads}.values():
            self._move(name, tensor, _num_bytes(tensor))
        for tensor in [*writes, *made]:
            self._move(name, tensor, _num_bytes(tensor))

    def _count_scatter(self, name: str, args) -> None:
        """An in-place operation that touches only the entries an index names; it reads them only to add to them."""
        target, *rest = args
        if name.startswith(("index_put", "_index_put")):
            indices, values = rest[0], rest[1]
            adds = len(rest) > 2 and rest[2]
            touched = torch.ops.aten.index.Tensor(target, indices).numel()
            others = [*_tensors(indices), values]
        else:
            others = _tensors(rest)
            adds = name in ("scatter_add_", "scatter_reduce_", "index_add_")
            index = others[0]
            row = 1 if name.startswith("scatter") else target.select(rest[0], 0).numel()
            touched = index.numel() * row
        for tensor in others:
            self._move(name, tensor, _num_bytes(tensor))
        self._move(name, target, touched * target.element_size() * (2 if adds else 1))

    def _register(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        self._cache += self._small.pop(key, 0)  # a freed storage, of which this one has the address
        if 0 < tensor.untyped_storage().nbytes() <= self._cache_size:
            self._small[key] = 0

    def _move(self, name: str, tensor: Tensor, num_bytes: int) -> None:
        self.by_op[name] += num_bytes
        key = _storage(tensor)
        if key in self._small:
            self._small[key] += num_bytes
        else:
            self._memory += num_bytes


def _operands(schema, args, kwargs, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those among its arguments that it writes."""
    reads, writes = [], []
    for i, argument in enumerate(schema.arguments):
        tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        if argument.alias_info is None or not argument.alias_info.is_write:
            reads += tensors
            continue
        writes += tensors
        if not argument.is_out and name not in _OVERWRITE:
            reads += tensors
    return reads, writes


def _tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> tuple:
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _num_bytes(tensor: Tensor) -> int:
    """Those of the distinct entries: an expanded dimension has stride 0 and repeats the same ones."""
    if tensor.numel() == 0:
        return 0
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        entries *= size if stride else 1
    return entries * tensor.element_size()


def count_traffic(step: Callable[[], Iterable[Tensor]], cache_size: int = 0) -> Traffic:
    """Runs ``step`` once, which returns the tensors it leaves behind, and counts what it moves.

    See :class:`TrafficCounter`; ``cache_size`` is in bytes.
    """
    counter = TrafficCounter(cache_size)
    with _one_thread(), counter:
        kept = list(step())
    counter.keep(kept)
    return counter.traffic


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """What listens to operations hears those of its own thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Runs ``step`` once: the most bytes that were allocated at a time beyond those before it, results included.

    Exact: on a GPU from the caching allocator's statistics, on a CPU from every recorded allocation and release.
    It runs in one thread; each further one of our own losses would add its scratch, less than 1 MB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise the profiler prints its stages, and the lack of a GPU, to stderr. Read when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def cache_size(device: torch.device) -> int:
    """Bytes of a core's level-2 cache, in which scratch may stay; 0 on a GPU."""
    if device.type != "cpu":
        return 0
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        number, unit = re.fullmatch(r"(\d+)([KM])", text.strip()).groups()
        return int(number) * {"K": 2**10, "M": 2**20}[unit]
    except (OSError, AttributeError):  # not Linux, or another way of writing it
        return 2**20


class KernelBytes(NamedTuple):
    """Bytes a logit, of the forward and of the backward pass."""

    forward: float
    backward: float


def kernel_bytes(element_size: int, num_classes: int, label_size: int) -> KernelBytes:
    """Computed, not counted: the loads and stores of a fused kernel for integer labels, which no counter can see into.

    Forward: each logit and each row's label read, each row's float32 sum written. Backward: the same read, each
    gradient written.

    Args:
        element_size: bytes of a logit.
        num_classes: K, the logits of a row.
        label_size: bytes of a label.
    """
    label = label_size / num_classes
    return KernelBytes(element_size + label + 4 / num_classes, 2 * element_size + label)


class Compiled(NamedTuple):
    """A compiled function.

    Attributes:
        function: what to call.
        start_up: seconds that the first step took, compiling included.
        num_bytes: that its kernels read and write per step, as Inductor counts them; None if it does not say.
        error: why there is no function; else "".
    """

    function: Callable | None
    start_up: float | None = None
    num_bytes: int | None = None
    error: str = ""


def compile_and_count(function: Callable, first_step: Callable[[Callable], object]) -> Compiled:
    """``torch.compile(function, fullgraph=True, dynamic=False)``, run once by ``first_step``, with nothing cached."""
    try:
        from torch._inductor import metrics
        from torch._inductor.utils import fresh_inductor_cache

        torch._dynamo.reset()
        metrics.reset()
        with tempfile.TemporaryDirectory() as folder, fresh_inductor_cache(dir=folder), _inductor_counts():
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            start = time.perf_counter()
            first_step(compiled)
            start_up = time.perf_counter() - start
    except Exception as error:  # anything: no compiler, a graph break, a platform without Inductor
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Compiled(None, error=f"{type(error).__name__}: {lines[0] if lines else ''}")
    return Compiled(compiled, start_up, metrics.num_bytes_accessed or None)


@contextlib.contextmanager
def _inductor_counts():
    """Newer versions of Inductor count bytes only while they log them: this switches that on, and prints nothing."""
    from torch._inductor import compile_fx

    logger = getattr(compile_fx, "inductor_metrics_log", None)
    if logger is None:
        yield
        return
    before = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]
