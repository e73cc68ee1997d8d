"""The errors that fastnorm promises, over rows that break sums and rows at the edges of the range.

    forward           1e-6 max(1, max|y|), with unit weights
    dx                1e-6 rstd max|g|
    dweight, dbias    1e-6 of the sum of the terms' magnitudes

for float32, as many ulps for float64 (fastnorm.accuracy says how they are counted). Results are the
same on every instruction set (test_bits.py), so one is enough here. --full takes more lengths, more
rows of each kind and float64 throughout.
"""

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .helpers.arrays import assert_same_bits
from .helpers.rows import DISTRIBUTIONS, MEANS, distribution_row

LENGTHS = (1, 2, 3, 17, 64, 127, 768, 1025, 4096, 50_000, 1_000_000)
MORE_LENGTHS = (*range(4, 131), 997, 2047, 2049, 16_384, 131_072, 262_147, 999_983)


def lengths(full):
    return sorted(LENGTHS + MORE_LENGTHS) if full else LENGTHS


def sweep(rng, kind, n, dtype, full):
    """Rows of one kind and length, of every mean: (rows, n)."""
    repeats = (5 if full else 3) if n < 20_000 else 1
    means = MEANS if full or n < 1_000_000 else MEANS[::2]
    return np.stack(
        [distribution_row(rng, kind, n, mean, dtype) for mean in means for _ in range(repeats)]
    )


def assert_within(dtype, n, errors, context):
    """float64 rows are summed in float64, and every block of 1,024 may round its half ulp away."""
    limit = accuracy.bound(dtype)
    if dtype == np.float64:
        limit += n / 1024 * np.finfo(dtype).eps / 2
    assert max(errors) <= limit, f"{context} n={n}: errors {errors}, allowed {limit:.2e}"


# ---- ordinary magnitudes -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_forward(kind, rng, full):
    for dtype in (np.float32, np.float64):
        for n in lengths(full):
            x = sweep(rng, kind, n, dtype, full)
            for eps in (1e-5, 0.0):
                error = accuracy.layer_norm_error(fastnorm.layer_norm(x, eps=eps), x, eps=eps)
                assert_within(dtype, n, [error], f"{kind} eps={eps}")


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_backward(kind, rng, full):
    for n in lengths(full):
        x = sweep(rng, kind, n, np.float32, full)
        dy = rng.standard_normal(x.shape).astype(np.float32)
        weight = rng.standard_normal(n).astype(np.float32)
        for eps in (1e-5, 0.0):
            _, mean, rstd = fastnorm.layer_norm(x, eps=eps, return_stats=True)
            for w in (None, weight):
                gradients = fastnorm.layer_norm_backward(dy, x, n, mean, rstd, w)
                errors = accuracy.layer_norm_backward_errors(gradients, dy, x, w, eps)
                assert_within(np.float32, n, errors, f"{kind} eps={eps}")


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_backward_of_sorted_gradients(kind, rng):
    """dy that goes with x, and dy far from 0: the means that are taken away are large."""
    for n in (3, 100, 1025, 50_000):
        x = sweep(rng, kind, n, np.float32, False)
        for dy in (np.sort(rng.standard_normal(x.shape)) + 3, 1e3 + x / np.abs(x).max()):
            dy = dy.astype(np.float32)
            _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
            gradients = fastnorm.layer_norm_backward(dy, x, n, mean, rstd)
            errors = accuracy.layer_norm_backward_errors(gradients, dy, x)
            assert_within(np.float32, n, errors, kind)


def test_sums_over_many_rows(rng):
    """With the terms' own magnitudes as the measure, no floor under |xh|."""
    for rows in (64, 1000, 40_000):
        x = (rng.standard_normal((rows, 48)) + 1e3).astype(np.float32)
        dy = (rng.standard_normal((rows, 48)) + 1).astype(np.float32)
        xh, mean, rstd = reference.layer_norm(x, return_stats=True)
        _, dweight, dbias = fastnorm.layer_norm_backward(dy, x, 48, mean, rstd)
        for got, terms in ((dweight, dy * xh), (dbias, dy.astype(np.float64))):
            assert (np.abs(got - terms.sum(0)) <= 1e-6 * np.abs(terms).sum(0)).all()


