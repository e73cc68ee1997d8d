"""A program: every op on arrays that end, or begin, at a page that nobody may touch.

One byte read or written beyond an array ends it with a segmentation fault; the case that did it is
the last one printed. It runs for itself because it may crash.
"""

import contextlib
import ctypes
import itertools
import mmap
import sys

import numpy as np

import fastnorm
from fastnorm import _core

with contextlib.suppress(ImportError):
    import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it; without it, that is left out)

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT = []
EDGES = (0, 1, 7, 15)


def dtypes():
    for name in _core.DTYPES:
        with contextlib.suppress(TypeError):
            yield np.dtype(name)


def guarded(source, at_end):
    """A copy of `source` with a forbidden page right behind, or right before it."""
    size = (source.nbytes // PAGE + 3) * PAGE
    memory = mmap.mmap(-1, size)
    KEPT.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + size - PAGE):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = size - PAGE - source.nbytes if at_end else PAGE
    array = np.frombuffer(memory, source.dtype, source.size, offset).reshape(source.shape)
    array[...] = source
    return array


class Arrays:
    """What one size and type of rows is tested with; `of` makes more of them."""

    def __init__(self, n, rows, dtype, at_end):
        self.n, self.rows, self.dtype, self.at_end = n, rows, dtype, at_end
        self.rng = np.random.default_rng(n)
        self.x, self.dy, self.out, self.residual = (self.of((rows, n)) for _ in range(4))
        self.weight, self.bias = (self.of((n,)) for _ in range(2))
        self.x[0] = 6e4 if dtype == np.float16 else 1e38  # a row for the careful path
        self.lengths = guarded(self.rng.integers(0, n + 1, rows), at_end)
        self.mask = guarded(self.rng.random((rows, n)) < 0.6, at_end)

    def of(self, shape, dtype=None):
        values = self.rng.standard_normal(shape).astype(dtype or self.dtype)
        return guarded(values, self.at_end)

    def statistics(self, *stats):
        return (guarded(s, self.at_end) for s in stats)


def plain(a):
    for w, b in itertools.product((None, a.weight), (None, a.bias)):
        _, mean, rstd = fastnorm.layer_norm(a.x, a.n, w, b, out=a.out, return_stats=True)
    mean, rstd = a.statistics(mean, rstd)
    for w in (None, a.weight):
        fastnorm.layer_norm_backward(a.dy, a.x, a.n, mean, rstd, w)
    fastnorm.layer_norm_backward(a.dy, a.x, a.n, None, rstd, a.weight, a.bias, from_output=True)
    fastnorm.rms_norm(a.x, a.n, a.weight, out=a.out, offset=1.0, eps=0.0)
    fastnorm.rms_norm_backward(a.dy, a.x, a.n, rstd, a.weight, offset=1.0)
    fastnorm.moments(a.x)


def fused(a):
    total = guarded(np.zeros_like(a.x), a.at_end)
    q = guarded(np.zeros(a.x.shape, np.int8), a.at_end)
    w, b = a.weight, a.bias
    fastnorm.add_layer_norm(
        a.x, a.residual, a.n, w, b, linear_bias=b, out=a.out, sum_out=total, activation="gelu"
    )
    fastnorm.layer_norm(a.x, a.n, w, b, dtype=np.int8, out=q)
    fastnorm.parallel_layer_norm(a.x, a.n, [w, b], [None, w], out=[a.out, total])
    scale, shift, gate = a.of((3, a.rows, a.n))
    fastnorm.adaptive_layer_norm(
        a.x, scale, shift, gate=gate, residual=a.residual, out=a.out, sum_out=total
    )


def ragged(a):
    packed, dy = a.of((a.rows * a.n,)), a.of((a.rows * a.n,))
    for given in ({"lengths": a.lengths}, {"mask": a.mask}, {"mask": a.mask[:1]},
                  {"mask": a.mask[:, :1]}):  # fmt: skip
        _, mean, rstd = fastnorm.layer_norm(
            a.x, a.n, a.weight, a.bias, out=a.out, return_stats=True, **given
        )
        mean, rstd = a.statistics(mean, rstd)
        fastnorm.layer_norm_backward(a.dy, a.x, a.n, mean, rstd, a.weight, **given)
        fastnorm.layer_norm(a.x, dtype="i1", **given)
    offsets = np.unique([0, a.n // 3, a.n // 2, a.n, a.rows * a.n])
    w, b = a.of(()), a.of(())
    _, mean, rstd = fastnorm.segment_layer_norm(packed, offsets, w, b, return_stats=True)
    fastnorm.segment_layer_norm_backward(dy, packed, offsets, mean, rstd, w)
    rows = np.arange(a.rows + 1)
    fastnorm.segment_layer_norm(a.x, rows, a.weight, a.bias, out=a.out)


def strided(a):
    """Every other element, first and last ones at the ends; backwards; with gaps between rows."""
    wide, wide_dy, out = (a.of((a.rows, 2 * a.n - 1)) for _ in range(3))
    for step in (slice(None, None, 2), slice(None, None, -2), slice(0, a.n), slice(a.n - 1, None)):
        x, dy, y = wide[:, step], wide_dy[:, step], out[:, step]
        _, mean, rstd = fastnorm.layer_norm(x, a.n, a.weight, out=y, return_stats=True)
        fastnorm.layer_norm_backward(dy, x, a.n, mean, rstd, a.weight)
        fastnorm.layer_norm(x, out=y, mask=a.mask)
        fastnorm.add_rms_norm(x, dy, sum_out=y)
        fastnorm.moments(x)


def columns(a):
    """Rows side by side; `n` is the number of rows here, and of elements there are a few."""
    for count in (a.rows, 17, 2):
        x, dy, out = (a.of((count, a.n)) for _ in range(3))
        x[:, 0] = 1.5
        w, b = a.of((2, count))
        _, mean, rstd = fastnorm.layer_norm(x, None, w, b, 0.0, axis=0, out=out, return_stats=True)
        mean, rstd = a.statistics(mean, rstd)
        fastnorm.layer_norm_backward(dy, x, None, mean, rstd, w, axis=0)
        fastnorm.layer_norm(x.T, out=out.T, activation="silu")
        fastnorm.rms_norm(x, None, w, axis=0, dtype="f2")
        fastnorm.moments(x, 0)
        fastnorm.layer_norm(np.broadcast_to(x[:, None], (count, 3, a.n)), axis=(0, 1))


def run(n, rows, dtype, at_end):
    arrays = Arrays(n, rows, dtype, at_end)
    # What goes strip by strip has its edges where vectors have theirs.
    parts = (plain, fused, ragged, strided, columns) if n < 12 or n % 16 in EDGES else (plain,)
    for isa in filter(_core.isa_supported, _core.isa_names()):
        _core.select_isa(isa)
        for part in parts:
            end = "end" if at_end else "start"
            print(f"n={n} rows={rows} {dtype} {isa} {part.__name__} {end}", flush=True)
            part(arrays)


def main():
    lengths = range(int(sys.argv[1]), int(sys.argv[2]))
    for n, dtype, at_end in itertools.product(lengths, dtypes(), (True, False)):
        for rows in (1, 11):
            run(n, rows, dtype, at_end)
        KEPT.clear()
    for n, dtype in itertools.product((1023, 1024, 1025, 2049), dtypes()):
        run(n, 6, dtype, at_end=True)
        KEPT.clear()


# A row of random numbers, and sums next to the largest one, may leave the type's range.
with np.errstate(all="ignore"):
    main()
