"""rms_norm and rms_norm_backward: against the reference, and against differences.

Bits over instruction sets, types, threads and layouts are tested with those of all ops, in
test_half_types.py and test_axes.py.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .helpers.arrays import assert_same_bits
from .helpers.rows import DISTRIBUTIONS, MEANS, distribution_row
from .helpers.storage import HALVES, STORAGE, cast, compute_type, rounded

NARROW = range(1, 131)
WIDE = (131, 256, 509, 768, 1023, 1024, 1025, 2047, 2048, 2049, 5000)
storage = pytest.mark.parametrize("kind", STORAGE, ids=str)


def weight_of(rng, n, dtype, which):
    return rng.standard_normal(n).astype(dtype) if which else None


def assert_right(x, weight=None, eps=None, offset=0.0):
    y = fastnorm.rms_norm(x, x.shape[-1], weight, eps, offset=offset)
    error = accuracy.rms_norm_error(y, x, weight, eps, offset)
    assert error <= accuracy.bound(x.dtype), f"{x.dtype} {x.shape}: error {error:.2e}"


def gradients(dy, x, weight=None, eps=None, offset=0.0, **options):
    n = x.shape[-1]
    _, rstd = fastnorm.rms_norm(x, n, weight, eps, offset=offset, return_stats=True)
    return fastnorm.rms_norm_backward(dy, x, n, rstd, weight, offset=offset, **options)


def assert_gradients_right(dy, x, weight=None, eps=None, offset=0.0):
    got = gradients(dy, x, weight, eps, offset)
    errors = accuracy.rms_norm_backward_errors(got, dy, x, weight, eps, offset)
    assert max(errors) <= accuracy.bound(x.dtype), f"{x.shape}: {errors}"


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.25])
@pytest.mark.parametrize("which", [False, True])
def test_narrow_rows(isa, dtype, which, offset, rng):
    for n in NARROW:
        x = (rng.standard_normal((9, n)) + 0.5).astype(dtype)
        assert_right(x, weight_of(rng, n, dtype, which), offset=offset)


@pytest.mark.parametrize("which", [False, True])
def test_wide_rows(isa, dtype, which, rng):
    for n, rows in itertools.product(WIDE, (1, 5)):
        x = (rng.standard_normal((rows, n)) + 0.5).astype(dtype)
        assert_right(x, weight_of(rng, n, dtype, which), offset=1.0)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_distributions(dtype, kind, rng):
    for n in (2, 64, 1025, 20_000):
        x = np.stack([distribution_row(rng, kind, n, mean, dtype) for mean in MEANS])
        for eps in (None, 0.0):
            assert_right(x, eps=eps)


@storage
def test_eps_none_is_the_machine_epsilon(kind, rng):
    """Of the type that is computed in: float32's for the half types."""
    x = cast(1e-4 * rng.standard_normal((5, 60)), kind)
    eps = float(np.finfo(compute_type(kind)).eps)
    want = fastnorm.rms_norm(x, eps=eps, return_stats=True)
    assert_same_bits(fastnorm.rms_norm(x, return_stats=True), want)
    assert_same_bits(fastnorm.rms_norm(x, eps=None, return_stats=True), want)
    total = fastnorm.add_rms_norm(x, np.zeros_like(x), return_stats=True)
    assert_same_bits((total[0], total[2]), want)
    assert_same_bits(fastnorm.segment_rms_norm(x, [0, 5]), fastnorm.rms_norm(x, x.shape))


def test_eps_none_with_a_float64_residual(rng):
    """The sum is float64's, and so is what is computed in."""
    x = 1e-6 * rng.standard_normal((5, 60)).astype(np.float32)
    residual = 1e-6 * rng.standard_normal((5, 60))
    y, total, rstd = fastnorm.add_rms_norm(x, residual, return_stats=True)
    want = fastnorm.rms_norm(total, eps=float(np.finfo("f8").eps), return_stats=True)
    assert y.dtype == np.float32
    assert_same_bits((y, rstd), (want[0].astype(np.float32), want[1]))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0, 1e30])
def test_eps(dtype, eps, rng):
    assert_right((0.01 * rng.standard_normal((9, 50))).astype(dtype), eps=eps)


