"""Fused ops: each has the bits of the unfused calls, where its definition rounds as they do; and
against the reference where it does not."""

import functools
import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference
from fastnorm.reference_rows import ACTIVATIONS

from .helpers.arrays import assert_same_bits
from .helpers.calls import FORWARD, Problem
from .helpers.storage import (
    FLOAT32,
    FLOAT64,
    STORAGE,
    cast,
    compute_type,
    rounded,
    special_rows,
)

# Regimes change behind each of these.
LENGTHS = (1, 2, 16, 17, 33, 64, 65, 256, 257, 1024, 1025, 2048, 2049)
PI = np.longdouble("3.14159265358979323846")
ACTIVE = [name for name in ACTIVATIONS if name]
PAIRS = list(itertools.product(STORAGE, STORAGE))
storage = pytest.mark.parametrize("kind", STORAGE, ids=str)
pairs = pytest.mark.parametrize(("kind", "other"), PAIRS, ids=lambda d: d.name)


def rows_of(rng, rows, n, dtype):
    """Ordinary rows, the second and last one special."""
    x = cast(rng.standard_normal((rows, n)) + 0.5, dtype)
    x[1::7] = special_rows(rng, n, dtype)[rng.integers(0, 20, len(x[1::7]))]
    return x


def sum_type(a, b):
    return a if a == b else compute_type(a, b)


