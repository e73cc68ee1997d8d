"""Bad input: the fitting exception, which names the argument, what was got and what was wanted, and
nothing written."""

import re

import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastnorm

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
W = np.ones(4, np.float32)
MEAN = np.zeros((2, 3), np.float32)
RSTD = np.ones((2, 3), np.float32)
MASKED = np.ma.array(X, mask=X > 3)
OBJECTS = X.astype(object)
COMPLEX = X.astype(np.complex64)
HALF = X.astype(np.float16)
LONG = X.astype(np.longdouble)
TEXT = np.full((2, 3, 4), "a")

#: (x, options), exception, words that the message must hold
FORWARD = {
    # x
    "x complex": ((COMPLEX, {}), TypeError, ["x", "complex64", "float32 or float64"]),
    "x object": ((OBJECTS, {}), TypeError, ["x", "object", "float32 or float64"]),
    "x half": ((HALF, {}), TypeError, ["x", "float16", "float32 or float64"]),
    "x long double": ((LONG, {}), TypeError, ["x", str(LONG.dtype), "float32 or float64"]),
    "x text": ((TEXT, {}), TypeError, ["x", "<U1", "float32 or float64"]),
    "x dates": ((X.astype("M8[s]"), {}), TypeError, ["x", "datetime64", "float32 or float64"]),
    "x masked": ((MASKED, {}), TypeError, ["x", "masked", "ndarray"]),
    "x None": ((None, {}), TypeError, ["x", "object", "float32 or float64"]),
    "x of 0 dimensions": ((np.float32(3), {}), ValueError, ["x", "0 dimensions", "at least 1"]),
    # normalized_shape
    "other length": ((X, {"normalized_shape": 5}), ValueError, ["normalized_shape", "5", "(4,)"]),
    "other lengths": (
        (X, {"normalized_shape": (2, 4)}), ValueError, ["normalized_shape", "(2, 4)", "(3, 4)"],
    ),
    "leading length": ((X, {"normalized_shape": (2,)}), ValueError, ["normalized_shape", "(2,)"]),
    "too many lengths": (
        (X, {"normalized_shape": (1, 2, 3, 4)}), ValueError, ["normalized_shape", "(1, 2, 3, 4)"],
    ),
    "no length": ((X, {"normalized_shape": ()}), ValueError, ["normalized_shape", "()", "wanted"]),
    "negative length": ((X, {"normalized_shape": -4}), ValueError, ["normalized_shape", "-4"]),
    "float length": ((X, {"normalized_shape": 4.0}), TypeError, ["normalized_shape", "4.0", "int"]),
    "text length": ((X, {"normalized_shape": "4"}), TypeError, ["normalized_shape", "'4'", "int"]),
    # axis
    "axis too large": ((X, {"axis": 3}), AxisError, ["axis", "3"]),
    "axis too small": ((X, {"axis": -4}), AxisError, ["axis", "-4", "3"]),
    "one axis too large": ((X, {"axis": (0, 5)}), AxisError, ["axis", "5", "3"]),
    "axis twice": ((X, {"axis": (1, 1)}), ValueError, ["axis", "(1, 1)"]),
    "axis twice, once negative": ((X, {"axis": (2, -1)}), ValueError, ["axis", "(2, -1)"]),
    "no axis": ((X, {"axis": ()}), ValueError, ["axis", "()", "at least one"]),
    "float axis": ((X, {"axis": 1.0}), TypeError, ["axis", "1.0", "int"]),
    "axis and shape": (
        (X, {"axis": -1, "normalized_shape": 4}),
        TypeError, ["normalized_shape", "axis", "4", "-1"],
    ),
    # eps
    "eps negative": ((X, {"eps": -1e-5}), ValueError, ["eps", "-1e-05", "at least 0"]),
    "eps minus infinity": ((X, {"eps": -np.inf}), ValueError, ["eps", "-inf", "at least 0"]),
    "eps NaN": ((X, {"eps": np.nan}), ValueError, ["eps", "nan", "at least 0"]),
    "eps text": ((X, {"eps": "small"}), TypeError, ["eps", "small", "number"]),
    "eps None": ((X, {"eps": None}), TypeError, ["eps", "None", "number"]),
    "eps complex": ((X, {"eps": 1j}), TypeError, ["eps", "1j", "number"]),
    # weight and bias
    "weight too short": ((X, {"weight": W[:3]}), ValueError, ["weight", "(3,)", "(4,)"]),
    "weight too long": ((X, {"weight": np.ones(5)}), ValueError, ["weight", "(5,)", "(4,)"]),
    "weight of 1": ((X, {"weight": np.ones(1)}), ValueError, ["weight", "(1,)", "(4,)"]),
    "weight scalar": ((X, {"weight": 1.0}), ValueError, ["weight", "()", "(4,)"]),
    "weight of 2 axes": ((X, {"weight": X[0]}), ValueError, ["weight", "(3, 4)", "(4,)"]),
    "bias too short": ((X, {"bias": W[:3]}), ValueError, ["bias", "(3,)", "(4,)"]),
    "weight of one of two axes": (
        (X, {"weight": W, "normalized_shape": (3, 4)}), ValueError, ["weight", "(4,)", "(3, 4)"],
    ),
    "weight of axes out of order": (
        (X, {"weight": np.ones((4, 2)), "axis": (2, 0)}),
        ValueError, ["weight", "(4, 2)", "(2, 4)"],
    ),
    "weight complex": ((X, {"weight": W + 0j}), TypeError, ["weight", "complex", "real"]),
    "weight object": ((X, {"weight": W.astype(object)}), TypeError, ["weight", "object", "real"]),
    "weight masked": ((X, {"weight": np.ma.array(W, mask=W > 3)}), TypeError, ["weight", "masked"]),
    "bias text": ((X, {"bias": np.full(4, "b")}), TypeError, ["bias", "<U1", "real"]),
}  # fmt: skip


