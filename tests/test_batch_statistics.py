"""BatchStatistics: exact sums over blocks, in any split and order; their accuracy; NaN; copies."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnorm import exact_sums
from fastnorm.batch_statistics import ROWS, BatchStatistics

from .helpers.arrays import assert_same_bits
from .helpers.storage import LIMITS, STORAGE, cast

# Shapes with their channels' axis, and at how many samples they may be cut between blocks.
LAYOUTS = [
    ((200, 3), 1, ROWS),
    ((200, 3), -1, ROWS),
    ((7, 3, 10), 1, 1),
    ((7, 10, 3), -1, 1),
    ((6, 3, 4, 5), 1, 1),
    ((6, 4, 5, 3), 3, 1),
    ((6, 4, 3, 5), 2, 1),
    ((5, 3, 2, 3, 4), 1, 1),
    ((5, 2, 3, 4, 3), -1, 1),
    ((9, 3, 1), 1, 1),
]
BY_SHAPE = pytest.mark.parametrize(("shape", "axis", "step"), LAYOUTS, ids=str)


def channels_of(x, axis):
    """(C, elements)."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def exact(elements):
    """Mean and sum of squared deviations, as fractions."""
    numbers = [Fraction(float(v)) for v in elements]
    mean = sum(numbers, Fraction(0)) / len(numbers)
    return mean, sum(((v - mean) ** 2 for v in numbers), Fraction(0))


def assert_accurate(statistics, x, axis, bound):
    """Means to `bound` standard deviations (and half an ulp), m2 to `bound` of itself."""
    for c, elements in enumerate(channels_of(x, axis)):
        mean, m2 = exact(elements)
        deviation = math.sqrt(m2 / len(elements))
        ulp = float(np.spacing(abs(statistics.mean[c])))
        assert abs(Fraction(statistics.mean[c]) - mean) <= bound * deviation + ulp / 2
        assert abs(Fraction(statistics.m2[c]) - m2) <= Fraction(bound) * m2


def results(statistics):
    mean, m2 = statistics.mean, statistics.m2
    assert (mean.dtype, mean.shape) == (np.float64, (statistics.num_features,))
    assert (m2.dtype, m2.shape) == (np.float64, (statistics.num_features,))
    return mean, m2


def assert_same(one, other):
    """Equal, with results of the same bits."""
    assert one == other
    assert one.count == other.count
    assert_same_bits(results(one), results(other))


# ---- the sums ------------------------------------------------------------------------------------


def exactly(fixed):
    unit = Fraction(2) ** (exact_sums.WIDTH * fixed.low)
    return [int(whole) * unit for whole in fixed.integers(fixed.low)]


def wild(rng, shape, digits):
    return rng.standard_normal(shape) * 10.0 ** rng.integers(-digits, digits + 1, shape)


@pytest.mark.parametrize("shape", [(1, 1), (50, 3), (3, 50), (exact_sums._TILE + 5, 1)], ids=str)
@pytest.mark.parametrize("digits", [0, 9, 150])
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_sums_are_exact(shape, digits, scale, rng):
    a, b = wild(rng, shape, digits) * scale, wild(rng, shape, digits) * (scale * 2.0**-40)
    with np.errstate(under="ignore"):
        a[0, 0], a[-1] = 0, a[-1] * 1e-8
    if digits == 150 and a.size > 1000:
        a, b = a[:99], b[:99]
    columns = range(shape[1])
    as_fractions = [[[Fraction(float(v)) for v in part[:, c]] for c in columns] for part in (a, b)]
    assert exactly(exact_sums.sums(a)) == [sum(c) for c in as_fractions[0]]
    both = [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(*as_fractions, strict=True)]
    total, squares = exact_sums.sums_and_squares(a, b)
    assert exactly(total) == [sum(c) for c in both]
    assert exactly(squares) == [sum(v * v for v in c) for c in both]