def added(x, residual, linear_bias=None, gate=None):
    """(gate * x + linear_bias) + residual, each rounded in the type that is computed in."""
    computed = compute_type(x.dtype, residual.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = cast(x, computed)
        total = total if gate is None else cast(gate, computed) * total
        total = total if linear_bias is None else total + cast(linear_bias, computed)
        return total + cast(residual, computed)


# ---- a residual ----------------------------------------------------------------------------------


@pairs
def test_add_layer_norm(isa, kind, other, rng):
    for n, rows in itertools.product((1, 33, 256, 1025, 2049), (1, 2, 5)):
        x, residual = rows_of(rng, rows, n, kind), rows_of(rng, rows, n, other)
        w, b, linear_bias = cast(rng.standard_normal((3, n)), other)
        for add, eps in itertools.product((None, linear_bias), (1e-5, 0.0)):
            y, total, mean, rstd = fastnorm.add_layer_norm(
                x, residual, n, w, b, eps, linear_bias=add, return_stats=True
            )
            assert_same_bits(total, rounded(added(x, residual, add), sum_type(kind, other)))
            want = fastnorm.layer_norm(total, n, w, b, eps, dtype=kind, return_stats=True)
            assert_same_bits((y, mean, rstd), want, f"{rows} rows of {n}, {eps=}")


@pairs
def test_add_rms_norm(isa, kind, other, rng):
    for n, rows in itertools.product((1, 33, 256, 1025, 2049), (1, 2, 5)):
        x, residual = rows_of(rng, rows, n, kind), rows_of(rng, rows, n, other)
        w, linear_bias = cast(rng.standard_normal((2, n)), other)
        eps = float(np.finfo(compute_type(kind, other)).eps)
        for first in (False, True):
            options = {"offset": 1.0, "round_before_weight": first, "return_stats": True}
            y, total, rstd = fastnorm.add_rms_norm(
                x, residual, n, w, linear_bias=linear_bias, **options
            )
            want = rounded(added(x, residual, linear_bias), sum_type(kind, other))
            assert_same_bits(total, want)
            want = fastnorm.rms_norm(total, n, w, eps, dtype=kind, **options)
            assert_same_bits((y, rstd), want, f"{rows} rows of {n}")


@pairs
def test_statistics_of_the_unrounded_sum(isa, kind, other, rng):
    for n in (5, 64, 257, 1030):
        x, residual = rows_of(rng, 5, n, kind), rows_of(rng, 5, n, other)
        w = cast(rng.standard_normal(n), kind)
        full = added(x, residual)
        got = fastnorm.add_layer_norm(x, residual, n, w, round_sum=False, return_stats=True)
        want = fastnorm.layer_norm(full, n, w, dtype=kind, return_stats=True)
        assert_same_bits(got[1], rounded(full, sum_type(kind, other)))
        assert_same_bits((got[0], *got[2:]), want)
        got = fastnorm.add_rms_norm(x, residual, n, w, 1e-6, round_sum=False, return_stats=True)
        want = fastnorm.rms_norm(full, n, w, 1e-6, dtype=kind, return_stats=True)
        assert_same_bits((got[0], *got[2:]), want)


@storage
def test_row_counts_and_widths(isa, kind, rng):
    for n, rows in itertools.product(LENGTHS, range(1, 10)):
        x, residual = rows_of(rng, rows, n, kind), rows_of(rng, rows, n, kind)
        y, total = fastnorm.add_layer_norm(x, residual)
        assert_same_bits(total, rounded(added(x, residual), kind))
        assert_same_bits(y, fastnorm.layer_norm(total), f"{rows} rows of {n}")


def test_against_the_reference(dtype, rng):
    for n in (3, 64, 300, 1025):
        x, residual = rng.standard_normal((2, 4, n)).astype(dtype)
        w, b, linear_bias = rng.standard_normal((3, n)).astype(dtype)
        y, total = fastnorm.add_layer_norm(x, residual, n, w, b, linear_bias=linear_bias)
        _, exact = reference.add_layer_norm(
            x, residual, n, w, b, linear_bias=linear_bias, sum_dtype=dtype
        )
        assert_same_bits(total, exact.astype(dtype))
        assert accuracy.layer_norm_error(y, total, w, b) <= accuracy.bound(dtype)


IN_PLACE = {
    "sum is residual": lambda x, r, o: {"sum_out": r},
    "sum is x": lambda x, r, o: {"sum_out": x},
    "y is x": lambda x, r, o: {"out": x},
    "y is x, sum is residual": lambda x, r, o: {"out": x, "sum_out": r},
    "y elsewhere, sum is x": lambda x, r, o: {"out": o, "sum_out": x},
}


@storage
@pytest.mark.parametrize("how", IN_PLACE)
def test_in_place(isa, kind, how, rng):
    for n, rows in itertools.product(LENGTHS, (1, 2, 3, 5, 9)):
        x, residual = rows_of(rng, rows, n, kind), rows_of(rng, rows, n, kind)
        w = cast(rng.standard_normal(n), kind)
        want = fastnorm.add_layer_norm(x, residual, n, w, return_stats=True)
        outs = IN_PLACE[how](x, residual, np.empty_like(x))
        got = fastnorm.add_layer_norm(x, residual, n, w, return_stats=True, **outs)
        assert got[0] is outs.get("out", got[0])
        assert got[1] is outs.get("sum_out", got[1])
        assert_same_bits(got, want, f"{rows} rows of {n}")


@pytest.mark.parametrize("view", [np.s_[:, ::2], np.s_[::-1, 3:], np.s_[..., ::-1]], ids=str)
@storage
def test_in_place_through_views(kind, view, rng):
    """Strided, backwards: what lies between stays as it is."""
    x, residual = cast(rng.standard_normal((2, 9, 140)), kind)
    want = fastnorm.add_layer_norm(x[view].copy(), residual[view].copy())
    between = [a.copy() for a in (x, residual)]
    y, total = fastnorm.add_layer_norm(x[view], residual[view], out=x[view], sum_out=residual[view])
    assert_same_bits((np.array(y, order="C"), np.array(total, order="C")), want)
    for array, result in zip(between, want, strict=True):
        array[view] = result
    assert_same_bits((x, residual), tuple(between))


def test_in_place_of_a_residual_of_another_type(rng):
    """The residual stream in float32, layers in a half type: the sum may be the residual."""
    for kind in STORAGE[2:]:
        x = cast(rng.standard_normal((6, 70)), kind)
        residual = rng.standard_normal((6, 70)).astype(np.float32)
        want = fastnorm.add_rms_norm(x, residual)
        got = fastnorm.add_rms_norm(x, residual, sum_out=residual)
        assert got[1] is residual
        assert_same_bits(got, want)


def test_results_that_overlap_something_else(rng):
    """Only x itself may become y, and only x or the residual the sum; nothing is written before."""
    room = rng.standard_normal((20, 40)).astype(np.float32)
    before = room.copy()
    x, residual, linear_bias = room[:6], room[8:14], room[18]
    wrong = {
        "x": room[1:7],
        "residual": room[7:13],
        "linear_bias": room[14:20],
        "x backwards": room[:6][::-1],
    }
    for name, (other, out) in itertools.product(("out", "sum_out"), wrong.items()):
        with pytest.raises(
            ValueError, match=f"{name}: got an array that overlaps {other.split()[0]}"
        ):
            fastnorm.add_layer_norm(x, residual, linear_bias=linear_bias, **{name: out})
    with pytest.raises(ValueError, match="out: got an array that overlaps residual"):
        fastnorm.add_layer_norm(x, residual, out=residual)
    gate = room[14:16]
    with pytest.raises(ValueError, match="sum_out: got an array that overlaps gate"):
        fastnorm.adaptive_layer_norm(
            x.reshape(2, 3, 40), gate, None, gate=gate, residual=residual.reshape(2, 3, 40),
            sum_out=room[14:20].reshape(2, 3, 40),
        )  # fmt: skip
    np.testing.assert_array_equal(room, before)


def test_y_and_sum_in_one_place(rng):
    x, residual, out = rng.standard_normal((3, 6, 40)).astype(np.float32)
    with pytest.raises(ValueError, match="overlaps sum_out"):
        fastnorm.add_layer_norm(x, residual, out=out, sum_out=out)
    with pytest.raises(ValueError, match="overlaps"):
        fastnorm.add_layer_norm(x, residual, out=x, sum_out=x)


@storage
def test_add_backward(isa, kind, rng):
    """dx = dsum + the gradient through the norm of the sum."""
    for n, rows in itertools.product((5, 64, 1025), (1, 20)):
        total, dy, dsum = cast(rng.standard_normal((3, rows, n)), kind)
        w = cast(rng.standard_normal(n), kind)
        _, mean, rstd = fastnorm.layer_norm(total, return_stats=True)
        plain = fastnorm.layer_norm_backward(dy, total, n, mean, rstd, w)
        got = fastnorm.add_layer_norm_backward(dy, None, total, n, mean, rstd, w)
        assert_same_bits(got, plain)
        got = fastnorm.add_layer_norm_backward(dy, dsum, total, n, mean, rstd, w)
        exact = reference.layer_norm_backward(dy, total, n, mean, rstd, w)[0]
        exact = exact + dsum.astype(np.float64)
        size = np.abs(exact).max() + np.abs(dsum.astype(np.float64)).max()
        assert np.abs(got[0].astype(np.float64) - exact).max() <= 2 * epsilon(kind) * size
        assert_same_bits(got[1:], plain[1:])
        _, rstd = fastnorm.rms_norm(total, return_stats=True)
        plain = fastnorm.rms_norm_backward(dy, total, n, rstd, w, offset=1.0)
        got = fastnorm.add_rms_norm_backward(dy, None, total, n, rstd, w, offset=1.0)
        assert_same_bits(got, plain)


def epsilon(kind):
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-22, "float64": 2.0**-51}[
        kind.name
    ]


