"""What a review of the kernels on channels found: extremes of gradients and statistics, bfloat16 as
uint16, arguments that only the general path looked at."""

import numpy as np
import pytest

import fastnorm
from fastnorm import reference

from .helpers.arrays import assert_same_bits

axes = pytest.mark.parametrize("axis", [1, -1])


def by_axis(x, axis):
    """(1, C, S), as it is or channels last."""
    return x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def trained(x, dy, axis, eps):
    """batch_norm's gradients, the definition's, and the scale that dx's error is measured by."""
    x, dy = by_axis(x, axis), by_axis(dy, axis)
    options = {"training": True, "eps": eps, "channel_axis": axis}
    _, mean, rstd = fastnorm.batch_norm(x, None, None, return_stats=True, **options)
    options |= {"mean": mean, "rstd": rstd}
    got = fastnorm.batch_norm_backward(dy, x, **options)
    want = reference.batch_norm_backward(dy, x, **options)
    return got, want, rstd.max() * np.abs(dy).max()


@axes
def test_products_of_dy_that_underflow(axis, rng):
    """dy times x - mean is subnormal, though the sum of dy is not."""
    x = (rng.standard_normal((1, 1, 10_000)) * 1e-12).astype(np.float32)
    dy = (1e-31 + 5e-32 * np.sign(x)).astype(np.float32)
    got, want, scale = trained(x, dy, axis, 1e-30)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    assert np.abs(got[0] - want[0]).max() <= 1e-6 * scale


@axes
def test_slopes_that_underflow(axis, rng):
    """rstd^2 times a gradient is subnormal, though dx is not."""
    x = (rng.standard_normal((1, 1, 1000)) * 1e12).astype(np.float32)
    dy = ((rng.standard_normal(x.shape) + np.sign(x)) * 1e-18).astype(np.float32)
    got, want, scale = trained(x, dy, axis, 1e-5)
    assert np.abs(got[0] - want[0]).max() <= 1e-6 * scale


@axes
@pytest.mark.parametrize(
    ("mean", "var", "value", "weight"),
    [(1e39, 1e78, 1e38, 1), (-3e38, 1e76, 3e38, 1), (0, 1e-80, 1e-41, 1), (0, 1e-40, 1e-25, 1e25)],
)
def test_running_statistics_out_of_range(axis, mean, var, value, weight):
    """Neither the mean nor the factor is a float32, but y is."""
    x = by_axis(np.full((2, 3, 4), value, np.float32), axis)
    x[..., 1:] *= 0.5
    arguments = np.full(3, mean, np.float64), np.full(3, var, np.float64)
    parameters = {"weight": np.full(3, weight, np.float32), "channel_axis": axis, "eps": 0.0}
    want = reference.batch_norm(x, *arguments, **parameters)
    assert np.isfinite(want).all()
    got = fastnorm.batch_norm(x, *arguments, **parameters)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert_same_bits(fastnorm.batch_norm(x, *arguments, out=x, **parameters), got)


@axes
def test_dx_of_inference_of_huge_doubles(axis):
    x = by_axis(np.full((1, 2, 3), 1e307), axis)
    dy = np.ones_like(x)
    dx, _, _ = fastnorm.batch_norm_backward(
        dy, x, np.zeros(2), np.ones(2), np.full(2, 1e30), channel_axis=axis, eps=0.0
    )
    np.testing.assert_array_equal(dx, 1e30)