@pytest.mark.parametrize("extreme", [5e-324, 2.0**-1022, 1.7976931348623157e308, 0.0, -0.0, 1.0])
def test_sums_of_extremes(extreme):
    numbers = [extreme, 1e-300, -extreme, extreme, 1.0]
    a = np.array(numbers)[:, None]
    total, squares = exact_sums.sums_and_squares(a, a[::-1])
    pairs = zip(numbers, numbers[::-1], strict=True)
    twice = [Fraction(v) + Fraction(w) for v, w in pairs]
    assert exactly(total) == [sum(twice)]
    assert exactly(squares) == [sum(v * v for v in twice)]
    assert exactly(exact_sums.sums(a)) == [sum(map(Fraction, numbers))]


@given(st.lists(st.integers(-(10**40), 10**40), min_size=1, max_size=9), st.integers(-3, 3))
def test_fixed_point_arithmetic(numbers, low):
    fixed = exact_sums.Fixed.of_integers(numbers, low)
    assert fixed.integers(low).tolist() == numbers
    for same in fixed.carried(), fixed.compact(), fixed.compact().carried(), fixed.times(1):
        assert same.integers(-3).tolist() == fixed.integers(-3).tolist()
        assert fixed.is_equal(same)
        assert np.abs(same.limbs).max(initial=0) <= same.bound
    other = exact_sums.Fixed.of_integers(numbers[::-1], low - 1)
    unit = 1 << exact_sums.WIDTH
    wanted = [unit * a + b for a, b in zip(numbers, numbers[::-1], strict=True)]
    assert fixed.plus(other).integers(low - 1).tolist() == wanted
    factor = (1 << 40) - 1
    assert fixed.times(factor).integers(low).tolist() == [factor * a for a in numbers]
    assert fixed.is_equal(other) == (exactly(fixed) == exactly(other))
    nothing = exact_sums.Fixed.zeros(len(numbers))
    assert fixed.is_equal(nothing) == (not any(numbers))


def test_limbs_never_overflow():
    """However much is added, carries come in time."""
    total = exact_sums.Fixed.of_integers([-1, 1, 5], 0)
    for _ in range(200):
        total = total.plus(total)
    assert total.integers(0).tolist() == [v << 200 for v in (-1, 1, 5)]
    assert len(total.limbs) < 20


# ---- accuracy ------------------------------------------------------------------------------------


@BY_SHAPE
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_accuracy_of_float64(shape, axis, step, mean, rng):
    x = mean + rng.standard_normal(shape)
    statistics = BatchStatistics(3, channel_axis=axis).update(x)
    assert statistics.count == x.size // 3
    assert_accurate(statistics, x, axis, 1e-12)