@pairs
def test_add_backward_of_a_gradient_of_another_type(kind, other, rng):
    total, dy = cast(rng.standard_normal((2, 6, 30)), kind)
    dsum = cast(rng.integers(-3, 4, (6, 30)), other)
    _, mean, rstd = fastnorm.layer_norm(total, return_stats=True)
    got = fastnorm.add_layer_norm_backward(dy, dsum, total, 30, mean, rstd)
    want = fastnorm.add_layer_norm_backward(dy, cast(dsum, kind), total, 30, mean, rstd)
    assert_same_bits(got, want)


def test_the_gradient_of_linear_bias(rng):
    """Is dx summed over the rows: by differences."""
    x, residual, dy, dsum = rng.standard_normal((4, 5, 6))
    w, b, linear_bias = rng.standard_normal((3, 6))

    def loss(linear_bias):
        y, total = fastnorm.add_layer_norm(x, residual, 6, w, b, linear_bias=linear_bias)
        return float((dy * y + dsum * total).sum())

    _, total, mean, rstd = fastnorm.add_layer_norm(
        x, residual, 6, w, b, linear_bias=linear_bias, return_stats=True
    )
    dx, _, _ = fastnorm.add_layer_norm_backward(dy, dsum, total, 6, mean, rstd, w, b)
    for i in range(6):
        step = 1e-5 * np.eye(6)[i]
        slope = (loss(linear_bias + step) - loss(linear_bias - step)) / 2e-5
        np.testing.assert_allclose(dx.sum(0)[i], slope, rtol=1e-6, atol=1e-7)


# ---- scale and shift of each sample --------------------------------------------------------------


def by_samples(function, *arrays):
    """`function` of each sample alone; its results stacked."""
    results = [function(*(a[i] for a in arrays)) for i in range(len(arrays[0]))]
    return tuple(np.stack(parts) for parts in zip(*results, strict=True))


@pairs
def test_adaptive_layer_norm(isa, kind, other, rng):
    """Is layer_norm with the weight 1 + scale, rounded in the type that is computed in."""
    computed = compute_type(kind)
    for n, tokens in itertools.product((1, 33, 257, 1025), (1, 4)):
        x = rows_of(rng, 3 * tokens, n, kind).reshape(3, tokens, n)
        scale, shift = cast(rng.standard_normal((2, 3, n)), other)
        got = fastnorm.adaptive_layer_norm(x, scale, shift, return_stats=True)
        weight = cast(scale, computed) + computed.type(1)

        def alone(x, w, b, n=n):
            return fastnorm.layer_norm(x, n, w, b, 1e-6, return_stats=True)

        want = by_samples(alone, x, weight, cast(shift, computed))
        assert_same_bits(got, want, f"{tokens} tokens of {n}")


@pairs
def test_adaptive_layer_norm_with_residual_and_gate(isa, kind, other, rng):
    for n, tokens in itertools.product((1, 33, 257, 1025), (1, 4)):
        x = rows_of(rng, 3 * tokens, n, kind).reshape(3, tokens, n)
        residual = rows_of(rng, 3 * tokens, n, other).reshape(3, tokens, n)
        scale, shift, gate = cast(rng.standard_normal((3, 3, n)), other)
        for g in (None, gate):
            y, total, mean, rstd = fastnorm.adaptive_layer_norm(
                x, scale, shift, gate=g, residual=residual, return_stats=True
            )
            full = added(x, residual, gate=None if g is None else g[:, None])
            assert_same_bits(total, rounded(full, sum_type(kind, other)))
            want = fastnorm.adaptive_layer_norm(total, scale, shift, dtype=kind, return_stats=True)
            assert_same_bits((y, mean, rstd), want)
            got = fastnorm.adaptive_layer_norm(
                x, scale, shift, gate=g, residual=residual, round_sum=False
            )
            want = fastnorm.adaptive_layer_norm(full, scale, shift, dtype=kind)
            assert_same_bits(got[0], want)


