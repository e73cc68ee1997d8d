"""Out of memory: MemoryError, nothing written, and the next call works. And no leaks."""

import contextlib
import gc
import os
import sys
import tracemalloc

import numpy as np
import pytest

import fastnorm

from .helpers import child

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


@on_linux
def test_forward_without_room_for_a_copy_writes_nothing():
    child.output(
        LIMIT
        + """
x = np.ones((4096, 4096), np.float32)
out = np.full_like(x, 7)
limited(16 << 20)
raises_memory_error(lambda: fastnorm.layer_norm(x.T, out=out))
raises_memory_error(lambda: fastnorm.layer_norm(x, axis=0, out=out))
unlimited()
assert (out == 7).all()
assert (fastnorm.layer_norm(x.T, out=out) == 0).all()
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


def test_nothing_is_kept(dtype, rng):
    """Calls of every way through, five hundred times: no array stays behind."""
    x = rng.standard_normal((40, 64)).astype(dtype)
    weight = np.ones(64)
    norm = fastnorm.LayerNorm(64, dtype=dtype)

    def calls():
        y, mean, rstd = fastnorm.layer_norm(x, 64, weight, return_stats=True)
        fastnorm.layer_norm(x, out=y)
        fastnorm.layer_norm_backward(y, x, 64, mean, rstd, weight)
        fastnorm.moments(x.T)
        norm.backward(y, norm.forward(x)[1])
        for bad in ({"eps": -1.0}, {"out": x[1:]}):
            with contextlib.suppress(ValueError):
                fastnorm.layer_norm(x, **bad)

    def in_use():
        gc.collect()  # Python's free lists too
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        calls()
        before = in_use()
        for _ in range(500):
            calls()
        grown = in_use() - before
    finally:
        tracemalloc.stop()
    assert grown < x.nbytes, f"{grown} bytes more after 500 rounds"


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="reference counts are CPython's")
def test_reference_counts_are_kept(dtype):
    x, out, weight = np.ones((4, 8), dtype), np.ones((4, 8), dtype), np.ones(8, dtype)
    shape, eps = (8,), 1e-3
    held = (x, out, weight, shape)
    before = [sys.getrefcount(a) for a in held]
    for _ in range(100):
        fastnorm.layer_norm(x, shape, weight, weight, eps, out=out)
        fastnorm.layer_norm(x, shape, weight, weight, 0, out=out)
        fastnorm.layer_norm_backward(out, x, shape, x[:, 0], x[:, 0], weight)
    assert [sys.getrefcount(a) for a in held] == before
