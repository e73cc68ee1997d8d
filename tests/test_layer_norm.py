"""layer_norm: what it computes, compared with the reference on every instruction set."""

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .helpers.arrays import assert_same_bits

NARROW = range(1, 131)
WIDE = (131, 251, 256, 509, 512, 768, 997, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 7919, 16384)
PARAMETERS = {"none": (0, 0), "weight": (1, 0), "bias": (0, 1), "both": (1, 1)}


def parameters(rng, n, dtype, which):
    has_weight, has_bias = PARAMETERS[which]
    weight = rng.standard_normal(n).astype(dtype) if has_weight else None
    bias = rng.standard_normal(n).astype(dtype) if has_bias else None
    return weight, bias


def assert_right(x, weight=None, bias=None, eps=1e-5):
    y = fastnorm.layer_norm(x, x.shape[-1], weight, bias, eps)
    error = accuracy.layer_norm_error(y, x, weight, bias, eps)
    assert error <= accuracy.bound(x.dtype), f"{x.dtype} {x.shape}: error {error:.2e}"


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PARAMETERS)
def test_narrow_rows(isa, dtype, which, rng):
    for n in NARROW:
        x = (rng.standard_normal((11, n)) + 3).astype(dtype)
        assert_right(x, *parameters(rng, n, dtype, which))


@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("n", WIDE)
def test_wide_rows(isa, dtype, n, which, rng):
    x = (rng.standard_normal((5, n)) + 3).astype(dtype)
    assert_right(x, *parameters(rng, n, dtype, which))


def test_a_million_columns(isa, dtype, rng):
    x = (rng.standard_normal((2, 1_000_000)) + 3).astype(dtype)
    assert_right(x, *parameters(rng, 1_000_000, dtype, "both"))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 1.0, 1e30])
def test_eps(dtype, eps, rng):
    assert_right((0.01 * rng.standard_normal((9, 50))).astype(dtype), eps=eps)


def test_infinite_eps_leaves_the_bias(isa, dtype, rng):
    x, bias = rng.standard_normal((2, 50)).astype(dtype)
    assert_same_bits(fastnorm.layer_norm(x, 50, None, bias, np.inf), bias)


def test_parameters_of_another_type_do_not_promote(rng):
    x = rng.standard_normal((4, 8)).astype(np.float32)
    weight = rng.standard_normal(8).astype(np.float32)
    want = fastnorm.layer_norm(x, 8, weight, weight)
    for kind in (np.float64, np.longdouble, ">f4"):
        assert_same_bits(fastnorm.layer_norm(x, 8, weight.astype(kind), weight.astype(kind)), want)
    half = weight.astype(np.float16)
    want = fastnorm.layer_norm(x, 8, half.astype(np.float32))
    assert_same_bits(fastnorm.layer_norm(x, 8, half), want)


@pytest.mark.parametrize("values", [[[1, 2, 4]], [[True, False, True]], np.arange(6, dtype="u1")])
def test_integers_and_lists_become_float64(values):
    want = fastnorm.layer_norm(np.asarray(values, dtype=np.float64))
    assert_same_bits(fastnorm.layer_norm(values), want)


def test_inputs_stay_as_they_are(dtype, rng):
    x, weight, bias = (rng.standard_normal((6, 40)).astype(dtype) for _ in range(3))
    before = x.copy(), weight.copy(), bias.copy()
    fastnorm.layer_norm(x, (40,), weight[0], bias[0], return_stats=True)
    assert_same_bits((x, weight, bias), before)


# ---- the acceptance vectors of layer norm: some framework failed each of them --------------------


def test_a_constant_row_is_exactly_bias(isa, dtype, rng):
    bias = rng.standard_normal(1234).astype(dtype)
    weight = rng.standard_normal(1234).astype(dtype)
    for value in (256, 1.1, -0.3, 1e30, 1e-30):
        for eps in (1e-5, 0.0):
            y = fastnorm.layer_norm(np.full((5, 1234), value, dtype), 1234, weight, bias, eps)
            assert_same_bits(y, np.broadcast_to(bias, (5, 1234)).copy())


