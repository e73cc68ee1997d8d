"""How much memory a call takes besides its results; what happens where there is none: MemoryError,
nothing written, and the next call works. And no leaks."""

import contextlib
import gc
import os
import sys
import tracemalloc

import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers import child
from .helpers.arguments import BACKWARD, FORWARD, SEGMENTS, arrays_of, outputs, valid
from .helpers.calls import CALLS, Problem
from .helpers.storage import STORAGE

LIMIT = """
import resource
import numpy as np, fastnorm
from fastnorm import _core

def limited(extra):
    '''Let this process have `extra` bytes more than it has now.'''
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, -1))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

def raises_memory_error(call):
    try:
        call()
    except MemoryError as error:
        return str(error)
    raise AssertionError("no MemoryError")

def is_refused(call, *outputs, room=8 << 20):
    '''Without room it raises and writes nothing; with room it works.'''
    for out in outputs:
        out.fill(7)
    _core.set_pool_limit(0)  # nor any that was freed before
    limited(room)
    message = raises_memory_error(call)
    unlimited()
    assert all((out == 7).all() for out in outputs), "something was written"
    call()
    assert not any((out == 7).all() for out in outputs)
    return message

def fits(call, room=5 << 20):
    '''It needs no more than that; threads have their stacks from the call before.'''
    call()
    _core.set_pool_limit(0)
    limited(room)
    call()
    unlimited()
"""

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="memory is limited by RLIMIT_AS here; the address sanitizer ends a program without any",
)


@on_linux
def test_backward_without_room_for_its_sums():
    message = child.output(
        LIMIT
        + """
n = 1 << 21
row = np.ones(n, np.float32)
x = np.broadcast_to(row, (40, n))
mean = rstd = np.ones(40, np.float32)
def call():
    return fastnorm.layer_norm_backward(x, x, n, mean, rstd, output_mask=(False, True, True))
limited(40 << 20)  # room for dweight and dbias, not for the partial sums in double
message = raises_memory_error(call)
unlimited()
dx, dweight, dbias = call()
assert (dbias == 40).all() and dx is None
print(message)
"""
    )
    assert message.startswith("layer_norm_backward: no memory")


WIDE = """
n = 6 << 20
x = np.ones((2, n), np.float16)
out, total = np.empty_like(x), np.empty_like(x)
rstd = mean = np.ones(2, np.float32)
"""


@on_linux
def test_forward_without_room_for_a_row():
    """A wide row of a half type is converted once a thread; so is one that is gathered."""
    child.output(
        LIMIT
        + WIDE
        + """
for message in (
    is_refused(lambda: fastnorm.layer_norm(x, out=out), out),
    is_refused(lambda: fastnorm.rms_norm(x, out=out, lengths=[n, 5]), out),
    is_refused(lambda: fastnorm.layer_norm(x, out=out, mask=x > 0), out, room=20 << 20),
    is_refused(lambda: fastnorm.add_rms_norm(x, x, out=out, sum_out=total), out, total),
    is_refused(lambda: fastnorm.segment_layer_norm(x.reshape(-1), [0, 2 * n], out=out.reshape(-1)),
               out),
    is_refused(lambda: fastnorm.parallel_layer_norm(x, n, [None, None], out=[out, total]),
               out, total),
    is_refused(lambda: fastnorm.layer_norm(x.reshape(n, 2).T, out=out.reshape(n, 2).T), out),
    is_refused(lambda: fastnorm.moments(x)),
):
    wide = "no memory for a thread's row of {} elements; nothing was written"
    assert message in (wide.format(n), wide.format(2 * n)), message
"""
    )


@on_linux
def test_backward_without_room_for_a_row():
    child.output(
        LIMIT
        + WIDE
        + """
for call in (
    lambda: fastnorm.layer_norm_backward(x, x, n, mean, rstd, output_mask=(True, False, False)),
    lambda: fastnorm.rms_norm_backward(x, x, n, rstd, output_mask=(True, False)),
    lambda: fastnorm.add_rms_norm_backward(x, x, x, n, rstd, output_mask=(True, False)),
    lambda: fastnorm.segment_rms_norm_backward(x, x, [0, 1, 2], rstd, output_mask=(True, False)),
):
    message = is_refused(call, room=x.nbytes + (8 << 20))  # dx, and not two rows of float32
    assert message.startswith("layer_norm_backward: no memory"), message
assert is_refused(lambda: fastnorm.layer_norm_backward(x, x, n, mean, rstd), room=x.nbytes)
"""
    )