@storage
def test_shapes_of_scale_and_gate(kind, rng):
    """(B, n), or as many axes as x; one sample; one scale for all; one of each token."""
    x = cast(rng.standard_normal((3, 4, 5, 30)), kind)
    residual = cast(rng.standard_normal(x.shape), kind)
    for shape in ((3, 30), (3, 1, 1, 30), (1, 1, 1, 30), (3, 4, 1, 30), (1, 1, 5, 30), x.shape):
        scale, shift, gate = cast(rng.standard_normal((3, *shape)), kind)
        full = [
            np.broadcast_to(a.reshape(3, 1, 1, 30) if a.ndim == 2 else a, x.shape).copy()
            for a in (scale, shift, gate)
        ]
        got = fastnorm.adaptive_layer_norm(x, scale, shift, gate=gate, residual=residual)
        want = fastnorm.adaptive_layer_norm(x, *full[:2], gate=full[2], residual=residual)
        assert_same_bits(got, want, f"{shape}")
        assert_same_bits(
            fastnorm.adaptive_layer_norm(x[:1], scale[:1], shift[:1]),
            fastnorm.adaptive_layer_norm(x, scale, shift)[:1],
        )
    assert_same_bits(
        fastnorm.adaptive_layer_norm(x, scale, None),
        fastnorm.adaptive_layer_norm(x, scale, np.full_like(scale, -0.0)),
    )


@storage
def test_adaptive_on_several_axes_and_in_place(kind, rng):
    x = cast(rng.standard_normal((2, 6, 3, 20)), kind)
    scale, shift, gate = cast(rng.standard_normal((3, 2, 3, 20)), kind)
    flat = [a.reshape(2, 60) for a in (scale, shift, gate)]
    residual = cast(rng.standard_normal(x.shape), kind)
    want = fastnorm.adaptive_layer_norm(
        x.reshape(2, 6, 60), flat[0], flat[1], gate=flat[2], residual=residual.reshape(2, 6, 60)
    )
    got = fastnorm.adaptive_layer_norm(x, scale, shift, (3, 20), gate=gate, residual=residual)
    assert_same_bits(got, tuple(a.reshape(x.shape) for a in want))
    again = fastnorm.adaptive_layer_norm(
        x, scale, shift, (3, 20), gate=gate, residual=residual, out=x, sum_out=residual
    )
    assert again[0] is x
    assert again[1] is residual
    assert_same_bits(again, got)


def test_adaptive_where_rows_lie_side_by_side(isa, rng):
    """One sample has one scale for all rows, which then may go a vector of them at a time."""
    for kind, other in PAIRS:
        x = cast(rng.standard_normal((1, 20, 70)), kind).transpose(0, 2, 1)
        scale, shift = cast(rng.standard_normal((2, 1, 20)), other)
        want = fastnorm.adaptive_layer_norm(np.ascontiguousarray(x), scale, shift)
        got = fastnorm.adaptive_layer_norm(x, scale, shift)
        assert_same_bits(np.ascontiguousarray(got), want, f"{kind} {other}")


@storage
def test_adaptive_backward(isa, kind, rng):
    """Is layer_norm_backward of each sample, with the weight 1 + scale."""
    computed = compute_type(kind)
    for n, tokens in itertools.product((1, 33, 1025), (1, 3, 20)):
        x = rows_of(rng, 2 * tokens, n, kind).reshape(2, tokens, n)
        dy = cast(rng.standard_normal(x.shape), kind)
        scale = cast(rng.standard_normal((2, n)), kind)
        _, mean, rstd = fastnorm.layer_norm(x, eps=1e-6, return_stats=True)

        def alone(dy, x, mean, rstd, w, n=n):
            return fastnorm.layer_norm_backward(dy, x, n, mean, rstd, w)

        weight = cast(scale, computed) + computed.type(1)
        want = by_samples(alone, dy, x, mean, rstd, weight)
        got = fastnorm.adaptive_layer_norm_backward(dy, x, scale, n, mean, rstd)
        assert_same_bits(got, want, f"{tokens} tokens of {n}")
        for mask in itertools.product((True, False), repeat=3):
            some = fastnorm.adaptive_layer_norm_backward(
                dy, x, scale, n, mean, rstd, output_mask=mask
            )
            for wanted, a, b in zip(mask, some, want, strict=True):
                assert a is None if not wanted else not assert_same_bits(a, b)


def test_adaptive_backward_of_other_shapes(dtype, rng):
    x, dy = rng.standard_normal((2, 3, 4, 5, 20)).astype(dtype)
    _, mean, rstd = fastnorm.layer_norm(x, eps=1e-6, return_stats=True)
    for shape in ((3, 20), (3, 1, 1, 20), (1, 1, 1, 20), (3, 4, 1, 20), (1, 1, 5, 20), x.shape):
        scale = rng.standard_normal(shape).astype(dtype)
        got = fastnorm.adaptive_layer_norm_backward(dy, x, scale, 20, mean, rstd)
        want = reference.adaptive_layer_norm_backward(dy, x, scale, 20, mean, rstd)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=8e-6 * np.abs(b).max(), err_msg=shape)