def test_four_numbers_after_40000(dtype):
    x = np.array([40000, 40001, 40002, 40003], dtype)
    y = fastnorm.layer_norm(x, eps=0.0)
    want = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25)
    np.testing.assert_allclose(y, want, rtol=1e-7)


def test_unit_variance_round_2000(dtype, rng):
    x = (rng.standard_normal((5, 4)) + 2000).astype(dtype)
    y = fastnorm.layer_norm(x, eps=0.0)
    np.testing.assert_allclose(y.astype(np.float64).var(-1), 1, rtol=1e-6)
    assert_right(x)


def test_two_equal_numbers(dtype):
    bias = np.array([0.25, -3], dtype)
    y = fastnorm.layer_norm(np.array([[14, 14]], dtype), 2, None, bias, 1e-6)
    assert_same_bits(y, bias[np.newaxis])


def test_small_variance_far_from_zero(rng):
    x = (0.01 * rng.standard_normal((64, 32768)) + 100).astype(np.float32)
    assert_right(x)
    _, variance = fastnorm.moments(x)
    np.testing.assert_allclose(variance, 1e-4, rtol=0.05)


def test_spread_of_a_thousandth_round_a_million(rng):
    assert_right((1e6 + 1e-3 * rng.standard_normal((8, 256))).astype(np.float32), eps=0.0)
    assert_right(1e6 + 1e-3 * rng.standard_normal((8, 256)), eps=0.0)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_rows(isa, size, eps, rng):
    assert_right((size * rng.standard_normal((9, 300))).astype(np.float32), eps=eps)


def test_transposed_input(dtype, rng):
    x = rng.standard_normal((3, 5, 7)).astype(dtype).transpose(0, 2, 1)
    assert_same_bits(fastnorm.layer_norm(x), fastnorm.layer_norm(np.ascontiguousarray(x)))


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [5, (5,), [5], np.int64(5), np.array([5])])
def test_forms_of_normalized_shape(shape, dtype, rng):
    x = rng.standard_normal((2, 3, 5)).astype(dtype)
    assert_same_bits(fastnorm.layer_norm(x, shape), fastnorm.layer_norm(x))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_normalized_axes(count, dtype, rng):
    x = rng.standard_normal((4, 3, 5)).astype(dtype)
    shape = x.shape[-count:]
    weight, bias = rng.standard_normal((2, *shape)).astype(dtype)
    flat = x.reshape(-1, int(np.prod(shape)))
    want = fastnorm.layer_norm(flat, flat.shape[-1], weight.ravel(), bias.ravel())
    y, mean, rstd = fastnorm.layer_norm(x, shape, weight, bias, return_stats=True)
    assert_same_bits(y, want.reshape(x.shape))
    assert mean.shape == rstd.shape == x.shape[:-count]


AXES = [0, 1, 2, -1, -3, (0,), (1, 2), (2, 1), (0, 2), (-1, 0), (0, 1, 2), [0, 1]]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_axis(axis, dtype, rng):
    x = rng.standard_normal((3, 4, 5)).astype(dtype)
    axes = tuple(sorted(a % 3 for a in np.atleast_1d(axis)))
    inner = tuple(x.shape[a] for a in axes)
    weight, bias = rng.standard_normal((2, *inner)).astype(dtype)

    y, mean, rstd = fastnorm.layer_norm(
        x,
        None,
        weight,
        bias,
        axis=axis if isinstance(axis, int) else tuple(axis),
        return_stats=True,
    )
    lead = [a for a in range(3) if a not in axes]
    moved = np.ascontiguousarray(x.transpose(*lead, *axes))
    want = fastnorm.layer_norm(moved, inner, weight, bias, return_stats=True)
    assert_same_bits((y.transpose(*lead, *axes), mean, rstd), want)


