"""Plain arrays with channels go straight down: to the bits, statistics and running statistics of
the calls that are checked in Python. (A dtype= that is named sends a call there.)"""

import functools
import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import channels
from fastnorm.dialects import DIALECTS

from .helpers.arrays import assert_same_bits
from .helpers.channels import FORWARD, SHAPES, Problem

dtypes = pytest.mark.parametrize("dtype", ["f4", "f8"])


@pytest.fixture
def straight(monkeypatch):
    """A way to make a call that fails where it is checked in Python."""

    def refuse(*_):
        raise AssertionError("took the long way")

    def run(call, *args, **kwargs):
        with monkeypatch.context() as patch:
            for op in channels.OPS:
                patch.setitem(channels.handlers, op, refuse)
            return call(*args, **kwargs)

    return run


@dtypes
@pytest.mark.parametrize("name", ["batch_norm training", "group_norm", "instance_norm"])
def test_results_and_statistics(name, dtype, straight, rng):
    for shape, axis, groups in SHAPES:
        if axis not in (1, -1, len(shape) - 1):
            continue
        p = Problem(rng, shape, dtype, axis, groups)
        got = straight(FORWARD[name], fastnorm, p)
        assert_same_bits(got, FORWARD[name](fastnorm, p, dtype=p.x.dtype), str(shape))


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("kinds", [("f4", "f4"), ("f8", "f8"), ("f8", "f4"), ("f4", None)])
def test_running_statistics_move_as_far(dialect, kinds, straight, rng):
    for shape, axis in (((1, 3), 1), ((5, 7), 1), ((4, 3, 6), 1), ((4, 6, 3), -1)):
        p = Problem(rng, shape, "f4", axis)
        for momentum, stats in itertools.product((0.1, 0.0, -2.5), (False, True)):
            ways = []
            for options in ({}, {"dtype": "f4"}):
                running = [k and a.astype(k) for k, a in zip(kinds, p.running, strict=True)]
                call = functools.partial(
                    fastnorm.batch_norm, p.x, *running, p.weight, p.bias, True, momentum,
                    channel_axis=axis, dialect=dialect, return_stats=stats, **options,
                )  # fmt: skip
                done = call() if options else straight(call)
                ways.append((*(done if stats else (done,)), *(a for a in running if a is not None)))
            assert_same_bits(*ways, f"{shape} {momentum}")


@pytest.mark.parametrize("axis", [1, -1])
def test_units_that_are_put_right_have_their_statistics(axis, straight, rng):
    """A unit that is out of range is done in double, and its statistics are those that it has."""
    x = rng.standard_normal((2, 3, 5)).astype("f4")
    x[0, 1] *= 1e30
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    options = {"weight": np.float32([1, 1e-30, 1]), "channel_axis": axis, "return_stats": True}
    for call in (
        lambda **o: fastnorm.group_norm(x, 3, **options, **o),
        lambda **o: fastnorm.instance_norm(x, **options, **o),
        lambda **o: fastnorm.batch_norm(x, None, None, training=True, **options, **o),
    ):
        assert_same_bits(straight(call), call(dtype=x.dtype))


def test_running_statistics_that_are_not_plain_are_checked(rng):
    """What overlaps, does not fit or cannot be written is refused, and nothing moves."""
    x = rng.standard_normal((4, 3)).astype("f4")
    kept = np.zeros(4, "f4")
    frozen = np.zeros(3, "f4")
    frozen.flags.writeable = False
    for mean, var in (
        (kept[:3], kept[1:]), (kept, None), (frozen, None), (None, frozen), (kept[:3], [1, 1, 1]),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="running_"):
            fastnorm.batch_norm(x, mean, var, training=True)
    out = np.empty_like(x)
    with pytest.raises(ValueError, match="out"):
        fastnorm.batch_norm(x, out[0], None, training=True, out=out)
    assert not kept.any()