@pytest.mark.parametrize("stored", STORAGE, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_accuracy_of_each_type(stored, mean, rng):
    x = cast(mean + 8 * rng.standard_normal((300, 3)), stored)
    statistics = BatchStatistics(3).update(x[:128]).update(x[128:])
    assert_accurate(statistics, x, 1, 1e-12 if stored == np.float64 else 1e-6)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_splits(data):
    """Cuts anywhere: the numbers; cuts between blocks, in any order: the bits."""
    seed, mean = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([0.0, 1e3, 1e6, -1e6]))
    shape, axis, step = data.draw(st.sampled_from(LAYOUTS))
    stored = data.draw(st.sampled_from([*STORAGE, np.dtype("f8"), np.dtype("f8")]))
    x = mean + np.random.default_rng(seed).standard_normal(shape)
    bound = 1e-6
    if stored == np.float64:
        bound, x = 1e-12, x * data.draw(st.sampled_from([1.0, 1e-3, 1e30]))
    elif stored.itemsize == 2:
        x = np.clip(x, -1e3, 1e3) + 8 * np.sin(x)
    x = cast(x, stored)
    whole = BatchStatistics(3, channel_axis=axis).update(x)
    cuts = st.lists(st.integers(0, len(x)), max_size=4)

    anywhere = np.split(x, sorted(data.draw(cuts)))
    parts = [BatchStatistics(3, channel_axis=axis).update(part) for part in anywhere]
    merged = BatchStatistics(3, channel_axis=axis)
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert merged.count == whole.count
    assert_accurate(merged, x, axis, bound)

    between = [cut // step * step for cut in sorted(data.draw(cuts))]
    pieces = data.draw(st.permutations(np.split(x, between)))
    one, other = (BatchStatistics(3, channel_axis=axis) for _ in range(2))
    for piece in pieces:
        one.update(piece)
        other = BatchStatistics(3, channel_axis=axis).update(piece).merge(other)
    assert_same(one, whole)
    assert_same(other, whole)
    assert_same_bits(one.var(1), whole.var(1))


def test_merging_is_associative(rng):
    parts = [BatchStatistics(2).update(wild(rng, (50, 2), 12)) for _ in range(4)]
    a, b, c, d = parts
    left = copy.copy(a).merge(b).merge(c).merge(d)
    right = copy.copy(d).merge(c).merge(copy.copy(b).merge(a))
    assert_same(left, right)


def test_merged_with_itself(rng):
    x = rng.standard_normal((64, 2))
    one = BatchStatistics(2).update(x)
    assert_same(one.merge(one), BatchStatistics(2).update(np.concatenate([x, x])))


def test_channels_first_and_last_agree(rng):
    """And may be merged."""
    x = 1e3 + rng.standard_normal((4, 3, 5, 6))
    first = BatchStatistics(3).update(x)
    last = BatchStatistics(3, channel_axis=-1).update(np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(first.mean, last.mean, rtol=1e-15)
    np.testing.assert_allclose(first.m2, last.m2, rtol=1e-12)
    assert first.merge(last).count == 240


@BY_SHAPE
def test_layouts_in_memory(shape, axis, step, rng):
    """Strides, bytes and alignment do not matter."""
    x = rng.standard_normal(shape)
    want = BatchStatistics(3, channel_axis=axis).update(x)
    swapped = x.astype(x.dtype.newbyteorder())
    shifted = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(shape)
    shifted[...] = x
    padded = np.zeros([2 * n for n in shape])[tuple([slice(n, None) for n in shape])]
    padded[...] = x
    for same in np.asfortranarray(x), x[::-1].copy()[::-1], swapped, shifted, padded:
        assert_same(BatchStatistics(3, channel_axis=axis).update(same), want)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_large_arrays_are_copied_in_parts(channel_axis, rng):
    shape = (70, 40, 50, 10) if channel_axis == -1 else (70, 10, 40, 50)
    x = rng.standard_normal(shape)
    want = BatchStatistics(10, channel_axis=channel_axis).update(x)
    same = x.astype(">f8")
    assert_same(BatchStatistics(10, channel_axis=channel_axis).update(same), want)
    columns = rng.standard_normal((300_001, 4))
    want = BatchStatistics(4).update(columns)
    assert_same(BatchStatistics(4).update(np.asfortranarray(columns)), want)


def test_many_elements(full):
    """1e8 of them, which take no more digits than 1e6 do."""
    count = 10**8 if full else 10**6
    pattern = (np.arange(1000) * 37 % 1000).astype(np.float32)
    x = np.resize(pattern + np.float32(1e6), (count, 1))
    statistics = BatchStatistics(1).update(x)
    m2 = count * (1000**2 - 1) / 12
    assert statistics.count == count
    assert statistics.mean[0] == 1e6 + 499.5
    assert abs(statistics.m2[0] - m2) <= 1e-6 * m2
    parts = BatchStatistics(1)
    for part in np.array_split(x.reshape(-1, ROWS), 7)[::-1]:
        parts.update(part.reshape(-1, 1))
    assert_same(parts, statistics)


def test_many_channels(rng):
    x = rng.standard_normal((150, 3000)) * 10.0 ** rng.integers(-200, 150, 3000)
    statistics = BatchStatistics(3000).update(x)
    for c in range(0, 3000, 500):
        alone = BatchStatistics(2).update(x[:, c : c + 2])
        assert_same_bits(statistics.mean[c : c + 2], alone.mean)
        assert_same_bits(statistics.m2[c : c + 2], alone.m2)


# ---- what is not ordinary ------------------------------------------------------------------------


def test_one_element():
    statistics = BatchStatistics(2).update([[3.0, -7.0]])
    assert statistics.count == 1
    assert_same_bits(results(statistics), (np.array([3.0, -7.0]), np.zeros(2)))
    assert_same_bits(statistics.var(), np.zeros(2))
    assert np.isnan(statistics.var(1)).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (4, 3, 0, 7)], ids=str)
