"""Rows of different lengths: lengths=, mask= and packed segments.

Each row has the bits that it has alone; what is left out is neither read into a result nor written
as anything but 0.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, checks, dispatch, reference

from .helpers.arrays import assert_same_bits, guarded, placed
from .helpers.storage import STORAGE, cast, compute_type, special_rows

# Regimes change behind each of these; rows of 1,024 and fewer go in groups.
LENGTHS = (1, 2, 16, 33, 64, 65, 256, 257, 1024, 1025, 2048, 2049)
storage = pytest.mark.parametrize("kind", STORAGE, ids=str)
NORMS = ("layer_norm", "rms_norm")
norms = pytest.mark.parametrize("name", NORMS)


def rows_of(rng, rows, n, dtype):
    x = cast(rng.standard_normal((rows, n)) + 0.5, dtype)
    x[1::4] = special_rows(rng, n, dtype)[rng.integers(0, 20, len(x[1::4]))]
    return x


def parameters(rng, name, n, dtype):
    count = 2 if name == "layer_norm" else 1
    return list(cast(rng.standard_normal((count, n)), dtype))


def forward(name, x, params=(), **options):
    return getattr(fastnorm, name)(x, x.shape[-1], *params, return_stats=True, **options)


def backward(name, dy, x, stats, params=(), **options):
    function = getattr(fastnorm, f"{name}_backward")
    return function(dy, x, x.shape[-1], *stats, *params, **options)


def kept_of(given, x):
    """Which elements count, as a full mask."""
    if "mask" in given:
        return np.broadcast_to(given["mask"], x.shape)
    lengths = np.broadcast_to(given["lengths"], x.shape[:-1])
    return np.arange(x.shape[-1]) < lengths[..., None]


def assert_rows_alone(name, x, dy, params, given, eps=1e-5, **options):
    """Forward and backward: each row as the array of its elements that count."""
    kept = kept_of(given, x)
    y, *stats = forward(name, x, params, eps=eps, **given, **options)
    dx, *sums = backward(name, dy, x, stats, params, **given)
    assert not cast(y[~kept], np.float64).any(), "y is not 0 where nothing counts"
    assert not cast(dx[~kept], np.float64).any(), "dx is not 0 where nothing counts"
    for row in np.ndindex(x.shape[:-1]):
        k = kept[row]
        own = [np.ascontiguousarray(p[k]) for p in params]
        alone = forward(name, np.ascontiguousarray(x[row][k]), own, eps=eps, **options)
        got = (np.ascontiguousarray(y[row][k]), *(np.asarray(s[row]) for s in stats))
        assert_same_bits(got, alone, f"row {row}: {k.sum()} of {k.size}")
        got = np.ascontiguousarray(dx[row][k])
        want = backward(name, dy[row][k], x[row][k], alone[1:], own)[0]
        assert_same_bits(got, want, f"dx of row {row}: {k.sum()} of {k.size}")
    return sums


# ---- each row alone ------------------------------------------------------------------------------


@storage
@norms
def test_lengths(isa, kind, name, rng):
    for n, rows in itertools.product(LENGTHS, (1, 3, 9)):
        x, dy = rows_of(rng, rows, n, kind), cast(rng.standard_normal((rows, n)), kind)
        lengths = rng.integers(0, n + 1, rows)
        lengths[: min(rows, 4)] = [n, 0, 1, n - 1][:rows]
        given = {"lengths": rng.permutation(lengths)}
        assert_rows_alone(name, x, dy, parameters(rng, name, n, kind), given)


@storage
@norms
def test_masks(isa, kind, name, rng):
    for n, rows in itertools.product(LENGTHS, (1, 3, 9)):
        x, dy = rows_of(rng, rows, n, kind), cast(rng.standard_normal((rows, n)), kind)
        mask = rng.random((rows, n)) < rng.random((rows, 1))
        mask[::4] = True
        mask[2::4] = False
        assert_rows_alone(name, x, dy, parameters(rng, name, n, kind), {"mask": mask})


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_careful_rows(isa, dtype, eps, rng):
    """Those that a mask leaves hard: the hard elements count, or are left out."""
    for n in (5, 64, 257, 1030):
        x = special_rows(rng, n, dtype)
        x = np.concatenate([x, rng.standard_normal((3, n)).astype(dtype) + 1e7])
        x[:, ::3] = rng.standard_normal((len(x), len(x[0, ::3])))
        dy = rng.standard_normal(x.shape).astype(dtype)
        for mask in (np.arange(n) % 3 > 0, np.arange(n) % 3 == 0):
            for name in NORMS:
                assert_rows_alone(name, x, dy, (), {"mask": mask}, eps)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_drawn_masks_and_lengths(data):
    """Shapes that broadcast, any type, any activation and result."""
    kind = data.draw(st.sampled_from(STORAGE))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=2)))
    n = data.draw(st.sampled_from([1, 3, 16, 40, 70]))
    x_shape = (*shape, n)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rows_of(rng, int(np.prod(shape)), n, kind).reshape(x_shape)
    dy = cast(rng.standard_normal(x_shape), kind)
    name = data.draw(st.sampled_from(NORMS))
    params = data.draw(st.sampled_from([(), parameters(rng, name, n, kind)]))
    if data.draw(st.booleans()):
        full = x_shape[data.draw(st.integers(0, len(x_shape))) :]
        own = tuple(data.draw(st.sampled_from([1, length])) for length in full)
        step = data.draw(st.sampled_from([1, -1, 2]))
        wide = rng.random((*own[:-1], own[-1] * abs(step)) if own else ()) < 0.6
        given = {"mask": wide[..., ::step] if own else np.bool_(wide)}
    else:
        full = shape[data.draw(st.integers(0, len(shape))) :]
        own = tuple(data.draw(st.sampled_from([1, length])) for length in full)
        integer = data.draw(st.sampled_from(["i8", "u1", "i4", "u8"]))
        given = {"lengths": rng.integers(0, n + 1, own).astype(integer)}
    options = {
        "activation": data.draw(st.sampled_from([None, "relu", "gelu"])),
        "dtype": data.draw(st.none() | st.sampled_from(STORAGE)),
    }
    assert_rows_alone(name, x, dy, params, given, **options)


@storage
@norms
def test_all_of_a_row_is_the_row(isa, kind, name, rng):
    """A mask of True and full lengths change no bit, of no result."""
    for n in (5, 64, 1030):
        x, dy = rows_of(rng, 20, n, kind), cast(rng.standard_normal((20, n)), kind)
        params = parameters(rng, name, n, kind)
        want = forward(name, x, params)
        want_back = backward(name, dy, x, want[1:], params)
        for given in ({"mask": np.bool_(True)}, {"lengths": n}, {"mask": np.ones(n, bool)}):
            assert_same_bits(forward(name, x, params, **given), want)
            assert_same_bits(backward(name, dy, x, want[1:], params, **given), want_back)


@storage
@norms
def test_a_mask_of_first_elements_is_a_length(kind, name, rng):
    for n in (1, 7, 64, 300, 1030):
        x, dy = rows_of(rng, 19, n, kind), cast(rng.standard_normal((19, n)), kind)
        lengths = rng.integers(0, n + 1, 19)
        mask = np.arange(n) < lengths[:, None]
        got = forward(name, x, mask=mask)
        assert_same_bits(got, forward(name, x, lengths=lengths))
        # NaN and infinity in a row are in dweight of all columns that it reaches.
        x = np.where(np.isfinite(cast(x, np.float64)), cast(x, np.float64), 1)
        x = cast(x, kind)
        stats = forward(name, x, mask=mask)[1:]
        got = backward(name, dy, x, stats, mask=mask)
        assert_same_bits(got, backward(name, dy, x, stats, lengths=lengths))


def test_empty_rows(dtype):
    """Nothing counts: mean 0, rstd NaN, zeros."""
    x = np.full((4, 9), np.nan, dtype)
    for given in ({"lengths": 0}, {"mask": np.bool_(False)}, {"mask": np.zeros((4, 9), bool)}):
        y, mean, rstd = forward("layer_norm", x, **given)
        assert_same_bits(y, np.zeros_like(x))
        assert_same_bits((mean, rstd), (np.zeros(4, dtype), np.full(4, np.nan, dtype)))
        grads = backward("layer_norm", x, x, (mean, rstd), **given)
        assert_same_bits(grads, (np.zeros_like(x), np.zeros(9, dtype), np.zeros(9, dtype)))
        y, rstd = forward("rms_norm", x, **given)
        assert not y.any()
        q, scale = fastnorm.layer_norm(x, dtype="i1", **given)
        assert not q.any()
        assert (scale == np.finfo("f4").tiny).all()
        y = fastnorm.layer_norm(x, 9, None, np.ones(9, dtype), activation="gelu", **given)
        assert not y.any()


# ---- what is left out ----------------------------------------------------------------------------


@storage
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_left_out_does_not_leak(isa, kind, poison, rng):
    """Of x, dy, and what was in `out` before."""
    for n in (5, 64, 300, 1030, 2050):
        x, dy = cast(rng.standard_normal((2, 9, n)), kind)
        lengths = rng.integers(0, n + 1, 9)
        for given in ({"lengths": lengths}, {"mask": rng.random((9, n)) < 0.6}):
            kept = kept_of(given, x)
            bad_x, bad_dy = (cast(np.where(kept, a.astype("f8"), poison), kind) for a in (x, dy))
            for name in NORMS:
                params = parameters(rng, name, n, kind)
                want = forward(name, x, params, **given)
                out = np.full_like(x, np.nan)
                assert_same_bits(forward(name, bad_x, params, out=out, **given), want)
                grads = backward(name, dy, x, want[1:], params, **given)
                got = backward(name, bad_dy, bad_x, want[1:], params, **given)
                assert_same_bits(got, grads, f"{name} {n} {list(given)}")
                q = fastnorm.layer_norm(bad_x, dtype="i1", **given)
                assert_same_bits(q, fastnorm.layer_norm(x, dtype="i1", **given))


@pytest.mark.parametrize("from_output", [False, True])
def test_masked_columns_have_no_gradient(isa, dtype, from_output, rng):
    """A column that no row has: 0, whatever stands there and whatever its weight is."""
    for n in (6, 70, 1030):
        rows = rng.standard_normal((20, n)).astype(dtype)
        rows[:4] = np.array([1e38, -1e38, 1e30, -3e37], dtype)[:, None]
        mask = np.ones((20, n), bool)
        mask[:, 2] = mask[:, -1] = False
        weight, bias = (rng.random((2, n)) + 0.5).astype(dtype)
        weight[2], bias[-1] = 0, 1e30
        x = np.where(mask, rows, np.nan)
        y, mean, rstd = forward("layer_norm", x, (weight, bias), mask=mask)
        dy = rng.standard_normal(x.shape).astype(dtype)
        given = y if from_output else x
        dx, dweight, dbias = backward(
            "layer_norm", dy, given, (mean, rstd), (weight, bias), mask=mask,
            from_output=from_output,
        )  # fmt: skip
        for a in (dweight, dbias):
            assert np.isfinite(a).all()
            assert not a[[2, -1]].any()
        assert np.isfinite(dx).all()


@storage
@norms
def test_in_place(isa, kind, name, rng):
    """Rows in flight at the same time, careful ones among them."""
    for n, rows in itertools.product((1, 16, 65, 257, 1024, 1025, 2049), (1, 2, 4, 5, 9)):
        x = rows_of(rng, rows, n, kind)
        params = parameters(rng, name, n, kind)
        for given in (
            {"lengths": rng.integers(0, n + 1, rows)},
            {"mask": rng.random((rows, n)) < 0.6},
        ):
            want = forward(name, x, params, **given)
            same = x.copy()
            got = forward(name, same, params, out=same, **given)
            assert got[0] is same
            assert_same_bits(got, want, f"{rows} rows of {n}, {list(given)}")


@storage
def test_nothing_is_written_beside_out(isa, kind, rng):
    for n in (1, 7, 31, 64, 129, 1030):
        x = cast(rng.standard_normal((5, n)), kind)
        lengths, mask = rng.integers(0, n + 1, 5), rng.random((5, n)) < 0.5
        for given in ({"lengths": lengths}, {"mask": mask}):
            with guarded(x.shape, kind, kind.itemsize) as out:
                fastnorm.layer_norm(x, out=out, **given)
        room = np.full((5, n + 2), 99, np.int8)
        fastnorm.layer_norm(x, out=room[:, 1:-1], dtype="i1", mask=mask)
        assert (room[:, [0, -1]] == 99).all()


# ---- layouts -------------------------------------------------------------------------------------


@storage
def test_layouts_and_axes(isa, kind, rng):
    """Axes, strides and orders of x, dy and the mask; elements are numbered in C order."""
    for axes in ((2,), (0,), (1,), (0, 2), (1, 2), (0, 1, 2)):
        shape = (4, 9, 12)
        x, dy = cast(rng.standard_normal((2, *shape)), kind)
        lead = tuple(d for d in range(3) if d not in axes)
        order = (*lead, *axes)
        last = tuple(shape[d] for d in axes)
        mask = rng.random(shape) < 0.6
        lengths = rng.integers(0, np.prod(last) + 1, [shape[d] for d in lead])
        for given, moved in (
            ({"mask": np.asfortranarray(mask)}, {"mask": mask.transpose(order)}),
            ({"mask": mask[::-1].copy()[::-1]}, {"mask": mask.transpose(order)}),
            ({"lengths": np.array(lengths, order="F")}, {"lengths": lengths}),
        ):
            plain_x, plain_dy = (np.ascontiguousarray(a.transpose(order)) for a in (x, dy))
            want = fastnorm.layer_norm(plain_x, last, return_stats=True, **moved)
            want_back = fastnorm.layer_norm_backward(plain_dy, plain_x, last, *want[1:], **moved)
            for made in (np.array, np.asfortranarray, lambda a: np.repeat(a, 2, 2)[..., ::2]):
                y, mean, rstd = fastnorm.layer_norm(made(x), axis=axes, return_stats=True, **given)
                y = np.ascontiguousarray(y.transpose(order))
                assert_same_bits((y, mean, rstd), want)
                dx, *sums = fastnorm.layer_norm_backward(
                    made(dy), made(x), None, mean, rstd, axis=axes, **given
                )
                dx = np.ascontiguousarray(dx.transpose(order))
                assert_same_bits((dx, *sums), want_back)


def test_a_mask_along_broadcast_axes(rng):
    """Of each sample, of each feature, of one number: never expanded in memory."""
    x = rng.standard_normal((3, 4, 70)).astype(np.float32)
    for shape in ((70,), (4, 1), (4, 70), (3, 1, 1), (3, 1, 70), (1, 4, 1), (1,), ()):
        mask = rng.random(shape) < 0.6
        full = np.broadcast_to(mask, x.shape)
        want = forward("layer_norm", x, mask=full.copy())
        assert_same_bits(forward("layer_norm", x, mask=mask), want)
        assert_same_bits(
            backward("layer_norm", x, x, want[1:], mask=mask),
            backward("layer_norm", x, x, want[1:], mask=full.copy()),
        )


@pytest.mark.parametrize("n", [7, 300, 1100, 2100])
def test_partitions(dtype, n, rng, partition):
    x, dy = rng.standard_normal((2, 100, n)).astype(dtype)
    w, b = rng.standard_normal((2, n)).astype(dtype)
    for given in ({"lengths": rng.integers(0, n + 1, 100)}, {"mask": rng.random((100, n)) < 0.6}):
        partition(0)
        want = forward("layer_norm", x, (w, b), **given)
        want_back = backward("layer_norm", dy, x, want[1:], (w, b), **given)
        for parts in (1, 2, 3, 7):
            partition(parts)
            assert_same_bits(forward("layer_norm", x, (w, b), **given), want)
            got = backward("layer_norm", dy, x, want[1:], (w, b), **given)
            assert_same_bits(got, want_back, f"{parts} parts")


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("n", [768, 1500])
def test_past_the_cache(isa, dtype, n, offset, rng, partition):
    """Outputs that are written past the cache: as their pieces, which are not."""
    rows = (9 << 20) // (n * dtype.itemsize)
    x = np.resize(rows_of(rng, 200, n, dtype), (rows, n))
    w, b = rng.standard_normal((2, n)).astype(dtype)
    out = placed(np.full_like(x, 3), offset)
    for given in ({"lengths": rng.integers(0, n + 1, rows)}, {"mask": rng.random(x.shape) < 0.6}):
        if "lengths" in given:
            plan = fastnorm.explain("layer_norm", x, n, w, b, out=out, **given)
            assert plan.stream, str(plan)
        pieces = []
        for i in range(0, rows, 300):
            own = {name: value[i : i + 300] for name, value in given.items()}
            pieces.append(fastnorm.layer_norm(x[i : i + 300], n, w, b, **own))
        want = np.concatenate(pieces)
        for parts in (0, 3):
            partition(parts)
            got = fastnorm.layer_norm(x, n, w, b, out=out, **given)
            assert_same_bits(got, want, f"{list(given)}, {parts} parts")
        partition(0)


@pytest.mark.parametrize(("size", "dy_size", "w_size"), [
    (1e20, 1e30, 1e10), (1e-20, 1e-30, 1e-15), (1.0, 1e20, 1e-30), (1e-30, 1e-10, 1e-35),
    (1e38, 1.0, 1.0), (1.0, 1e30, 1e30),
])  # fmt: skip
def test_gradients_beyond_the_range(isa, size, dy_size, w_size, rng):
    """dy times the weight need not be a number of the type for dx to be one."""
    for n in (8, 70, 1030):
        x, dy = (rng.standard_normal((3, n)) * s for s in (size, dy_size))
        x, dy = np.clip(x, -3e38, 3e38).astype(np.float32), dy.astype(np.float32)
        w = (rng.random(n) * w_size + w_size).astype(np.float32)
        stats = forward("layer_norm", x, (w,), eps=0.0)[1:]
        want = backward("layer_norm", dy, x, stats, (w,))
        for given in ({"lengths": n}, {"mask": np.bool_(True)}):
            got = backward("layer_norm", dy, x, stats, (w,), **given)
            assert_same_bits(got, want, f"{list(given)} {n}")
        dx, *_ = fastnorm.segment_layer_norm_backward(dy, x, [0, 1, 2, 3], *stats, w)
        assert_same_bits(dx, want[0], f"segments {n}")


# ---- sums over rows ------------------------------------------------------------------------------


@norms
def test_gradients_of_parameters(isa, dtype, name, rng):
    for n, rows in itertools.product((1, 33, 300, 1030), (1, 5, 40)):
        x, dy = rng.standard_normal((2, rows, n)).astype(dtype)
        params = parameters(rng, name, n, dtype)
        lengths, mask = rng.integers(0, n + 1, rows), rng.random((rows, n)) < 0.7
        for given in ({"lengths": lengths}, {"mask": mask}):
            stats = forward(name, x, params, **given)[1:]
            _, *sums = backward(name, dy, x, stats, params, **given)
            eps = {} if name == "layer_norm" else {"eps": float(np.finfo(dtype).eps)}
            xh, *exact = getattr(reference, name)(x, return_stats=True, **given, **eps)
            _, *want = getattr(reference, f"{name}_backward")(dy, x, n, *exact, *params, **given)
            kept = kept_of(given, x)
            magnitudes = [np.abs(dy) * np.maximum(1, np.abs(xh)) * kept, np.abs(dy) * kept]
            for got, w, m in zip(sums, want, magnitudes, strict=False):
                # Of a row of two elements, or of fewer, dy (x - m) r has lost the digits of x - m.
                error = accuracy.sum_error(got, w, m.sum(0))
                assert error <= 2 * accuracy.bound(dtype), f"{rows} rows of {n}"


@norms
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_from_output(isa, dtype, name, offset, rng):
    for n in (5, 64, 1030):
        x, dy = rng.standard_normal((2, 20, n)).astype(dtype)
        params = parameters(rng, name, n, dtype)
        params[0] = (rng.random(n) + 0.5).astype(dtype)
        options = {"offset": offset} if name == "rms_norm" else {}
        for given in ({"lengths": rng.integers(2, n + 1, 20)}, {"mask": rng.random((20, n)) < 0.8}):
            y, *stats = forward(name, x, params, **given, **options)
            got = backward(name, dy, y, stats, params, from_output=True, **given, **options)
            want = getattr(reference, f"{name}_backward")(
                dy, y, n, *stats, *params, from_output=True, **given, **options
            )
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=8e-6 * np.abs(b).max())


# ---- packed rows ---------------------------------------------------------------------------------

SEGMENTS = ("segment_layer_norm", "segment_rms_norm")
FEATURES = [(), (1,), (5,), (64,), (3, 40), (1023,), (1025,), (2100,)]
segments = pytest.mark.parametrize("name", SEGMENTS)


def packed(rng, features, dtype, edges, name):
    """x, dy and parameters; one segment in three is a special row."""
    total = edges[-1]
    x = cast(rng.standard_normal((total, *features)) + 0.5, dtype)
    for begin, end in itertools.islice(itertools.pairwise(edges), 1, None, 3):
        part = x[begin:end]
        if part.size:
            part[...] = special_rows(rng, part.size, dtype)[rng.integers(0, 20)].reshape(part.shape)
    dy = cast(rng.standard_normal(x.shape), dtype)
    count = 2 if name == "segment_layer_norm" else 1
    return x, dy, list(cast(rng.standard_normal((count, *features)), dtype))


def edges_of(rng, features):
    """Empty segments at both ends and in the middle, one of one element, longer ones."""
    width = max(1, int(np.prod(features)))
    longest = max(2, 2500 // width)
    counts = [0, 1, 0, 0, 2, longest, 1, *rng.integers(0, min(longest, 60), 14), 0]
    return np.cumsum([0, *counts])


@storage
@segments
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_segments_alone(isa, kind, name, features, rng):
    """Each is one row of all its elements, with parameters that repeat."""
    norm = name.removeprefix("segment_")
    edges = edges_of(rng, features)
    x, dy, params = packed(rng, features, kind, edges, name)
    y, *stats = getattr(fastnorm, name)(x, edges, *params, return_stats=True)
    dx, *_ = getattr(fastnorm, f"{name}_backward")(dy, x, edges, *stats, *params)
    assert stats[0].shape == (len(edges) - 1,)
    assert stats[0].dtype == compute_type(kind)
    for s, (begin, end) in enumerate(itertools.pairwise(edges)):
        row = x[begin:end].reshape(-1)
        own = [np.broadcast_to(p, (end - begin, *features)).reshape(-1) for p in params]
        alone = forward(norm, row, own)
        got = (y[begin:end].reshape(-1), *(np.asarray(a[s]) for a in stats))
        assert_same_bits(got, alone, f"segment {s} of {row.size}")
        want = backward(norm, dy[begin:end].reshape(-1), row, alone[1:], own)[0]
        assert_same_bits(dx[begin:end].reshape(-1), want, f"dx of segment {s} of {row.size}")


@segments
@pytest.mark.parametrize("features", [(), (1,), (7,), (3, 40), (1025,)], ids=str)
def test_gradients_of_segments(isa, dtype, name, features, rng):
    edges = edges_of(rng, features)
    x, dy = rng.standard_normal((2, edges[-1], *features)).astype(dtype)
    params = list(rng.standard_normal((2, *features)).astype(dtype))[: len(name) // 9]
    params = params if name == "segment_layer_norm" else params[:1]
    _, *stats = getattr(fastnorm, name)(x, edges, *params, return_stats=True)
    backward_name = f"{name}_backward"
    got = getattr(fastnorm, backward_name)(dy, x, edges, *stats, *params)
    exact = [np.asarray(s, np.float64) for s in stats]
    want = getattr(reference, backward_name)(dy, x, edges, *exact, *params)
    size = np.abs(want[0]).max()
    bound = 40 * accuracy.bound(dtype)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=bound * size)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.shape == features
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1, np.abs(dy).sum(0).max()))
    for mask in itertools.product((True, False), repeat=len(got)):
        some = getattr(fastnorm, backward_name)(dy, x, edges, *stats, *params, output_mask=mask)
        for wanted, a, b in zip(mask, some, got, strict=True):
            if wanted:
                assert_same_bits(a, b)
            else:
                assert a is None


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("longest", [768, 1500])
def test_segments_past_the_cache(isa, dtype, longest, offset, rng, partition):
    """Neighbours share cache lines; careful and empty rows interrupt the stream."""
    edges = np.cumsum([0, *rng.integers(0, longest + 1, (10 << 21) // (longest * dtype.itemsize))])
    x = np.resize(rows_of(rng, 100, longest, dtype), edges[-1])
    out = placed(np.full_like(x, 3), offset)
    plan = fastnorm.explain("segment_layer_norm", x, edges, out=out)
    assert plan.stream, str(plan)
    pieces = [edges[i : i + 300 + 1] for i in range(0, len(edges) - 1, 300)]
    want = np.concatenate([fastnorm.segment_layer_norm(x[p[0] : p[-1]], p - p[0]) for p in pieces])
    for parts in (0, 3):
        partition(parts)
        assert_same_bits(fastnorm.segment_layer_norm(x, edges, out=out), want, f"{parts} parts")


@pytest.mark.parametrize("activation", [None, "relu"])
def test_large_packed_rows_keep_to_themselves(activation, dtype, rng, partition):
    """With an activation too, with and without `out`: nothing beyond a row, nor beyond the last."""
    lengths = rng.integers(600, 1001, (10 << 20) // (800 * dtype.itemsize))
    edges = np.cumsum([0, *lengths])
    x = np.resize(rows_of(rng, 100, 1000, dtype), edges[-1])
    places = placed(np.full(len(x) + 2000, 7, dtype), 0)
    want = np.concatenate([
        fastnorm.layer_norm(x[edges[i] : edges[i + 1]], activation=activation)
        for i in range(len(lengths))
    ])  # fmt: skip
    for parts in (0, 2, 5):
        partition(parts)
        out = places[: len(x)]
        fastnorm.segment_layer_norm(x, edges, out=out, activation=activation)
        assert_same_bits(out, want, f"{parts} parts")
        assert (places[len(x) :] == 7).all()
        for _ in range(3):  # the second has warm memory
            got = fastnorm.segment_layer_norm(x, edges, activation=activation)
            assert_same_bits(got, want, f"{parts} parts, new")
            del got


def test_packed_rows_that_are_not_aligned(dtype, rng):
    x, dy = rng.standard_normal((2, 9)).astype(dtype)
    memory = np.zeros((2, x.nbytes + 1), np.uint8)
    odd = [row[1:].view(dtype) for row in memory]
    odd[0][:], odd[1][:] = x, dy
    edges = np.array([0, 4, 9])
    want = fastnorm.segment_layer_norm(x, edges, return_stats=True)
    got = fastnorm.segment_layer_norm(odd[0], edges, return_stats=True)
    assert_same_bits(got, want)
    plan = fastnorm.explain("segment_layer_norm", odd[0], edges)
    assert plan.copies == ("x is copied: its elements are not aligned",)
    call = dispatch.CALLS["segment_layer_norm"](
        odd[0], edges, None, None, 1e-5, None, None, False, None
    )
    assert call.packed("x", odd[0]).flags.aligned
    want = fastnorm.segment_layer_norm_backward(dy, x, edges, *want[1:])
    assert_same_bits(fastnorm.segment_layer_norm_backward(odd[1], odd[0], edges, *got[1:]), want)


@segments
def test_partitions_of_segments(dtype, name, rng, partition):
    for features in ((), (40,)):
        edges = np.cumsum([0, *rng.integers(0, 30, 90)])
        x, dy, params = packed(rng, features, dtype, edges, name)
        call = getattr(fastnorm, name)
        partition(0)
        want = call(x, edges, *params, return_stats=True)
        want_back = getattr(fastnorm, f"{name}_backward")(dy, x, edges, *want[1:], *params)
        for parts in (2, 3, 7):
            partition(parts)
            assert_same_bits(call(x, edges, *params, return_stats=True), want)
            got = getattr(fastnorm, f"{name}_backward")(dy, x, edges, *want[1:], *params)
            assert_same_bits(got, want_back)


def test_equal_segments_are_rows(dtype, rng):
    """With as many rows as segments, dweight is in another order of sums, all else is the same."""
    x, dy = rng.standard_normal((2, 20, 6, 9)).astype(dtype)
    weight, bias = rng.standard_normal((2, 9)).astype(dtype)
    full = [np.broadcast_to(p, (6, 9)).copy() for p in (weight, bias)]
    want = fastnorm.layer_norm(x, (6, 9), *full, return_stats=True)
    flat, edges = x.reshape(120, 9), np.arange(0, 121, 6)
    got = fastnorm.segment_layer_norm(flat, edges, weight, bias, return_stats=True)
    assert_same_bits((got[0].reshape(x.shape), *got[1:]), want)
    dx, dweight, dbias = fastnorm.layer_norm_backward(dy, x, (6, 9), *want[1:], *full)
    back = fastnorm.segment_layer_norm_backward(
        dy.reshape(120, 9), flat, edges, *got[1:], weight, bias
    )
    assert_same_bits(back[0].reshape(x.shape), dx)
    tolerance = 1e-5 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(back[1], dweight.sum(0), rtol=0, atol=20 * tolerance)
    np.testing.assert_allclose(back[2], dbias.sum(0), rtol=0, atol=20 * tolerance)


@storage
def test_layouts_of_segments(kind, rng):
    x, dy = cast(rng.standard_normal((2, 40, 3, 8)), kind)
    w, b = cast(rng.standard_normal((2, 3, 8)), kind)
    edges = np.array([0, 3, 3, 17, 40])
    want = fastnorm.segment_layer_norm(x, edges, w, b, return_stats=True)
    want_back = fastnorm.segment_layer_norm_backward(dy, x, edges, *want[1:], w, b)
    for made in (
        np.asfortranarray,
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.array(a.astype("f8")).astype(a.dtype),
    ):
        got = fastnorm.segment_layer_norm(made(x), edges, made(w), made(b), return_stats=True)
        assert_same_bits((np.ascontiguousarray(got[0]), *got[1:]), want)
        back = fastnorm.segment_layer_norm_backward(
            made(dy), made(x), edges, *want[1:], made(w), made(b)
        )
        assert_same_bits((np.ascontiguousarray(back[0]), *back[1:]), want_back)
        out = made(np.zeros_like(x))
        assert fastnorm.segment_layer_norm(x, edges, w, b, out=out) is out
        assert_same_bits(np.ascontiguousarray(out), want[0])
        same = made(x)
        fastnorm.segment_layer_norm(same, edges, w, b, out=same)
        assert_same_bits(np.ascontiguousarray(same), want[0])
    for integer in ("u1", "i2", ">i8", "u8"):
        assert_same_bits(fastnorm.segment_layer_norm(x, edges.astype(integer), w, b), want[0])
    assert_same_bits(fastnorm.segment_layer_norm(x, edges.tolist(), w, b), want[0])


@storage
@segments
def test_no_segments_and_empty_ones(kind, name, rng):
    function, backwards = getattr(fastnorm, name), getattr(fastnorm, f"{name}_backward")
    for features, edges in (
        ((5,), [0]), ((5,), [0, 0, 0]), ((), [0]), ((0,), [0, 2, 2, 7]), ((3, 0), [0, 1]),
    ):  # fmt: skip
        x = np.ones((edges[-1], *features), kind)
        y, *stats = function(x, edges, return_stats=True)
        assert (y.shape, y.dtype) == (x.shape, kind)
        assert all(s.shape == (len(edges) - 1,) for s in stats)
        assert np.isnan(stats[-1]).all()
        dx, *sums = backwards(x, x, edges, *stats)
        assert dx.shape == x.shape
        assert all(s.shape == features and not s.any() for s in sums)
        q, scale = function(x, edges, dtype="i1")
        assert (q.shape, scale.shape) == (x.shape, (len(edges) - 1,))


# ---- errors --------------------------------------------------------------------------------------


def test_errors(rng):
    x = rng.standard_normal((4, 9))
    with pytest.raises(TypeError, match="lengths and mask: got both"):
        fastnorm.layer_norm(x, lengths=3, mask=x > 0)
    for wrong in (-1, 10, [1, 2, 3, 10], [-1, 2, 3, 4]):
        with pytest.raises(ValueError, match="lengths: got"):
            fastnorm.layer_norm(x, lengths=wrong)
    with pytest.raises(ValueError, match="lengths: got shape"):
        fastnorm.layer_norm(x, lengths=[1, 2, 3])
    with pytest.raises(TypeError, match="lengths: got dtype"):
        fastnorm.layer_norm(x, lengths=[1.0] * 4)
    with pytest.raises(TypeError, match="mask: got dtype"):
        fastnorm.layer_norm(x, mask=np.ones((4, 9), np.uint8))
    with pytest.raises(ValueError, match="mask: got shape"):
        fastnorm.layer_norm(x, mask=np.ones((2, 9), bool))
    with pytest.raises(ValueError, match="mask: got shape"):
        fastnorm.layer_norm(x, mask=np.ones((1, 4, 9), bool))
    for wrong in ([0, 3], [1, 4], [0, 3, 2, 4], [], [[0, 4]], [0, 2, 5]):
        with pytest.raises((ValueError, TypeError), match="offsets: got"):
            fastnorm.segment_layer_norm(x, wrong)
    with pytest.raises(TypeError, match="offsets: got dtype"):
        fastnorm.segment_layer_norm(x, [0.0, 4.0])
    with pytest.raises(ValueError, match="weight: got shape"):
        fastnorm.segment_layer_norm(x, [0, 4], np.ones((4, 9)))


@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_what_the_kernels_trust_is_their_own(shape):
    """Another thread may write to the caller's lengths once they have been checked."""
    given = np.full(shape, 4, np.intp)
    lengths = checks.as_lengths(given, (3,), 4)
    assert not np.shares_memory(lengths, given)
    assert lengths.flags.c_contiguous
    assert lengths.dtype == np.intp
    offsets = np.array([0, 3])
    assert not np.shares_memory(checks.as_offsets(offsets, 3), offsets)


def test_lengths_need_not_be_aligned():
    given = np.ndarray(3, np.intp, bytearray(3 * np.intp().itemsize + 1), 1)
    given[...] = [1, 2, 4]
    lengths = checks.as_lengths(given, (3,), 4)
    assert lengths.flags.aligned
    assert lengths.tolist() == [1, 2, 4]
