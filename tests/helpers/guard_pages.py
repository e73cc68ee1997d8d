"""A program: every op on arrays that end, or begin, at a page that nobody may touch.

One byte read or written beyond an array ends it with a segmentation fault; the case that did it is
the last one printed. It runs for itself because it may crash.
"""

import ctypes
import itertools
import mmap
import sys

import numpy as np

import fastnorm
from fastnorm import _core

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT = []


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


def run(n, rows, dtype, at_end):
    rng = np.random.default_rng(n)
    x, dy, out = (guarded(rng.standard_normal((rows, n)).astype(dtype), at_end) for _ in range(3))
    weight, bias = (guarded(rng.standard_normal(n).astype(dtype), at_end) for _ in range(2))
    x[0] = 1e38  # a row for the careful path
    for isa in filter(_core.isa_supported, _core.isa_names()):
        print(f"n={n} rows={rows} {dtype} {isa} {'end' if at_end else 'start'}", flush=True)
        _core.select_isa(isa)
        for w, b in itertools.product((None, weight), (None, bias)):
            _, mean, rstd = fastnorm.layer_norm(x, n, w, b, out=out, return_stats=True)
        mean, rstd = guarded(mean, at_end), guarded(rstd, at_end)
        for w in (None, weight):
            fastnorm.layer_norm_backward(dy, x, n, mean, rstd, w)
        fastnorm.moments(x)


def main():
    lengths = range(int(sys.argv[1]), int(sys.argv[2]))
    for n, dtype, at_end in itertools.product(lengths, _core.DTYPES, (True, False)):
        for rows in (1, 11):
            run(n, rows, dtype, at_end)
        KEPT.clear()
    for n in (1023, 1024, 1025, 2049):
        run(n, 6, "float32", at_end=True)


main()