# ---- several norms of one array, and parameters of each head -------------------------------------


@storage
def test_parallel_layer_norm(isa, kind, rng):
    for n, rows in itertools.product((1, 33, 256, 1025, 2049), (1, 2, 9)):
        x = rows_of(rng, rows, n, kind)
        weights = [cast(rng.standard_normal(n), kind), None, cast(rng.standard_normal(n), FLOAT32)]
        biases = [None, cast(rng.standard_normal(n), FLOAT64), cast(rng.standard_normal(n), kind)]
        ys, *stats = fastnorm.parallel_layer_norm(x, n, weights, biases, return_stats=True)
        for y, w, b in zip(ys, weights, biases, strict=True):
            want = fastnorm.layer_norm(x, n, w, b, return_stats=True)
            assert_same_bits((y, *stats), want, f"{rows} rows of {n}")


@storage
def test_parallel_into_given_arrays(kind, rng):
    x = cast(rng.standard_normal((7, 3, 40)), kind)
    w = cast(rng.standard_normal((2, 40)), kind)
    outs = (np.empty_like(x), None, np.zeros((7, 3, 80), kind)[..., ::2])
    got = fastnorm.parallel_layer_norm(x, 40, [w[0], w[1], None], out=outs)
    want = fastnorm.parallel_layer_norm(x, (40,), (w[0], w[1], None), (None,) * 3)
    assert got[0] is outs[0]
    assert got[2] is outs[2]
    assert_same_bits(tuple(np.ascontiguousarray(y) for y in got), want)
    with pytest.raises(ValueError, match=r"out\[0\]: got an array that overlaps x"):
        fastnorm.parallel_layer_norm(x, 40, [w[0], w[1]], out=[x, None])
    with pytest.raises(ValueError, match="overlaps"):
        fastnorm.parallel_layer_norm(x, 40, [w[0], w[1]], out=[outs[0], outs[0]])


def test_parallel_in_another_order_of_axes(isa, dtype, rng):
    x = np.asfortranarray(rng.standard_normal((50, 33)).astype(dtype))
    w, b = rng.standard_normal((2, 2, 33)).astype(dtype)
    got = fastnorm.parallel_layer_norm(x, 33, list(w), list(b))
    want = fastnorm.parallel_layer_norm(np.ascontiguousarray(x), 33, list(w), list(b))
    assert_same_bits(tuple(np.ascontiguousarray(y) for y in got), want)


HEADS = {
    "layer_norm": lambda x, w, b: fastnorm.layer_norm(x, x.shape[-1], w, b, return_stats=True),
    "rms_norm": lambda x, w, b: fastnorm.rms_norm(x, x.shape[-1], w, offset=1.0, return_stats=True),
}


@storage
@pytest.mark.parametrize("name", HEADS)
def test_parameters_of_each_head(isa, kind, name, rng):
    for n, heads in itertools.product((1, 33, 64, 257, 1025), (1, 3, 8)):
        x = rows_of(rng, 10 * heads, n, kind).reshape(2, 5, heads, n)
        w, b = cast(rng.standard_normal((2, heads, n)), kind)
        got = HEADS[name](x, w, b)
        for h in range(heads):
            want = HEADS[name](np.ascontiguousarray(x[:, :, h]), w[h], b[h])
            assert_same_bits(tuple(a[:, :, h].copy() for a in got), want, f"head {h} of {n}")


def test_gradients_of_each_head(isa, dtype, rng):
    for n, heads in itertools.product((1, 33, 1025), (1, 3)):
        x, dy = rng.standard_normal((2, 4, 7, heads, n)).astype(dtype)
        w, b = rng.standard_normal((2, heads, n)).astype(dtype)
        _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
        got = fastnorm.layer_norm_backward(dy, x, n, mean, rstd, w, b)
        (rms,) = fastnorm.rms_norm(x, return_stats=True)[1:]
        got_rms = fastnorm.rms_norm_backward(dy, x, n, rms, w, offset=1.0)
        for h in range(heads):
            parts = [np.ascontiguousarray(a[:, :, h]) for a in (dy, x, mean, rstd, rms)]
            want = fastnorm.layer_norm_backward(*parts[:2], n, *parts[2:4], w[h], b[h])
            assert_same_bits((got[0][:, :, h].copy(), got[1][h], got[2][h]), want)
            want = fastnorm.rms_norm_backward(*parts[:2], n, parts[4], w[h], offset=1.0)
            assert_same_bits((got_rms[0][:, :, h].copy(), got_rms[1][h]), want)


SHAPES = [(20,), (3, 20), (1, 20), (5, 1, 20), (5, 3, 20), (2, 1, 1, 20), (2, 5, 3, 20)]


