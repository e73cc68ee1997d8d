"""layer_norm_backward: against the reference, and against differences of the forward pass."""

import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .helpers.arrays import assert_same_bits

NARROW = range(1, 131)
WIDE = (256, 509, 768, 1023, 1024, 1025, 2049, 5000)


def problem(rng, rows, n, dtype):
    x = (rng.standard_normal((rows, n)) + 3).astype(dtype)
    dy = (rng.standard_normal((rows, n)) + 0.5).astype(dtype)
    return x, dy, rng.standard_normal(n).astype(dtype)


def gradients(dy, x, weight=None, eps=1e-5, **options):
    n = x.shape[-1]
    _, mean, rstd = fastnorm.layer_norm(x, n, weight, eps=eps, return_stats=True)
    return fastnorm.layer_norm_backward(dy, x, n, mean, rstd, weight, **options)


def assert_right(dy, x, weight, eps=1e-5):
    got = gradients(dy, x, weight, eps)
    errors = accuracy.layer_norm_backward_errors(got, dy, x, weight, eps)
    assert max(errors) <= accuracy.bound(x.dtype), f"{x.shape}: {errors}"


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_weight", [True, False])
def test_narrow_rows(isa, dtype, with_weight, rng):
    for n in NARROW:
        x, dy, weight = problem(rng, 19, n, dtype)
        assert_right(dy, x, weight if with_weight else None)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("n", WIDE)
def test_wide_rows(isa, dtype, n, with_weight, rng):
    x, dy, weight = problem(rng, 19, n, dtype)
    assert_right(dy, x, weight if with_weight else None)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 63, 65, 200, 1025])
def test_numbers_of_rows(isa, dtype, rows, rng):
    x, dy, weight = problem(rng, rows, 40, dtype)
    assert_right(dy, x, weight)


def test_far_from_zero(isa, rng):
    """The saved mean is rounded; with that alone dx would err by a thousandth at 1e6."""
    x, dy, weight = problem(rng, 9, 300, np.float32)
    for mean in (1e3, 1e5, 1e6, 1e7):
        assert_right(dy, (x + mean).astype(np.float32), weight)


def central_differences(function, at, step=1e-5):
    """The gradient of a scalar function, one coordinate at a time."""
    gradient = np.empty_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (up[place] - down[place])
    return gradient


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (18, 7), (2, 3, 4)], ids=str)
def test_finite_differences(isa, shape, eps, rng):
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = rng.standard_normal((2, shape[-1]))

    def loss(x, weight, bias):
        return float((dy * fastnorm.layer_norm(x, shape[-1], weight, bias, eps)).sum())

    _, mean, rstd = fastnorm.layer_norm(x, shape[-1], weight, bias, eps, return_stats=True)
    dx, dweight, dbias = fastnorm.layer_norm_backward(dy, x, shape[-1], mean, rstd, weight, bias)
    for got, want in (
        (dx, central_differences(lambda v: loss(v, weight, bias), x)),
        (dweight, central_differences(lambda v: loss(x, v, bias), weight)),
        (dbias, central_differences(lambda v: loss(x, weight, v), bias)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(dx).max() + 1e-9)


# ---- arguments -----------------------------------------------------------------------------------

NAMES = ("dx", "dweight", "dbias")
MASKS = list(itertools.product((True, False), repeat=3))


def name_of(mask):
    return "+".join(itertools.compress(NAMES, mask)) or "nothing"


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_output_mask(isa, dtype, mask, rows, rng):
    x, dy, weight = problem(rng, rows, 70, dtype)
    for w in (weight, None):
        every = gradients(dy, x, w)
        some = gradients(dy, x, w, output_mask=mask)
        for wanted, got, want in zip(mask, some, every, strict=True):
            if wanted:
                assert_same_bits(got, want)
            else:
                assert got is None


@pytest.mark.parametrize("mask", [[True, False, True], (1, 0, 1), np.array([True, False, True])],
                         ids=["list", "ints", "array"])  # fmt: skip
def test_forms_of_output_mask(mask, dtype, rng):
    x, dy, weight = problem(rng, 5, 9, dtype)
    dx, dweight, dbias = gradients(dy, x, weight, output_mask=mask)
    want = gradients(dy, x, weight)
    assert dweight is None
    assert_same_bits((dx, dbias), (want[0], want[2]))


def test_statistics_as_torch_keeps_them(dtype, rng):
    """With trailing axes of length 1."""
    x = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    for count in (1, 2, 3):
        shape = x.shape[-count:]
        _, mean, rstd = fastnorm.layer_norm(x, shape, return_stats=True)
        kept = x.shape[:-count] + (1,) * count
        want = fastnorm.layer_norm_backward(dy, x, shape, mean, rstd)
        got = fastnorm.layer_norm_backward(dy, x, shape, mean.reshape(kept), rstd.reshape(kept))
        assert_same_bits(got, want)


def test_statistics_with_kept_axes_anywhere(dtype, rng):
    x, dy = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    _, mean, rstd = fastnorm.layer_norm(x, axis=1, return_stats=True)
    want = fastnorm.layer_norm_backward(dy, x, None, mean, rstd, axis=1)
    kept = mean[:, np.newaxis], rstd[:, np.newaxis]
    assert_same_bits(fastnorm.layer_norm_backward(dy, x, None, *kept, axis=1), want)


def test_bias_changes_nothing(dtype, rng):
    x, dy, weight = problem(rng, 5, 9, dtype)
    assert_same_bits(gradients(dy, x, weight, bias=weight), gradients(dy, x, weight))


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (1, 2), (2, 0, 1)], ids=str)
def test_axis(axis, dtype, rng):
    x, dy = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    axes = tuple(sorted(np.atleast_1d(axis)))
    weight = rng.standard_normal([x.shape[a] for a in axes]).astype(dtype)
    _, mean, rstd = fastnorm.layer_norm(x, None, weight, axis=axis, return_stats=True)
    got = fastnorm.layer_norm_backward(dy, x, None, mean, rstd, weight, axis=axis)
    want = reference.layer_norm_backward(dy, x, None, mean, rstd, weight, axis=axis)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=20 * np.finfo(dtype).eps)