def test_nothing_changes_nothing(shape):
    empty = BatchStatistics(3)
    assert_same(BatchStatistics(3).update(np.zeros(shape)), empty)
    assert empty.count == 0
    assert_same_bits(results(empty), (np.zeros(3), np.zeros(3)))
    assert np.isnan(empty.var()).all()
    some = BatchStatistics(3).update(np.ones((2, 3)))
    assert_same(copy.copy(some).update(np.zeros(shape)), some)
    assert_same(copy.copy(some).merge(empty), some)
    assert_same(BatchStatistics(3).merge(some), some)


def test_no_channels():
    statistics = BatchStatistics(0).update(np.zeros((5, 0)))
    assert results(statistics)[0].shape == (0,)


@pytest.mark.parametrize("value", [1e300, -1.7e308, 1e-310, 5e-324, 0.1, 0.0, -0.0])
def test_constant_channels(value):
    """A block's mean times its count is no rounded number."""
    for shape in (200, 1), (5, 1, 77):
        statistics = BatchStatistics(1).update(np.full(shape, value))
        assert statistics.mean[0] == value
        assert statistics.m2[0] == 0


def test_huge_and_tiny(rng):
    """The mean is there where squares leave float64."""
    deviations = [1e300, 1e-300, 1e140, 1e-140]
    x = rng.standard_normal((200, 4)) * deviations + [0, 0, 1e146, 1e-134]
    statistics = BatchStatistics(4).update(x[:64]).update(x[64:])
    for c in range(4):
        mean, m2 = exact(x[:, c])
        ulp = float(np.spacing(abs(statistics.mean[c])))
        assert abs(Fraction(statistics.mean[c]) - mean) <= 1e-12 * deviations[c] + ulp / 2
        want = np.inf if c == 0 else 0.0 if c == 1 else float(m2)
        assert statistics.m2[c] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("stored", STORAGE, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(130, 3), (3, 100, 3)])
def test_the_range_of_each_type(stored, axis, shape, rng):
    """Squares that the type that is computed in does not have; mixed with what is ordinary."""
    largest, least, _ = LIMITS[stored.name]
    x = rng.standard_normal(shape)
    x[..., 0] *= largest / 8 if largest < 1e100 else 1e150
    x[..., 2] *= least * 8 if least > 1e-100 else 1e-150
    x = cast(x, stored)
    x = x if axis == -1 else np.moveaxis(x, -1, 1).copy()
    assert_accurate(BatchStatistics(3, channel_axis=axis).update(x), x, axis, 1e-6)


def test_deviations_that_cancel():
    """Their squares are below float32, and their sum is 0."""
    x = np.full((128, 2), 1e-30, np.float32)
    x[::2, 1] *= -1
    statistics = BatchStatistics(2).update(x)
    assert statistics.m2[1] == pytest.approx(128 * float(x[0, 0]) ** 2, rel=1e-6)
    assert statistics.m2[0] == 0


@pytest.mark.parametrize("axis", [1, -1])
def test_large_planes_of_float32(axis, rng):
    x = 100 + rng.standard_normal((2, 300, 200, 3)).astype(np.float32)
    x = np.moveaxis(x, -1, axis)
    got, wide = BatchStatistics(3, channel_axis=axis).update(x), x.astype(np.float64)
    others = tuple(d for d in range(4) if d != axis % 4)
    np.testing.assert_allclose(got.mean, wide.mean(others), rtol=1e-8)
    np.testing.assert_allclose(got.var(), wide.var(others), rtol=2e-7)


