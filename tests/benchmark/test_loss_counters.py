import pytest
import torch
from fvcore.nn import sigmoid_focal_loss, sigmoid_focal_loss_jit

from benchmark.loss_counters import (
    TrafficCounter,
    cache_size,
    compile_and_count,
    count_traffic,
    kernel_bytes,
    peak_bytes,
)

N = 1024
CPU = torch.device("cpu")


def bytes_moved(function):
    with TrafficCounter() as counter:
        result = function()  # noqa: F841 - freed after the count
    return counter.traffic.total


def floats(*shape):
    return torch.randn(*(shape or (N,)))


def test_forward_and_backward_of_a_small_graph():
    x = floats().requires_grad_()

    def step():
        y = x.exp()
        y.sum().backward()
        return [x.grad]

    # exp: read, write; sum: read, write 4; the backward: fill 4; multiply by the expanded 4, read y, write.
    assert count_traffic(step).total == (4 * N + 4 * N) + (4 * N + 4) + 4 + (4 + 4 * N + 4 * N)


@pytest.mark.parametrize(
    ("operation", "per_entry"),
    [
        (lambda x, y: x + y, 12),
        (lambda x, y: x * x, 8),
        (lambda x, y: x * 2.0, 8),
        (lambda x, y: x.mul_(y), 12),
        (lambda x, y: x.neg_(), 8),
        (lambda x, y: x.copy_(y), 8),
        (lambda x, y: x.zero_(), 4),
        (lambda x, y: torch.exp(x, out=y), 8),
        (lambda x, y: torch.mul(x, y, out=y), 12),
        (lambda x, y: x.to(torch.float16), 6),
        (lambda x, y: x > 0, 5),
        (lambda x, y: torch.where(x > 0, x, y), 5 + 1 + 12),
        (lambda x, y: torch.empty_like(x), 0),
        (lambda x, y: torch.zeros_like(x), 4),
        (lambda x, y: x.new_zeros(N), 4),
        (lambda x, y: torch.ones(N), 4),
        (lambda x, y: torch.cat([x, y]), 16),
        (lambda x, y: torch.addcmul(x, x, y, out=y), 12),
        (lambda x, y: torch._foreach_add([x], [y]), 12),
    ],
)
def test_operations(operation, per_entry):
    x, y = floats(), floats()
    assert bytes_moved(lambda: operation(x, y)) == per_entry * N


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(4, -1).t()[1:],
        lambda x: x.detach(),
        lambda x: x.expand(8, N),
        lambda x: x.split(100),
        lambda x: x.reshape(2, 2, -1).permute(2, 0, 1),
        lambda x: x.to(torch.float32),
    ],
)
def test_views_cost_nothing(view):
    x = floats()
    assert bytes_moved(lambda: view(x)) == 0


def test_only_distinct_entries_count():
    x, one = floats(), torch.ones(1)
    assert bytes_moved(lambda: x + one.expand(N)) == 8 * N + 4
    assert bytes_moved(lambda: x[::2] * 1.0) == 4 * N


def test_indexing_counts_the_entries_it_touches():
    x, index, rows = floats(N, 8), torch.zeros(N, 1, dtype=torch.long), torch.arange(10)
    values, column = floats(10, 8), floats(N, 1)
    assert bytes_moved(lambda: x.gather(1, index)) == (4 + 8 + 4) * N
    assert bytes_moved(lambda: x[rows]) == 80 + 2 * 320
    assert bytes_moved(lambda: x.index_select(0, rows)) == 80 + 2 * 320
    assert bytes_moved(lambda: x.scatter_(1, index, 1.0)) == (8 + 4) * N
    assert bytes_moved(lambda: x.scatter_add_(1, index, column)) == (8 + 4 + 8) * N
    assert bytes_moved(lambda: x.index_put_((rows,), values)) == 80 + 2 * 320
    assert bytes_moved(lambda: x.index_put_((rows,), values, accumulate=True)) == 80 + 3 * 320
    assert bytes_moved(lambda: x.index_add_(0, rows, values)) == 80 + 3 * 320
    mask = torch.zeros(N, dtype=torch.bool)
    mask[:10] = True
    assert bytes_moved(lambda: x[mask]) == N + 2 * 320


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_backward_of_a_python_function_is_seen():
    x = floats().requires_grad_()
    # Forward 8; sum 4; the backward reads an expanded number and writes 4.
    assert bytes_moved(lambda: Doubled.apply(x).sum().backward()) == 16 * N + 12