@pytest.mark.parametrize("bias_shape", [None, *SHAPES], ids=str)
@pytest.mark.parametrize("weight_shape", [None, *SHAPES], ids=str)
def test_gradients_of_parameters_with_different_axes(weight_shape, bias_shape, rng):
    """A gradient is the sum over all rows that share an element of its parameter."""
    x, dy = rng.standard_normal((2, 2, 5, 3, 20))
    w, b = (None if s is None else rng.standard_normal(s) for s in (weight_shape, bias_shape))
    y, mean, rstd = fastnorm.layer_norm(x, 20, w, b, return_stats=True)
    np.testing.assert_allclose(y, reference.layer_norm(x, 20, w, b), rtol=1e-12, atol=1e-12)
    want = reference.layer_norm_backward(dy, x, 20, mean, rstd, w, b)
    for mask in itertools.product((True, False), repeat=3):
        got = fastnorm.layer_norm_backward(dy, x, 20, mean, rstd, w, b, output_mask=mask)
        for a, exact in itertools.compress(zip(got, want, strict=True), mask):
            assert a.shape == exact.shape
            np.testing.assert_allclose(a, exact, rtol=1e-10, atol=1e-12)


def test_parameters_of_each_head_with_lengths_and_masks(dtype, rng):
    p = Problem(rng, 40, dtype, tokens=5, heads=3, special=False)
    call = functools.partial(
        fastnorm.layer_norm, p.x, 40, p.head_weight, p.head_bias, return_stats=True
    )
    for given in ({"lengths": p.lengths}, {"mask": p.mask}):
        y, mean, rstd = call(**given)
        got = fastnorm.layer_norm_backward(
            p.dy, p.x, 40, mean, rstd, p.head_weight, p.head_bias, **given
        )
        for h in range(3):
            (kind, values), x = *given.items(), p.x[:, :, h]
            own = {kind: values[:, :, h]}
            w, b = p.head_weight[h], p.head_bias[h]
            want = fastnorm.layer_norm(x, 40, w, b, return_stats=True, **own)
            assert_same_bits(tuple(a[:, :, h].copy() for a in (y, mean, rstd)), want)
            want = fastnorm.layer_norm_backward(p.dy[:, :, h], x, 40, *want[1:], w, b, **own)
            assert_same_bits((got[0][:, :, h].copy(), got[1][h], got[2][h]), want)


# ---- activations ---------------------------------------------------------------------------------


def exactly(activation, y):
    """The function in extended precision; ACTIVATIONS has constants of float64."""
    if activation != "gelu_tanh":
        return ACTIVATIONS[activation](y)
    root, cubic = np.sqrt(np.longdouble(8) / PI), np.longdouble("0.044715")
    return y / (1 + np.exp(-root * (y + cubic * y**3)))


@pytest.mark.parametrize("activation", ACTIVE)
def test_activations(isa, dtype, activation, rng):
    """Of the normalised value as it would have been stored: within 3 ulps of the function."""
    for n, rows in itertools.product((1, 7, 64, 257, 1025), (1, 5)):
        x = cast(rng.standard_normal((rows, n)), dtype)
        w, b = cast(8 * rng.standard_normal((2, n)), dtype)
        y = fastnorm.layer_norm(x, n, w, b, return_stats=True)
        got = fastnorm.layer_norm(x, n, w, b, return_stats=True, activation=activation)
        with np.errstate(over="ignore"):
            exact = exactly(activation, y[0].astype(np.longdouble))
        least = np.finfo(dtype).smallest_subnormal
        unit = np.maximum(np.abs(exact) * np.finfo(dtype).eps, least)
        error = np.abs(got[0] - exact) / unit
        if activation == "gelu" and dtype == np.float64:
            error -= y[0] ** 2 / 32  # what the exact one errs by: its erfc is float64's
        assert error.max() <= 3, f"{activation} of {y[0][error == error.max()]}"
        assert_same_bits(got[1:], y[1:])


@storage
@pytest.mark.parametrize("activation", ACTIVE)
@pytest.mark.parametrize("name", [n for n in FORWARD if n != "layer_norm"])
def test_activations_of_every_op(kind, name, activation, rng):
    """An op's activation is layer_norm's: of y as it is computed, rounded once."""
    for n in (5, 64, 1025):
        p = Problem(rng, n, kind)
        computed = compute_type(kind)
        y, *others = FORWARD[name](p, dtype=computed)
        got = FORWARD[name](p, activation=activation)
        # Every y of the batch as the bias of a constant row.
        bias = y.reshape(1, -1)
        active = fastnorm.layer_norm(
            np.ones_like(bias), bias.size, None, bias[0], activation=activation
        ).reshape(y.shape)
        if "mask" in name:
            active[~p.mask] = 0
        elif "lengths" in name:
            active[np.arange(n) >= p.lengths[..., None]] = 0
        same = np.signbit(active) == np.signbit(cast(got[0], computed))
        assert same[active != 0].all()
        zero = computed.type(0)
        assert_same_bits(
            cast(got[0], computed) + zero, cast(rounded(active, kind), computed) + zero
        )
        assert_same_bits(got[1:], tuple(others))


