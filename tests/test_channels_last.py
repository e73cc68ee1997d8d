"""Channels last: samples of rows of channels, whose sums are formed about a pivot of each channel,
and shared among threads by samples or by blocks of rows."""

import numpy as np
import pytest

import fastnorm
from fastnorm import reference

from .helpers.arrays import assert_same_bits, placed

#: Rows that make one block, less, more; channels that fill vectors or do not.
SHAPES = [
    (2, 4, 4, 8),
    (3, 7, 9, 16),
    (1, 64, 20),
    (2, 65, 12),
    (5, 130, 3),
    (1, 40, 40, 36),
    (9, 8),
]


def groups_of(channels):
    return next(g for g in (4, 3, 2, 1) if channels % g == 0)


def every_norm(f, x, dy, w, b, groups, axis=-1):
    """Group and instance norm of rows, and their gradients."""
    options = {"channel_axis": axis}
    for name, count in (("group_norm", (groups,)), ("instance_norm", ())):
        norm, backward = getattr(f, name), getattr(f, f"{name}_backward")
        arguments = {"weight": w, "bias": b, **options}
        y, mean, rstd = norm(x, *count, return_stats=True, **arguments)
        yield norm(x, *count, **arguments)
        yield from (y, mean, rstd)
        yield from backward(dy, x, *count, mean, rstd, **arguments)


def problem(rng, shape, kind, mean=0.0, scale=1.0):
    x = (rng.standard_normal(shape) * scale + mean).astype(kind)
    dy = rng.standard_normal(shape).astype(kind)
    w, b = rng.standard_normal((2, shape[-1])).astype(kind)
    return x, dy, w, b


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1, 1e30, 1e-30, 0])
def test_plain_calls_have_the_bits_of_others(shape, kind, scale, rng):
    """Straight down, and by way of copies of arrays that are not contiguous."""
    x, dy, w, b = problem(rng, shape, kind, 100 if scale == 1 else 0, scale)
    spread = [np.stack([a, a], -1)[..., 0] for a in (x, dy)]
    groups = groups_of(shape[-1])
    want = tuple(every_norm(fastnorm, *spread, w, b, groups))
    assert_same_bits(tuple(every_norm(fastnorm, x, dy, w, b, groups)), want)
    assert_same_bits(want[0], want[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0, 1e3, 1e6])
def test_large_means(shape, mean, rng):
    x = (rng.standard_normal(shape) + mean).astype(np.float32)
    groups = groups_of(shape[-1])
    x[..., 1] += 3 * mean  # a channel that lies far from its group's others
    y = fastnorm.group_norm(x, groups, channel_axis=-1)
    want = reference.group_norm(x, groups, channel_axis=-1)
    assert np.abs(y - want).max() <= 1e-6 * max(1, np.abs(want).max())
    y = fastnorm.instance_norm(x, channel_axis=-1)
    want = reference.instance_norm(x, channel_axis=-1)
    assert np.abs(y - want).max() <= 1e-6 * max(1, np.abs(want).max())


