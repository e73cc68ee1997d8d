"""Whole calls on device arrays of every library, acted out by the PTX interpreter.

Each kind of call is compiled, which takes its time: types, widths and options are swept over in
test_kernels.py, and here each is met once.
"""

import copy
import pickle

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm.cuda import compiler, ops

from . import acted, libraries
from .libraries import BFLOAT16, KINDS, MAKING, STREAMS, Tensor, host, placed

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

FLOAT32 = np.dtype("f4")
TYPES = (FLOAT32, BFLOAT16, np.dtype("f2"), np.dtype("f8"))
SHORT = {FLOAT32: "f4", BFLOAT16: "bf16", np.dtype("f2"): "f2", np.dtype("f8"): "f8"}
B, T, N = 2, 3, 48


@pytest.fixture(autouse=True)
def stage(monkeypatch, driver, layouts):
    libraries.install(monkeypatch)
    stage = acted.Stage(driver, layouts)
    yield stage
    if stage.failure:
        raise stage.failure


def numbers(dtype, seed=0):
    """Arguments of every op, by name."""
    rng = np.random.default_rng(seed)
    shapes = {
        **dict.fromkeys(("x", "dy", "residual", "dsum"), (B, T, N)),
        **dict.fromkeys(("weight", "bias", "linear_bias"), (N,)),
        **dict.fromkeys(("scale", "shift", "gate"), (B, N)),
    }
    made = {name: (rng.standard_normal(shape) + 0.25).astype(dtype)
            for name, shape in shapes.items()}  # fmt: skip
    wide = np.float64 if dtype == np.float64 else np.float32
    x = made["x"].astype(np.longdouble)
    made["mean"] = x.mean(-1).astype(wide)
    made["rstd"] = (1 / np.sqrt(x.var(-1) + 1e-5)).astype(wide)
    made["rms"] = (1 / np.sqrt((x**2).mean(-1) + 1e-5)).astype(wide)
    return made


# What each op is called with: names of arrays, in the order of its arguments, and options.
FORWARD = {
    "layer_norm": (("x", N, "weight", "bias", 1e-5), {}),
    "rms_norm": (("x", N, "weight", 1e-5), {"offset": 1.0}),
    "add_layer_norm": (("x", "residual", N, "weight", "bias"), {"linear_bias": "linear_bias"}),
    "add_rms_norm": (("x", "residual", N, "weight", 1e-5), {}),
    "adaptive_layer_norm": (("x", "scale", "shift", N), {"gate": "gate", "residual": "residual"}),
}
BACKWARD = {
    "layer_norm_backward": ("dy", "x", N, "mean", "rstd", "weight", "bias"),
    "rms_norm_backward": ("dy", "x", N, "rms", "weight"),
    "add_layer_norm_backward": ("dy", "dsum", "x", N, "mean", "rstd", "weight", "bias"),
    "add_rms_norm_backward": ("dy", "dsum", "x", N, "rms", "weight"),
    "adaptive_layer_norm_backward": ("dy", "x", "scale", N, "mean", "rstd"),
}


def filled(call, arrays):
    """Names replaced by arrays, in a tuple or a dict."""
    if isinstance(call, dict):
        return {key: arrays.get(value, value) if isinstance(value, str) else value
                for key, value in call.items()}  # fmt: skip
    return tuple([arrays[item] if isinstance(item, str) else item for item in call])


def on(kind, arrays):
    return {name: kind(placed(array)) for name, array in arrays.items()}


def back(result):
    """Results as ndarrays."""
    if isinstance(result, tuple):
        return tuple(None if part is None else host(part) for part in result)
    return (host(result),)


def assert_near(got, want, dtype, terms=None, context=""):
    """Within 1e-6 of the scale of `want`, or of what is summed, and a rounding to `dtype`."""
    assert got.dtype == dtype, context
    wide = got.astype(np.float64)
    want = np.asarray(want, np.float64)
    precise = 1e-13 if dtype == np.float64 else 1e-6
    scale = np.maximum(1, np.abs(want).max()) if terms is None else np.maximum(terms, 1)
    allowed = precise * scale + (0.5 * accuracy.ulp(want, dtype) if dtype.itemsize == 2 else 0)
    assert wide.shape == want.shape, context
    assert (np.abs(wide - want) <= allowed).all(), (context, np.abs(wide - want).max())