@on_linux
def test_without_room_for_one_of_several_results():
    child.output(
        LIMIT
        + """
x = np.ones((4096, 4096), np.float32)
out = np.empty_like(x)
r = x[0]
is_refused(lambda: fastnorm.add_layer_norm(x, x, out=out), out)
is_refused(lambda: fastnorm.add_rms_norm(x, x, sum_out=out), out)
is_refused(lambda: fastnorm.adaptive_layer_norm(x, r, r, residual=x, out=out), out)
is_refused(lambda: fastnorm.parallel_layer_norm(x, 4096, [r, r], out=[out, None]), out)
is_refused(lambda: fastnorm.add_layer_norm(x.T, x, out=out), out)
"""
    )


@on_linux
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_forward_makes_no_copies(storage):
    """24 MB in every layout and 5 MB to spare: less than a mask of the elements."""
    child.output(
        LIMIT
        + f"dtype = np.dtype({storage!r})\n"
        + """
rows, n = (24 << 20) // 512 // dtype.itemsize, 512
x, residual, out, total = (np.ones((rows, n), dtype) for _ in range(4))
w = np.ones(n, dtype)
shape = (n, rows // 64, 64)
for view in (
    lambda a: a,
    lambda a: a.reshape(shape[1:] + shape[:1])[:, ::-1],
    lambda a: a.reshape(shape).transpose(1, 2, 0),
    lambda a: a.reshape(shape[2], n, shape[1]).transpose(0, 2, 1),
):
    a, b, y, s = map(view, (x, residual, out, total))
    per_sample = np.ones((len(a), n), dtype)
    fits(lambda: fastnorm.layer_norm(a, n, w, w, out=y, activation="gelu"))
    fits(lambda: fastnorm.rms_norm(a, n, w, out=y, offset=1.0, lengths=n // 2))
    fits(lambda: fastnorm.layer_norm(a, n, w, out=y, mask=w > 0))
    fits(lambda: fastnorm.add_layer_norm(a, b, n, w, out=y, sum_out=s, linear_bias=w))
    fits(lambda: fastnorm.adaptive_layer_norm(
        a, per_sample, None, n, gate=per_sample, residual=b, out=y, sum_out=s))
    fits(lambda: fastnorm.parallel_layer_norm(a, n, [w, None], out=[y, s]))
    fits(lambda: fastnorm.moments(a))
fits(lambda: fastnorm.layer_norm(x, axis=0, out=out))
fits(lambda: fastnorm.segment_layer_norm(x, np.arange(0, rows + 1, 64), w, out=out))
fits(lambda: fastnorm.layer_norm(x, out=x))
"""
    )


@on_linux
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_backward_makes_no_copies(storage):
    """Room for dx of 24 MB, and for the sums over thousands of rows."""
    child.output(
        LIMIT
        + f"dtype = np.dtype({storage!r})\n"
        + """
rows, n = (24 << 20) // 512 // dtype.itemsize, 512
x, dy = (np.ones((rows, n), dtype) for _ in range(2))
w = np.ones(n, dtype)
room = x.nbytes + (5 << 20)
for view in (lambda a: a, lambda a: a.reshape(n, rows).T, lambda a: a[::-1]):
    a, g = view(x), view(dy)
    mean = rstd = np.ones(rows, np.float32)
    fits(lambda: fastnorm.layer_norm_backward(g, a, n, mean, rstd, w), room)
    fits(lambda: fastnorm.layer_norm_backward(g, a, n, mean, rstd, w, lengths=7), room)
    fits(lambda: fastnorm.rms_norm_backward(g, a, n, rstd, w, offset=1.0, mask=w > 0), room)
    fits(lambda: fastnorm.add_layer_norm_backward(g, g, a, n, mean, rstd, w), room)
    sums = lambda: fastnorm.layer_norm_backward(
        g, a, n, mean, rstd, w, output_mask=(False, True, True))
    fits(sums)
fits(lambda: fastnorm.segment_layer_norm_backward(
    dy, x, np.arange(0, rows + 1, 64), mean[::64], rstd[::64], w), room)
"""
    )


@on_linux
def test_forward_without_room_for_its_output():
    child.output(
        LIMIT
        + """
x = np.ones((4096, 4096), np.float32)
limited(16 << 20)
raises_memory_error(lambda: fastnorm.layer_norm(x))
fastnorm.layer_norm(x[:100])
unlimited()
assert (fastnorm.layer_norm(x) == 0).all()
"""
    )


# ---- what NumPy sees -----------------------------------------------------------------------------