def test_torchscript_is_seen():
    x, target = floats().requires_grad_(), torch.zeros(N)
    for _ in range(3):
        sigmoid_focal_loss_jit(x, target, 0.25, 2.0, "sum").backward()
    eager = bytes_moved(lambda: sigmoid_focal_loss(x, target, 0.25, 2.0, "sum").backward())
    scripted = bytes_moved(lambda: sigmoid_focal_loss_jit(x, target, 0.25, 2.0, "sum").backward())
    assert eager <= scripted < 1.3 * eager
    assert eager > 300 * N


def test_by_op_adds_up():
    x = floats()
    with TrafficCounter() as counter:
        (x + x).exp_()
    assert counter.by_op == {"add": 8 * N, "exp_": 8 * N}


def blocked_double(x, block):
    """2 x, block by block in a scratch buffer, which is used three times."""
    out, scratch = torch.empty_like(x), x.new_empty(block)
    for start in range(0, len(x), block):
        scratch.copy_(x[start : start + block])
        scratch.mul_(2)
        out[start : start + block] = scratch
    return out


def test_small_scratch_counts_as_cache():
    x = floats()
    traffic = count_traffic(lambda: [blocked_double(x, N // 8)], cache_size=N)
    assert traffic == (8 * N, 16 * N)
    assert traffic.total == count_traffic(lambda: [blocked_double(x, N // 8)]).total
    # Scratch that does not fit is memory.
    assert count_traffic(lambda: [blocked_double(x, N // 2)], cache_size=N) == (24 * N, 0)


def test_without_a_cache_everything_is_memory():
    x = floats()
    assert count_traffic(lambda: [torch.empty(0), x * 2, torch.exp(x, out=torch.empty(0))]).cache == 0


def test_inputs_and_results_are_memory_however_small():
    x = floats()
    assert count_traffic(lambda: [x * 2], cache_size=2**20) == (8 * N, 0)
    assert count_traffic(lambda: [(x * 2).exp()], cache_size=2**20) == (8 * N, 8 * N)
    x.requires_grad_()

    def step():
        x.square().sum().backward()
        return [x.grad]

    traffic = count_traffic(step, cache_size=2**20)
    assert traffic.memory >= 4 * N + 4 * N + 4 * N  # x for its square, x for the gradient, and that
    assert traffic.cache > 0


def test_freed_scratch_stays_counted():
    x = floats()
    for _ in range(3):  # the allocator hands out the same addresses again and again
        traffic = count_traffic(lambda: [sum(x * i for i in range(5))], cache_size=2**20)
        assert traffic.total == count_traffic(lambda: [sum(x * i for i in range(5))]).total
        assert traffic.memory == 5 * 4 * N + 4 * N


def test_peak_of_known_allocations():
    existing = torch.empty(10_000)

    def step():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        c = torch.empty(2000)  # here b and c: 5000
        del b
        d = torch.empty(500)
        return existing, c, d

    assert peak_bytes(step, CPU) == 4 * 5000
    assert peak_bytes(lambda: torch.empty(7), CPU) == 28
    assert peak_bytes(lambda: existing.view(100, 100), CPU) == 0


def test_peak_contains_gradients_and_saved_tensors():
    x = torch.randn(100_000, requires_grad=True)
    # The result of exp is saved for the backward pass; it and the gradient are there at once.
    assert peak_bytes(lambda: x.exp().sum().backward(), CPU) == pytest.approx(2 * 400_000, abs=64)


def test_kernel_bytes():
    assert kernel_bytes(4, 80, 1) == (4 + 5 / 80, 8 + 1 / 80)
    assert sum(kernel_bytes(2, 1, 8)) == (2 + 8 + 4) + (4 + 8)


def test_cache_size():
    assert cache_size(CPU) >= 2**16 * torch.get_num_threads()
    assert cache_size(torch.device("cuda")) == 0


def test_compiled_function_and_what_it_moves():
    x = torch.randn(4096, requires_grad=True)
    result = compile_and_count(lambda x: x.exp().sum(), lambda f: f(x).backward())
    if "Compiler" in result.error:
        pytest.skip(result.error)
    assert result.error == ""
    assert result.start_up > 0
    # 4 to read x for the sum, 8 for the gradient: its own exp of x, or one that the forward pass saved (4 more).
    assert 12 * 4096 <= result.num_bytes < 17 * 4096
    x.grad = None
    result.function(x).backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_what_cannot_be_compiled_says_why():
    def broken(x):
        raise ValueError("no such thing")

    result = compile_and_count(broken, lambda f: f(torch.ones(2)))
    assert result.function is None
    assert result.num_bytes is None
    assert result.error
    assert "\n" not in result.error
