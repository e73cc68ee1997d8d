"""moments: mean and population variance, by layer_norm's own arithmetic."""

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .helpers.arrays import assert_same_bits
from .helpers.rows import hard_rows
from .helpers.storage import HALVES, STORAGE, special_rows


def assert_right(x):
    errors = accuracy.moments_errors(fastnorm.moments(x), x)
    assert max(errors) <= accuracy.bound(x.dtype), f"{x.shape}: {errors}"


def test_values(isa, dtype, rng):
    for n in (*range(1, 131), 768, 1023, 1024, 1025, 2049, 10_007):
        assert_right((rng.standard_normal((9, n)) + 3).astype(dtype))


def test_huge_rows(dtype):
    info = np.finfo(dtype)
    x = np.array([[info.max, info.max], [info.max, -info.max], [1e19, 3e19]], dtype)
    mean, variance = fastnorm.moments(x)
    with np.errstate(over="ignore"):
        want_mean, want_variance = (a.astype(dtype) for a in reference.moments(x))
    np.testing.assert_allclose(mean, want_mean, rtol=4 * info.eps)
    np.testing.assert_allclose(variance, want_variance, rtol=4 * info.eps)


def test_constant_rows_have_variance_0(isa, dtype):
    for value in (0, 1.1, 1e30, 1e-30):
        mean, variance = fastnorm.moments(np.full((9, 1234), value, dtype))
        assert_same_bits(mean, np.full(9, value, dtype))
        assert_same_bits(variance, np.zeros(9, dtype))


def test_agree_with_layer_norm(isa, dtype, rng):
    x = hard_rows(rng, 777, dtype)
    _, mean, rstd = fastnorm.layer_norm(x, eps=0.0, return_stats=True)
    moments_mean, variance = fastnorm.moments(x)
    assert_same_bits(moments_mean, mean)
    ordinary = (variance > 1e-20) & (variance < 1e20)
    assert ordinary.sum() > 5
    np.testing.assert_allclose(variance[ordinary] * rstd[ordinary] ** 2, 1, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (2, 1), (0, 1, 2), [1, 0]], ids=str)
def test_axis(axis, dtype, rng):
    x = rng.standard_normal((3, 4, 5)).astype(dtype)
    over = -1 if axis is None else tuple(np.atleast_1d(axis))
    mean, variance = fastnorm.moments(x) if axis is None else fastnorm.moments(x, axis)
    assert mean.dtype == variance.dtype == dtype
    want = x.astype(np.float64)
    assert mean.shape == variance.shape == want.mean(over).shape
    tolerance = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(mean, want.mean(over), atol=tolerance)
    np.testing.assert_allclose(variance, want.var(over), rtol=tolerance)


def test_nothing_in(dtype):
    mean, variance = fastnorm.moments(np.empty((3, 0), dtype))
    assert_same_bits((mean, variance), (np.zeros(3, dtype), np.full(3, np.nan, dtype)))
    mean, variance = fastnorm.moments(np.empty((0, 3), dtype))
    assert mean.shape == variance.shape == (0,)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poisoned_rows(isa, dtype, poison, rng):
    x = rng.standard_normal((9, 50)).astype(dtype)
    clean = fastnorm.moments(x)
    x[4, 7] = poison
    for got, before in zip(fastnorm.moments(x), clean, strict=True):
        assert np.isnan(got[4])
        assert_same_bits(np.delete(got, 4), np.delete(before, 4))


def test_integers_and_lists():
    mean, variance = fastnorm.moments([[1, 2, 3], [4, 4, 4]])
    assert_same_bits((mean, variance), (np.array([2.0, 4.0]), np.array([2 / 3, 0.0])))


@pytest.mark.parametrize("storage", HALVES, ids=str)
def test_half_types(isa, storage, rng):
    """Their elements are taken as they are; results are float32."""
    for n in (1, 7, 64, 1000, 1025, 5000):
        x = special_rows(rng, n, storage)
        assert_same_bits(fastnorm.moments(x), fastnorm.moments(x.astype(np.float32)))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_layouts(isa, storage, rng):
    """Other strides, the same bits."""
    x = np.stack([special_rows(rng, 60, storage)] * 3)
    want = fastnorm.moments(x)
    wide = np.repeat(x, 2, axis=-1)
    for view, axis in (
        (np.ascontiguousarray(x.transpose(2, 0, 1)), 0),
        (np.asfortranarray(x), 2),
        (wide[..., ::2], -1),
        (wide[..., ::-2][..., ::-1], (2,)),
        (x.reshape(3, 20, 6, 10), (2, 3)),
        (np.ascontiguousarray(x.reshape(3, 20, 6, 10).transpose(0, 2, 1, 3)), (1, 3)),
        (x.astype(storage.newbyteorder("S")) if storage.kind == "f" else x, 2),
    ):
        got = fastnorm.moments(view, axis)
        assert_same_bits(got, want, f"{view.shape} {view.strides} {axis}")
