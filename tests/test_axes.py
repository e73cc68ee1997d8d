"""Any axes of any layout: the bits are those of a contiguous copy with the normalised axes last.

Among them are rows that lie side by side (channels first), which have kernels of their own, and
arrays that no single stride walks. test_layout.py draws layouts of layer_norm and float32, float64;
here are the other ops and types, and every set of axes.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers.arrays import assert_same_bits, placed
from .helpers.storage import STORAGE, cast, compute_type, special_rows

storage = pytest.mark.parametrize("kind", STORAGE, ids=str)
SHAPES = ((13,), (7, 12), (4, 5, 9), (3, 4, 2, 6), (2, 3, 2, 4, 3), (70, 33), (2, 33, 70),
          (2, 1030, 9), (3, 1, 40), (9, 2050), (2, 9, 5, 17))  # fmt: skip


def axes_of(ndim):
    for count in range(1, ndim + 1):
        yield from itertools.combinations(range(ndim), count)


def lead_of(ndim, axes):
    return tuple(d for d in range(ndim) if d not in axes)


def moved(a, axes):
    """A contiguous copy, the axes last."""
    return np.ascontiguousarray(a.transpose(*lead_of(a.ndim, axes), *axes))


def values(rng, shape, kind):
    """Ordinary numbers, a few of them special."""
    x = cast(rng.standard_normal(shape) + 0.5, kind)
    if x.size > 60 and x.ndim > 1:
        flat = x.reshape(-1)
        flat[:20] = special_rows(rng, 20, kind)[13]
        flat[-1] = np.nan
    return x


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "backwards": lambda a: np.flip(np.flip(a).copy()),
    "every other": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "apart": lambda a: np.stack([a, a])[1] if a.ndim == 1 else np.pad(
        a, [(0, 0)] * (a.ndim - 1) + [(3, 2)])[..., 3:-2],
    "axes turned": lambda a: np.ascontiguousarray(np.moveaxis(a, 0, -1)).transpose(
        -1 % a.ndim, *range(a.ndim - 1)),
    "pairs swapped": lambda a: np.swapaxes(np.swapaxes(a, -1, -(a.ndim > 1) - 1).copy(),
                                           -1, -(a.ndim > 1) - 1),
    "in a record": lambda a: _field(a),
}  # fmt: skip


def _field(a):
    """Elements whose strides are no multiple of their size but for the alignment."""
    record = np.zeros(a.shape, np.dtype([("value", a.dtype), ("more", a.dtype, 2)]))
    record["value"] = a
    return record["value"]


FORWARD = {
    "layer_norm": lambda x, o: fastnorm.layer_norm(x, return_stats=True, **o),
    "rms_norm": lambda x, o: fastnorm.rms_norm(x, return_stats=True, **o),
    "moments": lambda x, o: fastnorm.moments(x, o["axis"]),
}


# ---- every set of axes ---------------------------------------------------------------------------


@storage
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_set_of_axes(isa, kind, shape, rng):
    x, dy, residual = (values(rng, shape, kind) for _ in range(3))
    for axes in axes_of(len(shape)):
        last, order = tuple(range(-len(axes), 0)), (*lead_of(len(shape), axes), *axes)
        inner = tuple(shape[d] for d in axes)
        w, b, linear_bias = cast(rng.standard_normal((3, *inner)), kind)
        plain, plain_dy, plain_residual = (moved(a, axes) for a in (x, dy, residual))
        y, *stats = fastnorm.layer_norm(plain, inner, w, b, return_stats=True)
        rms, rstd = fastnorm.rms_norm(plain, inner, w, 1e-6, offset=1.0, return_stats=True)
        total = fastnorm.add_layer_norm(plain, plain_residual, inner, w, b, linear_bias=linear_bias)
        grads = fastnorm.layer_norm_backward(plain_dy, plain, inner, *stats, w, b)
        rms_grads = fastnorm.rms_norm_backward(plain_dy, plain, inner, rstd, w, offset=1.0)
        mean_variance = fastnorm.moments(plain, last)
        for name in ("C", "F"):
            made = LAYOUTS[name]
            v, dv = made(x), made(dy)
            got = fastnorm.layer_norm(v, None, w, b, axis=axes, return_stats=True)
            assert_same_bits(
                (np.ascontiguousarray(got[0].transpose(order)), *got[1:]), (y, *stats),
                f"{name} {axes}",
            )  # fmt: skip
            got = fastnorm.rms_norm(v, None, w, 1e-6, axis=axes, offset=1.0)
            assert_same_bits(moved(got, axes), rms, f"rms {name} {axes}")
            got = fastnorm.add_layer_norm(
                v, made(residual), None, w, b, axis=axes, linear_bias=linear_bias
            )
            assert_same_bits(tuple(moved(a, axes) for a in got), total, f"add {name} {axes}")
            assert_same_bits(fastnorm.moments(v, axes), mean_variance, f"moments {name} {axes}")
            dx, *sums = fastnorm.layer_norm_backward(dv, v, None, *stats, w, b, axis=axes)
            assert_same_bits((moved(dx, axes), *sums), grads, f"backward {name} {axes}")
            dx, *sums = fastnorm.rms_norm_backward(dv, v, None, rstd, w, axis=axes, offset=1.0)
            assert_same_bits((moved(dx, axes), *sums), rms_grads, f"rms backward {name} {axes}")


@storage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, kind, layout, rng):
    made = LAYOUTS[layout]
    for shape in ((40,), (9, 33), (70, 20), (3, 17, 40), (2, 3, 4, 10), (2, 1030, 9)):
        x = values(rng, shape, kind)
        for axes in axes_of(len(shape)):
            for name, call in FORWARD.items():
                plain = call(moved(x, axes), {"axis": tuple(range(-len(axes), 0))})
                got = call(made(x), {"axis": axes})
                first = moved(got[0], axes) if name != "moments" else got[0]
                assert_same_bits((first, *got[1:]), plain, f"{name} {shape} {axes}")


@storage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_out(kind, layout, rng):
    """Written where it is to be, nothing beside it; x in another layout."""
    for shape, result in itertools.product(((9, 33), (70, 20), (3, 17, 40)), STORAGE):
        x = values(rng, shape, kind)
        for axes in axes_of(len(shape)):
            want = fastnorm.layer_norm(x, axis=axes, dtype=result)
            for v in (x, np.asfortranarray(x)):
                out = LAYOUTS[layout](np.zeros(shape, result))
                base = out if out.base is None else out.base
                untouched = np.count_nonzero(cast(base.view(result) if base.dtype.names else base,
                                                  "f8"))  # fmt: skip
                got = fastnorm.layer_norm(v, axis=axes, dtype=result, out=out)
                assert got is out
                assert_same_bits(np.ascontiguousarray(out), np.ascontiguousarray(want))
                out[...] = 0
                flat = base.view(result) if base.dtype.names else base
                assert np.count_nonzero(cast(flat, "f8")) == untouched


@storage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place(isa, kind, layout, rng):
    for shape in ((9, 33), (70, 20), (3, 17, 40), (2, 1030, 9)):
        x = values(rng, shape, kind)
        for axes in axes_of(len(shape)):
            want = fastnorm.layer_norm(x, axis=axes, return_stats=True)
            same = LAYOUTS[layout](x.copy())
            got = fastnorm.layer_norm(same, axis=axes, out=same, return_stats=True)
            assert got[0] is same
            assert_same_bits(
                tuple(np.ascontiguousarray(a) if a.ndim else a for a in got),
                tuple(np.ascontiguousarray(a) if a.ndim else a for a in want),
                f"{shape} {axes}",
            )


@storage
def test_broadcast_arrays(isa, kind, rng):
    """Strides of 0 along rows, along features, along both; windows that overlap."""
    for shape in ((5, 1), (1, 33), (5, 1, 33), (1, 5, 1), (1, 1), (4, 1, 7, 1)):
        x, dy = cast(rng.standard_normal((2, *shape)), kind)
        full = tuple(6 if n == 1 else n for n in shape)
        v, dv = np.broadcast_to(x, full), np.broadcast_to(dy, full)
        for axes in axes_of(len(shape)):
            want = fastnorm.layer_norm(v.copy(), axis=axes, return_stats=True)
            got = fastnorm.layer_norm(v, axis=axes, return_stats=True)
            assert_same_bits(got, want, f"{shape} {axes}")
            want = fastnorm.layer_norm_backward(dv.copy(), v.copy(), None, *got[1:], axis=axes)
            got = fastnorm.layer_norm_backward(dv, v, None, *got[1:], axis=axes)
            assert_same_bits(got, want, f"{shape} {axes}")
    series = cast(rng.standard_normal(200), kind)
    windows = np.lib.stride_tricks.sliding_window_view(series, 40)
    for axis in (0, 1, (0, 1)):
        assert_same_bits(
            fastnorm.layer_norm(windows, axis=axis), fastnorm.layer_norm(windows.copy(), axis=axis)
        )


# ---- drawn layouts -------------------------------------------------------------------------------


@st.composite
def views(draw, shape, kind, is_output=False):
    """Slices with steps, axes in any order, at any byte; for inputs strides of 0 too."""
    repeats = [not is_output and n > 0 and draw(st.integers(0, 5)) == 0 for n in shape]
    shape, full = tuple(1 if r else n for r, n in zip(repeats, shape, strict=True)), shape
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    offset = draw(st.integers(0, 9)) * draw(st.sampled_from([kind.itemsize, kind.itemsize, 1]))
    padded = [n * abs(s) + draw(st.integers(0, 1)) for n, s in zip(shape, steps, strict=True)]
    stored = [padded[axis] for axis in order]
    whole = placed(np.zeros(stored, kind), offset).transpose(np.argsort(order))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    whole[...] = cast(rng.standard_normal(whole.shape) + 0.5, kind)
    inner = whole[(..., *(slice(None, None, step) for step in steps))]
    inner = inner[(..., *(slice(0, n) for n in shape))]
    return np.broadcast_to(inner, full) if any(repeats) else inner


@hypothesis.settings(deadline=None, max_examples=250)
@hypothesis.given(st.data())
def test_drawn_layouts(data):
    """Of every type, with results of another type, parameters and activations; up to 5 axes."""
    kind, result = (data.draw(st.sampled_from(STORAGE)) for _ in range(2))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    shape = (*shape, data.draw(st.sampled_from([1, 2, 9, 17, 40, 70])))
    shape = tuple(data.draw(st.permutations(shape)))
    axes = tuple(data.draw(st.permutations(range(len(shape))))[: data.draw(
        st.integers(1, len(shape)))])  # fmt: skip
    ascending = tuple(sorted(axes))
    inner = tuple(shape[d] for d in ascending)
    x = data.draw(views(shape, kind))
    w_kind = data.draw(st.sampled_from(STORAGE))
    w, b = (data.draw(st.none() | views(inner, w_kind)) for _ in range(2))
    residual = data.draw(st.none() | views(shape, data.draw(st.sampled_from(STORAGE))))
    out = data.draw(st.none() | views(shape, result, is_output=True))
    options = {
        "dtype": result,
        "activation": data.draw(st.sampled_from([None, "silu", "gelu_tanh"])),
        "eps": data.draw(st.sampled_from([0.0, 1e-5])),
        "return_stats": True,
    }
    plain_w, plain_b = (None if p is None else p.copy() for p in (w, b))
    plain = moved(x, ascending)
    before = x.copy()
    if residual is None:
        want = fastnorm.layer_norm(plain, inner, plain_w, plain_b, **options)
        got = fastnorm.layer_norm(x, None, w, b, axis=axes, out=out, **options)
        arrays = 1
    else:
        want = fastnorm.add_layer_norm(
            plain, moved(residual, ascending), inner, plain_w, plain_b, **options
        )
        got = fastnorm.add_layer_norm(x, residual, None, w, b, axis=axes, out=out, **options)
        arrays = 2
    assert out is None or got[0] is out
    assert_same_bits((*(moved(a, ascending) for a in got[:arrays]), *got[arrays:]), want)
    assert_same_bits(np.array(x), before)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.data())
def test_drawn_layouts_backward(data):
    kind, dy_kind = (data.draw(st.sampled_from(STORAGE)) for _ in range(2))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    shape = (*shape, data.draw(st.sampled_from([1, 2, 9, 17, 40, 70])))
    shape = tuple(data.draw(st.permutations(shape)))
    axes = tuple(sorted(data.draw(st.permutations(range(len(shape))))[: data.draw(
        st.integers(1, len(shape)))]))  # fmt: skip
    inner = tuple(shape[d] for d in axes)
    x, dy = data.draw(views(shape, kind)), data.draw(views(shape, dy_kind))
    w = data.draw(st.none() | views(inner, data.draw(st.sampled_from(STORAGE))))
    mask = data.draw(
        st.sampled_from([(True, True, True), (True, False, False), (False, True, True)])
    )
    plain, plain_dy = moved(x, axes), moved(dy, axes)
    stats = fastnorm.layer_norm(plain, inner, return_stats=True)[1:]
    want = fastnorm.layer_norm_backward(
        plain_dy, plain, inner, *stats, None if w is None else w.copy(), output_mask=mask
    )
    got = fastnorm.layer_norm_backward(dy, x, None, *stats, w, axis=axes, output_mask=mask)
    if mask[0]:
        assert got[0].dtype == kind
        got, want = (moved(got[0], axes), *got[1:]), (want[0], *want[1:])
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


# ---- channels first ------------------------------------------------------------------------------


@storage
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64, 257, 1024, 1025, 2049])
def test_channels_first(isa, kind, channels, rng):
    """Every number of pixels to 70, about the strips that are taken at a time, and a few more."""
    few = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 130)
    for pixels in few if channels < 300 else (1, 8, 9, 33, 65, 131, 192):
        x = values(rng, (2, channels, pixels), kind)
        w, b = cast(rng.standard_normal((2, channels)), kind)
        for parameters in ((None, None), (w, None), (w, b)):
            got = fastnorm.layer_norm(x, None, *parameters, axis=1, return_stats=True)
            plain = moved(x, (1,))
            want = fastnorm.layer_norm(plain, channels, *parameters, return_stats=True)
            assert_same_bits((moved(got[0], (1,)), *got[1:]), want, f"{pixels} pixels")
        got = fastnorm.rms_norm(x, None, w, axis=1, activation="silu", return_stats=True)
        want = fastnorm.rms_norm(plain, channels, w, activation="silu", return_stats=True)
        assert_same_bits((moved(got[0], (1,)), *got[1:]), want, f"rms of {pixels} pixels")


def test_channels_first_is_not_copied(dtype, rng):
    x = rng.standard_normal((2, 33, 8, 9)).astype(dtype)
    plan = fastnorm.explain("layer_norm", x, axis=1)
    assert plan.regime == "columns"
    assert not plan.copies
    assert (plan.rows, plan.cols) == (144, 33)


@storage
def test_careful_rows_among_columns(isa, kind, rng):
    """Special rows side by side with ordinary ones, at every place of a strip."""
    for n, eps in itertools.product((5, 64, 257, 1030), (1e-5, 0.0)):
        rows = special_rows(rng, n, kind)
        rows = np.concatenate([rows, cast(rng.standard_normal((60, n)), kind)])
        far = cast(rng.standard_normal((20, n)) + 1e7, kind)
        rows = rng.permutation(np.concatenate([rows, far]))
        want = fastnorm.layer_norm(rows, eps=eps, return_stats=True)
        columns = np.asfortranarray(rows)
        got = fastnorm.layer_norm(columns, eps=eps, return_stats=True)
        assert_same_bits((np.ascontiguousarray(got[0]), *got[1:]), want, f"{n} {eps}")
        fastnorm.layer_norm(columns, eps=eps, out=columns)
        assert_same_bits(np.ascontiguousarray(columns), want[0])
        want = fastnorm.rms_norm(rows, eps=eps, dtype="f4")
        got = fastnorm.rms_norm(np.asfortranarray(rows), eps=eps, dtype="f4")
        assert_same_bits(np.ascontiguousarray(got), want)


@pytest.mark.parametrize("pixels", [9, 64, 200, 1000])
def test_partitions_of_columns(dtype, pixels, rng, partition):
    x, dy = rng.standard_normal((2, 3, 33, pixels)).astype(dtype)
    w, b = rng.standard_normal((2, 33)).astype(dtype)
    want = fastnorm.layer_norm(x, None, w, b, axis=1, return_stats=True)
    want_back = fastnorm.layer_norm_backward(dy, x, None, *want[1:], w, b, axis=1)
    for parts in (1, 2, 3, 7):
        partition(parts)
        got = fastnorm.layer_norm(x, None, w, b, axis=1, return_stats=True)
        assert_same_bits(got, want, f"{parts} parts")
        got = fastnorm.layer_norm_backward(dy, x, None, *want[1:], w, b, axis=1)
        assert_same_bits(got, want_back, f"{parts} parts")


@pytest.mark.parametrize("offset", [0, 8, 48])
@pytest.mark.parametrize("shape", [(2, 33, 36_000), (1, 65, 36_003), (200, 33, 352)], ids=str)
def test_streamed_columns(dtype, shape, offset, rng, partition):
    """Outputs that are written past the cache; careful rows interrupt the stream."""
    x = rng.standard_normal(shape).astype(dtype)
    hard = special_rows(rng, shape[1], dtype)
    places = rng.integers(0, shape[2], 200)
    x[rng.integers(0, shape[0], 200), :, places] = hard[rng.integers(0, 20, 200)]
    w, b = rng.standard_normal((2, shape[1])).astype(dtype)
    out = placed(np.zeros_like(x), offset)
    assert fastnorm.explain("layer_norm", x, None, w, b, axis=1, out=out).stream
    plain = moved(x, (1,))
    want = fastnorm.layer_norm(plain, shape[1], w, b)
    for parts in (0, 3):
        partition(parts)
        out[...] = 0
        fastnorm.layer_norm(x, None, w, b, axis=1, out=out)
        assert_same_bits(moved(out, (1,)), want, f"{parts} parts")
    fastnorm.layer_norm(x, None, w, b, axis=1, out=x)
    assert_same_bits(moved(x, (1,)), want, "in place")


@storage
def test_nothing_is_written_beside_columns(isa, kind, rng):
    """Of an output whose rows lie side by side with other memory on both sides."""
    for n, rows in itertools.product((5, 33, 1030), (1, 7, 8, 17, 33, 63, 64, 65, 130)):
        x = cast(rng.standard_normal((n, rows)), kind)
        room = cast(np.full((n, rows + 7), 3), kind)
        out = room[:, 3 : 3 + rows]
        fastnorm.layer_norm(x, axis=0, out=out)
        assert_same_bits(np.ascontiguousarray(out), fastnorm.layer_norm(x.copy(), axis=0))
        assert (cast(np.delete(room, np.s_[3 : 3 + rows], axis=1), "f4") == 3).all()
        same = cast(np.full((n, rows + 7), 3), kind)
        same[:, 3 : 3 + rows] = x
        view = same[:, 3 : 3 + rows]
        fastnorm.layer_norm(view, axis=0, out=view)
        assert_same_bits(same, room)


# ---- nothing in, odd forms -----------------------------------------------------------------------


@storage
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (2, 0, 3), (0, 0), (0, 3, 0), (3, 0, 2, 0)], ids=str
)
def test_nothing_in(kind, shape):
    x = np.empty(shape, kind)
    for axes in axes_of(len(shape)):
        lead = tuple(shape[d] for d in lead_of(len(shape), axes))
        inner = tuple(shape[d] for d in axes)
        for v in (x, np.asfortranarray(x)):
            y, mean, rstd = fastnorm.layer_norm(v, axis=axes, return_stats=True)
            assert (y.shape, y.dtype, mean.dtype) == (shape, kind, compute_type(kind))
            assert mean.shape == rstd.shape == lead
            assert not mean.any()
            assert np.isnan(rstd).all()
            dx, dweight, dbias = fastnorm.layer_norm_backward(v, v, None, mean, rstd, axis=axes)
            assert dx.shape == shape
            assert dweight.shape == dbias.shape == inner
            assert not dweight.any()
            assert not dbias.any()
            m, variance = fastnorm.moments(v, axes)
            assert m.shape == variance.shape == lead
            _, total = fastnorm.add_rms_norm(v, v, axis=axes)
            assert total.shape == shape


@pytest.mark.parametrize("kind", [k for k in STORAGE if k.kind == "f"], ids=str)
def test_byte_swapped_and_unaligned(kind, rng):
    x, dy = cast(rng.standard_normal((2, 3, 20, 9)), kind)
    w = cast(rng.standard_normal(20), kind)
    want = fastnorm.layer_norm(x, None, w, axis=1, return_stats=True)
    want_back = fastnorm.layer_norm_backward(dy, x, None, *want[1:], w, axis=1)
    for odd in (lambda a: a.astype(a.dtype.newbyteorder("S")), lambda a: placed(a, 1)):
        got = fastnorm.layer_norm(odd(x), None, odd(w), axis=1, return_stats=True)
        assert_same_bits(got, want)
        stats = [odd(s) for s in got[1:]]
        got = fastnorm.layer_norm_backward(odd(dy), odd(x), None, *stats, odd(w), axis=1)
        assert_same_bits(got, want_back)
        out = odd(np.zeros_like(x))
        assert fastnorm.layer_norm(x, None, w, axis=1, out=out) is out
        assert_same_bits(cast(out, kind), want[0])
        same = odd(x)
        fastnorm.layer_norm(same, None, w, axis=1, out=same)
        assert_same_bits(cast(same, kind), want[0])
        assert_same_bits(fastnorm.moments(odd(x), 1), fastnorm.moments(x, 1))
        mask = rng.random(x.shape) < 0.7
        assert_same_bits(
            fastnorm.layer_norm(odd(x), axis=1, mask=mask),
            fastnorm.layer_norm(x, axis=1, mask=mask),
        )


def test_instruction_sets_agree_on_columns(isa, rng):
    for kind, shape in itertools.product(STORAGE, ((40, 150), (1030, 20))):
        x = values(rng, shape, kind)
        got = fastnorm.layer_norm(x, axis=0, return_stats=True)
        before = _core.isa_active()
        _core.select_isa(_core.isa_names()[-1])
        assert_same_bits(got, fastnorm.layer_norm(x, axis=0, return_stats=True))
        _core.select_isa(before)