def test_far_apart():
    """Means whose squares are infinite, each block constant."""
    x = np.repeat([[1e300], [-1e300]], ROWS, axis=0)
    statistics = BatchStatistics(1).update(x)
    assert (statistics.mean[0], statistics.m2[0]) == (0, np.inf)
    x = np.repeat([[1e300, 1.0], [1e-300, 1e-300]], ROWS, axis=0)
    assert_same_bits(BatchStatistics(2).update(x).mean, np.array([5e299, 0.5]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@BY_SHAPE
def test_what_is_not_finite_stays_in_its_channel(bad, shape, axis, step, rng):
    x = rng.standard_normal(shape)
    want = BatchStatistics(3, channel_axis=axis).update(x).update(x)
    spoilt = x.copy()
    np.moveaxis(spoilt, axis, 0)[1].flat[2] = bad
    got = BatchStatistics(3, channel_axis=axis).update(spoilt).update(x)
    for one, other in zip(results(got), results(want), strict=True):
        assert np.isnan(one[1])
        assert_same_bits(one[[0, 2]], other[[0, 2]])
    also = BatchStatistics(3, channel_axis=axis).update(x).update(2 * spoilt)
    assert np.isnan(also.merge(want).mean[1])
    # What else such a channel has seen is no difference.
    changed = spoilt.copy()
    np.moveaxis(changed, axis, 0)[1].flat[-1] = 5
    assert BatchStatistics(3, channel_axis=axis).update(changed).update(x) == got


def test_numpys_own_warnings_stay_silent(rng):
    """Of what happens within; there is nothing that a caller could do."""
    x = wild(rng, (200, 3), 100)
    x[0, 0], x[1, 1] = np.inf, 5e-324
    with np.errstate(all="raise"):
        statistics = BatchStatistics(3).update(x)
        assert np.isnan(results(statistics)[0][0])


def test_integers_and_lists():
    statistics = BatchStatistics(2).update([[1, 2], [3, 6]])
    assert_same_bits(results(statistics), (np.array([2.0, 4.0]), np.array([2.0, 8.0])))


def test_tensors(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.from_numpy(rng.standard_normal((9, 3, 5)).astype(np.float32))
    for tensor in x, x.to(torch.bfloat16), x.half(), x.transpose(0, 2).contiguous().transpose(0, 2):
        want = BatchStatistics(3).update(tensor.double().numpy().copy())
        got = BatchStatistics(3).update(tensor)
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.m2, want.m2, rtol=1e-6)


# ---- results -------------------------------------------------------------------------------------


def test_variances(rng):
    x = rng.standard_normal((40, 3, 5))
    statistics = BatchStatistics(3).update(x)
    for ddof in 0, 1, 7:
        np.testing.assert_allclose(statistics.var(ddof), x.var((0, 2), ddof=ddof), rtol=1e-12)
    assert np.isnan(statistics.var(200)).all()
    mean, variance = statistics.running()
    assert_same_bits((mean, variance), (statistics.mean, statistics.var(1)))
    for dialect in "keras", "flax", "onnx":
        assert_same_bits(statistics.running(dialect)[1], statistics.var())


def test_running_statistics_of_one_element():
    """As batch_norm has them: the biased variance, 0."""
    statistics = BatchStatistics(1).update([[2.5]])
    assert_same_bits(statistics.running("torch"), (np.array([2.5]), np.array([0.0])))


def test_running_statistics_of_nothing():
    with pytest.raises(ValueError, match="count: got 0, wanted statistics of at least one"):
        BatchStatistics(2).running()


def test_results_are_new_arrays():
    statistics = BatchStatistics(2).update(np.ones((3, 2)))
    statistics.mean[:] = 7
    assert (statistics.mean == 1).all()


# ---- the object ----------------------------------------------------------------------------------


def pickled(statistics):
    return pickle.loads(pickle.dumps(statistics))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies(copied, rng):
    x = wild(rng, (100, 3), 5)
    x[3, 2] = np.nan
    original = BatchStatistics(3, channel_axis=-1).update(x)
    twin = copied(original)
    assert_same(twin, original)
    assert (twin.num_features, twin.channel_axis) == (3, -1)
    twin.update(x)
    assert (original.count, twin.count) == (100, 200)
    assert_same(twin, original.update(x))


def test_subclasses_keep_what_they_have():
    class Named(BatchStatistics):
        pass

    named = Named(2)
    named.name = "stem"
    assert copy.copy(named).name == "stem"
    assert type(copy.copy(named)) is Named


def test_comparison():
    x = np.arange(12.0).reshape(4, 3)
    one = BatchStatistics(3).update(x)
    assert one == BatchStatistics(3).update(x)
    assert one != BatchStatistics(3).update(x[:3])
    assert one != BatchStatistics(3).update(np.nextafter(x, 99))
    assert one != BatchStatistics(3, channel_axis=-1).update(x)
    assert BatchStatistics(3) != BatchStatistics(4)
    assert one != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_repr():
    statistics = BatchStatistics(3, channel_axis=-1).update(np.ones((2, 5, 3)))
    assert repr(statistics) == "BatchStatistics(3, channel_axis=-1, count=10)"


def test_threads_may_share_one(rng):
    parts = rng.standard_normal((40, 64, 5))
    shared = BatchStatistics(5)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(shared.update, parts))
    assert_same(shared, BatchStatistics(5).update(parts.reshape(-1, 5)))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    (("3",), {}, TypeError, "num_features: got '3', wanted an integer of at least 0"),
    ((-1,), {}, ValueError, "num_features: got -1, wanted an integer of at least 0"),
    ((3,), {"channel_axis": 0}, ValueError, "channel_axis: got 0, wanted an integer other than 0"),
    ((3,), {"channel_axis": 1.5}, TypeError, "channel_axis: got 1.5, wanted an integer other"),
])  # fmt: skip
def test_errors_of_construction(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        BatchStatistics(*arguments, **options)


@pytest.mark.parametrize(("axis", "x", "error", "message"), [
    (1, np.ones((2, 4)), ValueError, r"x: got shape \(2, 4\), wanted samples on axis 0 and 3 ch"),
    (1, np.ones(3), ValueError, r"x: got shape \(3,\), wanted samples on axis 0"),
    (1, 5.0, ValueError, r"x: got shape \(\), wanted samples on axis 0"),
    (3, np.ones((2, 3)), ValueError, r"x: got shape \(2, 3\), .* on axis 3"),
    (-2, np.ones((3, 3)), ValueError, r"x: got shape \(3, 3\), .* on axis -2"),
    (-3, np.ones((3, 3)), ValueError, r"x: got shape \(3, 3\), .* on axis -3"),
    (1, np.ones((0, 4)), ValueError, r"x: got shape \(0, 4\)"),
    (1, None, TypeError, "x: got None, wanted an array"),
    (1, np.ones((2, 3), complex), TypeError, "x: got dtype complex128, wanted float16"),
    (1, np.ma.ones((2, 3)), TypeError, "x: got a masked array"),
    (1, [[1], [2, 3]], ValueError, "x: "),
])  # fmt: skip
def test_errors_of_update(axis, x, error, message):
    statistics = BatchStatistics(3, channel_axis=axis)
    with pytest.raises(error, match=f"^{message}"):
        statistics.update(x)
    assert statistics == BatchStatistics(3, channel_axis=axis)


def test_errors_of_merge():
    with pytest.raises(TypeError, match=r"^other: got dict, wanted BatchStatistics"):
        BatchStatistics(3).merge({})
    with pytest.raises(ValueError, match=r"^other: got statistics of 4 channels, wanted 3"):
        BatchStatistics(3).merge(BatchStatistics(4))


def test_errors_of_results():
    statistics = BatchStatistics(3).update(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"^ddof: got 0.5, wanted an integer of at least 0"):
        statistics.var(0.5)
    with pytest.raises(ValueError, match=r"^ddof: got -1, wanted an integer of at least 0"):
        statistics.var(-1)
    with pytest.raises(ValueError, match=r"^dialect: got 'jax', wanted one of: 'torch', 'keras'"):
        statistics.running("jax")