def test_types_and_shapes(dtype, rng):
    x = rng.standard_normal((2, 3, 4)).astype(dtype)
    _, mean, rstd = fastnorm.layer_norm(x, (3, 4), return_stats=True)
    dx, dweight, dbias = fastnorm.layer_norm_backward(x, x, (3, 4), mean, rstd)
    assert {a.dtype for a in (dx, dweight, dbias)} == {dtype}
    assert (dx.shape, dweight.shape, dbias.shape) == ((2, 3, 4), (3, 4), (3, 4))


def test_types_do_not_promote(rng):
    x, dy, weight = problem(rng, 5, 9, np.float32)
    _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    want = fastnorm.layer_norm_backward(dy, x, 9, mean, rstd, weight)
    wide = (a.astype(np.float64) for a in (mean, rstd, weight))
    assert_same_bits(fastnorm.layer_norm_backward(dy.astype(np.float64), x, 9, *wide), want)


def test_inputs_stay_as_they_are(dtype, rng):
    x, dy, weight = problem(rng, 20, 30, dtype)
    _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    inputs = (x, dy, weight, mean, rstd)
    before = tuple(a.copy() for a in inputs)
    fastnorm.layer_norm_backward(dy, x, 30, mean, rstd, weight)
    assert_same_bits(inputs, before)


# ---- special rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 7), (0,), (2, 0, 7), (3, 0)], ids=str)
def test_no_elements(shape, dtype):
    x = np.empty(shape, dtype)
    lead = np.empty(shape[:-1], dtype)
    dx, dweight, dbias = fastnorm.layer_norm_backward(x, x, shape[-1], lead, lead)
    assert dx.shape == shape
    assert_same_bits((dweight, dbias), (np.zeros(shape[-1], dtype),) * 2)


@pytest.mark.parametrize("n", [1, 2, 33, 64, 1500])
@pytest.mark.parametrize("value", [0, 1.1, -3e5, 1e30])
def test_a_constant_row_has_dx_0_for_eps_0(isa, dtype, n, value, rng):
    _, dy, weight = problem(rng, 7, n, dtype)
    x = np.full((7, n), value, dtype)
    dx, dweight, dbias = gradients(dy, x, weight, eps=0.0)
    assert_same_bits(np.abs(dx), np.zeros_like(dx))
    assert_same_bits(np.abs(dweight), np.zeros(n, dtype))
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-5)


def test_one_column(isa, dtype, rng):
    """xh is 0 whatever x is: dweight is 0 exactly, dx but for rounding."""
    x = np.array([[1e6], [0], [-3], [1e-30], [3e38]] * 5, dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    for eps in (1e-5, 0.0):
        dx, dweight, dbias = gradients(dy, x, np.array([2], dtype), eps)
        assert_same_bits(np.abs(dweight), np.zeros(1, dtype))
        np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-5)
        rstd = 1 / np.sqrt(eps) if eps else 0
        assert (np.abs(dx) <= accuracy.bound(dtype) * rstd * np.abs(2 * dy)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_poisoned_row_keeps_to_itself(isa, dtype, where, poison, rng):
    x, dy, weight = problem(rng, 21, 50, dtype)
    clean = gradients(dy, x, weight)[0]
    (x if where == "x" else dy)[9, 17] = poison
    dx = gradients(dy, x, weight)[0]
    assert np.isnan(dx[9]).all()
    others = np.arange(21) != 9
    assert_same_bits(dx[others], clean[others])


def test_zero_gradient(isa, dtype, rng):
    x, _, weight = problem(rng, 21, 50, dtype)
    for array in gradients(np.zeros_like(x), x, weight):
        assert (array == 0).all()


@pytest.mark.parametrize("rstd", [np.nan, -np.inf])
def test_statistics_that_are_no_numbers_give_none(rstd, dtype, rng):
    x = rng.standard_normal((2, 9)).astype(dtype)
    mean, bad = x.mean(1), np.array([1, rstd], dtype)
    dx, _, _ = fastnorm.layer_norm_backward(x, x, 9, mean, bad)
    assert np.isfinite(dx[0]).all()
    assert np.isnan(dx[1]).all()
