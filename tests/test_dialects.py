"""Momentum and variance between torch, Keras, Flax and ONNX; folding into scale, linear, conv."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fastnorm import dialects, interop
from fastnorm.dialects import (
    DIALECTS,
    convert_momentum,
    convert_running_var,
    fold_batch_norm,
    fold_into_conv,
    fold_into_linear,
)

from .helpers.arrays import assert_same_bits
from .helpers.storage import HALVES, STORAGE, cast, rounded

PAIRS = [(a, b) for a in DIALECTS for b in DIALECTS]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


# ---- momentum and variance -----------------------------------------------------------------------


def test_what_each_takes_by_default():
    assert {name: d.momentum for name, d in DIALECTS.items()} == {
        "torch": 0.1, "keras": 0.99, "flax": 0.99, "onnx": 0.9,
    }  # fmt: skip
    assert {name: d.eps["batch_norm"] for name, d in DIALECTS.items()} == {
        "torch": 1e-5, "keras": 1e-3, "flax": 1e-5, "onnx": 1e-5,
    }  # fmt: skip
    assert [name for name, d in DIALECTS.items() if d.is_unbiased] == ["torch"]
    assert [name for name, d in DIALECTS.items() if d.momentum_is_of_new] == ["torch"]


def test_torch_agrees(torch):
    norm = torch.nn.BatchNorm2d(3)
    assert (norm.momentum, norm.eps) == (0.1, DIALECTS["torch"].eps["batch_norm"])
    assert torch.nn.LayerNorm(3).eps == DIALECTS["torch"].eps["layer_norm"]
    assert torch.nn.RMSNorm(3).eps == DIALECTS["torch"].eps["rms_norm"]


@pytest.mark.parametrize("source", DIALECTS)
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.01, 0, 1, -2.5, 1e-3, 1e300])
def test_momentum(source, momentum):
    """There and back is where it was; torch counts the other way."""
    for target in DIALECTS:
        there = convert_momentum(momentum, source, target)
        assert type(there) is float
        if (source == "torch") == (target == "torch"):
            assert there == momentum
        else:
            assert there == pytest.approx(1 - momentum, rel=1e-15)
            if 1e-3 <= abs(momentum) < 100:
                assert convert_momentum(there, target, source) == momentum


def test_momentum_stays_decimal():
    assert convert_momentum(0.1, "torch", "keras") == 0.9
    assert convert_momentum(0.99, "flax", "torch") == 0.01
    assert convert_momentum(np.float32(0.5), "onnx", "torch") == 0.5


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("n", [2, 3, 1000])
def test_momentum_and_variance_do_the_same_update(source, target, n, rng):
    """One step in the source's way, then converted, is the converted ones' step."""

    def step(run, biased, dialect, momentum):
        kept = biased * n / (n - 1) if DIALECTS[dialect].is_unbiased else biased
        new = momentum if DIALECTS[dialect].momentum_is_of_new else 1 - momentum
        return (1 - new) * run + new * kept

    run, biased = rng.random(5), rng.random(5)
    theirs = convert_running_var(step(run, biased, source, 0.3), source, target, n)
    momentum = convert_momentum(0.3, source, target)
    ours = step(convert_running_var(run, source, target, n), biased, target, momentum)
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)


@pytest.mark.parametrize("stored", STORAGE, ids=str)
def test_variance_keeps_its_type(stored, rng):
    variance = cast(rng.random(50), stored)
    wide = variance.astype(np.float64)
    got = convert_running_var(variance, "torch", "onnx", 8)
    assert_same_bits(got, rounded(wide * 7 / 8, stored))
    got = convert_running_var(variance, "onnx", "torch", 8)
    assert_same_bits(got, rounded(wide * 8 / 7, stored))


def test_variance_is_a_new_array():
    variance = np.ones(3, np.float32)
    for source, target in PAIRS:
        got = convert_running_var(variance, source, target, 1)
        assert not np.shares_memory(got, variance)
        assert_same_bits(got, variance)


# ---- folding -------------------------------------------------------------------------------------


def parameters(rng, channels, dtype=np.float64):
    """mean, var, weight, bias."""
    parts = [rng.standard_normal(channels), rng.random(channels) + 0.1]
    parts += [rng.standard_normal(channels), rng.standard_normal(channels)]
    return [cast(part, dtype) for part in parts]


def inferred(y, mean, var, weight, bias, eps, axis=1):
    """What batch norm makes of y, in float64."""
    shape = [1] * y.ndim
    shape[axis] = -1
    wide = [np.float64(p).reshape(shape) for p in (mean, var, weight, bias)]
    return (y - wide[0]) / np.sqrt(wide[1] + eps) * wide[2] + wide[3]


def test_scale_and_shift(rng):
    x = rng.standard_normal((5, 7))
    mean, var, weight, bias = parameters(rng, 7)
    scale, shift = fold_batch_norm(mean, var, weight, bias, 1e-3)
    np.testing.assert_allclose(
        x * scale + shift, inferred(x, mean, var, weight, bias, 1e-3), atol=1e-13
    )
    scale, shift = fold_batch_norm(mean, var)
    np.testing.assert_allclose(x * scale + shift, inferred(x, mean, var, 1, 0, 1e-5), atol=1e-13)


@pytest.mark.parametrize("stored", STORAGE, ids=str)
def test_scale_and_shift_are_rounded_once(stored, rng):
    given = parameters(rng, 50, stored)
    wide = fold_batch_norm(*[p.astype(np.float64) for p in given])
    result = np.float64 if stored == np.float64 else np.float32
    for got, want in zip(fold_batch_norm(*given), wide, strict=True):
        assert_same_bits(got, want.astype(result))


def test_what_the_fold_loses():
    """The docstring's number: with a mean of 1e6, float32's x scale + shift is far off."""
    x = (1e6 + np.random.default_rng(0).standard_normal(4096)).astype(np.float32)
    mean, var = [x.astype(np.float64).mean()], [x.astype(np.float64).var()]
    scale, shift = (p.astype(np.float32) for p in fold_batch_norm(mean, var))
    error = np.abs(x * scale + shift - inferred(x[:, None], *mean, *var, 1, 0, 1e-5)[:, 0]).max()
    assert 1e-2 < error < 0.2


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(axis, has_bias, rng):
    x, w = rng.standard_normal((6, 5)), rng.standard_normal((7, 5))
    b = rng.standard_normal(7) if has_bias else None
    norm = parameters(rng, 7)
    y = x @ w.T + (b if has_bias else 0)
    got, offset = fold_into_linear(w if axis == 0 else w.T, b, *norm, 1e-3, axis=axis)
    assert got.shape == (w.shape if axis == 0 else w.T.shape)
    got = got if axis == 0 else got.T
    np.testing.assert_allclose(x @ got.T + offset, inferred(y, *norm, 1e-3), atol=1e-12)


def test_linear_with_a_plain_norm(rng):
    x, w = rng.standard_normal((6, 5)), rng.standard_normal((7, 5))
    mean, var, *_ = parameters(rng, 7)
    got, offset = fold_into_linear(w, None, mean, var)
    np.testing.assert_allclose(x @ got.T + offset, inferred(x @ w.T, mean, var, 1, 0, 1e-5))


@pytest.mark.parametrize("stored", STORAGE, ids=str)
def test_each_is_rounded_once(stored, rng):
    """To its own type, from numbers in float64."""
    w, b = cast(rng.standard_normal((7, 5)), stored), rng.standard_normal(7).astype(np.float32)
    norm = parameters(rng, 7, stored)
    wide = fold_into_linear(w.astype(np.float64), b.astype(np.float64), *norm)
    got = fold_into_linear(w, b, *norm)
    assert_same_bits(got[0], rounded(wide[0], stored))
    assert_same_bits(got[1], wide[1].astype(np.float32))
    wide = fold_into_linear(w.astype(np.float64), None, *norm)
    assert_same_bits(fold_into_linear(w, None, *norm)[1], rounded(wide[1], stored))


@pytest.mark.parametrize("stored", HALVES, ids=str)
def test_halves_are_rounded_from_all_digits(stored, rng):
    """float64 to bfloat16 by way of float32 would round twice."""
    digits = {"float16": 10, "bfloat16": 7}[stored.name]
    tie = 1 + 2.0 ** (-digits - 1)
    values = np.array([tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40, 1e39, -1e-50, np.nan])
    assert_same_bits(dialects._stored(values, stored), rounded(values, stored))
    values = rng.standard_normal(5000) * 2.0 ** rng.integers(-30, 30, 5000)
    assert_same_bits(dialects._stored(values, stored), rounded(values, stored))
    if stored.name == "bfloat16":
        bits = dialects._stored(values, interop.BITS)
        assert_same_bits(bits.view(np.uint16), rounded(values, stored).view(np.uint16))


def correlated(x, w):
    """Convolution of (N, in, L) with (out, in, K), in torch's sense."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2], axis=2)
    return np.einsum("nilk,oik->nol", windows, w)


