"""Bad input: the fitting exception, which names the argument, what was got and what was wanted, and
nothing written. explain says the same."""

import re

import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastnorm
from fastnorm import _core

from .helpers.arguments import (
    BACKWARD,
    FORWARD,
    NORMS,
    SEGMENTS,
    WITH_RESIDUAL,
    arrays_of,
    outputs,
    valid,
)
from .helpers.arrays import assert_same_bits

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
W = np.ones(4, np.float32)
LONG = X.astype(np.longdouble)
STORED = "float16, bfloat16, float32 or float64"
EVERY_RMS = tuple(op for op in _core.OPS if "rms" in op)


def assert_says(message, words):
    """The argument comes first, and the words are all there."""
    assert message.startswith(words[0]), message
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) or word in message, message


def bytes_of(arguments):
    return [np.asarray(a).tobytes() for a in arrays_of(arguments)]


def assert_refused(op, exception, words, **change):
    """A call with some arguments replaced raises, with outputs or without, and writes nothing."""
    arguments = {**valid(op), **change}
    given = outputs(op) if op in FORWARD else {}
    for name in given.keys() & change.keys():
        del given[name]
    if arguments.get("residual") is None:
        given.pop("sum_out", None)
    for made in (arguments, arguments | given):
        before = bytes_of(made)
        messages = []
        for call in (getattr(fastnorm, op), lambda **made: fastnorm.explain(op, **made)):
            with pytest.raises(exception) as caught:
                call(**made)
            assert type(caught.value) is exception
            messages.append(str(caught.value))
        assert_says(messages[0], words)
        assert messages[0] == messages[1]
        assert bytes_of(made) == before, "something was written"


def cases(table):
    """Every op with every row of what is wrong with it."""
    return pytest.mark.parametrize(
        ("op", "change", "exception", "words"),
        [pytest.param(op, *row, id=f"{op}-{name}") for op, name, row in table],
    )


# ---- x -------------------------------------------------------------------------------------------

BAD_X = {
    "complex": (X.astype(np.complex64), TypeError, ["complex64", STORED]),
    "object": (X.astype(object), TypeError, ["object", STORED]),
    "long double": (LONG, TypeError, [str(LONG.dtype), STORED]),
    "text": (np.full((2, 3, 4), "a"), TypeError, ["<U1", STORED]),
    "dates": (X.astype("M8[s]"), TypeError, ["datetime64", STORED]),
    "record": (np.zeros((2, 3, 4), [("bfloat", "u2")]), TypeError, ["bfloat", STORED]),
    "masked": (np.ma.array(X, mask=X > 3), TypeError, ["masked", "ndarray"]),
    "None": (None, TypeError, ["None", "an array"]),
    "0 dimensions": (np.float32(3), ValueError, ["0 dimensions", "at least 1"]),
}


def bad_x():
    for op in _core.OPS:
        name = "sum" if "sum" in valid(op) else "x"
        for why, (x, exception, words) in BAD_X.items():
            yield op, why, ({name: x}, exception, [name, *words])


@cases(bad_x())
def test_x(op, change, exception, words):
    assert_refused(op, exception, words, **change)


# ---- other arrays --------------------------------------------------------------------------------


def other_arrays():
    """Every other array of every op: of a wrong type, masked, an element short, of other axes."""
    for op in _core.OPS:
        for name, a in valid(op).items():
            if not isinstance(a, np.ndarray) or name in ("x", "sum", "offsets"):
                continue
            short, few = a[..., :-1], a[:0]
            more = np.ones((3, 3, *a.shape), a.dtype)
            for why, bad, exception, words in (
                ("complex", a + 0j, TypeError, ["complex64"]),
                ("object", a.astype(object), TypeError, ["object"]),
                ("text", a.astype(str), TypeError, ["<U"]),
                ("masked", np.ma.array(a), TypeError, ["masked"]),
                ("short", short, ValueError, [str(short.shape), "wanted"]),
                ("none of it", few, ValueError, [str(few.shape), "wanted"]),
                ("more axes", more, ValueError, [str(more.shape), "wanted"]),
                ("a number", 1.0, ValueError, ["()", "wanted"]),
            ):
                yield op, f"{name} {why}", ({name: bad}, exception, [name, *words])


