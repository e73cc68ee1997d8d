"""The reference itself, which all else is compared with: against exact rational arithmetic and
against what the papers and frameworks say."""

from fractions import Fraction
from math import frexp, sqrt

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


# ---- RMS norm, activations, types ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1e300, 1e-300])
@pytest.mark.parametrize("eps", [0.0, 1e-5, None])
def test_rms_norm(size, eps, rng):
    for n in (1, 2, 10, 50):
        row = size * rng.standard_normal(n)
        added = 2.0**-52 if eps is None else eps
        square = sum(Fraction(float(v)) ** 2 for v in row) / n + Fraction(added)
        scale = Fraction(2) ** -frexp(max(size, sqrt(added)))[1]  # for a square that is a float
        root = sqrt(square * scale**2)
        want = [float(Fraction(float(v)) * scale) / root for v in row]
        y, rstd = reference.rms_norm(row, eps=eps, return_stats=True)
        np.testing.assert_allclose(y, want, rtol=1e-14)
        np.testing.assert_allclose(rstd, float(scale) / root, rtol=1e-14)


def test_rms_norm_of_centred_rows_is_layer_norm(rng):
    x, weight = rng.standard_normal((5, 8)), rng.standard_normal(8)
    x[:, 4:] = -x[:, :4]
    y, _, rstd = reference.layer_norm(x, 8, weight, eps=1e-3, return_stats=True)
    got, got_rstd = reference.rms_norm(x, 8, weight, 1e-3, return_stats=True)
    np.testing.assert_allclose(got, y, rtol=1e-13)
    np.testing.assert_allclose(got_rstd, rstd, rtol=1e-13)
    np.testing.assert_allclose(reference.rms_norm(x, 8, weight - 1, 1e-3, offset=1), y, rtol=1e-13)