def array_bytes():
    """Bytes that arrays hold, as NumPy tells tracemalloc."""
    gc.collect()
    kept = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    snapshot = tracemalloc.take_snapshot().filter_traces([kept])
    return sum(trace.size for trace in snapshot.traces)


@pytest.fixture
def tracing():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def results_bytes(result):
    if isinstance(result, tuple):
        return sum(map(results_bytes, result))
    return 0 if result is None else result.nbytes


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("op", _core.OPS)
def test_temporary_arrays_are_a_few_rows(op, storage, layout, tracing):
    """Of the parameters, and of statistics: never of x's size."""
    shape = (4, 64, 512)
    if op in SEGMENTS and layout != "contiguous":
        pytest.skip("packed rows are one run of memory: others are copied")
    arguments = valid(op, storage, shape)
    if op in FORWARD:
        arguments |= outputs(op, storage, shape)

    def laid_out(value):
        if isinstance(value, list):
            return [laid_out(item) for item in value]
        return LAYOUTS[layout](value) if np.shape(value) == shape else value

    arguments = {name: laid_out(value) for name, value in arguments.items()}
    call = getattr(fastnorm, op)
    call(**arguments)
    given = {id(a) for a in arrays_of(arguments)}
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    result = call(**arguments)
    peak = tracemalloc.get_traced_memory()[1] - before
    parts = result if isinstance(result, tuple) else (result,)
    new = [p for p in parts if not isinstance(p, tuple) and p is not None and id(p) not in given]
    row = shape[-1] * 8
    if op in SEGMENTS:  # whose parameters are as large as x[0]
        row *= shape[1]
    assert peak - results_bytes(tuple(new)) < 8 * row + 100_000


# ---- leaks ---------------------------------------------------------------------------------------


def every_call(storage):
    """Functions that call every op in every way through, errors too."""
    problem = Problem(np.random.default_rng(3), 24, np.dtype(storage))
    norm = fastnorm.LayerNorm(24)
    x = np.ones((5, 24), np.float32)

    def refused(op, **change):
        with contextlib.suppress(ValueError, TypeError):
            getattr(fastnorm, op)(**valid(op, storage) | change)
            raise AssertionError("no error")

    for call in CALLS.values():
        yield lambda call=call: call(problem)
    for op in _core.OPS:
        yield lambda op=op: getattr(fastnorm, op)(**valid(op, storage))
        yield lambda op=op: fastnorm.explain(op, **valid(op, storage))
        if op in FORWARD:
            yield lambda op=op: getattr(fastnorm, op)(**valid(op, storage), dtype=np.int8)
            yield lambda op=op: refused(op, eps=-1.0)
            yield lambda op=op: refused(op, out=x[1:])
        if op in BACKWARD:
            yield lambda op=op: refused(op, output_mask=())
    yield lambda: norm.backward(x, norm.forward(x)[1])


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_nothing_is_kept(storage, tracing):
    """Calls of every way through, a hundred times: no array stays behind, nor any other object."""
    calls = list(every_call(storage))

    def rounds(count):
        for _ in range(count):
            for call in calls:
                call()

    rounds(2)
    before, objects = array_bytes(), len(gc.get_objects())
    rounds(40)
    assert array_bytes() == before
    assert len(gc.get_objects()) - objects < 40


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_no_cycles(storage):
    """What a call made goes when it ends, without waiting for the garbage collector."""
    calls = list(every_call(storage))
    for call in calls:
        call()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be searched each time
    try:
        for call in calls:
            call()
            assert gc.collect() == 0
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="reference counts are CPython's")
@pytest.mark.parametrize("op", _core.OPS)
def test_reference_counts_are_kept(op, dtype):
    arguments = valid(op, dtype)
    if op in FORWARD:
        arguments |= outputs(op, dtype)
    elif op != "moments":
        arguments["output_mask"] = tuple([True] * (2 if "rms" in op else 3))
    if op not in SEGMENTS and op != "moments":
        arguments["normalized_shape"] = (4,)
    if op in FORWARD:
        arguments["eps"] = 1e-3
    held = [*arguments.values(), *arrays_of(arguments)]
    call = getattr(fastnorm, op)
    before = [sys.getrefcount(a) for a in held]
    gc.disable()
    try:
        for _ in range(20):
            call(**arguments)
            for wrong in ({"eps": -1.0}, {"eps": 0}) if op in FORWARD else ():
                with contextlib.suppress(ValueError):
                    call(**arguments | wrong)
        assert [sys.getrefcount(a) for a in held] == before
    finally:
        gc.enable()