@cases(other_arrays())
def test_other_arrays(op, change, exception, words):
    assert_refused(op, exception, words, **change)


def test_arrays_that_may_not_be_left_out():
    for op in WITH_RESIDUAL[:2]:
        assert_refused(op, TypeError, ["residual", "None", "array of x's shape"], residual=None)
    assert_refused("adaptive_layer_norm", TypeError, ["scale", "None"], scale=None)
    assert_refused("adaptive_layer_norm_backward", TypeError, ["scale", "None"], scale=None)
    for op in BACKWARD:
        for name in valid(op).keys() & {"dy", "mean", "rstd"}:
            assert_refused(op, TypeError, [name], **{name: None})


PARAMETERS = {
    "of 1": ({"weight": np.ones(1)}, ValueError, ["weight", "(1,)", "(4,)"]),
    "of two axes' lengths": (
        {"weight": W, "normalized_shape": (3, 4)}, ValueError, ["weight", "(4,)", "(3, 4)"],
    ),
    "with a leading axis that does not fit": (
        {"weight": np.ones((2, 4))}, ValueError, ["weight", "(2, 4)", "(4,)", "(2, 3)"],
    ),
    "with leading axes in the wrong order": (
        {"weight": np.ones((3, 2, 4))}, ValueError, ["weight", "(3, 2, 4)", "(2, 3)"],
    ),
    "with more leading axes than x": (
        {"weight": np.ones((1, 2, 3, 4))}, ValueError, ["weight", "(1, 2, 3, 4)", "(2, 3)"],
    ),
    "of axes out of order": (
        {"weight": np.ones((4, 2)), "normalized_shape": None, "axis": (2, 0)},
        ValueError, ["weight", "(4, 2)", "(2, 4)"],
    ),
}  # fmt: skip


@cases((op, name, row) for op in NORMS for name, row in PARAMETERS.items())
def test_weight(op, change, exception, words):
    bias = {"bias": None} if op == "layer_norm" else {}
    assert_refused(op, exception, words, **bias, **change)


def test_weight_of_axes_that_are_not_last():
    """They have no leading ones: what is refused is not what is said to be wanted."""
    with pytest.raises(ValueError, match=r"^weight: got shape \(2, 4, 3\), wanted \(3,\)$"):
        fastnorm.layer_norm(X, weight=np.ones((2, 4, 3)), axis=1)


# ---- shapes and axes -----------------------------------------------------------------------------

SHAPES = {
    "other length": (5, ValueError, ["5", "(4,)"]),
    "other lengths": ((2, 4), ValueError, ["(2, 4)", "(3, 4)"]),
    "leading length": ((2,), ValueError, ["(2,)"]),
    "too many lengths": ((1, 2, 3, 4), ValueError, ["(1, 2, 3, 4)"]),
    "no length": ((), ValueError, ["()", "wanted"]),
    "negative length": (-4, ValueError, ["-4"]),
    "huge length": (2**70, ValueError, [str(2**70), "(4,)"]),
    "float length": (4.0, TypeError, ["4.0", "int"]),
    "text length": ("4", TypeError, ["'4'", "int"]),
}
WITH_SHAPE = tuple(op for op in _core.OPS if "normalized_shape" in valid(op))


@cases(
    (op, why, ({"normalized_shape": shape}, exception, ["normalized_shape", *words]))
    for op in WITH_SHAPE
    for why, (shape, exception, words) in SHAPES.items()
)
def test_normalized_shape(op, change, exception, words):
    assert_refused(op, exception, words, **change)