def test_special_rows_of_rms_norm():
    x = [[0.0, 0.0], [np.nan, 1], [1, -np.inf], [5e-324, 0]]
    y, rstd = reference.rms_norm(x, eps=0.0, return_stats=True)
    np.testing.assert_array_equal(y[:3], [[0, 0], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_allclose(y[3], [sqrt(2), 0], rtol=1e-15)
    np.testing.assert_array_equal(rstd, [np.inf, np.nan, np.nan, np.inf])
    dx, dweight = reference.rms_norm_backward(np.ones((1, 2)), [[0, 0]], 2, [np.inf])
    np.testing.assert_array_equal(dx, [[0, 0]])
    np.testing.assert_array_equal(dweight, [0, 0])
    y, rstd = reference.rms_norm(np.empty((2, 0)), return_stats=True)
    assert y.shape == (2, 0)
    np.testing.assert_array_equal(rstd, [np.nan, np.nan])


# From torch 2.13 in float64.
TORCH = {
    "x": [[1, -2, 3, 0.5], [40, 41, 42.5, 40]],
    "residual": [[0.5, 1, -1, 0.25], [-39, -42, -40, -41]],
    "weight": [0.5, -1, 2, 1.5],
    "bias": [0.1, 0.2, -0.3, 0],
    "dy": [[1, 0.5, -1, 2], [-0.25, 1, 0, 3]],
    "rms_norm": [  # eps=1e-5
        [0.26490609961523515, 1.0596243984609406, 3.1788731953828218, 0.3973591494228527],
        [0.4891434139027068, -1.002743998500549, 2.078859509086504, 1.4674302417081204],
    ],
    "rms_norm_dx": [
        [0.37644519688734185, -0.48798429415944855, -0.7250071066446204, 1.6452061463274643],
        [-0.02266018706989933, -0.04455028744646794, -0.020828230778820376, 0.09045422739510162],
    ],
    "rms_norm_dweight": [
        0.28524049227911685, 0.4729317992700788, -1.5894365976914109, 3.464672682646711,
    ],
    "add_layer_norm": [  # eps=1e-12
        [0.40230734046100514, 1.7939841587943905, 1.7886688977305807, -0.08244745648936502],
        [0.3120472324199439, 1.1330078226477531, 2.583842360911237, -1.3995117339716296],
    ],
    "add_layer_norm_dx": [
        [0.3732968422719712, -1.0640952692521566, -1.7137114823169162, 2.4045099092971016],
        [-0.418602594072287, -1.776315089422655, 0.23920148232658434, 1.9557162011683573],
    ],
    "add_layer_norm_dweight": [
        0.4985910647120383, -1.7299999020449484, -1.0443344488652904, -2.9089534099290795,
    ],
}  # fmt: skip


def test_torch_says_the_same():
    x, residual, weight, bias, dy = (
        np.array(TORCH[name]) for name in ("x", "residual", "weight", "bias", "dy")
    )
    y, rstd = reference.rms_norm(x, 4, weight, 1e-5, return_stats=True)
    dx, dweight = reference.rms_norm_backward(dy, x, 4, rstd, weight)
    for got, name in ((y, "rms_norm"), (dx, "rms_norm_dx"), (dweight, "rms_norm_dweight")):
        np.testing.assert_allclose(got, TORCH[name], rtol=1e-12, atol=1e-14)

    y, s, mean, rstd = reference.add_layer_norm(
        x, residual, 4, weight, bias, 1e-12, return_stats=True
    )
    np.testing.assert_array_equal(s, x + residual)
    dx, dweight, dbias = reference.add_layer_norm_backward(dy, None, s, 4, mean, rstd, weight)
    np.testing.assert_array_equal(dbias, dy.sum(0))
    for got, name in ((y, ""), (dx, "_dx"), (dweight, "_dweight")):
        np.testing.assert_allclose(got, TORCH[f"add_layer_norm{name}"], rtol=1e-12, atol=1e-14)


# From as many decimal digits as it takes: below -5, torch's gelu has few that are right.
POINTS = [-9, -5, -1, -0.25, 0, 0.5, 3]
ACTIVATED = {
    "relu": [0, 0, 0, 0, 0, 0.5, 3],
    "silu": [
        -0.0011105511838760856, -0.03346425462142428, -0.2689414213699951, -0.10945587477855048, 0,
        0.3112296656009273, 2.8577223804672998,
    ],
    "gelu": [
        -1.0157295653584566e-18, -1.4332578593959695e-06, -0.15865525393145705,
        -0.10032341857926907, 0, 0.34573123063700656, 2.99595030590511,
    ],
    "gelu_tanh": [
        -1.3364595947348725e-28, -2.291796196629506e-07, -0.1588080093917233, -0.100324649298315, 0,
        0.34571400982514394, 2.996362607918227,
    ],
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations(activation, dtype):
    """Of the bias, with a weight of 0."""
    n = len(POINTS)
    y = reference.layer_norm(
        np.arange(n, dtype=dtype), n, np.zeros(n), POINTS, activation=activation
    )
    np.testing.assert_allclose(y, ACTIVATED[activation], rtol=1e-13)
    if (activation, dtype) == ("gelu", np.float64):
        np.testing.assert_allclose(y, ACTIVATED[activation], rtol=1e-15)
    far = reference.rms_norm(np.array([1e30, -1e30], dtype), 2, [1e30, 1e30], activation=activation)
    np.testing.assert_allclose(far, [1e30, 0], rtol=1e-6)


def test_activation_comes_last_and_is_one_of_a_list(rng):
    x, weight, bias = rng.standard_normal((3, 2, 6))
    y = reference.layer_norm(x, 6, weight[0], bias[0])
    got = reference.layer_norm(x, 6, weight[0], bias[0], activation="silu")
    np.testing.assert_allclose(got, y / (1 + np.exp(-y)), rtol=1e-14)
    with pytest.raises(ValueError, match=r"^activation: got 'swish', wanted one of"):
        reference.layer_norm(x, activation="swish")


def test_half_types_are_loaded_exactly(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x, dy = (300 * rng.standard_normal((2, 3, 50))).astype(dtype)
        weight = rng.standard_normal(50).astype(dtype)
        wide, wide_dy, wide_weight = (a.astype(np.float32) for a in (x, dy, weight))
        for norm, backward in (
            (reference.layer_norm, reference.layer_norm_backward),
            (reference.rms_norm, reference.rms_norm_backward),
        ):
            y, *stats = norm(x, 50, weight, return_stats=True)
            want, *wanted_stats = norm(wide, 50, wide_weight, return_stats=True)
            assert y.dtype == np.float64
            np.testing.assert_array_equal(y, want)
            np.testing.assert_array_equal(stats, wanted_stats)
            got = backward(dy, x, 50, *stats, weight)
            for one, other in zip(
                got, backward(wide_dy, wide, 50, *stats, wide_weight), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(reference.moments(x), reference.moments(wide))
    with pytest.raises(TypeError, match=r"^x: got dtype complex128, wanted real numbers"):
        reference.layer_norm(np.ones(3, complex))


# ---- gradients are differences of the forward pass -----------------------------------------------


def assert_gradients(loss, arrays, gradients):
    """Each of `gradients` against central differences of loss(*arrays)."""
    step = 1e-5
    for k, gradient in enumerate(gradients):
        assert gradient.shape == arrays[k].shape
        difference = np.empty(gradient.shape)
        for place in np.ndindex(gradient.shape):
            moved = [a.copy() for a in arrays]
            moved[k][place] += step
            up = loss(*moved)
            moved[k][place] -= 2 * step
            difference[place] = (up - loss(*moved)) / (2 * step)
        np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-7)


@pytest.fixture
def small(rng):
    """x, dy, weight, bias: three rows of five, and parameters."""
    return (*rng.standard_normal((2, 3, 5)), *rng.standard_normal((2, 5)))


def test_gradients_of_rms_norm(small):
    x, dy, weight, _ = small
    _, rstd = reference.rms_norm(x, eps=0.1, return_stats=True)
    assert_gradients(
        lambda x, w: (dy * reference.rms_norm(x, 5, w, 0.1, offset=0.5)).sum(),
        (x, weight),
        reference.rms_norm_backward(dy, x, 5, rstd, weight, offset=0.5),
    )
    dx, dweight = reference.rms_norm_backward(dy, x, 5, rstd, offset=7.0)  # of no weight
    want = reference.rms_norm_backward(dy, x, 5, rstd, np.ones(5))
    np.testing.assert_array_equal(dx, want[0])
    np.testing.assert_array_equal(dweight, want[1])


VALID = [
    {"lengths": [5, 2, 0]},
    {"lengths": 3},
    {"mask": [[True, False, True, True, False], [False] * 5, [True] * 5]},
]


@pytest.mark.parametrize("valid", VALID)
def test_gradients_of_ragged_rows(valid, small):
    x, dy, weight, bias = small
    _, mean, rstd = reference.layer_norm(x, return_stats=True, **valid)
    assert_gradients(
        lambda x, w, b: (dy * reference.layer_norm(x, 5, w, b, **valid)).sum(),
        (x, weight, bias),
        reference.layer_norm_backward(dy, x, 5, mean, rstd, weight, bias, **valid),
    )
    _, rstd = reference.rms_norm(x, return_stats=True, **valid)
    assert_gradients(
        lambda x, w: (dy * reference.rms_norm(x, 5, w, **valid)).sum(),
        (x, weight),
        reference.rms_norm_backward(dy, x, 5, rstd, weight, **valid),
    )


@pytest.mark.parametrize("lead", [(2,), (3, 1), (3, 2), (1, 2)])
def test_gradients_of_parameters_of_each_head(lead, rng):
    """(heads, size) for x (tokens, heads, size), and any other leading dimensions."""
    x, dy = rng.standard_normal((2, 3, 2, 4))
    weight, bias = rng.standard_normal((2, *lead, 4))
    y, mean, rstd = reference.layer_norm(x, 4, weight, bias, return_stats=True)
    np.testing.assert_allclose(y, reference.layer_norm(x) * weight + bias, atol=1e-14)
    assert_gradients(
        lambda x, w, b: (dy * reference.layer_norm(x, 4, w, b)).sum(),
        (x, weight, bias),
        reference.layer_norm_backward(dy, x, 4, mean, rstd, weight, bias),
    )
    _, rstd = reference.rms_norm(x, 4, return_stats=True)
    assert_gradients(
        lambda x, w: (dy * reference.rms_norm(x, 4, w)).sum(),
        (x, weight),
        reference.rms_norm_backward(dy, x, 4, rstd, weight),
    )


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_gradients_of_a_sum(norm, small):
    x, dy, weight, bias = small
    residual, dsum = x[::-1] + 1, dy[::-1] - 1
    forward = getattr(reference, f"add_{norm}")
    parameters = (weight, bias) if norm == "layer_norm" else (weight,)

    def loss(x, residual, linear_bias, *parameters):
        y, s = forward(x, residual, 5, *parameters, eps=1e-2, linear_bias=linear_bias)
        return (dy * y).sum() + (dsum * s).sum()

    _, s, *stats = forward(
        x, residual, 5, *parameters, eps=1e-2, linear_bias=bias, return_stats=True
    )
    dx, *rest = getattr(reference, f"add_{norm}_backward")(dy, dsum, s, 5, *stats, *parameters)
    assert_gradients(loss, (x, residual, bias, *parameters), (dx, dx, dx.sum(0), *rest))


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)])
def test_gradients_of_adaptive_layer_norm(shape, rng):
    x, dy = rng.standard_normal((2, 2, 3, 4))
    scale, shift = rng.standard_normal((2, *shape))
    _, mean, rstd = reference.adaptive_layer_norm(x, scale, shift, return_stats=True)
    assert_gradients(
        lambda *arrays: (dy * reference.adaptive_layer_norm(*arrays)).sum(),
        (x, scale, shift),
        reference.adaptive_layer_norm_backward(dy, x, scale, 4, mean, rstd),
    )


@pytest.mark.parametrize("features", [(), (3,), (2, 2)])
def test_gradients_of_segments(features, rng):
    offsets = [0, 3, 3, 4, 9]
    x, dy = rng.standard_normal((2, 9, *features))
    weight, bias = rng.standard_normal((2, *features))
    _, mean, rstd = reference.segment_layer_norm(x, offsets, return_stats=True)
    assert_gradients(
        lambda x, w, b: (dy * reference.segment_layer_norm(x, offsets, w, b)).sum(),
        (x, np.asarray(weight), np.asarray(bias)),
        reference.segment_layer_norm_backward(dy, x, offsets, mean, rstd, weight),
    )
    _, rstd = reference.segment_rms_norm(x, offsets, return_stats=True)
    assert_gradients(
        lambda x, w: (dy * reference.segment_rms_norm(x, offsets, w, offset=1.0)).sum(),
        (x, np.asarray(weight)),
        reference.segment_rms_norm_backward(dy, x, offsets, rstd, weight, offset=1.0),
    )


def test_gradients_from_the_output(small):
    x, dy, weight, bias = small
    y, mean, rstd = reference.layer_norm(x, 5, weight, bias, return_stats=True)
    want = reference.layer_norm_backward(dy, x, 5, mean, rstd, weight, bias)
    got = reference.layer_norm_backward(dy, y, 5, None, rstd, weight, bias, from_output=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
    y, rstd = reference.rms_norm(x, 5, weight, offset=1, return_stats=True)
    want = reference.rms_norm_backward(dy, x, 5, rstd, weight, offset=1)
    got = reference.rms_norm_backward(dy, y, 5, rstd, weight, offset=1, from_output=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)

    # A constant row of eps = 0 has dx = 0 here too; padding has nothing to say.
    args = [[3.0, 4, 5]], [[1.0, 2, 0]], 3, None, [np.inf], [1.0, 2, 4], [1.0, 2, 3]
    dx, dweight, dbias = reference.layer_norm_backward(*args, from_output=True, lengths=2)
    np.testing.assert_array_equal(dx, [[0, 0, 0]])
    np.testing.assert_array_equal(dweight, [0, 0, 0])
    np.testing.assert_array_equal(dbias, [3, 4, 0])


def test_output_mask(small):
    x, dy, weight, bias = small
    _, mean, rstd = reference.layer_norm(x, return_stats=True)
    want = reference.layer_norm_backward(dy, x, 5, mean, rstd, weight, bias)
    for chosen in np.ndindex(2, 2, 2):
        got = reference.layer_norm_backward(dy, x, 5, mean, rstd, weight, output_mask=chosen)
        for one, other, there in zip(got, want, chosen, strict=True):
            assert (one is not None) == there
            if there:
                np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"^output_mask: got 3 items, wanted 2"):
        reference.rms_norm_backward(dy, x, 5, rstd, output_mask=(True, True, True))


# ---- one op in terms of another ------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_masked_and_ragged_and_packed_rows_are_the_rows_alone(norm, rng):
    """What is left out may hold anything; it comes back as 0 and touches no gradient."""
    forward, backward = getattr(reference, norm), getattr(reference, f"{norm}_backward")
    counts = np.array([7, 1, 0, 4])
    x, dy = rng.standard_normal((2, 4, 7)) + 3
    weight, bias = rng.standard_normal((2, 7))
    rows = [(x[k, :n], dy[k, :n], weight[:n], bias[:n]) for k, n in enumerate(counts)]
    parts = 2 if norm == "layer_norm" else 1
    alone = [forward(a, n, *wb[:parts], return_stats=True)
             for n, (a, _, *wb) in zip(counts, rows, strict=True)]  # fmt: skip
    grads = [backward(g, a, n, *stats, *wb[:parts])
             for n, (a, g, *wb), (_, *stats) in zip(counts, rows, alone, strict=True)]  # fmt: skip

    valid = np.arange(7) < counts[:, None]
    x[~valid], dy[~valid] = np.nan, np.inf
    x[0, 0], dy[0, 0] = rows[0][0][0], rows[0][1][0]
    parameters = (weight, bias)[:parts]
    for rest in ({"lengths": counts}, {"mask": valid}):
        y, *stats = forward(x, 7, *parameters, return_stats=True, **rest)
        dx, *sums = backward(dy, x, 7, *stats, *parameters, **rest)
        assert (y[~valid] == 0).all()
        assert (dx[~valid] == 0).all()
        for k, n in enumerate(counts):
            np.testing.assert_allclose(y[k, :n], alone[k][0], rtol=1e-13)
            np.testing.assert_allclose([s[k] for s in stats], alone[k][1:], rtol=1e-13)
            np.testing.assert_allclose(dx[k, :n], grads[k][0], rtol=1e-12, atol=1e-13)
        for j, total in enumerate(sums, 1):
            padded = [np.pad(g[j], (0, 7 - len(g[j]))) for g in grads]
            np.testing.assert_allclose(total, np.sum(padded, 0), rtol=1e-12, atol=1e-13)

    packed = getattr(reference, f"segment_{norm}")
    offsets = np.concatenate([[0], np.cumsum(counts)])
    got, *stats = packed(x[valid], offsets, return_stats=True)
    want, *wanted_stats = forward(x, return_stats=True, lengths=counts)
    np.testing.assert_array_equal(got, want[valid])
    np.testing.assert_array_equal(stats, wanted_stats)
    dx = getattr(reference, f"segment_{norm}_backward")(dy[valid], x[valid], offsets, *stats)[0]
    want = backward(dy, x, 7, *stats, lengths=counts)[0]
    np.testing.assert_array_equal(dx, want[valid])


def test_a_mask_of_any_pattern_and_axis(rng):
    x = rng.standard_normal((3, 4, 5))
    mask = rng.random((3, 1, 5)) < 0.6
    weight, bias = rng.standard_normal((2, 3, 5))
    y, mean, _ = reference.layer_norm(
        x, None, weight, bias, axis=(2, 0), mask=mask, return_stats=True
    )
    there = mask[:, 0]
    for k in range(4):
        row = reference.layer_norm(x[:, k][there])
        want = row * weight[there] + bias[there]
        np.testing.assert_allclose(y[:, k][there], want, rtol=1e-13)
        np.testing.assert_allclose(mean[k], x[:, k][there].mean(), rtol=1e-13)
        assert (y[:, k][~there] == 0).all()


def test_segments_of_several_features(rng):
    x, (weight, bias) = rng.standard_normal((9, 2, 3)), rng.standard_normal((2, 2, 3))
    y, mean, rstd = reference.segment_layer_norm(
        x, [0, 3, 3, 9], weight, bias, 1e-3, return_stats=True
    )
    for part in (slice(0, 3), slice(3, 9)):
        want = (x[part] - x[part].mean()) / np.sqrt(x[part].var() + 1e-3) * weight + bias
        np.testing.assert_allclose(y[part], want, rtol=1e-12)
    np.testing.assert_allclose(mean, [x[:3].mean(), 0, x[3:].mean()], rtol=1e-12)
    assert np.isnan(rstd).tolist() == [False, True, False]
    for offsets in ([0], [0, 0, 0]):
        y, mean, rstd = reference.segment_layer_norm(np.empty((0, 4)), offsets, return_stats=True)
        assert y.shape == (0, 4)
        assert mean.shape == rstd.shape == (len(offsets) - 1,)


def test_parallel_is_one_after_the_other(small):
    x, _, weight, bias = small
    weights, biases = [weight, None, 2 * weight], [None, bias, -bias]
    ys, mean, rstd = reference.parallel_layer_norm(
        x, 5, weights, biases, 1e-3, return_stats=True, activation="relu"
    )
    for y, w, b in zip(ys, weights, biases, strict=True):
        want = reference.layer_norm(x, 5, w, b, 1e-3, return_stats=True, activation="relu")
        for one, other in zip((y, mean, rstd), want, strict=True):
            np.testing.assert_array_equal(one, other)
    assert reference.parallel_layer_norm(x, 5, []) == ()
    with pytest.raises(ValueError, match=r"^biases: got 1, wanted 3, as many as weights"):
        reference.parallel_layer_norm(x, 5, weights, [None])


def test_adaptive_is_layer_norm_with_another_weight(rng):
    x, residual = rng.standard_normal((2, 2, 3, 4))
    scale, shift, gate = rng.standard_normal((3, 2, 4))
    w, b, g = 1 + scale[:, None], shift[:, None], gate[:, None]
    want = reference.layer_norm(x, 4, w, b, 1e-6, return_stats=True)
    got = reference.adaptive_layer_norm(x, scale, shift, return_stats=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    y, s = reference.adaptive_layer_norm(x, scale, None, 4, gate=gate, residual=residual)
    np.testing.assert_allclose(s, residual + g * x, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(y, reference.layer_norm(s, 4, w, None, 1e-6), rtol=1e-12)
    y, s = reference.adaptive_layer_norm(x, scale, shift, residual=residual)
    np.testing.assert_array_equal(s, residual + x)
    want = reference.adaptive_layer_norm(x[:, 0], scale, shift)  # a sample is a row
    np.testing.assert_array_equal(want, got[0][:, 0])
    with pytest.raises(TypeError, match=r"^gate: got an array, wanted None without a residual"):
        reference.adaptive_layer_norm(x, scale, shift, gate=gate)
    with pytest.raises(ValueError, match=r"^scale: got shape \(3, 4\), wanted \(2, 4\)"):
        reference.adaptive_layer_norm(x, np.ones((3, 4)), None)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_the_sum_may_be_rounded(norm, rng):
    x, residual = (100 * rng.standard_normal((2, 3, 8))).astype(np.float16)
    linear_bias = rng.standard_normal(8).astype(np.float32)
    forward, plain = getattr(reference, f"add_{norm}"), getattr(reference, norm)
    exact = x.astype(np.float64) + linear_bias + residual
    s32 = (x.astype(np.float32) + linear_bias) + residual.astype(np.float32)
    assert (exact != s32).any()
    for dtype, want in ((None, exact), (np.float32, s32), (np.float16, s32.astype(np.float16))):
        y, s, *stats = forward(
            x, residual, linear_bias=linear_bias, sum_dtype=dtype, return_stats=True, eps=1e-5
        )
        np.testing.assert_array_equal(s, want)
        for one, other in zip((y, *stats), plain(want, eps=1e-5, return_stats=True), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13)


def test_the_default_eps_is_of_the_type_of_computation():
    for dtype, eps in ((np.float16, 2.0**-23), (np.float32, 2.0**-23), (np.float64, 2.0**-52)):
        x = np.zeros((1, 3), dtype)
        rstds = [
            reference.rms_norm(x, return_stats=True)[1],
            reference.segment_rms_norm(x, [0, 1], return_stats=True)[1],
            reference.add_rms_norm(x, x, return_stats=True)[2],
        ]
        np.testing.assert_allclose(rstds, eps**-0.5, rtol=1e-15)
    both = reference.add_rms_norm(x, x.astype(np.float32), return_stats=True)
    np.testing.assert_allclose(both[2], 2.0**26, rtol=1e-15)


BAD = [
    (TypeError, "lengths and mask exclude", {"lengths": 2, "mask": True}),
    (TypeError, "lengths: got dtype float64, wanted integers", {"lengths": 2.0}),
    (TypeError, "mask: got dtype int64, wanted bool", {"mask": np.int64(1)}),
    (ValueError, r"lengths: got 1 to 6, wanted 0 to 5", {"lengths": [1, 6, 2]}),
    (ValueError, r"lengths: got -1 to 2, wanted 0 to 5", {"lengths": [-1, 1, 2]}),
    (ValueError, r"lengths: got shape \(2,\), wanted \(3,\)", {"lengths": [1, 2]}),
    (ValueError, r"mask: got shape \(4,\), wanted \(3, 5\)", {"mask": [True] * 4}),
    (ValueError, r"weight: got shape \(2, 5\), wanted \(5,\)", {"weight": np.ones((2, 5))}),
    (ValueError, "eps: got -1.0, wanted at least 0", {"eps": -1.0}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_errors(error, message, arguments, small):
    for norm in (reference.layer_norm, reference.rms_norm):
        with pytest.raises(error, match=f"^{message}"):
            norm(small[0], **arguments)


@pytest.mark.parametrize("offsets", [[0, 4], [1, 3], [0, 2, 1, 3], [], [[0, 3]], 3, [0.0, 3.0]])
def test_errors_of_offsets(offsets, small):
    with pytest.raises((TypeError, ValueError), match=r"^offsets: got"):
        reference.segment_layer_norm(small[0], offsets)


# ---- 8 bits --------------------------------------------------------------------------------------


def test_dynamic_int8():
    """Half to even, the extremes, and rows that are 0, tiny or not finite."""
    y = np.float32([
        [127, 0.5, 1.5, 2.5, -3.5, -127],
        [0, 0, 0, 0, 0, -0.0],
        [1e-42, -1e-40, 0, 0, 0, 0],
        [1, np.nan, 0, 0, 0, 0],
        [1, np.inf, 0, 0, 0, 0],
        [254, -1, 3, 5, -254, 100],
    ])  # fmt: skip
    q, scale = reference.dynamic_int8(y)
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(scale, [1, tiny, tiny, np.nan, np.inf, 2])
    want = [[127, 0, 2, 2, -4, -127], [0] * 6, [0] * 6, [0] * 6, [0] * 6, [127, 0, 2, 2, -127, 50]]
    np.testing.assert_array_equal(q, want)
    q64, scale64 = reference.dynamic_int8(y.astype(np.float64).T, axis=0)
    np.testing.assert_array_equal(q64, q.T)
    np.testing.assert_array_equal(scale64, scale)


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


def test_errors_of_rms_norm_are_measured(rng):
    x, dy = rng.standard_normal((2, 40, 50)).astype(np.float32)
    weight = rng.standard_normal(50).astype(np.float32)
    y, rstd = reference.rms_norm(x, 50, weight, offset=1, return_stats=True)
    assert accuracy.rms_norm_error(y, x, weight, offset=1) == 0
    y[2, 7] += 3e-6 * abs(weight[7] + 1.0) * np.abs(reference.rms_norm(x)[2]).max()
    np.testing.assert_allclose(accuracy.rms_norm_error(y, x, weight, offset=1), 3e-6, rtol=1e-6)

    dx, dweight = reference.rms_norm_backward(dy, x, 50, rstd, weight)
    errors = accuracy.rms_norm_backward_errors((dx, dweight), dy, x, weight)
    np.testing.assert_allclose(errors, 0, atol=1e-15)
    dx[3, 4] += 2e-6 * rstd[3] * np.abs(dy[3] * weight.astype(np.float64)).max()
    dweight[0] = np.nan
    errors = accuracy.rms_norm_backward_errors((dx, dweight), dy, x, weight)
    np.testing.assert_allclose(errors, [2e-6, np.inf], rtol=1e-6)


def test_errors_with_parameters_of_each_sample(rng):
    xh, weight, bias = rng.standard_normal((3, 4, 50))
    y = xh * weight + bias
    assert accuracy.affine_error(y, xh, weight, bias) == 0
    y[1, 2] += 1e-5 * (abs(weight[1, 2]) * np.abs(xh[1]).max() + abs(bias[1, 2]))
    np.testing.assert_allclose(accuracy.affine_error(y, xh, weight, bias), 1e-5, rtol=1e-6)


def test_ulp():
    """NumPy's own spacing, where it has the type; a zero has the denormals'."""
    for dtype in (np.float16, np.float32):
        info = np.finfo(dtype)
        values = [0, info.smallest_subnormal, info.tiny, -1, 1.5, 2, -1234.5, info.max / 4]
        np.testing.assert_array_equal(
            accuracy.ulp(values, dtype), np.spacing(np.abs(np.array(values, dtype)))
        )


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_errors_of_stored_types_are_measured(name, rng):
    """One rounding takes all of the half ulp, at most; one unit more is seen."""
    dtype = np.dtype(name if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    exact = np.concatenate([rng.standard_normal(10_000), [0, 1e-7, 1 + accuracy.ulp(1, dtype) / 2]])
    terms = np.zeros_like(exact)
    y = exact.astype(dtype)
    assert accuracy.stored_error(y, exact, terms) == 1
    np.testing.assert_allclose(
        accuracy.stored_error(y, exact, 3 * np.abs(exact)), 1, atol=0.01, rtol=0
    )
    off = (y.astype(np.float64) + accuracy.ulp(exact, dtype)).astype(dtype)
    assert 2 < accuracy.stored_error(off, exact, terms) <= 3
    with np.errstate(over="ignore"):
        y = np.array([1e39, -1e39]).astype(dtype)
    assert accuracy.stored_error(y, np.array([1e39, -1e39]), terms[:2]) == 0
    assert accuracy.stored_error(np.array([np.nan], dtype), exact[:1], terms[:1]) == np.inf


def test_the_bound_is_what_is_promised():
    assert accuracy.bound(np.float32) == accuracy.bound(np.float16) == 1e-6
    assert accuracy.bound(np.float64) == pytest.approx(1e-6 * 2.0**-29)
