"""Memory of large results, kept for the next one: bounded, never shared, invisible."""

import gc
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy._core.multiarray import get_handler_name

import fastnorm
from fastnorm import _core

from .helpers import child
from .helpers.arguments import valid
from .helpers.arrays import assert_same_bits

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is kept on Linux only"
)

MIB = 1 << 20
LARGE = (16, MIB // 4)  # 16 MiB of float32


@pytest.fixture(autouse=True)
def _empty_pool():
    """Nothing is kept before a test; the limit is as it was after it."""
    limit = _core.pool()["limit"]
    gc.collect()
    fastnorm.set_pool_limit(0)
    fastnorm.set_pool_limit(limit)
    yield
    fastnorm.set_pool_limit(limit)


@pytest.fixture
def x(rng):
    return rng.standard_normal(LARGE).astype(np.float32)


def kept():
    return _core.pool()["kept"]


def address(a):
    return a.__array_interface__["data"][0]


def test_a_freed_result_serves_the_next(x):
    y = fastnorm.layer_norm(x)
    want, where = y.copy(), address(y)
    assert kept() == 0
    del y
    assert kept() >= x.nbytes
    y = fastnorm.layer_norm(x)
    assert address(y) == where
    assert kept() == 0
    assert_same_bits(y, want)


def test_results_are_the_same_in_new_and_in_kept_memory(dtype, rng):
    """Kept memory is written past the cache, new memory is not."""
    for n in (768, 771):
        x = rng.standard_normal((1 + 25 * MIB // (n * dtype.itemsize), n)).astype(dtype)
        _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)

        def results(x=x, n=n, mean=mean, rstd=rstd):
            return fastnorm.layer_norm(x), fastnorm.layer_norm_backward(x, x, n, mean, rstd)[0]

        fastnorm.set_pool_limit(0)
        want = results()
        fastnorm.set_pool_limit(256 * MIB)
        for _ in range(3):
            assert_same_bits(results(), want)
        assert kept() >= 2 * x.nbytes


def not_lazily_free():
    """Bytes of this process's memory that the system may not take."""
    with open("/proc/self/smaps_rollup") as file:
        sizes = {line.split(":")[0]: line.split()[1] for line in file if line.endswith(" kB\n")}
    if "LazyFree" not in sizes:
        pytest.skip("this kernel does not say what is marked MADV_FREE")
    return 1024 * (int(sizes["Anonymous"]) - int(sizes["LazyFree"]))


def test_all_that_is_kept_but_16_MB_is_the_systems_to_take(x):
    out = np.empty_like(x)
    fastnorm.layer_norm(x, out=out)  # the code's own pages are there
    before = not_lazily_free()
    results = [fastnorm.layer_norm(x[:13]) for _ in range(8)]  # 13 MiB each, in blocks of 14
    assert not_lazily_free() >= before + 8 * 13 * MIB
    del results
    assert kept() >= 8 * 13 * MIB
    assert 14 * MIB <= not_lazily_free() - before + MIB <= 18 * MIB


def test_what_is_kept_is_bounded(x):
    limit = 40 * MIB
    fastnorm.set_pool_limit(limit)
    results = [fastnorm.layer_norm(x) for _ in range(8)]
    while results:
        results.pop()
        assert kept() <= limit
    assert kept() >= x.nbytes
    fastnorm.set_pool_limit(x.nbytes)
    assert kept() <= x.nbytes
    fastnorm.set_pool_limit(0)
    assert kept() == 0
    fastnorm.layer_norm(x)
    assert kept() == 0


@pytest.mark.parametrize(
    ("limit", "exception"),
    [(-1, ValueError), (1.5, TypeError), ("1 GB", TypeError), (None, TypeError)],
)
def test_bad_limit(limit, exception):
    before = _core.pool()
    with pytest.raises(exception, match=r"^limit: got .*, wanted a number of bytes"):
        fastnorm.set_pool_limit(limit)
    assert _core.pool() == before


def test_the_limit_is_256_mib_at_first():
    assert child.output("from fastnorm import _core; print(_core.pool())") == str(
        {"kept": 0, "limit": 256 * MIB}
    )


def test_show_config_tells_what_is_kept(x):
    fastnorm.layer_norm(x)
    assert fastnorm.show_config("dicts")["pool_bytes"] == _core.pool()


def test_many_results_at_once(rng):
    """More than there are places: the rest is ordinary memory."""
    x = rng.standard_normal((5, MIB // 4)).astype(np.float32)
    want = fastnorm.layer_norm(x)
    results = [fastnorm.layer_norm(x) for _ in range(100)]
    places = sorted(address(y) for y in results)
    assert all(b - a >= x.nbytes for a, b in itertools.pairwise(places))
    for y in results:
        assert_same_bits(y, want)
    del results, y
    assert kept() <= _core.pool()["limit"]


def test_a_view_keeps_its_memory(x):
    row = fastnorm.layer_norm(x)[3]
    want = row.copy()
    for _ in range(3):
        fastnorm.layer_norm(x * 2 + 1)
    assert_same_bits(row, want)


def test_smaller_and_larger_results(rng):
    """A kept block serves what fits it without much waste, never what is larger."""
    x = rng.standard_normal((40, MIB // 4)).astype(np.float32)
    for rows in (40, 39, 38, 10, 5, 40, 7, 33, 40, 20):
        part = x[:rows]
        y = fastnorm.layer_norm(part)
        assert_same_bits(y[:2], fastnorm.layer_norm(part[:2].copy()))
        assert_same_bits(y[-1], fastnorm.layer_norm(part[-1]))
        del y


def test_results_are_ordinary_arrays(x):
    y = fastnorm.layer_norm(x)
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.base is None
    assert get_handler_name(y) == "fastnorm_pool"
    assert get_handler_name(np.empty(LARGE)) == "default_allocator"
    assert get_handler_name(fastnorm.layer_norm(x[:1, :100])) == "default_allocator"
    assert get_handler_name(y.copy()) == "default_allocator"


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("op", [op for op in _core.OPS if op != "moments"])
def test_results_of_every_op_are_kept(op, storage):
    """All of x's size: y, the sum, several ys, dx."""
    arguments = valid(op, storage, (10, 128, 1024 * 4 // np.dtype(storage).itemsize))
    call = getattr(fastnorm, op)

    def large(result):
        if isinstance(result, tuple):
            return [array for item in result for array in large(item)]
        return [result] if result.nbytes >= 4 * MIB else []

    first = large(call(**arguments))
    want, places = [y.copy() for y in first], {address(y) for y in first}
    count = 2 if op in ("add_layer_norm", "add_rms_norm", "adaptive_layer_norm",
                        "parallel_layer_norm") else 1  # fmt: skip
    assert len(first) == count
    assert all(get_handler_name(y) == "fastnorm_pool" for y in first)
    size = sum(y.nbytes for y in first)
    before = kept()
    first.clear()
    assert kept() - before >= size
    fastnorm.explain(op, **arguments)
    assert kept() - before >= size
    again = large(call(**arguments))
    assert {address(y) for y in again} == places
    for y, one in zip(again, want, strict=True):
        assert_same_bits(y, one)


def aligned(shape, offset, dtype=np.float32):
    """Ones, which begin so many bytes after a line."""
    count = np.prod(shape)
    room = np.ones(count + 128 // np.dtype(dtype).itemsize, dtype)
    skipped = ((offset - address(room)) % 64) // room.itemsize
    return room[skipped : skipped + count].reshape(shape)


@pytest.mark.parametrize("offset", [0, 16, 60])
def test_columns_are_written_where_they_lie_in_lines_as_x(offset):
    """Rows begin with a line in any case."""
    x = aligned((2, 3, 500, 512), offset)
    _, mean, rstd = fastnorm.layer_norm(x, axis=1, return_stats=True)
    for _ in range(2):
        assert address(fastnorm.layer_norm(x, axis=1)) % 64 == offset
        dx = fastnorm.layer_norm_backward(x, x, None, mean, rstd, axis=1)[0]
        assert address(dx) % 64 == offset
        assert address(fastnorm.layer_norm(x, axis=1, dtype=np.float16)) % 64 == 0
        assert address(fastnorm.layer_norm(x)) % 64 == 0
    del dx
    assert kept() >= x.nbytes


@pytest.mark.parametrize("width", [500, 512])
def test_rows_and_columns_share_what_is_kept(width):
    """512 fills whole huge pages, of which an offset would take one more."""
    x = aligned((2, 3, width, 512), 16)
    capacity = -(-x.nbytes // (2 * MIB)) * 2 * MIB
    for axis in (1, -1, 1):
        y = fastnorm.layer_norm(x, axis=axis)
        assert kept() == 0
        del y
        assert kept() == capacity
        assert _core.would_be_warm(x.nbytes)


def test_resize_of_what_begins_within_a_line():
    x = aligned((2, 3, 500, 512), 16)
    y = fastnorm.layer_norm(x, bias=np.float32([1, 2, 3]), axis=1)
    assert address(y) % 64 == 16
    want = y.copy()
    for count in (y.size // 2, 4 * y.size, 1):
        same = min(count, want.size)
        want = want.ravel()[:same].copy()
        y.resize(count, refcheck=False)
        assert_same_bits(y[:same], want)


@pytest.mark.parametrize("rows", [2, 15, 17, 60])
def test_resize(x, rows):
    y = fastnorm.layer_norm(x)
    want = np.zeros((rows, LARGE[1]), np.float32)
    want[: min(rows, 16)] = y[:rows]
    y.resize(want.shape, refcheck=False)
    assert_same_bits(y, want)
    del y
    assert_same_bits(fastnorm.layer_norm(x)[:2], fastnorm.layer_norm(x[:2]))


def test_many_threads(rng):
    inputs = [rng.standard_normal((k + 5, MIB // 4)).astype(np.float32) for k in range(6)]
    want = [fastnorm.layer_norm(x[:1]) for x in inputs]

    def work(k):
        for _ in range(20):
            assert_same_bits(fastnorm.layer_norm(inputs[k])[:1], want[k])
        return fastnorm.layer_norm(inputs[k])  # freed in another thread

    with ThreadPoolExecutor(6) as pool:
        for k, y in enumerate(pool.map(work, range(6))):
            assert_same_bits(y[:1], want[k])
    assert kept() <= _core.pool()["limit"]


def test_children_have_a_pool_of_their_own():
    child.output("""
        import os, signal
        import numpy as np, fastnorm
        from fastnorm import _core
        signal.alarm(60)
        x = np.random.default_rng(0).standard_normal((16, 1 << 18)).astype(np.float32)
        want = fastnorm.layer_norm(x).copy()
        held = fastnorm.layer_norm(x)
        other = fastnorm.layer_norm(x)
        del other
        pid = os.fork()
        for _ in range(3):
            y = fastnorm.layer_norm(x if pid else x[::-1])
            right = (y == (want if pid else want[::-1])).all() and (held == want).all()
            del y
            assert right and _core.pool()["kept"] <= _core.pool()["limit"]
        if pid == 0:
            del held
            os._exit(0 if _core.pool()["kept"] >= x.nbytes else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)


def test_arrays_may_outlive_everything():
    """Results that are alive when Python ends are freed, or not, without a crash."""
    child.output("""
        import builtins, numpy as np, fastnorm
        x = np.ones((16, 1 << 18), np.float32)
        builtins.kept_to_the_end = [fastnorm.layer_norm(x) for _ in range(3)]
    """)


def test_kept_memory_is_given_up_before_a_memory_error():
    child.output("""
        import resource
        import numpy as np, fastnorm
        from fastnorm import _core
        x = np.ones((100, 1 << 18), np.float32)
        fastnorm.layer_norm(x[:60])
        assert _core.pool()["kept"] >= 60 << 20
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (60 << 20), -1))
        y = fastnorm.layer_norm(x)
        assert y.min() == y.max() == 0
    """)


def test_explaining_a_call_leaves_the_pool_alone(x):
    assert not fastnorm.explain("layer_norm", x).stream
    assert not fastnorm.explain("layer_norm", x).stream
    assert _core.pool()["kept"] == 0
    fastnorm.layer_norm(x)
    assert fastnorm.explain("layer_norm", x).stream