AXES = {
    "too large": (3, AxisError, ["axis", "3"]),
    "too small": (-4, AxisError, ["axis", "-4", "3"]),
    "one too large": ((0, 5), AxisError, ["axis", "5", "3"]),
    "twice": ((1, 1), ValueError, ["axis", "(1, 1)"]),
    "twice, once negative": ((2, -1), ValueError, ["axis", "(2, -1)"]),
    "none": ((), ValueError, ["axis", "()", "at least one"]),
    "float": (1.0, TypeError, ["axis", "1.0", "int"]),
    "text": ("1", TypeError, ["axis", "'1'", "int"]),
}
WITH_AXIS = (*NORMS, *WITH_RESIDUAL[:2], *(f"{op}_backward" for op in (*NORMS, *WITH_RESIDUAL[:2])))


@cases(
    (op, name, ({"axis": axis, "normalized_shape": None}, exception, words))
    for op in WITH_AXIS
    for name, (axis, exception, words) in AXES.items()
)
def test_axis(op, change, exception, words):
    assert_refused(op, exception, words, **change)


@pytest.mark.parametrize("op", WITH_AXIS)
def test_axis_and_normalized_shape(op):
    assert_refused(op, TypeError, ["normalized_shape", "axis", "4", "-1"], axis=-1)


@pytest.mark.parametrize("name", AXES)
def test_axis_of_moments(name):
    axis, exception, words = AXES[name]
    assert_refused("moments", exception, words, axis=axis)


# ---- numbers, types and names --------------------------------------------------------------------

OPTIONS = {
    "eps": {
        "negative": (-1e-5, ValueError, ["-1e-05", "at least 0"]),
        "minus infinity": (-np.inf, ValueError, ["-inf", "at least 0"]),
        "NaN": (np.nan, ValueError, ["nan", "at least 0"]),
        "text": ("1e-5", TypeError, ["'1e-5'", "number"]),
        "bytes": (b"1e-5", TypeError, ["1e-5", "number"]),
        "complex": (1j, TypeError, ["1j", "number"]),
        "list": ([1e-5], TypeError, ["1e-05", "number"]),
    },
    "dtype": {
        "complex": ("complex64", TypeError, ["complex64", "float16, bfloat16, float32", "int8"]),
        "swapped": (">f4", TypeError, [">f4", "float32"]),
        "int16": (np.int16, TypeError, ["int16", "int8"]),
        "uint8": (np.uint8, TypeError, ["uint8", "int8"]),
        "bool": (bool, TypeError, ["bool", "int8"]),
        "long double": (np.longdouble, TypeError, ["longdouble", "float64"]),
        "object": (object, TypeError, ["object", "float64"]),
        "a word": ("half a byte", TypeError, ["half a byte", "float64"]),
        "a number": (16, TypeError, ["16", "float64"]),
        "an array": (X, TypeError, ["float64"]),
    },
    "activation": {
        "unknown": ("swish", ValueError, ["'swish'", "'relu', 'silu', 'gelu', 'gelu_tanh'"]),
        "upper case": ("GELU", ValueError, ["'GELU'", "'gelu'"]),
        "no letters": ("", ValueError, ["''", "'relu'"]),
        "bytes": (b"relu", TypeError, ["bytes", "name"]),
        "number": (1, TypeError, ["int", "name"]),
        "function": (abs, TypeError, ["builtin_function_or_method", "name"]),
    },
}


@cases(
    (op, f"{name} {why}", ({name: value}, exception, [name, *words]))
    for op in FORWARD
    for name, table in OPTIONS.items()
    for why, (value, exception, words) in table.items()
)
def test_options(op, change, exception, words):
    assert_refused(op, exception, words, **change)


@pytest.mark.parametrize("op", [op for op in FORWARD if op not in EVERY_RMS])
def test_eps_is_not_left_open(op):
    """None means the machine epsilon, for root mean squares alone."""
    assert_refused(op, TypeError, ["eps", "None", "number"], eps=None)


@pytest.mark.parametrize("op", FORWARD)
def test_a_bias_in_the_place_of_eps(op):
    """It is not printed out, and whoever is used to layer norm is told what RMS norm lacks."""
    words = ["eps", "a float64 array of shape (768,)", "a number of at least 0"]
    if op in EVERY_RMS:
        words.append("(RMS norm has no bias)")
    assert_refused(op, TypeError, words, eps=np.ones(768))