def test_conv(rng):
    x, w, b = rng.standard_normal((2, 3, 9)), rng.standard_normal((4, 3, 2)), rng.standard_normal(4)
    norm = parameters(rng, 4)
    y = correlated(x, w) + b[:, None]
    got, offset = fold_into_conv(w, b, *norm)
    np.testing.assert_allclose(
        correlated(x, got) + offset[:, None], inferred(y, *norm, 1e-5), atol=1e-12
    )
    keras, same = fold_into_conv(w.transpose(2, 1, 0), b, *norm, axis=-1)
    assert_same_bits(keras, got.transpose(2, 1, 0).copy())
    assert_same_bits(same, offset)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_conv_against_torch(groups, transposed, torch, rng):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv = kind(4, 6, 3, groups=groups, stride=2, padding=1).double()
    x = torch.from_numpy(rng.standard_normal((2, 4, 9, 9)))
    norm = parameters(rng, 6)
    with torch.no_grad():
        want = inferred(conv(x).numpy(), *norm, 1e-5)
        conv.weight[:], conv.bias[:] = fold_into_conv(
            conv.weight.detach(), conv.bias.detach(), *norm, axis=int(transposed), groups=groups
        )
        np.testing.assert_allclose(conv(x).numpy(), want, atol=1e-12)