def assert_says(message, words):
    """The argument comes first, and the words are all there."""
    assert message.startswith(words[0]), message
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) or word in message, message


@pytest.mark.parametrize("name", FORWARD)
def test_layer_norm(name):
    (x, options), exception, words = FORWARD[name]
    out = np.full(np.shape(x), 7, np.float32)
    for given in ({}, {"out": out}):
        with pytest.raises(exception) as caught:
            fastnorm.layer_norm(x, **options, **given)
        assert type(caught.value) is exception
        assert_says(str(caught.value), words)
    assert (out == 7).all(), "out was written to"


# ---- out -----------------------------------------------------------------------------------------


def whole(shape=(2, 3, 4), dtype=np.float32):
    return np.full(shape, 7, dtype)


def locked():
    out = whole()
    out.flags.writeable = False
    return out


OUT = {
    "shape": (lambda: whole((2, 3, 5)), ValueError, ["out", "(2, 3, 5)", "(2, 3, 4)"]),
    "transposed shape": (lambda: whole((4, 3, 2)), ValueError, ["out", "(4, 3, 2)", "(2, 3, 4)"]),
    "flat shape": (lambda: whole(24), ValueError, ["out", "(24,)", "(2, 3, 4)"]),
    "broadcastable shape": (lambda: whole((1, 2, 3, 4)), ValueError, ["out", "(1, 2, 3, 4)"]),
    "double": (lambda: whole(dtype=np.float64), TypeError, ["out", "float64", "float32"]),
    "integers": (lambda: whole(dtype=np.int32), TypeError, ["out", "int32", "float32"]),
    "read-only": (locked, ValueError, ["out", "read-only", "writeable"]),
    "bytes": (
        lambda: np.frombuffer(bytes(96), np.float32).reshape(2, 3, 4),
        ValueError, ["out", "read-only", "writeable"],
    ),
    "masked": (lambda: np.ma.array(whole()), TypeError, ["out", "MaskedArray", "ndarray"]),
    "list": (lambda: whole().tolist(), TypeError, ["out", "list", "ndarray"]),
    "tuple": (lambda: (whole(),), TypeError, ["out", "tuple", "ndarray"]),
    "broadcast": (
        lambda: np.lib.stride_tricks.as_strided(whole(), (2, 3, 4), (0, 16, 4)),
        ValueError, ["out", "overlap"],
    ),
    "windows": (
        lambda: np.lib.stride_tricks.as_strided(whole(), (2, 3, 4), (16, 4, 4)),
        ValueError, ["out", "overlap"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_bad_out(name):
    make, exception, words = OUT[name]
    out = make()
    before = np.array(out)
    with pytest.raises(exception) as caught:
        fastnorm.layer_norm(X, out=out)
    assert_says(str(caught.value), words)
    np.testing.assert_array_equal(np.array(out), before)


@pytest.mark.parametrize("shift", [s for s in range(-9, 10) if s])
def test_out_that_overlaps_x_in_part(dtype, shift):
    memory = np.arange(40, dtype=dtype)
    before = memory.copy()
    x, out = memory[10:30].reshape(4, 5), memory[10 + shift : 30 + shift].reshape(4, 5)
    with pytest.raises(
        ValueError, match=r"^out: .* overlaps x, wanted x itself or memory of its own"
    ):
        fastnorm.layer_norm(x, out=out)
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("make", [
    lambda x: x[::-1],
    lambda x: x.T,
    lambda x: x[:, ::-1],
    lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (4 * x.itemsize, x.itemsize)),
], ids=["rows backwards", "transposed", "columns backwards", "closer rows"])  # fmt: skip
def test_out_that_is_x_in_another_order(dtype, make):
    x = np.arange(25, dtype=dtype).reshape(5, 5)
    before = x.copy()
    with pytest.raises(ValueError, match=r"^out: "):
        fastnorm.layer_norm(x, out=make(x))
    np.testing.assert_array_equal(x, before)


def test_out_of_another_type_over_x():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    before = x.copy()
    with pytest.raises(TypeError, match=r"^out: got dtype float64, wanted float32"):
        fastnorm.layer_norm(x[:, :3], out=x.view(np.float64))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_out_that_overlaps_a_parameter(dtype, name):
    memory = np.arange(40, dtype=dtype)
    before = memory.copy()
    x = np.ones((4, 5), dtype)
    for out, parameter in (
        (memory[:20].reshape(4, 5), memory[10:15]),
        (memory[:20].reshape(4, 5), memory[19:24]),
        (memory[::2].reshape(4, 5), memory[4:14:2]),
    ):
        with pytest.raises(ValueError, match=rf"^out: .* overlaps {name}"):
            fastnorm.layer_norm(x, 5, out=out, **{name: parameter})
        np.testing.assert_array_equal(memory, before)


def test_out_between_the_elements_of_x(dtype):
    """Neighbours that interleave share no byte: they are fine."""
    memory = np.arange(40, dtype=dtype)
    want = fastnorm.layer_norm(memory[::2].reshape(4, 5).copy())
    fastnorm.layer_norm(memory[::2].reshape(4, 5), out=memory[1::2].reshape(4, 5))
    np.testing.assert_array_equal(memory[1::2].reshape(4, 5), want)
    np.testing.assert_array_equal(memory[::2], np.arange(0, 40, 2))


# ---- backward and moments ------------------------------------------------------------------------

#: what is wrong with layer_norm_backward's arguments
BACKWARD = {
    "dy of another shape": ({"dy": X[:1]}, ValueError, ["dy", "(1, 3, 4)", "(2, 3, 4)"]),
    "dy complex": ({"dy": COMPLEX}, TypeError, ["dy", "complex64", "float32 or float64"]),
    "dy masked": ({"dy": MASKED}, TypeError, ["dy", "masked", "ndarray"]),
    "x object": ({"x": OBJECTS}, TypeError, ["x", "object", "float32 or float64"]),
    "x half": ({"x": HALF}, TypeError, ["x", "float16", "float32 or float64"]),
    "normalized_shape": ({"normalized_shape": 3}, ValueError, ["normalized_shape", "(3,)", "(4,)"]),
    "axis and shape": ({"axis": -1}, TypeError, ["normalized_shape", "axis"]),
    "axis": ({"normalized_shape": None, "axis": 7}, AxisError, ["axis", "7"]),
    "mean too short": ({"mean": MEAN[:1]}, ValueError, ["mean", "(1, 3)", "(2, 3)", "(2, 3, 1)"]),
    "mean of x's shape": ({"mean": X}, ValueError, ["mean", "(2, 3, 4)", "(2, 3)"]),
    "mean scalar": ({"mean": 0.0}, ValueError, ["mean", "()", "(2, 3)"]),
    "mean object": ({"mean": MEAN.astype(object)}, TypeError, ["mean", "object"]),
    "rstd too long": ({"rstd": X[:, :, 0].T}, ValueError, ["rstd", "(3, 2)", "(2, 3)"]),
    "rstd None": ({"rstd": None}, TypeError, ["rstd"]),
    "weight": ({"weight": W[:2]}, ValueError, ["weight", "(2,)", "(4,)"]),
    "bias": ({"bias": W[:2]}, ValueError, ["bias", "(2,)", "(4,)"]),
    "two flags": (
        {"output_mask": (True, True)},
        ValueError,
        ["output_mask", "(True, True)", "three"],
    ),
    "four flags": ({"output_mask": [True] * 4}, ValueError, ["output_mask", "three"]),
    "one flag": ({"output_mask": True}, ValueError, ["output_mask", "True", "three"]),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_layer_norm_backward(name):
    change, exception, words = BACKWARD[name]
    arguments = {"dy": X, "x": X, "normalized_shape": 4, "mean": MEAN, "rstd": RSTD, **change}
    with pytest.raises(exception) as caught:
        fastnorm.layer_norm_backward(**arguments)
    assert_says(str(caught.value), words)


MOMENTS = {
    "complex": ((COMPLEX,), TypeError, ["x", "complex64", "float32 or float64"]),
    "masked": ((MASKED,), TypeError, ["x", "masked"]),
    "scalar": ((np.float32(1),), ValueError, ["x", "0 dimensions"]),
    "axis": ((X, 3), AxisError, ["axis", "3"]),
    "axis twice": ((X, (0, 0)), ValueError, ["axis", "(0, 0)"]),
    "no axis": ((X, ()), ValueError, ["axis", "()"]),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments(name):
    arguments, exception, words = MOMENTS[name]
    with pytest.raises(exception) as caught:
        fastnorm.moments(*arguments)
    assert_says(str(caught.value), words)


# ---- calls ---------------------------------------------------------------------------------------


def test_arguments_that_do_not_exist():
    for call in (
        lambda: fastnorm.layer_norm(),
        lambda: fastnorm.layer_norm(X, epsilon=1e-5),
        lambda: fastnorm.layer_norm(X, 4, W, W, 1e-5, -1),
        lambda: fastnorm.layer_norm_backward(X, X, 4, MEAN),
        lambda: fastnorm.moments(X, ddof=1),
    ):
        with pytest.raises(TypeError):
            call()


def test_device_arrays_are_refused():
    class OnDevice:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (2,), "typestr": "<f4", "data": (0, False), "version": 3}

    with pytest.raises(TypeError, match=r"^x: .* CUDA device, wanted one in host memory"):
        fastnorm.layer_norm(OnDevice())


def test_empty():
    assert fastnorm.empty((2, 3)).shape == (2, 3)
    for shape, dtype, exception, words in (
        (-1, "f4", ValueError, ["shape", "-1", "at least 0"]),
        ((2, 1.5), "f4", TypeError, ["shape", "1.5", "int"]),
        (3, object, TypeError, ["dtype", "object"]),
    ):
        with pytest.raises(exception) as caught:
            fastnorm.empty(shape, dtype)
        assert_says(str(caught.value), words)


def test_a_buffer_that_overlaps_out():
    """What is not an ndarray shares its memory all the same."""
    buffer = np.arange(60, dtype=np.float32)
    out = buffer[5:55].reshape(10, 5)
    before = buffer.copy()
    with pytest.raises(ValueError, match="out: got an array that overlaps x"):
        fastnorm.layer_norm(memoryview(buffer[:50].reshape(10, 5)), out=out)
    x = np.ones((10, 5), np.float32)
    with pytest.raises(ValueError, match="out: got an array that overlaps weight"):
        fastnorm.layer_norm(x, weight=memoryview(out[0]), out=out)
    np.testing.assert_array_equal(buffer, before)


@pytest.mark.parametrize("eps", ["1e-5", b"1e-5"])
def test_eps_is_no_text(eps):
    with pytest.raises(TypeError, match=r"eps: got .*1e-5.*wanted a number"):
        fastnorm.layer_norm(np.ones((2, 3), np.float32), eps=eps)
