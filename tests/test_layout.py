"""Every layout that NumPy can make gives the bits of its plain copy, and no byte beside an output
is touched. Layouts are drawn by hypothesis; the ones that fooled others are listed by name."""

import array
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastnorm
from fastnorm import _core, accuracy

from .helpers.arrays import assert_same_bits, guarded, placed

GUARD_PAGES = Path(__file__).parent / "helpers" / "guard_pages.py"
TYPES = st.sampled_from([np.dtype(name) for name in _core.COMPUTE_DTYPES])
examples = hypothesis.settings(deadline=None, max_examples=500)


# ---- drawn layouts -------------------------------------------------------------------------------


class View:
    """An array somewhere inside a larger block of bytes."""

    def __init__(self, memory, array):
        self.memory, self.array = memory, array
        self.before, self.values = memory.copy(), array.copy()

    def assert_unchanged(self):
        np.testing.assert_array_equal(self.memory, self.before, "an input was written to")

    def assert_unchanged_beside(self):
        """The array may have changed, what lies between and around its elements may not."""
        result = self.array.copy()
        self.array[...] = self.values
        np.testing.assert_array_equal(self.memory, self.before, "written beside the output")
        self.array[...] = result


@st.composite
def views(draw, shape, dtype):
    """Slices with steps, negative ones too, axes in any order, at any byte."""
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    offset = draw(st.integers(0, 15)) * draw(st.sampled_from([dtype.itemsize, 1]))
    padded = [n * abs(step) + draw(st.integers(0, 2)) for n, step in zip(shape, steps, strict=True)]
    stored = [padded[axis] for axis in order]
    seed = draw(st.integers(0, 1000))
    memory = np.zeros(int(np.prod(stored)) * dtype.itemsize + 64 + offset, np.uint8)
    whole = np.ndarray(stored, dtype, memory, offset).transpose(np.argsort(order))
    whole[...] = np.random.default_rng(seed).standard_normal(whole.shape) + 0.5
    inner = whole[(..., *(slice(None, None, step) for step in steps))]
    return View(memory, inner[(..., *(slice(0, n) for n in shape))])


@st.composite
def problems(draw):
    """A type, a shape and the axes to normalize."""
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=0, max_size=3)))
    shape += (draw(st.integers(0, 70)),)
    count = draw(st.integers(1, len(shape)))
    axes = tuple(draw(st.permutations(range(len(shape))))[:count])
    return draw(TYPES), shape, axes


def plainly(a, axes):
    """A plain copy, normalized axes last."""
    lead = [d for d in range(a.ndim) if d not in axes]
    return np.array(a.transpose(*lead, *sorted(axes)), order="C")


def back(a, axes):
    """Undo the order of plainly."""
    lead = [d for d in range(a.ndim) if d not in axes]
    return a.transpose(np.argsort([*lead, *sorted(axes)]))


def inner_shape(shape, axes):
    return tuple(shape[d] for d in sorted(axes))


@examples
@hypothesis.given(st.data())
def test_drawn_layouts(data):
    dtype, shape, axes = data.draw(problems())
    inner = inner_shape(shape, axes)
    x = data.draw(views(shape, dtype))
    weight = data.draw(st.none() | views(inner, dtype))
    bias = data.draw(st.none() | views(inner, dtype))
    out = data.draw(st.none() | st.just(x) | views(shape, dtype))

    w, b, o = (v and v.array for v in (weight, bias, out))
    plain = plainly(x.array, axes)
    want = fastnorm.layer_norm(
        plain, inner, None if w is None else w.copy(), None if b is None else b.copy(),
        return_stats=True,
    )  # fmt: skip
    y, mean, rstd = fastnorm.layer_norm(x.array, None, w, b, axis=axes, out=o, return_stats=True)

    assert_same_bits(
        (np.array(y, order="C"), mean, rstd), (np.array(back(want[0], axes), order="C"), *want[1:])
    )
    for view in (x, weight, bias):
        if view and view is not out:
            view.assert_unchanged()
    if out:
        assert y is o
        out.assert_unchanged_beside()
    if plain.size:
        rows = plain.reshape(-1, int(np.prod(inner)))
        flat = (None if p is None else p.copy().ravel() for p in (w, b))
        error = accuracy.layer_norm_error(want[0].reshape(rows.shape), rows, *flat)
        assert error <= accuracy.bound(dtype)


