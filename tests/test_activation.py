"""activation=: relu, silu, gelu and gelu_tanh of what a norm gives, before it is stored.

A row of equal numbers is exactly the bias: so any number can be given to an activation. What it
should be is worked out in decimals.
"""

import decimal
import functools
from decimal import Decimal

import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers.arrays import assert_same_bits

KINDS = ("relu", "silu", "gelu", "gelu_tanh")
BASELINE = _core.isa_names()[-1]
ULPS = 3.5

# Where float64 ends, 1/2 and a sum that is nearly as large leave a tail of 10^-323.
DIGITS = {"prec": 400, "Emin": -(10**6), "Emax": 10**6}


def activated(values, kind, like=None):
    """The activation of any numbers; `like` is the type of x and of the result."""
    values = np.asarray(values)
    # x - mean is +0; times a weight of -1 it is -0, and -0 + v is v for each v.
    x = np.zeros((1, values.size), like or values.dtype)
    weight = -np.ones(values.size, values.dtype)
    return fastnorm.layer_norm(x, values.size, weight, values.ravel(), activation=kind)[0]


# ---- in decimals ---------------------------------------------------------------------------------


@functools.cache
def pi():
    """By Machin's formula."""

    def arctan_of_inverse(n):
        total, power, k = Decimal(0), Decimal(1) / n, 0
        while total + power / (2 * k + 1) != total:
            total += power / (2 * k + 1) * (-1) ** k
            power, k = power / n**2, k + 1
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))


def normal_cdf(x):
    """1/2 + density(x) (x + x^3/3 + x^5/15 + ...); below 0 most of the digits cancel."""
    total, term, k = Decimal(0), x, 1
    while total + term != total:
        total, k = total + term, k + 2
        term = term * x * x / k
    return Decimal("0.5") + (-x * x / 2).exp() / (2 * pi()).sqrt() * total


@functools.cache
def exact(x, kind):
    """The activation of one finite float, to many more digits than it has."""
    with decimal.localcontext(**DIGITS):
        x = Decimal(x)
        if kind == "relu":
            return max(x, Decimal(0))
        if kind == "gelu":
            return x * normal_cdf(x)
        rate = 2 * (2 / pi()).sqrt() * (1 + Decimal("0.044715") * x * x)
        return x / (1 + (-x * (rate if kind == "gelu_tanh" else 1)).exp())


def error_in_ulps(got, want):
    """Of the result; below the normal numbers, of the least of them."""
    info = np.finfo(got.dtype)
    size = max(abs(want), Decimal(float(info.smallest_normal)))
    with decimal.localcontext(**DIGITS):
        exponent = np.frexp(float(size))[1] - 1 - info.nmant
        return float(abs(Decimal(float(got)) - want) / Decimal(2) ** int(exponent))


def where_it_counts(kind, dtype, rng):
    """Numbers of every size for which the activation is neither 0 nor x itself."""
    lowest = {"relu": -5, "silu": -102, "gelu": -14, "gelu_tanh": -10.6}[kind]
    if dtype == np.float64:
        lowest *= {"relu": 1, "silu": 7.3, "gelu": 2.75, "gelu_tanh": 2.03}[kind]
    far = np.linspace(lowest, -lowest / 3, 60)
    near = rng.uniform(-6, 6, 60)
    tiny = 10.0 ** rng.uniform(-37, 0, 20) * rng.choice([-1, 1], 20)
    return np.concatenate([far, near, tiny]).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_values(isa, dtype, kind, rng):
    x = where_it_counts(kind, dtype, rng)
    y = activated(x, kind)
    wanted = [exact(float(value), kind) for value in x]
    errors = [error_in_ulps(got, want) for got, want in zip(y, wanted, strict=True)]
    worst = int(np.argmax(errors))
    assert errors[worst] <= (0 if kind == "relu" else ULPS), f"{x[worst]}: {errors[worst]} ulps"


# ---- the ends of the number range ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_special_values(isa, dtype, kind):
    info = np.finfo(dtype)
    largest, least = info.max, info.smallest_subnormal
    x = np.array([np.nan, np.inf, largest, 1e4, 0.0, -0.0, -1e4, -largest, -np.inf], dtype)
    below = 0.0 if kind == "relu" else -0.0
    want = np.array([np.nan, np.inf, largest, 1e4, 0.0, below, below, below, below], dtype)
    assert_same_bits(activated(x, kind), want)
    small = np.array([least, -least, info.smallest_normal, -info.smallest_normal], dtype)
    got, half = activated(small, kind), small / 2
    if kind == "relu":
        half = np.maximum(small, 0)
    assert (abs(got - half) <= least).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_place(isa, dtype, kind, rng):
    x = rng.standard_normal(77).astype(dtype)
    x[[3, 40, 76]] = np.nan
    np.testing.assert_array_equal(np.isnan(activated(x, kind)), np.isnan(x))


# ---- bits ----------------------------------------------------------------------------------------