@storage
def test_statistics(isa, kind, rng):
    for n in (1, 2, 7, 64, 200, 1500):
        x = cast(rng.standard_normal((13, n)) + 1, kind)
        y, rstd = fastnorm.rms_norm(x, return_stats=True)
        wide = x.astype(np.float64)
        _, want = reference.rms_norm(x, return_stats=True)
        assert (rstd.shape, rstd.dtype) == ((13,), compute_type(kind))
        np.testing.assert_allclose(rstd, want, rtol=4 * np.finfo(rstd.dtype).eps)
        assert_same_bits(y, fastnorm.rms_norm(x))
        assert np.abs(y.astype(np.float64) - wide * want[:, None]).max() < 0.05


def test_offset_with_no_weight_is_not_used(dtype, rng):
    x = rng.standard_normal((5, 40)).astype(dtype)
    assert_same_bits(fastnorm.rms_norm(x, offset=1.0), fastnorm.rms_norm(x))
    ones = np.ones(40, dtype)
    assert_same_bits(fastnorm.rms_norm(x, 40, ones), fastnorm.rms_norm(x))


@storage
def test_offset_is_added_in_the_type_that_is_computed_in(isa, kind, rng):
    """Gemma's weights are half of what they stand for: 1 + weight needs more digits than it has."""
    for n in (5, 64, 1030):
        x = cast(rng.standard_normal((9, n)), kind)
        w = cast(rng.standard_normal(n) / 100, kind)
        computed = compute_type(kind)
        want = fastnorm.rms_norm(x, n, cast(w, computed) + computed.type(1))
        assert_same_bits(fastnorm.rms_norm(x, n, w, offset=1.0), want)
        assert_same_bits(fastnorm.rms_norm(x, n, w, offset=1), want)
        assert_same_bits(fastnorm.rms_norm(x, n, w[None], offset=1.0), want)


# ---- rounding before the weight ------------------------------------------------------------------


@storage
@pytest.mark.parametrize("result", STORAGE, ids=str)
def test_round_before_weight(isa, kind, result, rng):
    """The normalised row is rounded to the result's type, then multiplied, then rounded again."""
    for n, rows in itertools.product((5, 64, 256, 1025), (1, 6)):
        x, computed = cast(rng.standard_normal((rows, n)), kind), compute_type(kind)
        w = cast(rng.standard_normal(n), kind)
        got = fastnorm.rms_norm(
            x, n, w, dtype=result, offset=0.5, round_before_weight=True, return_stats=True
        )
        xh, rstd = fastnorm.rms_norm(x, dtype=result, return_stats=True)
        full = cast(w, computed) + computed.type(0.5)
        want = rounded(cast(xh, computed) * full, result)
        if result.itemsize >= computed.itemsize:  # nothing is rounded before
            want = fastnorm.rms_norm(x, n, w, dtype=result, offset=0.5)
        assert_same_bits(got, (want, rstd), f"{kind} to {result}, {rows} rows of {n}")


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_round_before_weight_without_a_weight(half, rng):
    x = cast(rng.standard_normal((6, 70)), half)
    want = fastnorm.rms_norm(x)
    assert_same_bits(fastnorm.rms_norm(x, round_before_weight=True), want)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_round_before_weight_changes_something(half, rng):
    x = cast(rng.standard_normal((6, 70)), half)
    w = cast(rng.standard_normal(70), half)
    first, last = (fastnorm.rms_norm(x, 70, w, round_before_weight=b) for b in (True, False))
    assert (first != last).any()
    y, total = fastnorm.add_rms_norm(x, x, 70, w, round_before_weight=True)
    assert_same_bits(y, fastnorm.rms_norm(total, 70, w, round_before_weight=True))


# ---- special rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 0.0, 1e-5])
@pytest.mark.parametrize("size", [3e38, 1e30, 1e20, 1e-20, 1e-30, 1e-38, 1e-44])
def test_huge_and_tiny_rows(isa, size, eps, rng):
    for n, rows in itertools.product((1, 2, 33, 300, 1025, 2049), (1, 9)):
        x = np.clip(rng.standard_normal((rows, n)) / 4, -1, 1) * size
        assert_right(x.astype(np.float32), eps=eps)


@pytest.mark.parametrize("size", [1e308, 1e160, 1e-160, 1e-300, 1e-320])
def test_huge_and_tiny_rows_of_float64(size, rng):
    x = np.clip(rng.standard_normal((6, 300)) / 4, -1, 1) * size
    for eps in (None, 0.0, 1e-5):
        assert_right(x, eps=eps)