@pytest.mark.parametrize("kind", ["f4", "f8", "f2"])
def test_rows_that_say_nothing_of_the_others(kind, rng, partition):
    """The rows that pivots are taken from hold another number than all others do."""
    rows, channels = 64 * 200, 20
    x = rng.standard_normal((3, rows, channels)) + 1000
    x[:, : 63 * 199 + 1 : 199] = 7
    x[:, :, 1] = rng.standard_normal((3, rows))  # and a channel of which that is not so
    x = x.astype(kind)
    results = []
    for parts in (1, 2, 3, 5):
        partition(parts)
        results.append(fastnorm.instance_norm(x, channel_axis=-1, return_stats=True, dtype="f8"))
        assert_same_bits(results[-1], results[0], f"{parts} parts")
    wanted = reference.instance_norm(x.astype("f8"), channel_axis=-1)
    assert np.abs(results[0][0] - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("offset", [0, 4, 20])
@pytest.mark.parametrize("channels", [40, 48, 515])
def test_results_that_go_past_the_cache(channels, offset, rng):
    """A sample is too small for that by itself."""
    rows = (9 << 20) // (3 * 4 * channels)
    x = rng.standard_normal((3, rows, channels), np.float32)
    x[1, :, : channels // 5] = 7 if channels == 40 else x[1, :, : channels // 5]
    w, b = rng.standard_normal((2, channels)).astype(np.float32)
    arguments = {"weight": w, "bias": b, "channel_axis": -1, "eps": 0.0}
    out = placed(np.zeros_like(x), offset)
    groups = 5 if channels % 5 == 0 else 3
    with np.errstate(all="ignore"):
        fastnorm.group_norm(x, groups, out=out, **arguments)
        want = [fastnorm.group_norm(sample[None], groups, **arguments)[0] for sample in x]
    assert_same_bits(out, np.stack(want))
    _, mean, rstd = fastnorm.group_norm(x, groups, return_stats=True, channel_axis=-1)
    backward = fastnorm.group_norm_backward
    kept = backward(x, x, groups, mean, rstd, w, channel_axis=-1)[0]
    del kept  # whose pages exist when the next is made
    dx = backward(x, x, groups, mean, rstd, w, channel_axis=-1)[0]
    for s, own in enumerate(dx):
        part = slice(s, s + 1)
        want = backward(x[part], x[part], groups, mean[part], rstd[part], w, channel_axis=-1)[0]
        assert_same_bits(own, want[0])


@pytest.mark.parametrize("kind", ["f4", "f8", "f2"])
@pytest.mark.parametrize("in_place", [False, True])
def test_units_out_of_range_and_their_neighbours(kind, in_place, rng, partition):
    """What is refused is put right, and leaves no mark on the channels beside it."""
    x = rng.standard_normal((3, 70, 12)).astype(kind)
    x[0, :, 3] = np.finfo(x.dtype).max  # a constant
    x[1, 5, 4:6] = np.nan
    x[2, :, 11] *= np.finfo(x.dtype).smallest_normal
    weight = np.float32(rng.standard_normal(12))
    results = []
    for parts in (1, 2, 3):
        partition(parts)
        out = x.copy()
        given = out if in_place else x
        y = fastnorm.group_norm(given, 6, weight, eps=0.0, channel_axis=-1, out=out)
        assert y is out
        results.append(y)
        assert_same_bits(y, results[0], f"{parts} parts")
    with np.errstate(all="ignore"):
        want = reference.group_norm(x, 6, weight, eps=0.0, channel_axis=-1)
    tolerance = 2e-3 if kind == "f2" else 1e-5
    np.testing.assert_allclose(results[0], want, rtol=tolerance, atol=tolerance)
    assert np.isnan(results[0][1, :, 4:6]).all()
    assert np.isfinite(np.delete(results[0], [4, 5], 2)).all()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 1, 1)])
def test_one_element_a_channel(shape, rng):
    """Channels first and last are the same then."""
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    w, b = rng.standard_normal((2, 8)).astype(np.float32)
    flat = [a.reshape(6, 8) for a in (x, dy)]
    got = every_norm(fastnorm, x, dy, w, b, 2, axis=1)
    for one, other in zip(got, every_norm(fastnorm, *flat, w, b, 2), strict=True):
        assert_same_bits(one.reshape(other.shape), other)


def test_one_channel(rng):
    """Which is a plane, first or last."""
    x = rng.standard_normal((3, 9, 7, 1)).astype(np.float32)
    got = fastnorm.instance_norm(x, channel_axis=-1)
    assert_same_bits(got, fastnorm.instance_norm(x.reshape(3, 1, 9, 7)).reshape(x.shape))


def test_explain():
    plan = fastnorm.explain("group_norm", np.ones((2, 5, 5, 6), np.float32), 3, channel_axis=-1)
    assert "channels last" in str(plan)