def numbers_of_every_kind(dtype, rng):
    """Any bits at all, and the places where something happens."""
    bits = np.frombuffer(rng.bytes(20_000 * dtype.itemsize), dtype)
    spread = [np.linspace(-end, end, 9001).astype(dtype) for end in (3, 15, 45, 120, 800)]
    return np.concatenate([bits, *spread])


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets(isa, dtype, kind, rng):
    x = numbers_of_every_kind(dtype, rng)
    got = activated(x, kind)
    _core.select_isa(BASELINE)
    assert_same_bits(got, activated(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_length(isa, dtype, kind, rng):
    values = 3 * rng.standard_normal(3000).astype(dtype)
    want = activated(values, kind)
    for n in (*range(1, 70), 127, 1023, 1024, 1025, 2049):
        assert_same_bits(activated(values[:n], kind), want[:n], f"{n} columns")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 64, 768, 1500])
def test_it_is_of_the_norm_without_it(isa, dtype, kind, n, rng):
    x = rng.standard_normal((5, n)).astype(dtype)
    weight, bias = rng.standard_normal((2, n)).astype(dtype)
    y, mean, rstd = fastnorm.layer_norm(x, n, weight, bias, return_stats=True)
    got = fastnorm.layer_norm(x, n, weight, bias, return_stats=True, activation=kind)
    assert_same_bits(got, (activated(y, kind).reshape(y.shape), mean, rstd))
    out = np.empty_like(x)
    assert fastnorm.layer_norm(x, n, weight, bias, out=out, activation=kind) is out
    assert_same_bits(out, got[0])


@pytest.mark.parametrize("kind", KINDS)
def test_over_columns(isa, dtype, kind, rng):
    x = rng.standard_normal((130, 37)).astype(dtype)
    got = fastnorm.layer_norm(x, axis=0, activation=kind)
    rows = fastnorm.layer_norm(np.ascontiguousarray(x.T), 130, activation=kind)
    assert_same_bits(got, np.ascontiguousarray(rows.T))


# ---- types and functions -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_half_types_round_once(isa, kind, rng):
    values = 4 * rng.standard_normal(500).astype(np.float32)
    want = activated(values, kind)
    assert_same_bits(activated(values, kind, np.float16), want.astype(np.float16))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    got = activated(values, kind, bfloat16)
    assert got.dtype == bfloat16
    np.testing.assert_array_equal(got.view("u2"), want.astype(bfloat16).view("u2"))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_of_the_activated_row(kind, rng):
    x = rng.standard_normal((3, 300)).astype(np.float32)
    y = fastnorm.layer_norm(x, 300, activation=kind)
    q, scale = fastnorm.layer_norm(x, 300, dtype=np.int8, activation=kind)
    np.testing.assert_array_equal(scale, (abs(y).max(1) / np.float32(127)).reshape(scale.shape))
    want = np.clip(np.rint(y / scale.reshape(3, 1)), -127, 127)
    np.testing.assert_array_equal(q, want)


def every_function(x, activation):
    """The y of each function that takes an activation."""
    n = x.shape[-1]
    one, other = np.linspace(0.5, 2, 2 * n).astype(x.dtype).reshape(2, n)
    offsets = [0, 1, len(x)]
    options = {"activation": activation}
    yield "rms_norm", fastnorm.rms_norm(x, n, one, **options)
    yield "add_layer_norm", fastnorm.add_layer_norm(x, x[::-1], n, one, other, **options)[0]
    yield "add_rms_norm", fastnorm.add_rms_norm(x, x[::-1], n, one, **options)[0]
    scales = np.tile(one, (2, 1))
    adaptive = fastnorm.adaptive_layer_norm(x.reshape(2, -1, n), scales, scales, **options)
    yield "adaptive_layer_norm", adaptive
    two = fastnorm.parallel_layer_norm(x, n, [one, other], [None, one], **options)
    yield "parallel_layer_norm", np.stack(two)
    yield "segment_layer_norm", fastnorm.segment_layer_norm(x, offsets, one, other, **options)
    yield "segment_rms_norm", fastnorm.segment_rms_norm(x, offsets, one, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_function(isa, dtype, kind, rng):
    x = rng.standard_normal((6, 45)).astype(dtype)
    plain = dict(every_function(x, None))
    for name, got in every_function(x, kind):
        want = activated(plain[name], kind).reshape(got.shape)
        assert_same_bits(got, want, name)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_elements_stay_zero(dtype, kind, rng):
    x, bias = rng.standard_normal((2, 40)).astype(dtype)
    mask = rng.random(40) < 0.6
    y = fastnorm.layer_norm(x, 40, None, bias, mask=mask)
    got = fastnorm.layer_norm(x, 40, None, bias, mask=mask, activation=kind)
    assert_same_bits(got[~mask], np.zeros(40, dtype)[~mask])
    assert_same_bits(got[mask], activated(y[mask], kind))


@pytest.mark.parametrize("wrong", ["swish", "GELU", ""])
def test_no_such_activation(wrong):
    with pytest.raises(ValueError, match=r"activation: got .*wanted"):
        fastnorm.layer_norm(np.ones((2, 3)), activation=wrong)


def test_not_a_name():
    with pytest.raises((TypeError, ValueError), match=r"activation: got "):
        fastnorm.layer_norm(np.ones((2, 3)), activation=3)