@pytest.mark.parametrize("op", EVERY_RMS)
def test_offset(op):
    for value, exception, words in (
        ("1", TypeError, ["'1'", "number"]),
        (None, TypeError, ["None", "number"]),
        (1j, TypeError, ["1j", "number"]),
        ([1.0], TypeError, ["[1.0]", "number"]),
        (W, TypeError, ["array", "number"]),
        (np.nan, ValueError, ["nan", "finite"]),
        (-np.inf, ValueError, ["-inf", "finite"]),
    ):
        assert_refused(op, exception, ["offset", *words], offset=value)


@pytest.mark.parametrize("op", BACKWARD)
def test_output_mask(op):
    count, names = (2, "dx, dweight") if "rms" in op else (3, "dx, dweight, dbias")
    word = {2: "two", 3: "three"}[count]
    for mask in ([True] * (count - 1), (True,) * (count + 1), (), True, None):
        words = ["output_mask", str(mask), f"{word} truth values", names]
        assert_refused(op, ValueError, words, output_mask=mask)


# ---- which elements count ------------------------------------------------------------------------

VALID_ELEMENTS = {
    "lengths float": ({"lengths": np.ones((2, 3))}, TypeError, ["lengths", "float64", "integers"]),
    "lengths bool": ({"lengths": True}, TypeError, ["lengths", "bool", "integers"]),
    "lengths object": ({"lengths": [None]}, TypeError, ["lengths", "object", "integers"]),
    "lengths masked": (
        {"lengths": np.ma.array([1, 2, 3])}, TypeError, ["lengths", "masked", "ndarray"],
    ),
    "lengths negative": ({"lengths": [1, -2, 3]}, ValueError, ["lengths", "-2", "0 to 4"]),
    "lengths too large": ({"lengths": 5}, ValueError, ["lengths", "5", "0 to 4"]),
    "lengths of 64 bits": (
        {"lengths": np.uint64(2**63 + 2)}, ValueError, ["lengths", str(2**63 + 2), "0 to 4"],
    ),
    "lengths of another shape": ({"lengths": [1, 2]}, ValueError, ["lengths", "(2,)", "(2, 3)"]),
    "lengths of x's shape": (
        {"lengths": np.ones(X.shape, int)}, ValueError, ["lengths", "(2, 3, 4)", "(2, 3)"],
    ),
    "mask of integers": ({"mask": np.ones(4, int)}, TypeError, ["mask", "int64", "bool"]),
    "mask of floats": ({"mask": X}, TypeError, ["mask", "float32", "bool"]),
    "mask that is masked": (
        {"mask": np.ma.array([True] * 4)}, TypeError, ["mask", "masked", "ndarray"],
    ),
    "mask of another shape": (
        {"mask": np.ones(3, bool)}, ValueError, ["mask", "(3,)", "(2, 3, 4)"],
    ),
    "mask of more axes": (
        {"mask": np.ones((2, 2, 3, 4), bool)}, ValueError, ["mask", "(2, 2, 3, 4)", "(2, 3, 4)"],
    ),
    "both": (
        {"mask": np.ones(4, bool), "lengths": 2}, TypeError, ["lengths and mask", "both", "one"],
    ),
}  # fmt: skip


@cases(
    (op, name, row)
    for op in (*NORMS, *(f"{op}_backward" for op in NORMS))
    for name, row in VALID_ELEMENTS.items()
)
def test_lengths_and_mask(op, change, exception, words):
    assert_refused(op, exception, words, **change)