def test_groups_of_a_transposed_convolution(rng):
    """Each group's inputs are with that group's outputs."""
    w, scale = np.ones((4, 3, 2)), np.arange(1.0, 7)
    got, _ = fold_into_conv(w, None, np.zeros(6), 1 / scale**2, eps=0, axis=1, groups=2)
    for i in range(4):
        np.testing.assert_allclose(got[i, :, 0], scale[:3] if i < 2 else scale[3:])


def test_tensors(torch, rng):
    """Tensors in, tensors out."""
    w, b = torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2)
    weight, bias = fold_into_linear(w, b, torch.zeros(2), torch.full((2,), 4.0), eps=0)
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    assert (weight == 0.5).all()
    scale, _ = fold_batch_norm(torch.zeros(2), torch.full((2,), 4.0), eps=0)
    assert torch.equal(scale, torch.full((2,), 0.5))
    variance = convert_running_var(torch.ones(2), "torch", "keras", 2)
    assert torch.equal(variance, torch.full((2,), 0.5))


def test_inputs_are_left_alone(rng):
    given = [rng.random((3, 2)), rng.random(3), *parameters(rng, 3)]
    before = [part.copy() for part in given]
    fold_into_linear(*given)
    fold_batch_norm(*given[2:])
    for part, was in zip(given, before, strict=True):
        assert_same_bits(part, was)