@pytest.mark.parametrize("shape", [(1, 0, 10), (0, 10), (0,), (3, 0), (0, 0), (2, 0, 5), (2, 5, 0)])
def test_nothing_in_keeps_its_shape(shape, dtype):
    x = np.empty(shape, dtype)
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    assert (y.shape, y.dtype) == (shape, dtype)
    assert mean.shape == rstd.shape == shape[:-1]
    out = np.empty(shape, dtype)
    assert fastnorm.layer_norm(x, out=out) is out


def test_empty_rows_have_mean_0_and_rstd_nan(dtype):
    _, mean, rstd = fastnorm.layer_norm(np.empty((3, 0), dtype), return_stats=True)
    assert_same_bits((mean, rstd), (np.zeros(3, dtype), np.full(3, np.nan, dtype)))


def test_one_column_is_exactly_bias(isa, dtype):
    x = np.array([[1e6], [0], [-3], [1e-30], [np.finfo(dtype).max]], dtype)
    for eps in (1e-5, 0.0):
        y = fastnorm.layer_norm(x, 1, np.array([7], dtype), np.array([0.3], dtype), eps)
        assert_same_bits(y, np.full((5, 1), 0.3, dtype))


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64, 200, 768, 1500])
def test_statistics(isa, dtype, n, rng):
    x = (rng.standard_normal((13, n)) + 5).astype(dtype)
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    _, want_mean, want_rstd = reference.layer_norm(x, return_stats=True)
    assert mean.dtype == rstd.dtype == dtype
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(mean, want_mean, rtol=tolerance)
    np.testing.assert_allclose(rstd, want_rstd, rtol=tolerance)
    assert_same_bits(y, fastnorm.layer_norm(x))


def test_statistics_of_a_constant_row_with_eps_0(isa, dtype):
    _, mean, rstd = fastnorm.layer_norm(np.full((9, 33), 1.1, dtype), eps=0.0, return_stats=True)
    assert_same_bits((mean, rstd), (np.full(9, 1.1, dtype), np.full(9, np.inf, dtype)))


def test_statistics_of_one_row(dtype, rng):
    _, mean, rstd = fastnorm.layer_norm(rng.standard_normal(9).astype(dtype), return_stats=True)
    assert mean.shape == rstd.shape == ()
    assert isinstance(mean, np.ndarray)


# ---- NaN and infinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 64, 300, 2050])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_row_is_nan_and_the_others_do_not_notice(isa, dtype, n, poison, rng):
    x = rng.standard_normal((17, n)).astype(dtype)
    clean = fastnorm.layer_norm(x, return_stats=True)
    for row, place in ((0, 0), (9, n // 2), (16, n - 1)):
        x[row, place] = poison
    got = fastnorm.layer_norm(x, return_stats=True)
    poisoned = np.zeros(17, bool)
    poisoned[[0, 9, 16]] = True
    for array, before in zip(got, clean, strict=True):
        assert np.isnan(array[poisoned]).all()
        assert_same_bits(array[~poisoned], before[~poisoned])


@pytest.mark.parametrize("wanted", [1, np.True_, "yes"])
def test_return_stats_may_be_anything_true(wanted, rng):
    """In place too: the row is normalized once."""
    x = rng.standard_normal((6, 40)).astype(np.float32) + 7
    want = fastnorm.layer_norm(x, return_stats=True)
    got = fastnorm.layer_norm(x, out=x, return_stats=wanted)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_next_to_which_eps_is_all_are_not_constant():
    """Their squares underflow; y is x / sqrt(eps) all the same."""
    x = np.float32([[1e-25, -2e-25, 4e-25, 0], [3e-25, 3e-25, 3e-25, 3e-25]])
    y = fastnorm.layer_norm(x, eps=1e-5)
    want = reference.layer_norm(x, eps=1e-5)
    np.testing.assert_allclose(y[0], want[0], rtol=1e-5)
    assert (y[1] == 0).all()