def compare_forward(op, dtype, kind, **options):
    arrays = numbers(dtype)
    positional, named = FORWARD[op]
    given = on(kind, arrays)
    with_out = {}
    if kind not in MAKING.values():
        with_out["out"] = kind(placed(np.zeros_like(arrays["x"])))
        if "residual" in (*positional, *named.values()):
            with_out["sum_out"] = kind(placed(np.zeros_like(arrays["x"])))
    got = back(getattr(fastnorm, op)(
        *filled(positional, given), **filled(named, given), **options, **with_out))  # fmt: skip
    more = {"sum_dtype": dtype} if "residual" in (*positional, *named.values()) else {}
    want = getattr(reference, op)(
        *filled(positional, arrays), **filled(named, arrays), **options, **more)  # fmt: skip
    want = want if isinstance(want, tuple) else (want,)
    assert len(got) == len(want)
    compute = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    stats = len(got) - (1 + bool(more))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_near(g, w, compute if i >= len(got) - stats else dtype, context=f"{op}, result {i}")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("op", FORWARD)
def test_forward(op, kind):
    """Results of the caller's kind; libraries that fastnorm cannot make arrays of get `out`."""
    compare_forward(op, FLOAT32, kind)


@pytest.mark.parametrize("dtype", TYPES, ids=SHORT.values())
def test_forward_types(dtype):
    compare_forward("layer_norm", dtype, Tensor, return_stats=True)


@pytest.mark.parametrize("op", ["rms_norm", "adaptive_layer_norm"])
def test_statistics(op):
    compare_forward(op, BFLOAT16, Tensor, return_stats=True)


def gradients(op, arrays, **options):
    return getattr(fastnorm, op)(*filled(BACKWARD[op], arrays), **options)


@pytest.mark.parametrize("kind", MAKING.values(), ids=MAKING)
@pytest.mark.parametrize("op", BACKWARD)
def test_backward(op, kind):
    compare_backward(op, FLOAT32, kind)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=list(SHORT.values())[1:])
def test_backward_types(dtype):
    compare_backward("add_layer_norm_backward", dtype, Tensor)


def compare_backward(op, dtype, kind):
    arrays = numbers(dtype)
    got = back(gradients(op, on(kind, arrays)))
    assert all(type(part) is np.ndarray for part in got)
    want = getattr(reference, op)(*filled(BACKWARD[op], arrays))
    compute = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    assert len(got) == len(want)
    if "dsum" in BACKWARD[op] and dtype.itemsize == 2:
        # dx is rounded before dsum is added.
        assert np.abs(got[0].astype(float) - want[0]).max() <= 2 * accuracy.ulp(
            np.abs(want[0]).max(), dtype)  # fmt: skip
    else:
        assert_near(got[0], want[0], dtype, context=f"{op}: dx")
    largest = np.abs(arrays["dy"].astype(float)).sum() * 4
    for g, w in zip(got[1:], want[1:], strict=True):
        assert_near(g, w, compute, terms=largest / N, context=f"{op}: gradient of a parameter")


# ---- options ------------------------------------------------------------------------------------


def same_as_the_host(op, dtype=FLOAT32, ulps=1, arrays=None, options=None, **more):
    """A call with options on the device, within `ulps` of the type of what the host has."""
    arrays, options = arrays or numbers(dtype), (options or {}) | more
    positional = FORWARD[op][0] if op in FORWARD else BACKWARD[op]
    given = on(Tensor, arrays)
    call = getattr(fastnorm, op)
    got = call(*filled(positional, given), **filled(options, given))
    want = call(*filled(positional, arrays), **filled(options, arrays))
    got, want = back(got), want if isinstance(want, tuple) else (want,)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is None:
            continue
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        wide = w.astype(float)
        step = (
            ulps * accuracy.ulp(np.maximum(np.abs(wide), 1), w.dtype)
            if w.dtype.itemsize == 2
            else 1e-6
        )
        scale = 1 if w.dtype.itemsize == 2 else np.maximum(1, np.abs(wide).max())
        assert (np.abs(g.astype(float) - wide) <= step * scale).all(), (op, options)
    return got