@storage
def test_a_row_of_zeros(isa, kind, rng):
    """Is 0, and so is its gradient where eps is 0; with eps the gradient is g / sqrt(eps)."""
    for n, rows in itertools.product((1, 33, 1025), (1, 5)):
        x = np.zeros((rows, n), kind)
        w, dy = cast(rng.standard_normal((2, n)) + 2, kind)
        y, rstd = fastnorm.rms_norm(x, n, w, 0.0, return_stats=True)
        assert not y.any()
        assert np.isinf(rstd).all()
        dy = np.broadcast_to(dy, x.shape)
        dx, dweight = fastnorm.rms_norm_backward(dy, x, n, rstd, w)
        assert not dx.any()
        assert not dweight.any()
        y, rstd = fastnorm.rms_norm(x, n, w, 0.25, return_stats=True)
        assert not y.any()
        np.testing.assert_array_equal(rstd, 2)
        dx, dweight = fastnorm.rms_norm_backward(dy, x, n, rstd, w)
        product = rounded(2 * cast(dy, rstd.dtype) * cast(w, rstd.dtype), kind)
        assert_same_bits(dx, product)
        assert not dweight.any()


@pytest.mark.parametrize("n", [1, 5, 64, 300, 2050])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_row_is_nan_and_the_others_do_not_notice(isa, dtype, n, poison, rng):
    x = rng.standard_normal((17, n)).astype(dtype)
    clean = fastnorm.rms_norm(x, return_stats=True)
    for row, place in ((0, 0), (9, n // 2), (16, n - 1)):
        x[row, place] = poison
    poisoned = np.isin(np.arange(17), [0, 9, 16])
    for array, before in zip(fastnorm.rms_norm(x, return_stats=True), clean, strict=True):
        assert np.isnan(array[poisoned]).all()
        assert_same_bits(array[~poisoned], before[~poisoned])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 5), (0, 0)], ids=str)
@storage
def test_nothing_in(shape, kind):
    x = np.empty(shape, kind)
    y, rstd = fastnorm.rms_norm(x, return_stats=True)
    assert (y.shape, y.dtype, rstd.shape) == (shape, kind, shape[:-1])
    assert np.isnan(rstd).all()
    dx, dweight = fastnorm.rms_norm_backward(x, x, shape[-1:], rstd)
    assert (dx.shape, dweight.shape) == (shape, shape[-1:])
    assert not dweight.any()


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_drawn_rows(data):
    """Any numbers at all, next to each other."""
    n, rows = data.draw(st.sampled_from([1, 2, 3, 8, 17, 40])), data.draw(st.integers(1, 5))
    exponents = st.integers(-140, 126)
    numbers = st.tuples(st.floats(-1, 1, width=32), exponents).map(lambda t: np.ldexp(*t))
    x = np.array(data.draw(st.lists(numbers, min_size=n * rows, max_size=n * rows)))
    x = x.reshape(rows, n).astype(np.float32)
    eps = data.draw(st.sampled_from([None, 0.0, 1e-12, 1e-5]))
    assert_right(x, eps=eps)
    assert_right(x.astype(np.float64), eps=eps)


# ---- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [True, False])
def test_backward_narrow(isa, dtype, which, rng):
    for n in NARROW:
        x, dy = (rng.standard_normal((2, 19, n)) + 0.5).astype(dtype)
        assert_gradients_right(dy, x, weight_of(rng, n, dtype, which))


@pytest.mark.parametrize("which", [True, False])
def test_backward_wide(isa, dtype, which, rng):
    for n in WIDE:
        x, dy = (rng.standard_normal((2, 18, n)) + 0.5).astype(dtype)
        assert_gradients_right(dy, x, weight_of(rng, n, dtype, which), offset=1.0)


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 33, 64, 200])
def test_backward_numbers_of_rows(isa, dtype, rows, rng):
    x, dy = rng.standard_normal((2, rows, 40)).astype(dtype)
    assert_gradients_right(dy, x, weight_of(rng, 40, dtype, True), 1e-5)


