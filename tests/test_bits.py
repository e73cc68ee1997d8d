"""Same row, same bits: whatever the batch, the place in it, the instruction set, the number of
threads, alignment, strides and `out` are. Forward, backward and moments.

NaN counts as NaN, whatever its payload. test_c_core.py compares the same on other CPUs.
"""

import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers.arrays import assert_same_bits, placed
from .helpers.rows import hard_rows

LENGTHS = (1, 2, 5, 8, 16, 31, 33, 63, 64, 65, 100, 129, 256, 257, 511, 768, 1024, 1025, 3000, 5003)
BASELINE = _core.isa_names()[-1]


class Case:
    """Rows of every kind, their gradients, and every result that fastnorm has for them."""

    def __init__(self, rng, n, dtype, rows=None):
        self.x = hard_rows(rng, n, dtype)
        if rows:
            self.x = np.tile(self.x, (rows // len(self.x) + 1, 1))[:rows]
        self.dy = rng.standard_normal(self.x.shape).astype(dtype)
        self.weight, self.bias = rng.standard_normal((2, n)).astype(dtype)

    def forward(self, rows=slice(None), **options):
        n = self.x.shape[-1]
        return fastnorm.layer_norm(
            self.x[rows], n, self.weight, self.bias, return_stats=True, **options
        )

    def backward(self, rows=slice(None)):
        _, mean, rstd = fastnorm.layer_norm(self.x[rows], return_stats=True)
        n = self.x.shape[-1]
        return fastnorm.layer_norm_backward(
            self.dy[rows], self.x[rows], n, mean, rstd, self.weight, self.bias
        )

    def results(self):
        plain = fastnorm.layer_norm(self.x, eps=0.0)
        return (*self.forward(), *self.backward(), *fastnorm.moments(self.x), plain)


# ---- instruction sets and threads ----------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_instruction_sets(isa, dtype, n, rng):
    case = Case(rng, n, dtype, rows=53)
    got = case.results()
    _core.select_isa(BASELINE)
    assert_same_bits(got, case.results())


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 161, 1000])
@pytest.mark.parametrize("n", [3, 64, 770, 2050])
def test_partitions(dtype, n, rows, rng, partition):
    """Backward sums rows in blocks of 16: one, several, a last one that is not full."""
    case = Case(rng, n, dtype, rows)
    want = case.results()
    for parts in range(1, 8):
        partition(parts)
        assert_same_bits(case.results(), want, f"{parts} parts")


def test_partitions_on_every_instruction_set(isa, dtype, rng, partition):
    case = Case(rng, 100, dtype, rows=353)
    want = case.results()
    partition(5)
    assert_same_bits(case.results(), want)


def test_threads(dtype, rng):
    """The threads that a large call takes by itself, however many there are here."""
    case = Case(rng, 768, dtype, rows=4096)
    with fastnorm.num_threads(1):
        want = case.results()
    for count in range(2, 8):
        with fastnorm.num_threads(count):
            assert_same_bits(case.results(), want, f"{count} threads")


# ---- the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 64, 200, 768])
def test_batch(isa, dtype, n, rng):
    """A row in batches of 1 to 4,096 rows, at either end and in the middle."""
    case = Case(rng, n, dtype, rows=4096)
    want = case.forward()
    dx = case.backward()[0]
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 64, 100, 1000, 1024, 4096):
        for first in {0, 11, 24, 4096 - size}:
            rows = slice(first, first + size)
            part = tuple(a[rows] for a in want)
            assert_same_bits(case.forward(rows), part, f"rows {rows}")
            assert_same_bits(case.backward(rows)[0], dx[rows], f"dx of rows {rows}")


def test_every_batch_size_to_1024(rng):
    x = rng.standard_normal((1024, 40)).astype(np.float32)
    want = fastnorm.layer_norm(x)
    for size in range(1, 1025):
        assert_same_bits(fastnorm.layer_norm(x[:size]), want[:size], f"{size} rows")