# ---- int8 ----------------------------------------------------------------------------------------


def assert_int8(got, y, axes_of=lambda a: a):
    q, scale = got[:2]
    want_q, want_scale = reference.dynamic_int8(axes_of(y))
    assert_same_bits(axes_of(q), want_q)
    assert_same_bits(scale, want_scale)


ROWS_LAST = ["layer_norm", "layer_norm eps=0, plain", "layer_norm per head", "layer_norm lengths",
             "layer_norm mask", "rms_norm", "rms_norm offset", "rms_norm mask", "add_layer_norm",
             "add_rms_norm", "adaptive_layer_norm", "adaptive_layer_norm gate"]  # fmt: skip


@storage
@pytest.mark.parametrize("name", ROWS_LAST)
def test_int8(isa, kind, name, rng):
    """The reference's formula, of y in the type that is computed in."""
    for n in (1, 7, 64, 300, 1025, 2049):
        p = Problem(rng, n, kind)
        y, *others = FORWARD[name](p, dtype=compute_type(kind))
        got = FORWARD[name](p, dtype=np.int8)
        assert (got[0].dtype, got[1].dtype) == (np.int8, np.float32)
        assert (got[0].shape, got[1].shape) == (p.x.shape, p.x.shape[:-1])
        assert_int8(got, y)
        assert_same_bits(got[2:], tuple(others))


@storage
def test_int8_along_other_axes(isa, kind, rng):
    p = Problem(rng, 33, kind)
    for axis in (0, 1, 2):
        y = fastnorm.layer_norm(p.x, axis=axis, dtype=compute_type(kind))
        got = fastnorm.layer_norm(p.x, axis=axis, dtype="int8")
        assert_int8(got, y, lambda a, axis=axis: np.moveaxis(a, axis, -1).copy())
    y = fastnorm.layer_norm(p.x, axis=(0, 2), dtype=compute_type(kind))
    got = fastnorm.layer_norm(p.x, axis=(0, 2), dtype="int8")
    assert_int8(got, y, lambda a: a.transpose(1, 3, 0, 2).reshape(3, 33, -1))


@storage
def test_int8_with_everything_else(kind, rng):
    p = Problem(rng, 65, kind)
    computed = compute_type(kind)
    for activation in (None, *ACTIVE):
        options = {"activation": activation}
        y = FORWARD["layer_norm"](p, dtype=computed, **options)[0]
        assert_int8(FORWARD["layer_norm"](p, dtype=np.int8, **options), y)
    out = np.zeros((*p.x.shape[:-1], 130), np.int8)[..., ::2]
    got = FORWARD["layer_norm"](p, dtype=np.int8, out=out)
    assert got[0] is out
    assert_same_bits(np.ascontiguousarray(out), FORWARD["layer_norm"](p, dtype=np.int8)[0])
    qs, scales = fastnorm.parallel_layer_norm(p.x, p.n, [p.weight, p.bias], dtype="i1")
    for q, scale, w in zip(qs, scales, (p.weight, p.bias), strict=True):
        assert_same_bits((q, scale), fastnorm.layer_norm(p.x, p.n, w, dtype="i1"))


@storage
def test_int8_of_segments(isa, kind, rng):
    for n in (3, 65, 1025):
        p = Problem(rng, n, kind)
        y = FORWARD["segment_layer_norm"](p, dtype=compute_type(kind))[0]
        q, scale, *_ = FORWARD["segment_layer_norm"](p, dtype=np.int8)
        for s, (begin, end) in enumerate(itertools.pairwise(p.offsets)):
            want = reference.dynamic_int8(y[begin:end].reshape(1, -1))
            assert_same_bits(q[begin:end].reshape(1, -1), want[0])
            assert_same_bits(scale[s : s + 1], want[1])


def test_int8_of_infinite_and_tiny_results(isa, rng):
    x = rng.standard_normal((6, 50)).astype(np.float32)
    for size in (3e38, 1e38, 1e-37, 1e-38, 1e-44, 0):
        w = np.full(50, size, np.float32)
        y = fastnorm.layer_norm(x, 50, w)
        assert_int8(fastnorm.layer_norm(x, 50, w, dtype="i1"), y)
    x[1, 3], x[4, 49] = np.nan, np.inf
    q, scale = fastnorm.layer_norm(x, dtype="i1")
    assert_int8((q, scale), fastnorm.layer_norm(x))
    assert np.isnan(scale[[1, 4]]).all()
    assert not q[[1, 4]].any()


def test_int8_rounds_half_to_even(isa):
    """Constant rows are their bias: a row of which y/scale has many ties."""
    bias = np.append(np.arange(-126.5, 127, 1), [127.0, -127.0]).astype(np.float32)
    for size in (1.0, 2.0**100, 2.0**-100):
        q, scale = fastnorm.layer_norm(
            np.ones((1, bias.size), np.float32),
            bias.size,
            None,
            bias * np.float32(size),
            dtype="i1",
        )
        assert scale[0] == size
        np.testing.assert_array_equal(q[0], np.rint(bias))