def test_an_activation_and_another_type_of_result():
    same_as_the_host("layer_norm", BFLOAT16, options={"dtype": "float32"}, activation="gelu")


def test_torchs_names_of_types():
    x = numbers(FLOAT32)["x"]
    y = fastnorm.layer_norm(Tensor(placed(x)), dtype=libraries.TYPES["float16"])
    assert host(y).dtype == np.float16


def test_parameters_of_other_types():
    arrays = numbers(BFLOAT16)
    arrays["weight"] = arrays["weight"].astype(np.float32)
    arrays["bias"] = arrays["bias"].astype(np.float16)
    same_as_the_host("layer_norm", BFLOAT16, arrays=arrays)


def test_a_sum_of_several_types():
    arrays = numbers(BFLOAT16)
    arrays["residual"] = arrays["residual"].astype(np.float32)
    got = same_as_the_host("add_layer_norm", BFLOAT16, arrays=arrays, return_stats=True)
    assert got[1].dtype == np.float32


def test_a_sum_that_is_not_rounded_first():
    same_as_the_host("add_layer_norm", BFLOAT16, round_sum=False)


def test_rounding_before_the_weight():
    same_as_the_host("rms_norm", BFLOAT16, round_before_weight=True)


@pytest.mark.parametrize(("shape", "name"), [
    ((T, N), "each head"), ((B, 1, N), "each sample"), ((B, T, N), "each row"), ((1, 1, N), "all"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_parameters_of_their_own(shape, name):
    arrays = numbers(FLOAT32)
    rng = np.random.default_rng(3)
    for parameter in ("weight", "bias"):
        arrays[parameter] = rng.standard_normal(shape).astype(np.float32)
    same_as_the_host("layer_norm", arrays=arrays)
    got = same_as_the_host("layer_norm_backward", arrays=arrays)
    assert got[1].shape == got[2].shape == shape


def test_several_normalized_axes():
    arrays = numbers(FLOAT32)
    arrays["weight"] = np.random.default_rng(4).standard_normal((T, N)).astype(np.float32)
    x, w = Tensor(placed(arrays["x"])), Tensor(placed(arrays["weight"]))
    y, mean, rstd = fastnorm.layer_norm(x, (T, N), w, w, return_stats=True)
    want = reference.layer_norm(arrays["x"], (T, N), arrays["weight"], arrays["weight"])
    assert_near(host(y), want, FLOAT32)
    assert mean.shape == rstd.shape == (B,)
    assert_near(host(fastnorm.layer_norm(x, axis=(1, -1))), reference.layer_norm(
        arrays["x"], (T, N)), FLOAT32)  # fmt: skip


@pytest.mark.parametrize(("offset", "cols", "stride"), [
    (1, N, N), (2, N, N + 4), (0, N, N + 3), (3, N - 1, N - 1),
])  # fmt: skip
def test_alignment(offset, cols, stride):
    """Memory that begins anywhere, and rows at any distance."""
    values = np.random.default_rng(5).standard_normal((6, stride)).astype(FLOAT32)
    x, w = placed(values, offset)[:, :cols], placed(values[0, :cols], offset)
    y = fastnorm.layer_norm(Tensor(x), cols, Tensor(w))
    assert_near(host(y), reference.layer_norm(x, cols, w), FLOAT32)


def test_parameters_that_are_less_aligned_than_rows():
    arrays = numbers(FLOAT32)
    w = placed(arrays["weight"], 1)
    y = fastnorm.layer_norm(Tensor(placed(arrays["x"])), N, Tensor(w))
    assert_near(host(y), reference.layer_norm(arrays["x"], N, w), FLOAT32)


def test_in_place():
    arrays = numbers(FLOAT32)
    want = reference.layer_norm(arrays["x"])
    x = Tensor(placed(arrays["x"]))
    assert fastnorm.layer_norm(x, out=x) is x
    assert_near(host(x), want, FLOAT32)
    given = on(Tensor, arrays)
    stream = given["residual"]
    y, total = fastnorm.add_rms_norm(given["x"], stream, N, eps=1e-5, sum_out=stream)
    assert total is stream
    wanted = reference.add_rms_norm(arrays["x"], arrays["residual"], N, eps=1e-5,
                                    sum_dtype=np.float32)  # fmt: skip
    assert_near(host(y), wanted[0], FLOAT32)
    assert_near(host(stream), wanted[1], FLOAT32)


def test_slices_of_one_array():
    """Rows of the result between those of x."""
    both = placed(np.random.default_rng(6).standard_normal((6, 2 * N)).astype(np.float32))
    want = reference.layer_norm(both[:, :N])
    fastnorm.layer_norm(Tensor(both[:, :N]), out=Tensor(both[:, N:]))
    assert_near(both[:, N:], want, FLOAT32)


def test_bfloat16_as_bits():
    arrays = numbers(BFLOAT16)
    names = ("x", "weight", "bias")
    x, w, b = (libraries.ndarray(placed(arrays[name].view(np.uint16))) for name in names)
    options = {"dtype": "bfloat16", "return_stats": True}
    y, mean, _ = fastnorm.layer_norm(x, N, w, b, **options)
    assert host(y).dtype == np.uint16
    assert host(mean).dtype == np.float32
    want = reference.layer_norm(arrays["x"], N, arrays["weight"], arrays["bias"])
    assert_near(host(y).view(BFLOAT16), want, BFLOAT16)
    into = libraries.ndarray(placed(np.zeros_like(host(y))))
    assert fastnorm.layer_norm(x, N, w, b, out=into, **options)[0] is into
    assert np.array_equal(host(into), host(y))


@pytest.mark.parametrize("mask", [
    (True, False, False), (False, True, False), (False, False, True), (False, False, False),
])  # fmt: skip
def test_masks_of_outputs(mask):
    same_as_the_host("layer_norm_backward", output_mask=mask)


def test_no_gradient_of_the_sum():
    arrays = numbers(FLOAT32)
    given = on(Tensor, arrays) | {"dsum": None}
    got = back(gradients("add_rms_norm_backward", given))
    want = gradients("add_rms_norm_backward", arrays | {"dsum": None})
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, w.dtype)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0)])
def test_no_elements(shape, stage):
    x = np.zeros(shape, np.float32)
    for op in ("layer_norm", "rms_norm"):
        call = getattr(fastnorm, op)
        got = back(call(Tensor(placed(x)), return_stats=True))
        for g, w in zip(got, call(x, return_stats=True), strict=True):
            assert g.shape == w.shape
            np.testing.assert_array_equal(g, w)
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    arrays = [Tensor(placed(a)) for a in (y, x, mean, rstd)]
    got = back(fastnorm.layer_norm_backward(*arrays[:2], shape[-1], *arrays[2:]))
    want = fastnorm.layer_norm_backward(y, x, shape[-1], mean, rstd)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_rows_that_are_not_finite():
    x = numbers(FLOAT32)["x"].reshape(-1, N)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, 7
    y = host(fastnorm.layer_norm(Tensor(placed(x)), eps=0.0))
    assert np.isnan(y[1:3]).all()
    assert (y[3] == 0).all()
    assert np.isfinite(y[[0, 4, 5]]).all()


