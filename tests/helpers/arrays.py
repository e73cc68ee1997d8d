"""Arrays in odd places, and comparison to the bit."""

import contextlib

import numpy as np

CANARY = 0xA5
MARGIN = 256


def placed(source, offset, margin=0):
    """A copy of `source` that starts `offset` bytes past a multiple of 64."""
    memory = np.full(source.nbytes + 128 + offset + 2 * margin, CANARY, np.uint8)
    start = -(memory.ctypes.data + margin) % 64 + margin + offset
    array = memory[start : start + source.nbytes].view(source.dtype).reshape(source.shape)
    array[...] = source
    return array


@contextlib.contextmanager
def guarded(shape, dtype, offset=0):
    """An array to write to; whoever writes one byte beside it fails the test."""
    array = placed(np.full(shape, np.nan, dtype), offset, margin=MARGIN)
    memory = array.base
    while memory.base is not None:
        memory = memory.base
    start = array.ctypes.data - memory.ctypes.data
    yield array
    beside = np.concatenate([memory[:start], memory[start + array.nbytes :]])
    np.testing.assert_array_equal(beside, CANARY, "written beside the output")


def bits(array):
    """The array's bits; every NaN is the same NaN."""
    array = np.array(array, order="C")
    if array.dtype.kind not in "iub":
        array[np.isnan(array)] = np.nan
    return array.view(f"u{array.itemsize}")


def assert_same_bits(got, want, context=""):
    """Arrays, or tuples of them, that agree in type, shape and every bit but a NaN's payload."""
    if isinstance(want, tuple):
        assert len(got) == len(want), context
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other, context)
        return
    assert (got.dtype, got.shape) == (want.dtype, want.shape), context
    if got.tobytes() != want.tobytes():
        np.testing.assert_array_equal(bits(got), bits(want), context)