def test_a_row_alone_and_as_a_vector(isa, dtype, rng):
    case = Case(rng, 129, dtype)
    want, mean, rstd = case.forward()
    for r in range(len(want)):
        assert_same_bits(case.forward(r), (want[r], mean[r], rstd[r]), f"row {r}")


# ---- alignment and strides -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 64, 257, 768, 1030])
def test_alignment(isa, dtype, n, rng):
    case = Case(rng, n, dtype, rows=37)
    want = case.results()
    for offset in range(0, 64, dtype.itemsize):
        moved = Case(rng, n, dtype, rows=37)
        for name, other in (("x", offset), ("dy", 60), ("weight", offset), ("bias", 4)):
            setattr(
                moved, name, placed(getattr(case, name), other // dtype.itemsize * dtype.itemsize)
            )
        out = placed(np.zeros_like(case.x), offset)
        assert_same_bits(moved.results(), want, f"offset {offset}")
        assert_same_bits(moved.forward(out=out), want[:3], f"out at offset {offset}")


def strided(rng, array):
    """Views of the same values whose rows lie otherwise in memory."""
    rows, n = array.shape
    wide = rng.standard_normal((rows, n + 13)).astype(array.dtype)
    wide[:, 5 : 5 + n] = array
    yield "column slice", wide[:, 5 : 5 + n]
    sparse = rng.standard_normal((3 * rows, n)).astype(array.dtype)
    sparse[::3] = array
    yield "every third row", sparse[::3]
    yield "backwards", array[::-1].copy()[::-1]
    wide_backwards = wide[::-1].copy()
    yield "backwards and apart", wide_backwards[::-1, 5 : 5 + n]
    yield "columns first", np.asfortranarray(array)
    yield "every second column", np.repeat(array, 2, axis=1)[:, ::2]
    yield "columns backwards", array[:, ::-1].copy()[:, ::-1]


@pytest.mark.parametrize("n", [3, 64, 770])
def test_strides(isa, dtype, n, rng):
    case = Case(rng, n, dtype, rows=45)
    want = case.results()
    for name, view in strided(rng, case.x):
        moved = Case(rng, n, dtype, rows=45)
        moved.x, moved.dy, moved.weight, moved.bias = view, case.dy, case.weight, case.bias
        assert_same_bits(moved.results(), want, f"x {name}")
    for name, view in strided(rng, case.dy):
        moved.x, moved.dy = case.x, view
        assert_same_bits(moved.backward(), want[3:6], f"dy {name}")
    for name, out in strided(rng, case.x):
        assert_same_bits(case.forward(out=out), want[:3], f"out {name}")


def test_leading_axes(isa, dtype, rng):
    """Several leading axes that no single stride can walk."""
    x = hard_rows(rng, 60, dtype).reshape(2, 3, 4, 60)
    want = fastnorm.layer_norm(np.ascontiguousarray(x.transpose(1, 2, 0, 3)), return_stats=True)
    got = fastnorm.layer_norm(x.transpose(1, 2, 0, 3), return_stats=True)
    assert_same_bits(got, want)
    assert "copied" not in str(fastnorm.explain("layer_norm", x.transpose(1, 2, 0, 3)))
    inner = x[::-1, :, ::2, 5:50]
    assert_same_bits(fastnorm.layer_norm(inner), fastnorm.layer_norm(inner.copy()))


def test_broadcast_rows(dtype, rng):
    row = hard_rows(rng, 70, dtype)
    x = np.broadcast_to(row[:, np.newaxis], (24, 9, 70))
    want = np.repeat(fastnorm.layer_norm(row), 9, axis=0).reshape(x.shape)
    assert_same_bits(fastnorm.layer_norm(x), want)
    dy = np.broadcast_to(rng.standard_normal(70).astype(dtype), x.shape)
    _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    got = fastnorm.layer_norm_backward(dy, x, 70, mean, rstd)
    assert_same_bits(got, fastnorm.layer_norm_backward(dy.copy(), x.copy(), 70, mean, rstd))


# ---- out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 500, 768, 3001])
def test_out_and_in_place(isa, dtype, n, rng):
    case = Case(rng, n, dtype, rows=45)
    want = case.forward()
    out = np.empty_like(case.x)
    got = case.forward(out=out)
    assert got[0] is out
    assert_same_bits(got, want)
    got = case.forward(out=case.x)
    assert got[0] is case.x
    assert_same_bits(got, want)


@pytest.mark.parametrize("view", [slice(None), slice(None, None, -2), slice(3, None, 4)], ids=str)
def test_in_place_through_a_view(dtype, view, rng):
    case = Case(rng, 50, dtype, rows=45)
    before = case.x.copy()
    want = case.forward(view)[0]
    rows = case.x[view, 3:40]
    want = fastnorm.layer_norm(rows)
    fastnorm.layer_norm(rows, out=case.x[view, 3:40])
    assert_same_bits(case.x[view, 3:40], want)
    before[view, 3:40] = want
    assert_same_bits(case.x, before)


def test_in_place_along_another_axis(dtype, rng):
    x = rng.standard_normal((6, 30)).astype(dtype)
    want = fastnorm.layer_norm(x, axis=0)
    fastnorm.layer_norm(x, axis=0, out=x)
    assert_same_bits(x, want)


# ---- outputs past the cache ----------------------------------------------------------------------

STREAMED_BYTES = 33 << 20


class Streamed:
    """An output so large that it is written past the cache, where `out` is given."""

    def __init__(self, rng, n, dtype, which, offset):
        rows = STREAMED_BYTES // (n * dtype.itemsize) + 1
        kinds = hard_rows(rng, n, dtype)
        # Most rows are ordinary; one in a hundred needs care, and interrupts the stream.
        picks = np.where(rng.random(rows) < 0.01, rng.integers(0, len(kinds), rows), 23)
        self.x = kinds[picks]
        self.x += np.where(picks == 23, np.arange(rows) % 97, 0).astype(dtype)[:, np.newaxis]
        self.parameters = [
            rng.standard_normal(n).astype(dtype) if wanted else None for wanted in which
        ]
        self.out = placed(np.empty_like(self.x), offset)
        self.n = n

    def run(self, x, out=None):
        return fastnorm.layer_norm(x, self.n, *self.parameters, out=out)

    def assert_streams(self, out):
        plan = fastnorm.explain("layer_norm", self.x, self.n, *self.parameters, out=out)
        assert plan.stream, str(plan)


@pytest.mark.parametrize("which", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("offset", [0, 8, 16, 48])
@pytest.mark.parametrize("n", [131, 768, 771, 3001])
def test_streamed(dtype, n, offset, which, rng):
    case = Streamed(rng, n, dtype, which, offset)
    case.assert_streams(case.out)
    want = case.run(case.x)
    assert_same_bits(case.run(case.x, case.out), want)


@pytest.mark.parametrize("n", [131, 770])
def test_streamed_on_every_instruction_set(isa, dtype, n, rng):
    case = Streamed(rng, n, dtype, (1, 1), 16)
    got = case.run(case.x, case.out)
    _core.select_isa(BASELINE)
    assert_same_bits(got, case.run(case.x))


@pytest.mark.parametrize("n", [131, 770])
def test_streamed_in_place_in_parts_and_strided(dtype, n, rng, partition):
    case = Streamed(rng, n, dtype, (1, 1), 16)
    want = case.run(case.x)
    room = placed(np.full((len(case.x), n + 5), 3, dtype), 8)
    case.assert_streams(room[:, 2 : n + 2])
    assert_same_bits(case.run(case.x, room[:, 2 : n + 2]), want, "strided")
    assert (np.delete(room, np.s_[2 : n + 2], axis=1) == 3).all(), "written between the rows"
    assert_same_bits(case.run(case.x[::-1], case.out[::-1])[::-1], want, "backwards")
    for parts in (2, 7):
        partition(parts)
        assert_same_bits(case.run(case.x, case.out), want, f"{parts} parts")
    assert_same_bits(case.run(case.x, case.x), want, "in place")