@examples
@hypothesis.given(st.data())
def test_drawn_layouts_backward(data):
    dtype, shape, axes = data.draw(problems())
    inner = inner_shape(shape, axes)
    lead = tuple(n for d, n in enumerate(shape) if d not in axes)
    kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
    x, dy = data.draw(views(shape, dtype)), data.draw(views(shape, dtype))
    weight = data.draw(st.none() | views(inner, dtype))
    plain = plainly(x.array, axes)
    _, plain_mean, plain_rstd = fastnorm.layer_norm(plain, inner, return_stats=True)
    statistics = []
    for values in (plain_mean, plain_rstd):
        form = data.draw(st.sampled_from([lead, kept]))
        view = data.draw(views(form, dtype))
        view.array[...] = values.reshape(form)
        statistics.append(view.array)

    w = weight and weight.array
    got = fastnorm.layer_norm_backward(dy.array, x.array, None, *statistics, w, axis=axes)
    want = fastnorm.layer_norm_backward(
        plainly(dy.array, axes),
        plain,
        inner,
        plain_mean,
        plain_rstd,
        None if w is None else w.copy(),
    )
    assert got[0].shape == shape
    assert_same_bits((plainly(got[0], axes), *got[1:]), want)
    for view in (x, dy, weight):
        if view:
            view.assert_unchanged()


@examples
@hypothesis.given(st.data())
def test_drawn_layouts_of_moments(data):
    dtype, shape, axes = data.draw(problems())
    x = data.draw(views(shape, dtype))
    rows = plainly(x.array, axes)
    rows = rows.reshape(
        *rows.shape[: len(shape) - len(axes)], int(np.prod(inner_shape(shape, axes)))
    )
    assert_same_bits(fastnorm.moments(x.array, axes), fastnorm.moments(rows))
    x.assert_unchanged()


# ---- memory beside the output --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 24, 60])
def test_nothing_is_written_beside_out(isa, dtype, offset, rng):
    offset -= offset % dtype.itemsize
    for n in range(1, 131):
        x = rng.standard_normal((9, n)).astype(dtype)
        with guarded(x.shape, dtype, offset) as out:
            fastnorm.layer_norm(x, out=out)
        assert_same_bits(np.array(out), fastnorm.layer_norm(x))


@pytest.mark.parametrize("offset", [0, 16, 40])
@pytest.mark.parametrize("n", [131, 771])
def test_nothing_is_written_beside_a_streamed_out(isa, dtype, n, offset, rng):
    x = rng.standard_normal((1 + (33 << 20) // (n * dtype.itemsize), n)).astype(dtype)
    with guarded(x.shape, dtype, offset) as out:
        assert fastnorm.explain("layer_norm", x, out=out).stream
        fastnorm.layer_norm(x, out=out)


@pytest.mark.parametrize("lengths", [(1, 65), (65, 131)], ids=str)
def test_no_page_beside_any_array_is_touched(lengths):
    """n from 1 to 130, every op on every instruction set, pages at both ends."""
    done = subprocess.run(
        [sys.executable, "-I", GUARD_PAGES, *map(str, lengths)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-200:]} {done.stderr[-2000:]}"


# ---- arrays that fooled others -------------------------------------------------------------------


def unaligned(a):
    return placed(a, 1)


def memmap(a, mode="r+"):
    # Kept open by the array; the file is gone when it is.
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(a.tobytes())
        file.flush()
        return np.memmap(file.name, a.dtype, mode, shape=a.shape)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def odd_stride_of_length_1(a):
    """An axis of length 1 whose stride is odd, which NumPy still calls C-contiguous."""
    view = np.lib.stride_tricks.as_strided(a, (1, *a.shape), (12345, *a.strides))
    return view[0] if a.ndim == 1 else view.reshape(a.shape)


def field(a):
    record = np.zeros(a.shape, np.dtype([("tag", "u1"), ("value", a.dtype), ("more", "u2")]))
    record["value"] = a
    return record["value"]


class Subclass(np.ndarray):
    pass


class Exporter:
    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.a, dtype=dtype)


HOSTILE = {
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "unaligned": unaligned,
    "memmap": memmap,
    "read-only memmap": lambda a: memmap(a, "r"),
    "read-only": read_only,
    "bytes": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "odd stride of length 1": odd_stride_of_length_1,
    "field of a record": field,
    "Fortran order": np.asfortranarray,
    "subclass": lambda a: a.view(Subclass),
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape))[1],
    "object with __array__": Exporter,
    "memoryview": lambda a: memoryview(a.copy()),
}
CHANGEABLE = ("byte-swapped", "unaligned", "memmap", "odd stride of length 1", "field of a record",
              "Fortran order", "subclass")  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs(kind, dtype, rng):
    make = HOSTILE[kind]
    x, dy = rng.standard_normal((2, 5, 33)).astype(dtype)
    weight, bias = rng.standard_normal((2, 33)).astype(dtype)
    want = fastnorm.layer_norm(x, 33, weight, bias, return_stats=True)
    got = fastnorm.layer_norm(make(x), 33, make(weight), make(bias), return_stats=True)
    assert_same_bits(got, want)
    assert type(got[0]) is np.ndarray
    _, mean, rstd = want
    assert_same_bits(
        fastnorm.layer_norm_backward(make(dy), make(x), 33, make(mean), make(rstd), make(weight)),
        fastnorm.layer_norm_backward(dy, x, 33, mean, rstd, weight),
    )
    assert_same_bits(fastnorm.moments(make(x)), fastnorm.moments(x))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs_of_a_module(kind, dtype, rng):
    norm = fastnorm.LayerNorm(33, dtype=dtype)
    x = rng.standard_normal((5, 33)).astype(dtype)
    assert_same_bits(norm(HOSTILE[kind](x)), norm(x))


