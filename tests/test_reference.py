"""The reference itself, which all else is compared with: against exact rational arithmetic and
against what the papers and frameworks say."""

from fractions import Fraction
from math import sqrt

import numpy as np
import pytest

from fastnorm import accuracy, reference


def exact_layer_norm(row, eps):
    """One row in rational numbers, but for the one square root."""
    values = [Fraction(float(v)) for v in row]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    rstd = 1 / sqrt(variance + Fraction(eps))
    return [float(v - mean) * rstd for v in values], float(mean), float(variance), rstd


@pytest.mark.parametrize("offset", [0, 1, 1e6, 1e12])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_layer_norm_and_moments(offset, eps, rng):
    for n in (2, 3, 10, 50):
        row = rng.standard_normal(n) + offset
        want = exact_layer_norm(row, eps)
        y, mean, rstd = reference.layer_norm(row, eps=eps, return_stats=True)
        variance = reference.moments(row)[1]
        np.testing.assert_allclose(y, want[0], rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose([mean, variance, rstd], want[1:], rtol=1e-14)


def test_backward(rng):
    """Differences of the exact forward pass."""
    row, dy, weight = rng.standard_normal((3, 6))
    step = 1e-6

    def loss(x, w):
        return sum(g * y * v for g, y, v in zip(dy, exact_layer_norm(x, 1e-5)[0], w, strict=True))

    _, mean, rstd = reference.layer_norm(row, eps=1e-5, return_stats=True)
    dx, dweight, dbias = reference.layer_norm_backward(dy, row, 6, mean, rstd, weight)
    for place in range(6):
        e = step * (np.arange(6) == place)
        difference = (loss(row + e, weight) - loss(row - e, weight)) / (2 * step)
        np.testing.assert_allclose(dx[place], difference, rtol=1e-7, atol=1e-8)
        difference = (loss(row, weight + e) - loss(row, weight - e)) / (2 * step)
        np.testing.assert_allclose(dweight[place], difference, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(dbias, dy)


@pytest.mark.parametrize("size", [1e300, 1e-300, 1e-320])
def test_scale(size, rng):
    row = size * rng.uniform(1, 2, 20)
    unit = row / size if size > 1e-310 else np.ldexp(row, 1060)
    want = exact_layer_norm(unit, 0.0)[0]
    np.testing.assert_allclose(reference.layer_norm(row, eps=0.0), want, rtol=1e-12, atol=1e-12)


def test_special_rows():
    y, mean, rstd = reference.layer_norm(
        [[1.1] * 7, [np.inf] + [1] * 6, [np.nan] + [1] * 6],
        7,
        None,
        np.arange(7.0),
        0.0,
        return_stats=True,
    )
    np.testing.assert_array_equal(y, [np.arange(7), [np.nan] * 7, [np.nan] * 7])
    np.testing.assert_array_equal(mean, [1.1, np.nan, np.nan])
    np.testing.assert_array_equal(rstd, [np.inf, np.nan, np.nan])
    y, mean, rstd = reference.layer_norm(np.empty((2, 0)), return_stats=True)
    assert y.shape == (2, 0)
    np.testing.assert_array_equal(mean, [0, 0])
    np.testing.assert_array_equal(rstd, [np.nan, np.nan])


def test_axes(rng):
    x = rng.standard_normal((3, 4, 5))
    weight, bias = rng.standard_normal((2, 3, 5))
    y = reference.layer_norm(x, None, weight, bias, axis=(0, 2))
    want = np.stack([reference.layer_norm(x[:, k], (3, 5), weight, bias) for k in range(4)], axis=1)
    np.testing.assert_allclose(y, want, rtol=1e-15)


# ---- the measure of errors -----------------------------------------------------------------------


def test_errors_are_measured(rng):
    """A planted error comes back in the units of the bound; a NaN is infinitely wrong."""
    x = rng.standard_normal((4, 50)).astype(np.float32)
    y = reference.layer_norm(x)
    assert accuracy.layer_norm_error(y, x) == 0
    y[2, 7] += 3e-6 * max(1, np.abs(y[2]).max())
    np.testing.assert_allclose(accuracy.layer_norm_error(y, x), 3e-6, rtol=1e-6)
    y[1, 1] = np.nan
    assert accuracy.layer_norm_error(y, x) == np.inf


def test_errors_of_gradients_are_measured(rng):
    x, dy = rng.standard_normal((2, 40, 50)).astype(np.float32)
    _, mean, rstd = reference.layer_norm(x, return_stats=True)
    exact = reference.layer_norm_backward(dy, x, 50, mean, rstd)
    scales = rstd[3] * np.abs(dy[3]).max(), None, np.abs(dy[:, 9]).sum()
    np.testing.assert_allclose(accuracy.layer_norm_backward_errors(exact, dy, x), 0, atol=1e-15)
    dx, dweight, dbias = (a.copy() for a in exact)
    dx[3, 4] += 2e-6 * scales[0]
    dbias[9] -= 5e-6 * scales[2]
    dweight[0] = np.nan
    errors = accuracy.layer_norm_backward_errors((dx, dweight, dbias), dy, x)
    np.testing.assert_allclose(errors, [2e-6, np.inf, 5e-6], rtol=1e-6)


def test_the_bound_is_what_is_promised():
    assert accuracy.bound(np.float32) == 1e-6
    assert accuracy.bound(np.float64) == pytest.approx(1e-6 * 2.0**-29)