def test_bfloat16_as_uint16_in_units_out_of_range():
    """Constant groups and eps 0: put right in Python, rounded once as elsewhere."""
    x = np.full((2, 3, 4), 0x3F80, np.uint16)
    x[1, 1, 2] = 0x4000
    y = fastnorm.group_norm(x, 3, eps=0.0, dtype="bfloat16")
    values = (x.astype(np.uint32) << 16).view(np.float32)
    want = fastnorm.group_norm(values, 3, eps=0.0)
    exact = (y.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(exact, want, rtol=2**-8)


def test_bfloat16_as_uint16_in_running_statistics():
    x = np.array([[0x3F80, 0x4040], [0x4040, 0x4040]], np.uint16)  # 1 3, 3 3
    mean, var = np.zeros(2, np.uint16), np.full(2, 0x3F80, np.uint16)
    options = {"dtype": "bfloat16", "eps": 0.0}
    y = fastnorm.batch_norm(x, mean, var, training=True, momentum=0.5, dialect="keras", **options)
    np.testing.assert_array_equal(y[:, 0], [0xBF80, 0x3F80])
    np.testing.assert_array_equal(mean, [0x3F80, 0x3FC0])  # 1, 1.5
    np.testing.assert_array_equal(var, [0x3F80, 0x3F00])  # 1, 0.5
    var[:] = 0x3F80
    y = fastnorm.batch_norm(x, mean, var, **options)
    np.testing.assert_array_equal(y, [[0x0000, 0x3FC0], [0x4000, 0x3FC0]])  # 0 1.5, 2 1.5


@pytest.mark.parametrize(
    ("change", "exception"),
    [({"momentum": "much"}, TypeError), ({"momentum": np.nan}, ValueError),
     ({"dialect": "no such"}, ValueError), ({"dialect": []}, TypeError)],
)  # fmt: skip
def test_inference_looks_at_all_arguments(change, exception):
    x = np.ones((1, 2, 3), np.float32)
    with pytest.raises(exception, match=next(iter(change))):
        fastnorm.batch_norm(x, np.zeros(2), np.ones(2), **change)


def test_statistics_of_inference_without_elements():
    x, mean, var = np.ones((0, 2, 3), np.float32), np.full(2, 3.0), np.full(2, 4.0)
    _, got, rstd = fastnorm.batch_norm(x, mean, var, eps=0.0, return_stats=True)
    np.testing.assert_array_equal(got, 3)
    np.testing.assert_array_equal(rstd, 0.5)


def test_styles_with_constant_channels(rng):
    style = rng.standard_normal((2, 3, 4)).astype(np.float32)
    style[:, 1] = 7
    x = rng.standard_normal((2, 3, 5)).astype(np.float32)
    y = fastnorm.adaptive_instance_norm(x, style, 0.0)
    np.testing.assert_array_equal(y[:, 1], 7)


def test_deviations_that_leave_the_range():
    """Of channels that are constant, or one number, each: no square of theirs tells."""
    x = np.float32([[3e38, -3e38, -3e38, -2e38], [1e38, 2e38, 3e38, 1e30]])
    np.testing.assert_allclose(fastnorm.group_norm(x, 1), reference.group_norm(x, 1), rtol=1e-5)
    x = np.empty((5, 1, 2), np.float32)
    x[0], x[1:] = 1.6e38, -1.6e38
    options = {"training": True, "eps": 0.0}
    got, want = (m.batch_norm(x, None, None, **options) for m in (fastnorm, reference))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@axes
def test_factors_that_underflow(axis, rng):
    """weight*rstd is subnormal, neither of them is."""
    x = by_axis((rng.standard_normal((2, 4, 50)) * 1e15).astype(np.float32), axis)
    w, var = np.full(4, 1e-25, np.float32), np.full(4, 1e30, np.float32)
    dy = (rng.standard_normal(x.shape) * 1e10).astype(np.float32)
    group = {"weight": w, "channel_axis": axis}
    batch = {"running_mean": np.zeros(4, np.float32), "running_var": var, **group}
    _, mean, rstd = fastnorm.group_norm(x, 2, return_stats=True, **group)
    results = [
        (
            f.group_norm(x, 2, **group),
            f.group_norm_backward(dy, x, 2, mean, rstd, **group)[0],
            f.batch_norm(x, **batch),
            f.batch_norm_backward(dy, x, **batch)[0],
        )
        for f in (fastnorm, reference)
    ]
    for got, want in zip(*results, strict=True):
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(5, 6), (64, 128), (65, 3), (300, 7), (4, 9, 10, 6), (1, 4)])
@pytest.mark.parametrize("scale", [1, 1e30, 1e-30, 0])
def test_rows_go_straight_with_the_same_bits(shape, kind, scale, rng):
    """Plain calls, channels last, against the general way: of return_stats, or of strides."""
    x = (rng.normal(size=shape) * scale + (100 if scale == 1 else 0)).astype(kind)
    dy, channels = rng.normal(size=shape).astype(kind), shape[-1]
    w, b = rng.normal(size=(2, channels)).astype(kind)
    stats, others = (np.ones((2, channels), kind) for _ in range(2))
    got = fastnorm.batch_norm(x, *stats, w, b, True, channel_axis=-1)
    want, mean, rstd = fastnorm.batch_norm(
        x, *others, w, b, True, channel_axis=-1, return_stats=True
    )
    assert_same_bits((got, stats), (want, others))
    got = fastnorm.batch_norm(x, *stats, w, b, channel_axis=-1)
    want, *_ = fastnorm.batch_norm(x, *stats, w, b, channel_axis=-1, return_stats=True)
    assert_same_bits(got, want)
    apart = np.stack([x, x], -1)[..., 0]
    running = {"running_mean": stats[0], "running_var": stats[1]}
    for options in ({"training": True, "mean": mean, "rstd": rstd}, running):
        options |= {"weight": w, "bias": b, "channel_axis": -1}
        assert_same_bits(
            fastnorm.batch_norm_backward(dy, x, **options),
            fastnorm.batch_norm_backward(dy, apart, **options),
        )