OFFSETS = {
    "floats": ([0.0, 2.0], TypeError, ["float64", "integers"]),
    "None": (None, TypeError, ["object", "integers"]),
    "bools": ([False, True], TypeError, ["bool", "integers"]),
    "masked": (np.ma.array([0, 2]), TypeError, ["masked", "ndarray"]),
    "two axes": ([[0, 2]], ValueError, ["(1, 2)", "one axis"]),
    "a number": (0, ValueError, ["()", "one axis"]),
    "of none": (np.zeros(0, int), ValueError, ["(0,)", "at least 1"]),
    "not from 0": ([1, 2], ValueError, ["[1, 2]", "from 0 to 2"]),
    "not to the end": ([0, 1], ValueError, ["[0, 1]", "from 0 to 2"]),
    "beyond the end": ([0, 3], ValueError, ["[0, 3]", "from 0 to 2"]),
    "back and forth": ([0, 2, 1, 2], ValueError, ["[0, 2, 1, 2]", "ascend"]),
    "below 0": ([0, -1, 2], ValueError, ["-1", "ascend"]),
    "of 64 bits": (np.array([0, 2**64 - 1, 2], np.uint64), ValueError, ["ascend"]),
}


@cases(
    (op, why, ({"offsets": offsets}, exception, ["offsets", *words]))
    for op in SEGMENTS
    for why, (offsets, exception, words) in OFFSETS.items()
)
def test_offsets(op, change, exception, words):
    assert_refused(op, exception, words, **change)


# ---- several results, and what belongs together --------------------------------------------------