def test_a_large_mean():
    x = (np.random.default_rng(8).standard_normal((4, N)) + 1e6).astype(np.float32)
    y = host(fastnorm.layer_norm(Tensor(placed(x))))
    assert_near(y, reference.layer_norm(x), FLOAT32)


# ---- calls --------------------------------------------------------------------------------------


def test_kept_calls(monkeypatch):
    """The second call of a kind builds nothing; one of another kind does."""
    given = on(Tensor, numbers(FLOAT32))
    call = fastnorm.cuda.op("layer_norm")
    call.clear()
    fastnorm.layer_norm(given["x"], N, given["weight"], given["bias"])
    assert len(call) == 1
    monkeypatch.setattr(ops, "checked", None)
    fastnorm.layer_norm(Tensor(placed(host(given["x"]))), N, given["weight"], given["bias"])
    with pytest.raises(TypeError):
        fastnorm.layer_norm(given["x"], N, given["weight"], given["bias"], 1e-3)


def test_streams(driver):
    STREAMS[0] = 0x77
    for kind in (Tensor, libraries.ndarray):
        fastnorm.layer_norm(kind(placed(numbers(FLOAT32)["x"])))
    assert {each.stream for each in driver.launches()} == {0x77}
    assert not driver.calls("cuEventRecord", "cuStreamWaitEvent")