def test_equal_terms_are_the_worst_of_sums(rng):
    """Rounding the same way at each step, and the sum is known exactly."""
    rows = 100_000
    dy = np.full((rows, 3), 1.1, np.float32)
    x = np.tile(np.float32([-1, 0, 1]), (rows, 1))
    _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    _, dweight, dbias = fastnorm.layer_norm_backward(dy, x, 3, mean, rstd)
    want = rows * float(np.float32(1.1))
    np.testing.assert_allclose(dbias, want, rtol=1e-6)
    _, _, exact_rstd = reference.layer_norm(x[:1], return_stats=True)
    np.testing.assert_allclose(dweight, want * exact_rstd * [-1, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_moments(kind, rng, full):
    for dtype in (np.float32, np.float64):
        for n in lengths(full):
            x = sweep(rng, kind, n, dtype, full)
            errors = accuracy.moments_errors(fastnorm.moments(x), x)
            assert_within(dtype, n, errors, kind)


# ---- the edges of the number range ---------------------------------------------------------------

EDGES = {
    np.float32: (3e38, 1e38, 1e30, 1e20, 1e19, 1e-12, 1e-19, 1e-25, 1e-30, 1e-37, 1e-38, 1e-42),
    np.float64: (1e308, 1e200, 1e154, 1e-90, 1e-154, 1e-162, 1e-200, 1e-300, 1e-308, 1e-320),
}
SIZES = [(dtype, size) for dtype, sizes in EDGES.items() for size in sizes]


def edge_rows(rng, dtype, size, n):
    """Rows whose largest magnitude is `size`, the last one constant."""
    rows = rng.standard_normal((6, n))
    rows[1] = np.where(np.arange(n) % 2, 1, -1)
    rows[2] = np.where(rng.random(n) < 0.05, 1, -1)
    rows[3] = np.arange(n)
    rows[4] = 1 + np.arange(n) % 3 / 1024
    rows[5] = 1
    return (rows / np.abs(rows).max(-1, keepdims=True) * size).astype(dtype)


@pytest.mark.parametrize("n", [2, 3, 99, 1024, 3000])
@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_forward_at_the_edges(dtype, size, n, rng):
    x = edge_rows(rng, dtype, size, n)
    info = np.finfo(dtype)
    for eps in (0.0, 1e-5, 1e-12, 1e-200):
        y, mean, rstd = fastnorm.layer_norm(x, eps=eps, return_stats=True)
        assert_within(dtype, n, [accuracy.layer_norm_error(y, x, eps=eps)], f"eps={eps}")
        _, want_mean, want_rstd = reference.layer_norm(x, eps=eps, return_stats=True)
        nearly = info.eps * size + info.smallest_subnormal
        np.testing.assert_allclose(mean, want_mean, rtol=4 * info.eps, atol=nearly)
        with np.errstate(over="ignore"):
            want_rstd = want_rstd.astype(dtype)
        np.testing.assert_allclose(rstd, want_rstd, rtol=4 * info.eps, err_msg=f"eps={eps}")


@pytest.mark.parametrize("n", [3, 99, 1025])
@pytest.mark.parametrize("dy_size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_backward_at_the_edges(dtype, size, dy_size, n, rng):
    x = edge_rows(rng, dtype, size, n)
    dy = (dy_size * rng.standard_normal(x.shape)).astype(dtype)
    info = np.finfo(dtype)
    for eps in (0.0, 1e-5):
        _, mean, rstd = fastnorm.layer_norm(x, eps=eps, return_stats=True)
        dx, dweight, dbias = fastnorm.layer_norm_backward(dy, x, n, mean, rstd)
        _, exact_mean, exact_rstd = reference.layer_norm(x, eps=eps, return_stats=True)
        exact = reference.layer_norm_backward(dy, x, n, exact_mean, exact_rstd)

        # A constant row's dx is 0 for eps = 0. Elsewhere what the type cannot hold may become
        # infinite, and what is denormal has a denormal's error.
        constant = (x == x[:, :1]).all(-1)
        exact_rstd = np.where(constant, 1 / np.sqrt(eps or 1), exact_rstd)
        with np.errstate(over="ignore"):
            largest = exact_rstd[:, None] * np.abs(dy).max(-1, keepdims=True).astype(float)
        fits = (largest < info.max / 4).ravel()
        assert fits[constant].all()
        error = np.abs(dx[fits] - exact[0][fits])
        allowed = accuracy.bound(dtype) * largest[fits] + info.smallest_subnormal
        assert (error <= allowed).all(), (
            f"dx eps={eps}: {(error / allowed).max()} of what is allowed"
        )

        xh = reference.layer_norm(x, eps=eps)
        for got, want, terms in (
            (dweight, exact[1], dy * np.maximum(1, abs(xh))),
            (dbias, exact[2], dy),
        ):
            error = np.abs(got - want) / np.abs(terms).astype(float).sum(0)
            assert_within(dtype, n, [error.max()], f"dweight, dbias eps={eps}")


@pytest.mark.parametrize("n", [1, 2, 64, 257, 1024, 5000])
def test_a_power_of_two_leaves_the_bits(dtype, n, rng):
    """For eps = 0, as long as every element stays a normal number."""
    x = (rng.uniform(0.5, 1, (6, n)) * rng.choice([-1, 1], (6, n))).astype(dtype)
    x[1] = np.sort(x[1])
    x[2] = 1
    x[3] = np.abs(x[3])
    want = fastnorm.layer_norm(x, eps=0.0, return_stats=True)
    most = 120 if dtype == np.float32 else 1000
    for k in range(-most, most + 1, 1 if dtype == np.float32 else 25):
        y, mean, rstd = fastnorm.layer_norm(np.ldexp(x, k), eps=0.0, return_stats=True)
        assert_same_bits((y, np.ldexp(rstd, k)), (want[0], want[2]), f"k={k}")
        normal = np.abs(mean) >= np.finfo(dtype).tiny
        assert_same_bits(np.ldexp(mean, -k)[normal], want[1][normal], f"k={k}")