@pytest.mark.parametrize("size", [1e38, 1e30, 1e19, 1e-19, 1e-30])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_backward_of_huge_and_tiny_rows(isa, size, eps, rng):
    x = (np.clip(rng.standard_normal((5, 99)) / 4, -1, 1) * size).astype(np.float32)
    dy = rng.standard_normal((5, 99)).astype(np.float32)
    dx, dweight = gradients(dy, x, eps=eps)
    _, rstd = reference.rms_norm(x, eps=eps, return_stats=True)
    exact = reference.rms_norm_backward(dy, x, 99, rstd)
    allowed = 1e-6 * rstd[:, None] * np.abs(dy).max(-1, keepdims=True) + 2.0**-148
    assert (np.abs(dx - exact[0]) <= allowed).all()
    xh = reference.rms_norm(x, eps=eps)
    magnitudes = (np.abs(dy) * np.maximum(1, np.abs(xh))).sum(0)
    assert (np.abs(dweight - exact[1]) <= 1e-6 * magnitudes).all()


def central_differences(function, at, step=1e-5):
    gradient = np.empty_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (up[place] - down[place])
    return gradient


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (18, 7), (2, 3, 4)], ids=str)
def test_finite_differences(shape, eps, offset, rng):
    x, dy = rng.standard_normal((2, *shape))
    weight = rng.standard_normal(shape[-1])

    def loss(x, weight):
        return float((dy * fastnorm.rms_norm(x, shape[-1], weight, eps, offset=offset)).sum())

    dx, dweight = gradients(dy, x, weight, eps, offset)
    for got, want in (
        (dx, central_differences(lambda v: loss(v, weight), x)),
        (dweight, central_differences(lambda v: loss(x, v), weight)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(dx).max() + 1e-8)


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=2)), ids=str)
@storage
def test_output_mask(isa, kind, mask, rng):
    x, dy = cast(rng.standard_normal((2, 20, 70)), kind)
    w = cast(rng.standard_normal(70), kind)
    some = gradients(dy, x, w, output_mask=mask)
    for wanted, got, want in zip(mask, some, gradients(dy, x, w), strict=True):
        if wanted:
            assert_same_bits(got, want)
        else:
            assert got is None


@storage
def test_gradients_with_an_offset_are_those_of_the_sum(isa, kind, rng):
    """To the bit, in any layout; and the call is as plain as with a weight that has it already."""
    for n in (5, 64, 1030):
        x, dy = cast(rng.standard_normal((2, 9, n)), kind)
        w = cast(rng.standard_normal(n) / 100, kind)
        computed = compute_type(kind)
        summed = cast(w, computed) + computed.type(1)
        rstd = fastnorm.rms_norm(x, n, w, offset=1.0, return_stats=True)[1]
        want = fastnorm.rms_norm_backward(dy, x, n, rstd, summed)
        wide = np.repeat(x, 2, axis=1)[:, ::2]
        for some_x, some_w, one in ((x, w, 1.0), (x, w, 1), (wide, w, 1.0), (x, w[None], 1.0)):
            got = fastnorm.rms_norm_backward(dy, some_x, n, rstd, some_w, offset=one)
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a.reshape(b.shape), b)
        plan = fastnorm.explain("rms_norm_backward", dy, x, n, rstd, w, offset=1.0)
        assert plan == fastnorm.explain("rms_norm_backward", dy, x, n, rstd, summed)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 5, 64, 257, 1025, 2049])
def test_from_output(isa, dtype, n, offset, rng):
    """What is known of x is in y, as long as no weight is 0."""
    x, dy = (rng.standard_normal((2, 19, n)) + 0.5).astype(dtype)
    weight = (rng.random(n) + 0.5).astype(dtype)
    y, rstd = fastnorm.rms_norm(x, n, weight, offset=offset, return_stats=True)
    got = fastnorm.rms_norm_backward(dy, y, n, rstd, weight, offset=offset, from_output=True)
    errors = accuracy.rms_norm_backward_errors(got, dy, x, weight, None, offset)
    assert max(errors) <= 4 * accuracy.bound(dtype)  # y has been rounded
    want = reference.rms_norm_backward(dy, y, n, rstd, weight, offset=offset, from_output=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_from_output_without_a_weight(dtype, rng):
    x, dy = rng.standard_normal((2, 9, 70)).astype(dtype)
    y, rstd = fastnorm.rms_norm(x, return_stats=True)
    got = fastnorm.rms_norm_backward(dy, y, 70, rstd, from_output=True)
    want = reference.rms_norm_backward(dy, x, 70, rstd)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("kind", ["int32", "bool"])
def test_integers_become_float64(kind, rng):
    x = rng.integers(0, 2, (4, 20)).astype(kind)
    assert_same_bits(fastnorm.rms_norm(x), fastnorm.rms_norm(x.astype(np.float64)))