def test_nothing_waits(driver):
    given = on(Tensor, numbers(FLOAT32))
    for op in BACKWARD:
        gradients(op, given)
    assert not [line for line in driver.log() if "Synchronize" in line]


def test_repeats_have_the_same_bits():
    arrays = numbers(FLOAT32)
    for op in BACKWARD:
        first, second = (back(gradients(op, on(Tensor, arrays))) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a.tobytes() == b.tobytes()


def test_a_row_is_itself_in_any_batch():
    x = numbers(FLOAT32)["x"].reshape(-1, N)
    whole = host(fastnorm.layer_norm(Tensor(placed(x))))
    for i in range(len(x)):
        alone = host(fastnorm.layer_norm(Tensor(placed(x[i : i + 1]))))
        assert alone.tobytes() == whole[i].tobytes()


# ---- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tensor, libraries.ndarray], ids=["torch", "cupy"])
@pytest.mark.parametrize("make", [fastnorm.LayerNorm, fastnorm.RMSNorm])
def test_modules(make, kind):
    arrays = numbers(FLOAT32)
    norm = make(N, eps=1e-5)
    norm.weight = arrays["weight"]
    x, dy = kind(placed(arrays["x"])), kind(placed(arrays["dy"]))
    assert_near(host(norm(x)), norm(arrays["x"]), FLOAT32)
    y, saved = norm.forward(x)
    dx, named = norm.backward(dy, saved)
    want, wanted = norm.backward(arrays["dy"], norm.forward(arrays["x"])[1])
    assert type(y) is type(dx) is kind
    assert_near(host(dx), want, FLOAT32)
    assert named.keys() == wanted.keys()
    for name, gradient in named.items():
        assert_near(host(gradient), wanted[name], FLOAT32, terms=B * T)


def test_modules_parameters_are_copied_once_and_again_where_they_change(monkeypatch):
    norm = fastnorm.LayerNorm(N)
    copied = []
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda *a: copied.append(a) or to(*a))
    x = Tensor(placed(numbers(FLOAT32)["x"]))
    first = host(norm(x)).copy()
    norm(x)
    assert len(copied) == 2  # the weight and the bias
    norm.weight[...] = 2
    assert np.array_equal(host(norm(x)), 2 * first)
    norm.weight = np.full(N, 4)
    assert np.array_equal(host(norm(x)), 4 * first)
    assert len(copied) == 4


def test_modules_keep_copies_to_themselves():
    norm = fastnorm.LayerNorm(N)
    norm.note = "mine"
    norm(Tensor(placed(numbers(FLOAT32)["x"])))
    for other in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm)):
        assert vars(other) == {"note": "mine"}
        assert other == norm


# ---- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [*FORWARD, *BACKWARD])
def test_explain(op, driver):
    given = on(Tensor, numbers(FLOAT32))
    named = filled(FORWARD[op][1], given) if op in FORWARD else {}
    said = fastnorm.explain(op, *filled(FORWARD[op][0] if op in FORWARD else BACKWARD[op], given),
                            **named)  # fmt: skip
    assert driver.launches() == []
    assert (said.op, said.backend, said.isa) == (op, "cuda:0", "sm_90")
    assert (said.rows, said.cols, said.dtype) == (B * T, N, "float32")
    assert said.copies == ()
    assert said.regime in str(said)
    getattr(fastnorm, op)(
        *filled(FORWARD[op][0] if op in FORWARD else BACKWARD[op], given), **named
    )
    launches = driver.launches()
    assert said.threads == max(each.block for each in launches)
    for each in launches:
        assert any(f"{each.grid} blocks of {each.block} threads" in why for why in said.reasons)


def test_show_config():
    found = fastnorm.show_config("dicts")["cuda"]
    assert found["available"] is True
    assert found["driver"] == "13.0"
    assert found["devices"] == [f"{i}: Fake {i}, sm_90, 132 multiprocessors" for i in range(2)]
    assert found["numba"]