def near_ties(largest, kind, halves):
    """So many halves of the scale that belongs to it, and the numbers next to each, as y."""
    scale = np.float64(np.float32(cast(largest, kind) / cast(127, kind)))
    assert scale > np.finfo("f4").tiny, "the least scale has no such ties"
    about = [cast(halves / 2 * scale, kind)]
    for to in (-np.inf, np.inf):
        about.append(np.nextafter(about[0], cast(to, kind)))
        about.append(np.nextafter(about[-1], cast(to, kind)))
    return np.concatenate(about)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize(("n", "apart"), [(768, 64), (1000, 1), (2048, 1)])
def test_int8_near_ties(isa, kind, n, apart, rng):
    """Where an estimate of the quotient does not decide, one alone among 64 elements too. Constant
    rows are their bias: one of ties and of the numbers next to them, by scales of all kinds."""
    halves = np.arange(-253, 254, 2)
    halves = halves[np.abs(halves) > (0 if apart == 1 else 200)]
    x = np.ones((2, n), kind)
    sizes = 2.0 ** rng.integers(-100, 100, 40) * rng.uniform(1, 2, 40)
    for largest in cast(np.append(sizes, [127, 1, 2.0**-118]), kind):
        every = rng.permutation(near_ties(largest, kind, halves))
        places = np.arange(0, n - 1, apart)
        for part in np.array_split(every, -(-every.size // places.size)):
            y = np.full(n, largest)
            y[places[: part.size]] = part
            got = fastnorm.layer_norm(x, n, None, y, dtype="i1")
            assert_int8(got, np.stack([y, y]))


# ---- nothing in, and arguments that exclude each other -------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 5), (2, 5, 0)], ids=str)
@storage
def test_nothing_in(shape, kind):
    x, n = np.empty(shape, kind), shape[-1]
    lead = shape[:-1]
    y, total, mean, rstd = fastnorm.add_layer_norm(x, x, return_stats=True)
    assert (y.shape, total.shape, y.dtype, total.dtype) == (shape, shape, kind, kind)
    assert mean.shape == rstd.shape == lead
    assert not mean.any()
    assert np.isnan(rstd).all()
    ys = fastnorm.parallel_layer_norm(x, n, [None, None])
    assert [y.shape for y in ys] == [shape, shape]
    q, scale = fastnorm.layer_norm(x, dtype="i1")
    assert (q.shape, scale.shape) == (shape, lead)
    assert (scale == np.finfo("f4").tiny).all()
    dx, dweight, dbias = fastnorm.add_layer_norm_backward(x, x, x, n, mean, rstd)
    assert (dx.shape, dweight.shape, dbias.shape) == (shape, (n,), (n,))
    assert not dweight.any()
    if len(shape) > 1:
        scale = np.ones((shape[0], n), kind)
        y, mean, rstd = fastnorm.adaptive_layer_norm(x, scale, scale, return_stats=True)
        assert y.shape == shape
        grads = fastnorm.adaptive_layer_norm_backward(x, x, scale, n, mean, rstd)
        assert [g.shape for g in grads] == [shape, scale.shape, scale.shape]
        assert not grads[1].any()


def test_a_gate_needs_a_residual(rng):
    x = rng.standard_normal((2, 3, 8))
    scale = rng.standard_normal((2, 8))
    with pytest.raises(TypeError, match="gate: got"):
        fastnorm.adaptive_layer_norm(x, scale, scale, gate=scale)
    with pytest.raises(TypeError, match="residual: got None"):
        fastnorm.add_layer_norm(x, None)
    with pytest.raises(ValueError, match="biases: got"):
        fastnorm.parallel_layer_norm(x, 8, [None, None], [None])


@pytest.mark.parametrize("swap", [True, False], ids=["byte-swapped", "unaligned"])
def test_swapped_and_unaligned_arrays(dtype, swap, rng):
    """Of every argument; the results are written back."""

    def odd(a):
        if swap:
            return a.astype(a.dtype.newbyteorder("S"))
        memory = np.zeros(a.nbytes + 1, np.uint8)
        view = memory[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    x, residual = rng.standard_normal((2, 2, 5, 33)).astype(dtype)
    scale, shift, gate = rng.standard_normal((3, 2, 33)).astype(dtype)
    want = fastnorm.adaptive_layer_norm(x, scale, shift, gate=gate, residual=residual)
    odd_x, odd_residual = odd(x), odd(residual)
    got = fastnorm.adaptive_layer_norm(
        odd_x, odd(scale), odd(shift), gate=odd(gate), residual=odd_residual, out=odd_x,
        sum_out=odd_residual,
    )  # fmt: skip
    assert got[0] is odd_x
    assert got[1] is odd_residual
    assert_same_bits(tuple(cast(a, dtype) for a in got), want)
    for half in ("f2", "f4"):
        p = x.astype(half)
        assert_same_bits(
            fastnorm.add_rms_norm(odd(p), odd(p), 33, odd(scale[0])),
            fastnorm.add_rms_norm(p, p, 33, scale[0]),
        )