TOGETHER = {
    "gate without residual": ({"residual": None}, TypeError, ["gate", "without a residual"]),
    "sum_out without residual": (
        {"residual": None, "gate": None, "sum_out": X.copy()},
        TypeError, ["sum_out", "without a residual"],
    ),
    "scale of another sample count": (
        {"scale": np.ones((3, 4))}, ValueError, ["scale", "(3, 4)", "(4,)", "(2, 3)"],
    ),
    "scale of the tokens": ({"scale": np.ones((2, 2, 4))}, ValueError, ["scale", "(2, 2, 4)"]),
    "scale without its own axis": (
        {"scale": np.ones((2, 3, 1))}, ValueError, ["scale", "(2, 3, 1)", "(4,)"],
    ),
    "shift of more samples": ({"shift": np.ones((4, 4))}, ValueError, ["shift", "(4, 4)", "(4,)"]),
    "gate of more samples": ({"gate": np.ones((4, 4))}, ValueError, ["gate", "(4, 4)", "(4,)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_adaptive(name):
    change, exception, words = TOGETHER[name]
    assert_refused("adaptive_layer_norm", exception, words, **change)


def whole(shape=(2, 3, 4), dtype=np.float32):
    return np.full(shape, 7, dtype)


PARALLEL = {
    "weights an array": ({"weights": np.ones((2, 4))}, TypeError, ["weights", "ndarray", "list"]),
    "weights None": ({"weights": None}, TypeError, ["weights", "NoneType", "list or tuple"]),
    "weights a generator": ({"weights": iter([W])}, TypeError, ["weights", "list or tuple"]),
    "no weights": ({"weights": []}, ValueError, ["weights", "empty", "at least one"]),
    "more weights": ({"weights": [None] * 3}, ValueError, ["biases", "2", "3", "one a weight"]),
    "fewer biases": ({"biases": [W]}, ValueError, ["biases", "1", "2", "one a weight"]),
    "biases an array": ({"biases": np.ones((2, 4))}, TypeError, ["biases", "ndarray", "list"]),
    "fewer outs": ({"out": [whole()]}, ValueError, ["out", "1", "2", "one a weight"]),
    "one out": ({"out": whole()}, TypeError, ["out", "ndarray", "list or tuple"]),
    "a weight's length": ({"weights": [W, W[:3]]}, ValueError, ["weights[1]", "(3,)", "(4,)"]),
    "a weight's type": ({"weights": [W + 0j, W]}, TypeError, ["weights[0]", "complex64"]),
    "a bias's length": ({"biases": [W[:3], None]}, ValueError, ["biases[0]", "(3,)", "(4,)"]),
    "a masked bias": ({"biases": [None, np.ma.array(W)]}, TypeError, ["biases[1]", "masked"]),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel(name):
    change, exception, words = PARALLEL[name]
    assert_refused("parallel_layer_norm", exception, words, **change)


# ---- out and sum_out -----------------------------------------------------------------------------


def locked():
    out = whole()
    out.flags.writeable = False
    return out


OUT = {
    "shape": (lambda: whole((2, 3, 5)), ValueError, ["(2, 3, 5)", "(2, 3, 4)"]),
    "transposed shape": (lambda: whole((4, 3, 2)), ValueError, ["(4, 3, 2)", "(2, 3, 4)"]),
    "flat shape": (lambda: whole(24), ValueError, ["(24,)", "(2, 3, 4)"]),
    "broadcastable shape": (lambda: whole((1, 2, 3, 4)), ValueError, ["(1, 2, 3, 4)"]),
    "double": (lambda: whole(dtype=np.float64), TypeError, ["float64", "float32"]),
    "half": (lambda: whole(dtype=np.float16), TypeError, ["float16", "float32"]),
    "integers": (lambda: whole(dtype=np.int32), TypeError, ["int32", "float32"]),
    "int8": (lambda: whole(dtype=np.int8), TypeError, ["int8", "float32"]),
    "read-only": (locked, ValueError, ["read-only", "writeable"]),
    "bytes": (
        lambda: np.frombuffer(bytes(96), np.float32).reshape(2, 3, 4),
        ValueError, ["read-only", "writeable"],
    ),
    "masked": (lambda: np.ma.array(whole()), TypeError, ["MaskedArray", "ndarray"]),
    "list": (lambda: whole().tolist(), TypeError, ["list", "ndarray"]),
    "tuple": (lambda: (whole(),), TypeError, ["tuple", "ndarray"]),
    "broadcast": (
        lambda: np.lib.stride_tricks.as_strided(whole(), (2, 3, 4), (0, 16, 4)),
        ValueError, ["overlap"],
    ),
    "windows": (
        lambda: np.lib.stride_tricks.as_strided(whole(), (2, 3, 4), (16, 4, 4)),
        ValueError, ["overlap"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("op", FORWARD)
def test_bad_out(op, name):
    make, exception, words = OUT[name]
    if op == "parallel_layer_norm":
        assert_refused(op, exception, ["out[1]", *words], out=[whole(), make()])
    else:
        assert_refused(op, exception, ["out", *words], out=make())


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("op", WITH_RESIDUAL)
def test_bad_sum_out(op, name):
    make, exception, words = OUT[name]
    assert_refused(op, exception, ["sum_out", *words], sum_out=make())


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("asked", [np.int8, np.float16, np.float64])
def test_out_is_of_the_type_that_is_asked_for(op, asked):
    """Not of x's."""
    out = whole()
    name, given = ("out[1]", [None, out]) if op == "parallel_layer_norm" else ("out", out)
    wanted = np.dtype(asked).name
    assert_refused(op, TypeError, [name, "float32", f"wanted {wanted}"], out=given, dtype=asked)


@pytest.mark.parametrize("op", WITH_RESIDUAL)
def test_sum_out_is_of_the_wider_type(op):
    residual = X.astype(np.float64)
    words = ["sum_out", "float32", "wanted float64"]
    assert_refused(op, TypeError, words, residual=residual, sum_out=whole())


def beside(a, shift=1):
    """A copy of `a` in memory that goes on, and an array of x's shape over a part of it."""
    unit = a.itemsize
    memory = np.zeros(a.nbytes + 40 * 8, np.uint8)
    copy = memory[64 : 64 + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    start = 64 + shift * (4 if unit < 4 else unit)
    return copy, memory[start : start + 96].view(np.float32).reshape(2, 3, 4)


def overlaps():
    """Outputs of every op over a part of each input."""
    extra = {"lengths": np.full((2, 3), 2), "mask": np.ones((2, 3, 4), bool)}
    for op in FORWARD:
        for kind in ("out", "sum_out") if op in WITH_RESIDUAL else ("out",):
            inputs = valid(op)
            more = extra if op in NORMS else {}
            for name, a in (inputs | more).items():
                if isinstance(a, np.ndarray):
                    yield op, kind, name, a, name
                for i, item in enumerate(a if isinstance(a, list) else ()):
                    if item is not None:
                        yield op, kind, name, item, f"{name}[{i}]"


@pytest.mark.parametrize(("op", "kind", "name", "a", "said"), [
    pytest.param(*row, id=f"{row[0]}-{row[1]}-{row[4]}") for row in overlaps()
])  # fmt: skip
def test_outputs_over_a_part_of_an_input(op, kind, name, a, said):
    copy, out = beside(a)
    value, before = copy, valid(op).get(name)
    if isinstance(before, list):
        value = [None if item is None else copy for item in before]
    word, given = kind, out
    if op == "parallel_layer_norm":
        word, given = "out[1]", [None, out]
    words = [word, f"overlaps {said}", "memory of its own"]
    assert_refused(op, ValueError, words, **{name: value, kind: given})


@pytest.mark.parametrize("op", FORWARD)
def test_out_that_is_another_input(op):
    """x itself is fine, where there is one result; residual, weights and scales are not."""
    for name, a in valid(op, shape=(1, 1, 24)).items():
        if not isinstance(a, np.ndarray) or name in ("x", "offsets"):
            continue
        x = np.ones((1, 1, 24), np.float32)
        over = {"x": x, name: a, "out": a.reshape(x.shape)}
        assert_refused_of_shape(op, (1, 1, 24), ["out", f"overlaps {name}"], over)


def assert_refused_of_shape(op, shape, words, change):
    arguments = valid(op, shape=shape) | change
    before = bytes_of(arguments)
    with pytest.raises(ValueError, match=f"^{re.escape(words[0])}: ") as caught:
        getattr(fastnorm, op)(**arguments)
    assert_says(str(caught.value), words)
    assert bytes_of(arguments) == before


@pytest.mark.parametrize("op", WITH_RESIDUAL)
def test_out_and_sum_out_share_nothing(op):
    x, memory = X.copy(), whole(30)
    y = memory[:24].reshape(2, 3, 4)
    for out, total, over in (
        (y, y, {}),
        (y, memory[5:29].reshape(2, 3, 4), {}),
        (memory[5:29].reshape(2, 3, 4), y, {}),
        (x, x, {"x": x}),
        (y, y[::-1], {}),
    ):
        words = ["out", "overlaps sum_out", "memory of its own"]
        assert_refused(op, ValueError, words, out=out, sum_out=total, **over)


def test_parallel_outs_share_nothing():
    x, memory = X.copy(), whole(30)
    y, z = memory[:24].reshape(2, 3, 4), memory[6:].reshape(2, 3, 4)
    for out, words in (
        ([y, y], ["out[1]", "overlaps out[0]"]),
        ([y, z], ["out[1]", "overlaps out[0]"]),
        ([x, y], ["out[0]", "overlaps x"]),
        ([None, x], ["out[1]", "overlaps x"]),
    ):
        words = [*words, "wanted memory of its own"]
        assert_refused("parallel_layer_norm", ValueError, words, x=x, out=out)


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


# ---- calls ---------------------------------------------------------------------------------------


#: what may be given by position, and is not an option
POSITIONAL = {
    "layer_norm": 5, "layer_norm_backward": 7, "rms_norm": 4, "rms_norm_backward": 5,
    "add_layer_norm": 6, "add_layer_norm_backward": 8, "add_rms_norm": 5,
    "add_rms_norm_backward": 6, "adaptive_layer_norm": 5, "adaptive_layer_norm_backward": 6,
    "parallel_layer_norm": 5, "segment_layer_norm": 5, "segment_layer_norm_backward": 7,
    "segment_rms_norm": 4, "segment_rms_norm_backward": 5, "moments": 2,
}  # fmt: skip


@pytest.mark.parametrize("op", _core.OPS)
def test_arguments_that_do_not_exist(op):
    call, arguments = getattr(fastnorm, op), valid(op)
    call(**arguments)
    for wrong in (
        lambda: call(),
        lambda: call(**arguments, epsilon=1e-5),
        lambda: call(*[X] * (POSITIONAL[op] + 1)),
        lambda: fastnorm.explain(op, **arguments, epsilon=1e-5),
        lambda: fastnorm.explain(op),
    ):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("op", _core.OPS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_either_byte_order_is_taken(op, dtype):
    """Big-endian arrays are no error: they are converted, and results are native."""
    arguments = valid(op, dtype)

    def swapped(value):
        if isinstance(value, list):
            return [swapped(item) for item in value]
        if not isinstance(value, np.ndarray):
            return value
        return value.astype(value.dtype.newbyteorder("S"))

    other = {name: swapped(value) for name, value in arguments.items()}
    call = getattr(fastnorm, op)
    assert_same_bits(call(**other), call(**arguments))


def test_device_arrays_beside_host_arrays_are_refused():
    class OnDevice:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (2,), "typestr": "<f4", "data": (0, False), "version": 3}

    with pytest.raises(TypeError, match=r"^weight: .* CUDA device, wanted one in host memory"):
        fastnorm.layer_norm(np.ones((3, 2), np.float32), 2, OnDevice())


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


# ---- numbers that are too large, and arguments that were forgotten -------------------------------


@pytest.mark.parametrize(("name", "call"), [
    ("eps", lambda x: fastnorm.layer_norm(x, eps=10**400)),
    ("eps", lambda x: fastnorm.RMSNorm(4, eps=10**400)),
    ("offset", lambda x: fastnorm.rms_norm(x, offset=10**400)),
    ("axis", lambda x: fastnorm.layer_norm(x, axis=10**40)),
    ("axis", lambda x: fastnorm.moments(x, -(10**40))),
    ("normalized_shape", lambda x: fastnorm.layer_norm(x, 10**40)),
    ("normalized_shape", lambda x: fastnorm.LayerNorm(10**40)),
    ("num_channels", lambda x: fastnorm.LayerNorm2d(10**40)),
    ("x", lambda x: fastnorm.layer_norm([[1, 2], [3]])),
    ("output_mask", lambda x: fastnorm.layer_norm_backward(
        x, x, 4, x[:, 0], x[:, 0], output_mask=np.ones((3, 2)))),
])  # fmt: skip
def test_value_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(np.ones((3, 4), np.float32))


@pytest.mark.parametrize(("message", "call"), [
    ("x: got None, wanted", lambda x: fastnorm.layer_norm(None)),
    ("x: got None, wanted", lambda x: fastnorm.segment_layer_norm(None, [0])),
    ("dy: got None, wanted", lambda x: fastnorm.layer_norm_backward(
        None, x, 4, x[:, 0], x[:, 0])),
    ("mean: got None, wanted", lambda x: fastnorm.layer_norm_backward(x, x, 4, None, x[:, 0])),
    ("rstd: got None, wanted", lambda x: fastnorm.rms_norm_backward(x, x, 4, None)),
    ("normalized_shape: got b'abc', wanted", lambda x: fastnorm.LayerNorm(b"abc")),
    ("normalized_shape: got b.*, wanted", lambda x: fastnorm.layer_norm(x, b"\x04")),
    ("saved: got None, wanted what forward returned", lambda x: fastnorm.LayerNorm(
        4).backward(x, None)),
    ("saved: got tuple, wanted what forward returned", lambda x: fastnorm.RMSNorm(
        4).backward(x, (x,))),
    (r"weight: .*pass weight\.filled", lambda x: fastnorm.layer_norm(
        x, 4, np.ma.array(np.ones(4)))),
    ("sum_out: .*the type of the sum$", lambda x: fastnorm.add_rms_norm(
        x, x, sum_out=x.astype(np.float16))),
])  # fmt: skip
def test_type_errors_name_the_argument(message, call):
    with pytest.raises(TypeError, match=f"^{message}"):
        call(np.ones((3, 4), np.float32))


def test_the_reference_is_listed_before_its_first_use():
    assert "reference" in dir(fastnorm)
