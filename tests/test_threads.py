"""Many Python threads calling at once: right results, shared cores, nothing left behind."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers import child
from .helpers.arrays import assert_same_bits
from .helpers.calls import CALLS, Problem
from .helpers.storage import STORAGE

CALLERS = 8


def together(work, count=CALLERS):
    """`work(k)` in so many threads that start at the same moment."""
    barrier = threading.Barrier(count)

    def run(k):
        barrier.wait()
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("shape", [(1, 768), (40, 100), (3000, 768)], ids=str)
@pytest.mark.parametrize("parts", [0, 3])
def test_results_do_not_mix(dtype, shape, parts, rng, partition):
    inputs = [rng.standard_normal(shape).astype(dtype) for _ in range(CALLERS)]
    weight, bias = rng.standard_normal((2, shape[-1])).astype(dtype)

    def results(k, out=None):
        x, n = inputs[k], shape[-1]
        y, mean, rstd = fastnorm.layer_norm(x, n, weight, bias, out=out, return_stats=True)
        return y, *fastnorm.layer_norm_backward(y, x, n, mean, rstd, weight), *fastnorm.moments(x)

    want = [results(k) for k in range(CALLERS)]
    partition(parts)
    repeats = 100 if inputs[0].size < 10_000 else 2

    def work(k):
        out = np.empty_like(inputs[k])
        for _ in range(repeats):
            assert_same_bits(results(k, out), want[k])

    together(work)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("parts", [0, 3])
def test_results_of_every_op_do_not_mix(storage, parts, rng, partition):
    """Scratch on the stack (short rows) and in memory (wide ones) belongs to one call."""
    problems = [Problem(rng, (40, 3000)[k % 2], storage) for k in range(CALLERS)]

    def results(k):
        return [call(problems[k]) for call in CALLS.values()]

    want = [results(k) for k in range(CALLERS)]
    partition(parts)

    def work(k):
        for got, one in zip(results(k), want[k], strict=True):
            assert_same_bits(got, one)

    together(work)


def test_one_input_read_by_all(rng):
    x = rng.standard_normal((3000, 768)).astype(np.float32)
    want = fastnorm.layer_norm(x)
    for y in together(lambda _: fastnorm.layer_norm(x)):
        assert_same_bits(y, want)


def test_settings_may_change_meanwhile(rng):
    x = rng.standard_normal((2000, 768)).astype(np.float32)
    want = fastnorm.layer_norm(x)

    def work(k):
        for turn in range(5):
            with fastnorm.num_threads(1 + (k + turn) % 3):
                assert_same_bits(fastnorm.layer_norm(x), want)

    before = _core.threads()["requested"]
    together(work)
    assert _core.threads()["requested"] == before


COUNTING = """
import os, threading, time
import numpy as np, fastnorm
from fastnorm import _core

big = np.ones((8192, 768), np.float32)
outs = [np.empty_like(big) for _ in range(8)]
most = _core.threads()["max"]

def tasks():
    return len(os.listdir("/proc/self/task"))

idle = tasks()  # this thread, and those of NumPy's BLAS

def in_threads(work, count):
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for t in threads: t.start()
    for t in threads: t.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_callers_share_the_cores():
    """Eight callers at once never make more threads than eight times one call's."""
    child.output(
        COUNTING
        + """
seen = []
def work(k):
    for _ in range(10):
        fastnorm.layer_norm(big, out=outs[k])
        seen.append(tasks())
in_threads(work, 8)
assert max(seen) <= idle + 8 * most, (max(seen), idle, most)
"""
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.skipif(_core.threads()["max"] < 2, reason="one thread at most here")
def test_threads_are_given_back():
    """After calls that shared the cores, one that is alone has all of them again."""
    child.output(
        COUNTING
        + """
def work(k):
    for _ in range(10):
        fastnorm.layer_norm(big, out=outs[k])
        fastnorm.layer_norm_backward(big, outs[k], 768, big[:, 0], big[:, 1])
in_threads(work, 8)
def alone(k):
    for _ in range(500):  # threads of the callers that are gone take a moment to go
        before = tasks()
        if before == idle + 1:
            break
        time.sleep(0.01)
    fastnorm.layer_norm(big, out=outs[k])
    assert tasks() - before == most - 1, (before, tasks(), most)
    done.append(k)
done = []
in_threads(alone, 1)
assert done
"""
    )


def test_nested_parallel_regions_stay_serial(rng):
    """A call made inside another library's parallel region uses the thread it is on."""
    before = fastnorm.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: fastnorm.get_num_threads(), range(2))) == [before] * 2