@pytest.mark.parametrize("kind", CHANGEABLE)
def test_hostile_out(kind, dtype, rng):
    x = rng.standard_normal((5, 33)).astype(dtype)
    out = HOSTILE[kind](np.zeros_like(x))
    assert fastnorm.layer_norm(x, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), fastnorm.layer_norm(x))


@pytest.mark.parametrize("kind", CHANGEABLE)
def test_hostile_in_place(kind, dtype, rng):
    x = rng.standard_normal((5, 33)).astype(dtype)
    same = HOSTILE[kind](x.copy())
    fastnorm.layer_norm(same, out=same)
    np.testing.assert_array_equal(np.asarray(same), fastnorm.layer_norm(x))


def test_matrix_becomes_an_ndarray(dtype, rng):
    x = rng.standard_normal((4, 6)).astype(dtype)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(x)
    y = fastnorm.layer_norm(matrix)
    assert type(y) is np.ndarray
    assert_same_bits(y, fastnorm.layer_norm(x))


def test_windows_that_share_memory(dtype, rng):
    series = rng.standard_normal(500).astype(dtype)
    windows = np.lib.stride_tricks.sliding_window_view(series, 40)
    assert_same_bits(fastnorm.layer_norm(windows), fastnorm.layer_norm(windows.copy()))
    assert_same_bits(fastnorm.moments(windows), fastnorm.moments(windows.copy()))
    assert "copied" not in str(fastnorm.explain("layer_norm", windows))


def test_python_containers(rng):
    x = rng.standard_normal((3, 4))
    want = fastnorm.layer_norm(x)
    for same in (x.tolist(), tuple(map(tuple, x.tolist())), list(x)):
        assert_same_bits(fastnorm.layer_norm(same), want)
    assert_same_bits(fastnorm.layer_norm(array.array("d", x[0])), want[0])


def test_64_axes(rng):
    x = rng.standard_normal((1,) * 62 + (3, 5)).astype(np.float32)
    assert_same_bits(fastnorm.layer_norm(x), fastnorm.layer_norm(x.reshape(3, 5)).reshape(x.shape))
    every_other = np.lib.stride_tricks.as_strided(x, x.shape, (4,) * 62 + (20, 4))
    assert_same_bits(fastnorm.layer_norm(every_other), fastnorm.layer_norm(x))
    grid = np.zeros((2,) * 12 + (3,), np.float32)
    grid[...] = rng.standard_normal(grid.shape)
    odd = grid.transpose(*range(11, -1, -1), 12)
    assert_same_bits(fastnorm.layer_norm(odd), fastnorm.layer_norm(odd.copy()))