def test_the_scale_is_right_to_the_last_bit():
    """Of numbers whose results are exact."""
    scale, shift = fold_batch_norm([3.0], [0.25 - 2.0**-10], [5.0], [1.0], 2.0**-10)
    assert (Fraction(scale[0]), Fraction(shift[0])) == (10, -29)
    assert math.isinf(fold_batch_norm([0.0], [0.0], eps=0)[0][0])


# ---- errors --------------------------------------------------------------------------------------

ONES = np.ones(3)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: convert_momentum(0.1, "jax", "torch"), ValueError, "source: got 'jax', wanted one of"),
    (lambda: convert_momentum(0.1, "torch", 1), TypeError, "target: got int, wanted a name"),
    (lambda: convert_momentum(None, "torch", "onnx"), TypeError, "momentum: got None, wanted a fi"),
    (lambda: convert_momentum("1", "torch", "onnx"), TypeError, "momentum: got '1', wanted a fini"),
    (lambda: convert_momentum(np.nan, "torch", "onnx"), ValueError, "momentum: got nan, wanted a"),
    (lambda: convert_momentum(10**400, "torch", "onnx"), ValueError, "momentum: got 1000"),
    (lambda: convert_running_var(ONES, "torch", "onnx", 0), ValueError, "n: got 0, wanted an int"),
    (lambda: convert_running_var(ONES, "torch", "onnx", 2.0), TypeError, "n: got 2.0, wanted an "),
    (lambda: convert_running_var(None, "torch", "onnx", 2), TypeError, "running_var: got None"),
    (lambda: convert_running_var(1j, "torch", "onnx", 2), TypeError, "running_var: got dtype comp"),
    (lambda: fold_batch_norm(ONES, np.ones(4)), ValueError, r"running_mean: got shape \(3,\), wan"),
    (lambda: fold_batch_norm(None, ONES), ValueError, "running_mean: got None, wanted shape"),
    (lambda: fold_batch_norm(ONES, None), ValueError, "running_var: got None, wanted one axis"),
    (lambda: fold_batch_norm(ONES, np.eye(3)), ValueError, r"running_var: got shape \(3, 3\)"),
    (lambda: fold_batch_norm(ONES, ONES, np.ones(2)), ValueError, r"weight: got shape \(2,\)"),
    (lambda: fold_batch_norm(ONES, ONES, ONES, ["a"] * 3), TypeError, "bias: got dtype <U1"),
    (lambda: fold_batch_norm(ONES, ONES, eps=-1), ValueError, "eps: got -1, wanted a number of at"),
    (lambda: fold_into_linear(ONES, None, ONES, ONES), ValueError, r"weight: got shape \(3,\), wa"),
    (lambda: fold_into_linear(None, None, ONES, ONES), ValueError, r"weight: got shape \(\), want"),
    (lambda: fold_into_linear(np.eye(3), None, ONES, ONES, axis=2), ValueError, "axis: axis 2 is "),
    (lambda: fold_into_linear(np.eye(3), None, ONES, ONES, axis="0"), TypeError, "axis: got '0'"),
    (lambda: fold_into_linear(np.ones((4, 2)), None, ONES, ONES), ValueError,
     r"weight: got shape \(4, 2\), wanted 3 outputs on axis 0"),
    (lambda: fold_into_linear(np.eye(3), np.ones(2), ONES, ONES), ValueError,
     r"bias: got shape \(2,\), wanted \(3,\)"),
    (lambda: fold_into_linear(np.eye(3), None, ONES, ONES, np.ones(2)), ValueError,
     r"norm_weight: got shape \(2,\), wanted \(3,\)"),
    (lambda: fold_into_conv(ONES, None, ONES, ONES), ValueError, r"weight: got shape \(3,\), wan"),
    (lambda: fold_into_conv(np.eye(3), None, ONES, ONES, groups=0), ValueError, "groups: got 0"),
    (lambda: fold_into_conv(np.ones((4, 2, 5)), None, np.ones(6), np.ones(6), axis=1, groups=2),
     ValueError, r"weight: got shape \(4, 2, 5\), wanted 6 outputs on axis 1, or inputs on axis 0"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
